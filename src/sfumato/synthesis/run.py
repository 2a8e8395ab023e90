"""`sfumato synthesize` from its options to a release folder: the order of work, and what goes where."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.data.duplicates import near_duplicates
from sfumato.data.files import write_whole
from sfumato.data.images import OwnerImages, ProtectedImages, PublicImages
from sfumato.data.release import InternalWriter, ReleaseWriter
from sfumato.data.sources import default_holdout, open_source
from sfumato.diffusion import networks
from sfumato.diffusion.edm import EDM
from sfumato.errors import BudgetError, InputError, LedgerError
from sfumato.machine import best_defaults
from sfumato.privacy.budget import Budget, delta_warning
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.run_account import check_left, open_account
from sfumato.report.cards import card
from sfumato.report.certificate import certificate, software
from sfumato.report.facts import AccuracyRow, ReleaseFacts, Stage, releasable_options
from sfumato.report.html import internal_report, release_report
from sfumato.synthesis import gate
from sfumato.synthesis.methods import METHODS
from sfumato.synthesis.options import SynthesizeOptions
from sfumato.synthesis.options import seconds as in_seconds
from sfumato.synthesis.owner_figures import check_holdout, classifiers, figures
from sfumato.synthesis.planner import Plan, make_plan, measure_speeds
from sfumato.synthesis.presets import Preset, preset_for
from sfumato.synthesis.privimage import IMAGES, PrivImage
from sfumato.synthesis.public_images import as_bytes
from sfumato.synthesis.run_folder import RunFolder

COMPARE = (
    "How good these images are was not measured here, because any figure about the sensitive images would need "
    "budget of its own. With a small ε or few images a release can be worse than its public images alone: the "
    "owner should compare the two on real held-out images (the internal report does) before it is used."
)
SECONDS_ARE_PUBLIC = ("public training", "generation")  # of other stages they follow private counts
ASSUMED_UNITS, ASSUMED_LABELS = 1_000, 10  # of a plan, where nothing is declared


@dataclass(frozen=True)
class SynthesizeResult:
    """Where things are and what they cost. `accuracy` and `notes` rest on private images: for their owner only."""

    release: Path
    statement: str
    epsilon: float
    delta: float
    accuracy: tuple[AccuracyRow, ...] = ()
    notes: tuple[str, ...] = ()


def synthesize(options: SynthesizeOptions) -> SynthesizeResult | None:
    """Run, or resume, `sfumato synthesize`; None for a dry run.

    Raises InputError, BudgetError or LedgerError with one line for the user; what was already produced stays.
    """
    started = time.monotonic()
    options.check()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            "`sfumato synthesize` runs as one process, and several were started (WORLD_SIZE); no budget was spent. "
            "Start it without torchrun"
        )
    options = replace(
        options, public_size=options.units, holdout=options.holdout or default_holdout(options.private)
    )
    if options.audit:
        gate.check(options)
    preset = _preset(options)
    budget = Budget(options.epsilon, options.delta_used)
    if options.dry_run:
        _dry_run(options, preset, budget)
        return None
    folder = RunFolder(options.run_folder)
    folder.take(options)
    if (result := _finished(folder)) is not None:
        _say("this run is complete; nothing was done and no budget was spent")
    else:
        result = _run(folder, options, preset, budget, started)
        _say(f"took {time.monotonic() - started:.0f} s")
    _say_result(result, folder.out)
    return result


def plan_for(
    *,
    method: str,
    preset: Preset,
    budget: Budget,
    time_budget: str,
    units: int,
    labels: int,
    public_classes: int | None,
    num_images: int | None,
    classifiers: int = 0,
) -> Plan:
    """The plan of a run from declared values and this machine's speed alone; no images are read."""
    defaults = best_defaults()
    torch.set_num_threads(defaults.threads)
    side = (preset.size, preset.size)
    network = networks.unet(preset.network, size=side, channels=preset.channels, num_labels=labels)
    speeds = measure_speeds(
        network.to(defaults.device), EDM(), size=side, channels=preset.channels,
        autocast=defaults.public_dtype == "bfloat16",
    )  # fmt: skip
    with _naming(time_budget):
        return make_plan(
            method=method, units=units, budget=budget, preset=preset, seconds=in_seconds(time_budget),
            speeds=speeds, num_images=num_images or preset.num_images or units, num_labels=labels,
            public_classes=public_classes, classifiers=classifiers,
        )  # fmt: skip


