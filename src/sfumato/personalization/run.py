"""`sfumato personalize` from its options to a release folder: the order of work, and what goes where."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sfumato.data.files import write_whole
from sfumato.data.images import ProtectedImages
from sfumato.data.release import InternalWriter, ReleaseWriter
from sfumato.errors import BudgetError, InputError
from sfumato.machine import best_defaults
from sfumato.personalization.aggregation import (
    TOO_NOISY,
    Plan,
    geometry,
    make_plan,
    norm_report,
    shrunk,
    what_would_do,
)
from sfumato.personalization.dp_sgd_inversion import dp_sgd_inversion, dp_sgd_plan
from sfumato.personalization.export import FILES, check_new, draw, load_token, write_token
from sfumato.personalization.inversion import Inversion, InversionPlan
from sfumato.personalization.options import SHEET_PROMPTS, PersonalizeOptions
from sfumato.personalization.style_bank import StyleBank
from sfumato.personalization.style_votes import style_votes
from sfumato.personalization.text_to_image import EMBEDDED, TextToImage, embedded_folder, open_pipeline
from sfumato.privacy import mechanisms, vectors
from sfumato.privacy.answers import Answers
from sfumato.privacy.budget import Budget, delta_warning
from sfumato.privacy.dp_sgd import DPSGDPlan
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.ledger import Ledger
from sfumato.report.certificate import certificate
from sfumato.report.style import PICTURES_A_ROW, StyleFacts, style_card, style_report

SHARE_OF_COUNT = 0.1  # of ε, for a noisy count where the number of units is not declared
BANK = "styles.safetensors"
FREE = ("out", "dry_run", "batch_size")  # may change between two calls of one run
SHEET_STEPS = 25
VOTERS_AT_ONCE = 4  # each is tried under every public style: no need for more


@dataclass(frozen=True)
class PersonalizeResult:
    """Where the token is, and what it cost."""

    release: Path
    statement: str
    epsilon: float
    delta: float


@dataclass(frozen=True)
class _Public:
    """Everything that is known before the private images are opened."""

    model: TextToImage
    bank: StyleBank | None
    anchor: np.ndarray
    vocabulary: np.ndarray
    select: bool


def personalize(options: PersonalizeOptions) -> PersonalizeResult | None:
    """Run, or resume, `sfumato personalize`; None for a dry run.

    Guarantee: everything under OUT/release is (ε, δ)-differentially private for adding or removing one unit, by the
    mechanisms that its privacy.json lists, each charged before it was computed.

    Raises InputError, BudgetError or LedgerError with one line for the user; what was already produced stays.
    """
    options.check()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            "`sfumato personalize` runs as one process, and several were started (WORLD_SIZE); no budget was spent. "
            "Start it without torchrun"
        )
    out = Path(options.run_folder)
    _take(out, options)
    if (done := _finished(out)) is not None:
        _say("this run is complete; nothing was done and no budget was spent")
        return done
    defaults = best_defaults()
    torch.set_num_threads(defaults.threads)
    public = _public(
        options, defaults.device, defaults.public_dtype == "bfloat16" and options.method != "dp-sgd"
    )
    if options.dry_run:
        _dry_run(options, public)
        return None
    budget = Budget(options.epsilon, options.delta)
    if options.public_size is not None:  # what can be refused is, before anything is opened or written
        _planned(options, budget, float(options.public_size), public)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(
        out / "config.yaml", yaml.safe_dump(_values(options), sort_keys=False, allow_unicode=True).encode()
    )
    ledger = _ledger(options, budget)
    internal = InternalWriter(out)
    private = ProtectedImages(
        options.images, ledger=ledger, unit=options.unit, size=public.model.size, channels=3,
        public_size=options.public_size, cache_dir=internal.directory("cache"), skip_unreadable=options.skip_unreadable,
    )  # fmt: skip
    if private.skipped.value:
        internal.json("skipped.json", private.skipped)
        _say(
            f"left out {len(private.skipped.value)} unreadable file(s), listed in {internal.path / 'skipped.json'}"
        )
    answers = Answers(internal.directory("checkpoints"))
    try:
        units, left = _units(options, private, answers, budget, ledger)
        plan = _planned(options, left, units, public)
        token, center, chosen = _learn(options, private, public, plan, left, units, answers, internal)
    except InputError as error:
        if not answers.reservations:
            raise
        raise InputError(
            str(error).replace(
                "no budget was spent", "nothing was spent but what `sfumato ledger show` lists"
            )
        ) from None
    except BudgetError:
        _drop_unused(out, ledger)
        raise
    for reservation in answers.reservations:
        reservation.settle()
    if isinstance(plan, Plan):
        token = shrunk(token, center, plan)
    claim = certificate(
        answers.reservations, unit=options.unit, public_size=round(units), budget=budget, software=_software(),
        ledger_head=ledger.head,
    )  # fmt: skip
    _release(out, options, public, plan, claim, token, chosen, delta_warning(options.delta, round(units)))
    done = _finished(out)
    assert done is not None
    return done


def _public(options: PersonalizeOptions, device: str, autocast: bool) -> _Public:
    """Model, bank and anchor; refuses what does not fit together."""
    pipeline = open_pipeline(options.model)
    check_new(pipeline, options.token, options.vectors)
    bank = None
    if options.subspace is not None:
        bank = StyleBank.load(options.subspace)
    elif options.model == EMBEDDED and (embedded_folder() / BANK).exists() and options.vectors == 1:
        bank = StyleBank.load(embedded_folder() / BANK)
    model = TextToImage(pipeline, vectors=options.vectors, device=device, autocast=autocast)
    if bank is not None:
        bank.check(
            model.fingerprint, model.dimension, model.vectors, options.subspace or "the embedded style bank"
        )
    wanted = options.anchor or ("bank" if bank is not None else "art")
    if wanted in ("bank", "nearest") and bank is None:
        raise InputError(
            f"--anchor {wanted} needs public styles; no budget was spent. Give --subspace, made by `sfumato "
            "style-bank`, or a "
            "word as the anchor"
        )
    if options.method == "selection" and bank is None:
        raise InputError(
            "--method selection needs public styles; no budget was spent. Give --subspace, made by `sfumato style-bank`"
        )
    if bank is not None and wanted in ("bank", "nearest"):
        anchor = bank.anchor.astype(np.float64)
    else:
        anchor = model.token_of(wanted).double().cpu().numpy()
    return _Public(model, bank, anchor, vocabulary(model), wanted == "nearest")


def vocabulary(model: TextToImage) -> np.ndarray:
    """The model's own tokens as flat vectors [V, D], as far as all its text encoders have that many."""
    tables = [tower.table.base.weight.detach().cpu().float().numpy() for tower in model.towers]
    count = min(len(table) for table in tables)
    return np.concatenate([np.tile(table[:count], (1, model.vectors)) for table in tables], 1)


