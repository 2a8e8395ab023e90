"""`sfumato synthesize` from its options to a release folder: the order of work, and what goes where."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sfumato.data.images import OwnerImages, ProtectedImages, PublicImages
from sfumato.data.release import InternalWriter, ReleaseWriter
from sfumato.data.sources import default_holdout
from sfumato.diffusion import networks
from sfumato.diffusion.edm import EDM
from sfumato.errors import InputError
from sfumato.evaluation.downstream import downstream_accuracy
from sfumato.machine import best_defaults
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.report.cards import card
from sfumato.report.certificate import certificate
from sfumato.report.facts import AccuracyRow, OwnerFacts, ReleaseFacts, releasable_options
from sfumato.report.html import internal_report, release_report
from sfumato.synthesis.options import SynthesizeOptions
from sfumato.synthesis.planner import Plan, make_plan, measure_speeds
from sfumato.synthesis.presets import Preset, preset_for
from sfumato.synthesis.privimage import PrivImage

# How many units these sets have is public knowledge.
KNOWN_SIZES = {"demo:digits": 4_000, "fashion-mnist": 60_000}
DELTA_WITHOUT_SIZE = 1e-6
NOT_OF_THE_RUN = ("config", "dry_run")
CLASSIFIER_IMAGES = 4_000


@dataclass(frozen=True)
class SynthesizeResult:
    """Where things are and what they cost. `accuracy` is measured on private images: for their owner only."""

    release: Path
    statement: str
    epsilon: float
    delta: float
    accuracy: tuple[AccuracyRow, ...]


def synthesize(options: SynthesizeOptions) -> SynthesizeResult | None:
    """Run, or resume, `sfumato synthesize`; None for a dry run.

    Raises InputError or BudgetError with one line for the user; what was already produced stays.
    """
    try:
        return _synthesize(options)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise InputError(
            f"{error.filename or options.run_folder}: {error.strerror}; what was charged stays charged and nothing "
            "already produced is lost. Make room, then run the same command again"
        ) from error


def _synthesize(options: SynthesizeOptions) -> SynthesizeResult | None:
    started = time.monotonic()
    options.check()
    options = _resolved(options)
    preset = _preset(options)
    budget = Budget(options.epsilon, _delta(options))
    if options.dry_run:
        plan = plan_for(options, preset, budget)
        print("\n".join(plan.lines()))
        return None
    out = options.run_folder
    if (finished := _finished(out, options)) is not None:
        return finished
    new = _write_config(out, options)
    try:
        return _run(out, options, preset, budget, started)
    except InputError:
        if new and not (out / "internal" / "checkpoints" / "run.json").exists():
            (out / "config.yaml").unlink(missing_ok=True)  # nothing was charged: other options may be tried
        raise


def _run(
    out: Path, options: SynthesizeOptions, preset: Preset, budget: Budget, started: float
) -> SynthesizeResult:
    internal = InternalWriter(out)
    images: dict[str, Any] = {
        "size": preset.size,
        "channels": preset.channels,
        "cache_dir": internal.directory("cache"),
    }
    ledger = _ledger(options, budget)
    public = PublicImages(options.public, **images) if options.public else None
    private = ProtectedImages(
        options.private, ledger=ledger, unit=options.unit, public_size=options.public_size,
        skip_unreadable=options.skip_unreadable, **images,
    )  # fmt: skip
    if private.skipped.value:
        internal.json("skipped.json", private.skipped)
        _say(
            f"left out {len(private.skipped.value)} unreadable file(s), listed in {out}/internal/skipped.json"
        )
    holdout = OwnerImages(options.holdout, **images) if options.holdout else None
    model = PrivImage(
        budget=budget,
        method=options.method,
        preset=preset,
        seconds=options.seconds - (time.monotonic() - started),
        num_images=options.num_images,
        classifiers=_classifiers(options, holdout, private),
        work_dir=internal.directory("checkpoints"),
        seed=options.seed,
    )
    for line in model.prepare(private, public).lines():
        _say(f"plan: {line}")
    model.fit(private, public)
    number = options.num_images or preset.num_images or model.plan.units
    pictures, labels = model.generate(number, seed=options.seed)
    facts = _facts(options, model, private, public, ledger, pictures, labels)
    release = _release(out, model, facts, pictures, labels)
    accuracy, owner = _evaluate(options, model, private, holdout, pictures, labels)
    internal.text("report.html", internal_report(facts, owner))
    internal.json("evaluation.json", {"accuracy": [dataclasses.asdict(row) for row in accuracy]})
    result = SynthesizeResult(
        release,
        facts.certificate["statement"],
        facts.certificate["epsilon"],
        facts.certificate["delta"],
        accuracy,
    )
    _say_result(result, out)
    _say(f"took {time.monotonic() - started:.0f} s")
    return result


def plan_for(options: SynthesizeOptions, preset: Preset, budget: Budget) -> Plan:
    """The plan of a run from declared values alone, for `--dry-run` and `sfumato plan`: reads no images."""
    defaults = best_defaults()
    units = options.public_size or 1000
    labels = 10
    edm, side = EDM(), (preset.size, preset.size)
    network = networks.unet(preset.network, size=side, channels=preset.channels, num_labels=labels)
    network = network.to(defaults.device)
    speeds = measure_speeds(
        network, edm, size=side, channels=preset.channels, autocast=defaults.public_dtype == "bfloat16"
    )
    return make_plan(
        method=options.method, units=units, budget=budget, preset=preset, seconds=options.seconds, speeds=speeds,
        num_images=options.num_images or preset.num_images or units, num_labels=labels,
    )  # fmt: skip


def _resolved(options: SynthesizeOptions) -> SynthesizeOptions:
    return replace(
        options,
        public_size=options.public_size or KNOWN_SIZES.get(options.private),
        holdout=options.holdout or default_holdout(options.private),
    )


def _preset(options: SynthesizeOptions) -> Preset:
    preset = preset_for(options.preset, options.private)
    given = {
        name: value
        for name in ("size", "channels", "guidance", "num_images")
        if (value := getattr(options, name)) is not None
    }
    return replace(preset, **given)


def _delta(options: SynthesizeOptions) -> float:
    if options.delta is not None:
        return options.delta
    if options.private.startswith("demo:"):
        return 1e-5
    if options.public_size is None:
        return DELTA_WITHOUT_SIZE
    n = max(options.public_size, 3)
    return min(1 / (n * math.log(n)), n**-1.1)


def _ledger(options: SynthesizeOptions, budget: Budget) -> Ledger:
    if options.ledger is not None:
        return Ledger.open(options.ledger)
    Path(options.ledger_url).parent.mkdir(parents=True, exist_ok=True)
    return Ledger.open(options.ledger_url, total=budget, name="synthesize")


def _write_config(out: Path, options: SynthesizeOptions) -> bool:
    """Write config.yaml, or refuse to mix two different runs in one folder; whether it is new."""
    values = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in NOT_OF_THE_RUN
    }
    path = out / "config.yaml"
    if path.exists():
        before = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        changed = [name for name, value in values.items() if before.get(name) != value and name != "out"]
        if changed:
            option = "--" + changed[0].replace("_", "-")
            raise InputError(
                f"{out} holds a run with {option} {before.get(changed[0])}, not {values[changed[0]]}; no budget "
                "was spent. Repeat that run's command to resume it, or choose another --out"
            )
        return False
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "config.yaml.partial"
    partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    partial.replace(path)
    return True


def _finished(out: Path, options: SynthesizeOptions) -> SynthesizeResult | None:
    """The result of a run that is already complete, said again; None when there is work left."""
    evaluation = out / "internal" / "evaluation.json"
    if not ((out / "release" / "privacy.json").exists() and evaluation.exists()):
        return None
    _write_config(out, options)
    claim = json.loads((out / "release" / "privacy.json").read_text(encoding="utf-8"))
    rows = json.loads(evaluation.read_text(encoding="utf-8"))["accuracy"]
    result = SynthesizeResult(
        out / "release", claim["statement"], claim["epsilon"], claim["delta"],
        tuple(AccuracyRow(**row) for row in rows),
    )  # fmt: skip
    _say("this run is complete; nothing was done and no budget was spent")
    _say_result(result, out)
    return result


def _facts(
    options: SynthesizeOptions,
    model: PrivImage,
    private: ProtectedImages,
    public: PublicImages | None,
    ledger: Ledger,
    pictures: np.ndarray,
    labels: np.ndarray,
) -> ReleaseFacts:
    names = None if public is None else list(public.label_names or ())
    per_label = max(1, 80 // len(private.label_names))
    shown = np.concatenate(
        [np.flatnonzero(labels == label)[:per_label] for label in range(len(private.label_names))]
    )
    before = None
    if model.public_generator is not None:
        before, _ = model.public_generator.generate(len(shown), labels=labels[shown], seed=options.seed)
    claim = certificate(
        model.reservations,
        unit=options.unit,
        public_size=None if options.method == "public-only" else model.plan.units,
        budget=None if options.method == "public-only" else model.budget,
        software=_software(),
        ledger_head=ledger.head if model.reservations else "",
    )
    return ReleaseFacts(
        method=options.method,
        private_description=private.description,
        public_description=None if public is None else public.description,
        unit=options.unit,
        size=private.size,
        channels=private.channels,
        label_names=private.label_names,
        has_labels=private.has_labels,
        num_images=len(pictures),
        certificate=claim,
        sample_images=pictures[shown],
        sample_labels=labels[shown],
        public_only_images=before,
        selection=None
        if model.selection is None or names is None
        else [[names[c] for c in classes] for classes in model.selection.classes],
        noisy_histogram=model.noisy_histogram,
        public_class_names=names if model.noisy_histogram is not None else None,
        mean_images=None if model.means is None else _bytes(model.means),
        stages=model.stages,
        options=releasable_options(dataclasses.asdict(options)) | {"plan": "; ".join(model.plan.lines())},
        warnings=model.warnings,
    )


def _release(
    out: Path, model: PrivImage, facts: ReleaseFacts, pictures: np.ndarray, labels: np.ndarray
) -> Path:
    writer = ReleaseWriter(out)
    writer.images(pictures, labels if facts.has_labels else None, facts.label_names)
    model.save_pretrained(writer.directory("model"))
    writer.json("privacy.json", facts.certificate)
    writer.text("README.md", card(facts))
    writer.text("report.html", release_report(facts))
    return writer.complete()


def _classifiers(options: SynthesizeOptions, holdout: OwnerImages | None, private: ProtectedImages) -> int:
    if holdout is None or not private.has_labels:
        return 0
    return {"privimage": 4, "public-only": 3, "dpdm": 2}[options.method]


def _evaluate(
    options: SynthesizeOptions,
    model: PrivImage,
    private: ProtectedImages,
    holdout: OwnerImages | None,
    pictures: np.ndarray,
    labels: np.ndarray,
) -> tuple[tuple[AccuracyRow, ...], OwnerFacts]:
    """Accuracy on the holdout of classifiers trained on this release, its floors and its ceiling."""
    if holdout is None or not private.has_labels or not holdout.label_names:
        note = "No labelled holdout was given (--holdout), so nothing was measured on real images."
        return (), OwnerFacts("none", notes=[note])
    unknown = set(holdout.label_names) - set(private.label_names)
    if unknown:
        raise InputError(
            f"--holdout {options.holdout} has labels that the private images lack: {', '.join(sorted(unknown))}; "
            "the release is complete; correct the holdout and run the same command again to measure it"
        )
    position = np.array([private.label_names.index(name) for name in holdout.label_names])
    real_labels = position[np.asarray(holdout.labels)]
    real = np.asarray(holdout.images)
    rng = np.random.default_rng(options.seed)

    def measure(name: str, images: np.ndarray, targets: np.ndarray, note: str) -> AccuracyRow:
        accuracy = downstream_accuracy(
            images, targets, real, real_labels, num_classes=len(private.label_names), seed=options.seed,
            description=name,
        )  # fmt: skip
        return AccuracyRow(name, accuracy, note)

    rows = [measure("this release", pictures, labels, f"{len(pictures)} synthetic images")]
    if model.public_generator is not None:
        drawn, targets = model.public_generator.generate(min(len(pictures), 2000), seed=options.seed)
        rows.append(
            measure("public-only generator (floor)", drawn, targets, "the same generator before DP-SGD")
        )
    if model.selected is not None:
        images, targets, weights = model.selected
        picked = rng.choice(len(images), CLASSIFIER_IMAGES, p=weights / weights.sum())
        note = "classifier straight on the selected public images, no generator"
        rows.append(measure("selected public images (floor)", images[picked], targets[picked], note))
    own = OwnerImages(
        options.private, size=private.size, channels=private.channels, cache_dir=_cache(options)
    )
    rows.append(
        measure(
            "real data (ceiling)",
            np.asarray(own.images),
            np.asarray(own.labels),
            "the private images themselves",
        )
    )
    notes = []
    best_floor = max((row.accuracy for row in rows[1:-1]), default=0.0)
    if rows[0].accuracy < best_floor:
        notes.append(
            f"The release ({rows[0].accuracy:.1%}) is below its best public floor ({best_floor:.1%}): at this "
            "epsilon the private stage costs more than it brings. Use more budget, more time or more images."
        )
    examples = real[np.sort(rng.choice(len(real), min(80, len(real)), replace=False))]
    return tuple(rows), OwnerFacts(holdout.description, rows, examples, notes)


def _cache(options: SynthesizeOptions) -> Path:
    return options.run_folder / "internal" / "cache"


def _bytes(images: np.ndarray) -> np.ndarray:
    return np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)


def _software() -> dict[str, str]:
    packages = ("sfumato", "dp-accounting", "torch", "diffusers", "opendp")
    return {name.replace("-", "_"): importlib.metadata.version(name) for name in packages}


def _say_result(result: SynthesizeResult, out: Path) -> None:
    print(result.statement)
    if result.accuracy:
        print("Accuracy on real held-out images (for the owner's eyes, not differentially private):")
        for row in result.accuracy:
            print(f"  {row.accuracy:6.1%}  {row.name}")
    print(f"release: {result.release}")
    print(f"report:  {result.release / 'report.html'}")
    print(f"yours:   {out / 'internal' / 'report.html'} (not for release)", flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