def _dry_run(options: SynthesizeOptions, preset: Preset, budget: Budget) -> None:
    """Print the plan. The public images' class names are read, the private images are not opened."""
    names = open_source(options.public).label_names if options.public else None
    classes = None if names is None else len(names)
    known = options.private.split(":")[0] in ("demo", "fashion-mnist")
    labels = ASSUMED_LABELS if known or classes is None else min(ASSUMED_LABELS, classes)
    plan = plan_for(
        method=options.method, preset=preset, budget=budget, time_budget=options.time_budget,
        units=options.units or ASSUMED_UNITS, labels=labels, public_classes=classes,
        num_images=options.num_images, classifiers=classifiers(options.method) if options.holdout else 0,
    )  # fmt: skip
    print("\n".join(plan.lines()))
    assumed = [] if options.units else [f"{ASSUMED_UNITS:,} units (--public-size)"]
    assumed += [] if known else [f"{labels} labels"]
    if assumed:
        print(f"assumed, since the sensitive images were not opened: {', '.join(assumed)}")
    if options.units and (warning := delta_warning(budget.delta, options.units)):
        print(f"note: {warning}")
    print("No sensitive image was read and no budget was spent.", flush=True)


def _run(
    folder: RunFolder, options: SynthesizeOptions, preset: Preset, budget: Budget, started: float
) -> SynthesizeResult:
    model, fresh = None, not (folder.checkpoints / "run.json").exists()
    try:
        ledger = open_account(options.ledger, options.run_folder, budget, "synthesize")
        internal = InternalWriter(folder.out)
        images: dict[str, Any] = {
            "size": preset.size, "channels": preset.channels, "cache_dir": internal.directory("cache"),
        }  # fmt: skip
        public = PublicImages(options.public, **images) if options.public else None
        # The time that is left is taken before the private images are read: how long that takes is private.
        seconds = options.seconds - (time.monotonic() - started)
        private_images: dict[str, Any] = images | {"skip_unreadable": options.skip_unreadable}
        private = ProtectedImages(
            options.private, ledger=ledger, unit=options.unit, public_size=options.public_size, **private_images
        )  # fmt: skip
        where = Path(options.private).expanduser()
        internal.json(
            "protected.json", {"private": str(where.resolve() if where.exists() else options.private)}
        )
        if private.skipped.value:
            internal.json("skipped.json", private.skipped)
            _say(
                f"left out {len(private.skipped.value)} unreadable file(s), listed in {internal.path / 'skipped.json'}"
            )
        holdout = OwnerImages(options.holdout, **images) if options.holdout else None
        measured = holdout is not None and private.has_labels and holdout.label_names is not None
        if holdout is not None:
            check_holdout(holdout, private, str(options.holdout))
        model = PrivImage(
            budget=budget, method=options.method, preset=preset, seconds=seconds,
            num_images=options.num_images, classifiers=classifiers(options.method) if measured else 0,
            work_dir=internal.directory("checkpoints"), seed=options.seed,
        )  # fmt: skip
        if METHODS[options.method].private != "none" and fresh:
            check_left(ledger, budget, options.ledger_url)
        with _naming(options.time_budget):
            plan = model.prepare(private, public)
        for line in (*plan.lines(), *(f"note: {warning}" for warning in model.warnings)):
            _say(f"plan: {line}")
        model.fit(private, public)
    except (InputError, BudgetError, LedgerError) as error:
        labels = [] if model is None else [reservation.label for reservation in model.reservations]
        if fresh and "synthesize" not in labels and not (folder.checkpoints / "public").exists():
            folder.give_up(charged=bool(labels))
        if labels and "no budget was spent" in str(error):
            said = "nothing was spent but what `sfumato ledger show` lists"
            raise type(error)(str(error).replace("no budget was spent", said)) from None
        raise
    pictures, targets = _generated(folder, options, model)
    folder.metrics([_metrics_row(stage) for stage in model.stages])
    facts = _facts(options, model, private, public, folder.certificate() or _certificate(options, model, ledger),
                   pictures, targets)  # fmt: skip
    if folder.certificate() is None:
        if options.audit:
            gate.audited(options, model, pictures, targets, facts.certificate)
        _release(folder.out, model, facts, pictures, targets)
    owner = figures(
        model, pictures, targets, private=private, holdout=holdout, seed=options.seed,
        own=lambda: OwnerImages(options.private, **private_images),
        remembered=folder.checkpoints / "accuracy.json",
    )  # fmt: skip
    if public is not None:
        found = near_duplicates(OwnerImages(options.private, **private_images), public).value
        if (count := int((found >= 0).sum())) > 0:
            owner.notes.append(
                f"{count} of the private images look almost the same as a public one. Public images are not "
                "protected: take those out of the public set, or know that the release may show them."
            )
    internal.text("report.html", internal_report(facts, owner))
    rows = [dataclasses.asdict(row) for row in owner.accuracy]
    internal.json("evaluation.json", {"accuracy": rows, "notes": owner.notes})
    result = _finished(folder)
    assert result is not None
    return result