def _planned(options: PersonalizeOptions, budget: Budget, units: float, public: _Public) -> Plan | DPSGDPlan:
    """The calibrated plan; InputError where the noise would drown the style, with what would do."""
    if options.method == "dp-sgd":
        return dp_sgd_plan(budget, units)
    shape = geometry(options.method, public.anchor, public.vocabulary, public.bank, options.directions)
    candidates = len(public.bank.names) if public.bank is not None else 0
    plan = make_plan(options.method, budget, units, shape, candidates=candidates, select=public.select)
    if options.method in ("dpagg-ti", "mean") and plan.noise_share > TOO_NOISY:
        enough, epsilon = what_would_do(plan, budget)
        raise InputError(
            f"{units:.0f} {options.unit}s are too few for ε {budget.epsilon:g}: the noise would be "
            f"{plan.noise_share:.1f} times "
            f"as long as what a style usually is; no budget was spent. {enough} {options.unit}s would do at this "
            "ε, or ε "
            f"{epsilon:.2g} with these; or try --method selection, or fewer --directions (`sfumato plan` shows more)"
        )
    return plan


def _units(
    options: PersonalizeOptions, private: ProtectedImages, answers: Answers, budget: Budget, ledger: Ledger
) -> tuple[float, Budget]:
    """The public number of units, declared or bought, and the budget that is left for the token."""
    fresh = not (answers.folder / "run.json").exists()
    if fresh:
        remaining, slack = ledger.remaining, 1 + 1e-9
        for option, wanted, there in (
            ("--epsilon", budget.epsilon, remaining.epsilon), ("--delta", budget.delta, remaining.delta),
        ):  # fmt: skip
            if wanted > there * slack:
                raise BudgetError(
                    f"{option} {wanted:g} is more than {options.ledger_url} has left ({there:.6g}); no budget was "
                    "spent. "
                    "Ask for less; `sfumato ledger show` lists what was spent"
                )
    if private.public_size is not None:
        return float(private.public_size), budget
    epsilon = SHARE_OF_COUNT * budget.epsilon
    event = PlannedEvent(mechanisms.COUNT, "number of units", mechanisms.count_event(epsilon))
    reservation = answers.reserve(ledger, "count", [event], 0.0)
    found = answers.ask(
        mechanisms.COUNT, reservation, lambda: np.array(mechanisms.count(private, epsilon, reservation)[0])
    )
    return float(found), Budget(budget.epsilon - epsilon, budget.delta)


def _learn(
    options: PersonalizeOptions,
    private: ProtectedImages,
    public: _Public,
    plan: Plan | DPSGDPlan,
    budget: Budget,
    units: float,
    answers: Answers,
    internal: InternalWriter,
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """The noisy token [D], the centre it was measured from, and the public style that was voted for, if any."""
    model, ledger = public.model, private.ledger
    if isinstance(plan, DPSGDPlan):
        reservation = answers.reserve(ledger, "personalize", [plan.planned()], budget.delta)
        answers.own(reservation, ["dp_sgd.safetensors"])
        start = torch.from_numpy(public.anchor).float()
        token = dp_sgd_inversion(model, private, start, plan, reservation, checkpoint_dir=answers.folder)
        return token.double().numpy(), public.anchor, None
    delta = 0.0 if plan.noise_multiplier is None else budget.delta
    reservation = answers.reserve(ledger, "personalize", plan.events, delta)
    center, chosen = plan.geometry.center, None
    if plan.selection_epsilon is not None:
        assert public.bank is not None
        votes, epsilon = style_votes(model, public.bank, seed=options.seed), plan.selection_epsilon
        bank = public.bank
        picked = int(
            answers.ask(
                vectors.NEAREST, reservation,
                lambda: np.array(
                    vectors.nearest_candidate(
                        private, votes, len(bank.names), epsilon, reservation, batch_size=VOTERS_AT_ONCE
                    )[0]
                ),
            )
        )  # fmt: skip
        chosen, center = bank.names[picked], bank.tokens[picked].astype(np.float64)
    if plan.noise_multiplier is None:
        return center, center, chosen
    inversion = InversionPlan(
        steps=options.steps,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    embed = Inversion(
        model, torch.from_numpy(public.anchor), inversion, kept=internal.directory("inversions")
    )
    token = answers.ask(
        vectors.VECTOR_MEAN, reservation,
        lambda: vectors.vector_mean(private, embed, plan.mean(center), reservation)[0],
    )  # fmt: skip
    return token, center, chosen


def _release(
    out: Path,
    options: PersonalizeOptions,
    public: _Public,
    plan: Plan | DPSGDPlan,
    claim: dict[str, Any],
    token: np.ndarray,
    chosen: str | None,
    warning: str | None,
) -> None:
    """Write the token, see that stock diffusers loads it, draw the contact sheet, write card and page."""
    model = public.model
    rows = [part.numpy() for part in model.split(torch.from_numpy(token).float())]
    writer = ReleaseWriter(out)
    header = {"sfumato_privacy": claim, "model": model.fingerprint, "statement": claim["statement"]}
    paths = write_token(writer.directory("token"), options.token, rows, header)
    folder = paths[0].parent
    for path in paths:
        os.replace(path, folder.parent / path.name)
    folder.rmdir()
    pipeline = open_pipeline(options.model).to(model.device)
    prompts = [prompt for prompt in SHEET_PROMPTS for _ in range(PICTURES_A_ROW)]
    bare = [prompt.replace(" in the style of {}", "") for prompt in prompts]
    shape = (len(SHEET_PROMPTS), PICTURES_A_ROW, -1)
    without = draw(pipeline, bare, seed=options.seed, steps=SHEET_STEPS)
    load_token(pipeline, folder.parent / FILES[0])
    after = draw(pipeline, [p.format(options.token) for p in prompts], seed=options.seed, steps=SHEET_STEPS)
    tables = [tower.table.base.weight.detach().cpu().numpy() for tower in model.towers]
    facts = StyleFacts(
        token=options.token, method=options.method,
        model=options.model if options.model == EMBEDDED or "/" in options.model else Path(options.model).name,
        model_hash=model.fingerprint, pipeline=model.kind, vectors=model.vectors, unit=options.unit, certificate=claim,
        prompts=SHEET_PROMPTS, without=without.reshape(*shape, *without.shape[2:]),
        with_token=after.reshape(*shape, *after.shape[2:]), norms=norm_report(rows, tables),
        noise_share=plan.noise_share if isinstance(plan, Plan) and plan.noise_multiplier is not None else None,
        chosen=chosen,
        options={
            name: value for name, value in _values(options).items() if name not in ("images", "model", "subspace")
        },
        warnings=[warning] if warning else [],
    )  # fmt: skip
    writer.json("privacy.json", claim)
    writer.text("README.md", style_card(facts))
    writer.text("report.html", style_report(facts))
    writer.complete()


def _dry_run(options: PersonalizeOptions, public: _Public) -> None:
    from sfumato.personalization.plan import plan_lines

    budget, units = Budget(options.epsilon, options.delta), options.public_size or 100
    print("\n".join(plan_lines(options.method, budget, units, public.anchor, public.vocabulary, public.bank)))
    if options.public_size is None:
        print("assumed, since the private images were not opened: 100 units (--public-size)")
    print("No private image was read and no budget was spent.", flush=True)


def _take(out: Path, options: PersonalizeOptions) -> None:
    """Refuse to mix two different runs in one folder."""
    held = out / "config.yaml"
    if not held.exists():
        if (out / "release").exists() or (out / "internal").exists():
            raise InputError(f"{out} holds another run; no budget was spent now. Choose another --out")
        return
    before = yaml.safe_load(held.read_text(encoding="utf-8")) or {}
    charged = (out / "internal" / "checkpoints" / "run.json").exists()
    changed = [name for name, value in _values(options).items() if before.get(name) != value]
    if changed and (charged or set(before) != set(_values(options))):
        option = "--" + changed[0].replace("_", "-")
        raise InputError(
            f"{out} holds a run with {option} {before.get(changed[0])}, not {_values(options)[changed[0]]}; no "
            "budget was "
            "spent now. Repeat that run's command to resume it, or choose another --out"
        )
    if changed and not charged:
        _drop_unused(out, None)


def _drop_unused(out: Path, ledger: Ledger | None) -> None:
    """Remove the run's own ledger if nothing was ever granted in it: its total is that of other options."""
    own = out / "internal" / "ledger.db"
    if own.exists() and not (ledger or Ledger.open(own)).reservations():
        for suffix in ("", "-wal", "-shm", "-journal"):
            own.with_name(own.name + suffix).unlink(missing_ok=True)


def _values(options: PersonalizeOptions) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in FREE}


def _ledger(options: PersonalizeOptions, budget: Budget) -> Ledger:
    if options.ledger is not None:
        return Ledger.open(options.ledger)
    Path(options.ledger_url).parent.mkdir(parents=True, exist_ok=True)
    return Ledger.open(options.ledger_url, total=budget, name="personalize")


def _finished(out: Path) -> PersonalizeResult | None:
    path = out / "release" / "privacy.json"
    if not path.exists():
        return None
    claim = json.loads(path.read_text(encoding="utf-8"))
    return PersonalizeResult(out / "release", claim["statement"], claim["epsilon"], claim["delta"])


def _software() -> dict[str, str]:
    packages = ("sfumato", "dp-accounting", "torch", "diffusers", "transformers", "opendp")
    return {name.replace("-", "_"): importlib.metadata.version(name) for name in packages}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