@contextlib.contextmanager
def _naming(time_budget: str) -> Iterator[None]:
    """Let a message about too little time name what was asked for, not what is left of it."""
    try:
        yield
    except InputError as error:
        asked = f"--time-budget {time_budget} is too short"
        raise InputError(str(error).replace("the time budget is too short", asked)) from None


def _generated(
    folder: RunFolder, options: SynthesizeOptions, model: PrivImage
) -> tuple[np.ndarray, np.ndarray]:
    """The release's images (uint8 [N, H, W, C]) and labels: drawn once, then kept."""
    path = folder.checkpoints / IMAGES
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            pictures, labels, seconds = kept["images"], kept["labels"], float(kept["seconds"])
    else:
        started = time.monotonic()
        number = options.num_images or model.plan.preset.num_images or model.plan.units
        pictures, labels = model.generate(number, seed=options.seed)
        seconds = time.monotonic() - started
        content = io.BytesIO()
        np.savez(content, images=pictures, labels=labels, seconds=seconds)
        write_whole(path, content.getvalue())
    model.stages.append(Stage("generation", seconds, f"{len(pictures)} images"))
    return pictures, labels


def _metrics_row(stage: Stage) -> dict[str, Any]:
    row: dict[str, Any] = {"stage": stage.name, "detail": stage.detail}
    return row | {"seconds": round(stage.seconds, 1)} if stage.name in SECONDS_ARE_PUBLIC else row


def _preset(options: SynthesizeOptions) -> Preset:
    preset = preset_for(options.preset, options.private)
    given = {
        name: value
        for name in ("size", "channels", "guidance", "num_images")
        if (value := getattr(options, name)) is not None
    }
    if options.warm_up is not None:
        given["means_per_label"] = options.warm_up
    if options.robust is not None:
        given["perturbation"] = options.robust
    return replace(preset, **given)


def _finished(folder: RunFolder) -> SynthesizeResult | None:
    """The result of a run that is complete; None when there is work left."""
    claim, evaluation = folder.certificate(), folder.evaluation()
    if claim is None or evaluation is None:
        return None
    return SynthesizeResult(
        folder.out / "release", claim["statement"], claim["epsilon"], claim["delta"],
        tuple(AccuracyRow(**row) for row in evaluation["accuracy"]), tuple(evaluation.get("notes", ())),
    )  # fmt: skip


def _certificate(options: SynthesizeOptions, model: PrivImage, ledger: Ledger) -> dict[str, Any]:
    none = METHODS[options.method].private == "none"
    return certificate(
        model.reservations, unit=options.unit, public_size=None if none else model.plan.units,
        budget=None if none else model.budget, software=software(),
        ledger_head=ledger.head if model.reservations else "",
    )  # fmt: skip


def _facts(
    options: SynthesizeOptions,
    model: PrivImage,
    private: ProtectedImages,
    public: PublicImages | None,
    claim: dict[str, Any],
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
        mean_images=None if model.means is None else as_bytes(model.means),
        stages=model.stages,
        options=releasable_options(dataclasses.asdict(options)) | {"plan": "; ".join(model.plan.lines())},
        warnings=model.warnings + [COMPARE] * (before is not None) + [gate.SAID] * options.audit,
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


def _say_result(result: SynthesizeResult, out: Path) -> None:
    print(result.statement)
    if result.accuracy:
        print("Accuracy on real held-out images (for the owner's eyes, not differentially private):")
        for row in result.accuracy:
            print(f"  {row.accuracy:6.1%}  {row.name}")
    for note in result.notes:
        print(f"note: {note}")
    print(f"release: {result.release}")
    print(f"report:  {result.release / 'report.html'}")
    print(f"yours:   {out / 'internal' / 'report.html'} (not for release)", flush=True)


def _say(line: str) -> None:
    """To the terminal's other stream, so that standard output holds the result alone."""
    print(line, file=sys.stderr, flush=True)
