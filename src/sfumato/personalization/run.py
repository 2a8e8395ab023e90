"""`sfumato personalize` from its options to a release folder: the order of work, and what goes where."""

from __future__ import annotations

import dataclasses
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
from sfumato.personalization.style_bank import StyleBank, embedded_bank
from sfumato.personalization.style_votes import style_votes
from sfumato.personalization.text_to_image import EMBEDDED, TextToImage, open_pipeline
from sfumato.privacy import vectors
from sfumato.privacy.answers import Answers
from sfumato.privacy.budget import Budget, delta_warning
from sfumato.privacy.dp_sgd import DPSGDPlan
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.run_account import check_left, drop_unused, open_account
from sfumato.report import words
from sfumato.report.certificate import certificate, software
from sfumato.report.style import PICTURES_A_ROW, StyleFacts, style_card, style_report

SHARE_OF_COUNT = 0.1  # of ε, for a noisy count where the number of units is not declared
FREE = ("out", "dry_run")  # may change between two calls of one run
OF_THE_COUNT = ("images", "epsilon", "delta", "unit", "ledger", "skip_unreadable", "public_size")
FIXED, APPLIED = "options_are_fixed", "steps_applied.npy"
SHEET_STEPS = 25
LARGE = 128  # pixels; models beyond it draw fewer pictures, one at a time
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
    mechanisms that its privacy.json lists, each charged before anything left it.

    Raises InputError, BudgetError or LedgerError with one line for the user; what was already produced stays.
    """
    options.check()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            "`sfumato personalize` runs as one process, and several were started (WORLD_SIZE); no budget was spent. "
            "Start it without torchrun"
        )
    out = Path(options.run_folder)
    if not options.dry_run:
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
    if options.method in (
        "dpagg-ti",
        "mean",
        "paper",
    ):  # the mechanism tests it too, when a count may be bought
        vectors.check_embed(_embedding(options, public, None), (public.model.size, public.model.size, 3))
    if options.public_size is not None:  # what can be refused is, before anything is opened or written
        _planned(options, budget, float(options.public_size), public)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(
        out / "config.yaml", yaml.safe_dump(_values(options), sort_keys=False, allow_unicode=True).encode()
    )
    internal = InternalWriter(out)  # makes internal/ for the owner alone, before anything is put there
    ledger = open_account(options.ledger, out, budget, "personalize")
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
        token, center, chosen = _learn(options, private, public, plan, left, answers, internal)
    except InputError as error:
        if not answers.reservations:
            raise
        raise InputError(
            str(error).replace(
                "no budget was spent", "nothing was spent but what `sfumato ledger show` lists"
            )
        ) from None
    except BudgetError:
        if not answers.reservations:  # nothing was granted: let less be asked for in this folder
            (answers.folder / "run.json").unlink(missing_ok=True)
        raise
    for reservation in answers.reservations:
        reservation.settle()
    warnings = (
        [warning] if units is not None and (warning := delta_warning(options.delta, round(units))) else []
    )
    if isinstance(plan, Plan):
        token = shrunk(token, center, plan)
    elif lost := plan.steps - int(np.load(answers.folder / APPLIED)):
        warnings.append(f"{lost} of {plan.steps} steps were charged and lost in an interruption")
    claim = certificate(
        answers.reservations, unit=options.unit, public_size=None if units is None else round(units),
        budget=budget, software=software("transformers"), ledger_head=ledger.head,
    )  # fmt: skip
    _release(out, options, public, plan, claim, token, chosen, warnings)
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
    elif options.model == EMBEDDED and options.vectors == 1:
        bank = StyleBank.load(embedded_bank())
    model = TextToImage(pipeline, vectors=options.vectors, device=device, autocast=autocast)
    if bank is not None:
        bank.check(
            model.fingerprint, model.dimension, model.vectors, options.subspace or "the embedded style bank"
        )
    wanted = options.anchor or ("bank" if bank is not None else "art")
    if wanted in ("bank", "nearest") and bank is None:
        raise InputError(
            f"--anchor {wanted} needs public styles; no budget was spent. Give --subspace, made by `sfumato "
            "style-bank`, or a word as the anchor"
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


def _embedding(options: PersonalizeOptions, public: _Public, kept: Path | None) -> Inversion:
    plan = InversionPlan(
        steps=options.steps,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    return Inversion(public.model, torch.from_numpy(public.anchor), plan, kept=kept)


def _planned(
    options: PersonalizeOptions, budget: Budget, units: float | None, public: _Public
) -> Plan | DPSGDPlan:
    """The calibrated plan; InputError where the noise would drown the style, with what would do."""
    if options.method == "selection":
        units = 1.0  # a vote needs no divisor
    assert units is not None
    if options.method == "dp-sgd":
        return dp_sgd_plan(budget, units)
    shape = geometry(options.method, public.anchor, public.vocabulary, public.bank, options.directions)
    candidates = len(public.bank.names) if public.bank is not None else 0
    plan = make_plan(options.method, budget, units, shape, candidates=candidates, select=public.select)
    if options.method in ("dpagg-ti", "mean") and plan.noise_share > TOO_NOISY:
        enough, epsilon = what_would_do(plan, budget)
        epsilon *= options.epsilon / budget.epsilon  # with the count's share
        raise InputError(
            f"{units:.0f} {options.unit}s are too few for ε {options.epsilon:g}: the noise would be "
            f"{plan.noise_share:.1f} times as long as what a style usually is; no budget was spent. {enough} "
            f"{options.unit}s would do at this ε, or ε {words.claim(epsilon)} with these; or try --method selection, "
            "or fewer --directions (`sfumato plan` shows more)"
        )
    return plan


def _units(
    options: PersonalizeOptions, private: ProtectedImages, answers: Answers, budget: Budget, ledger: Ledger
) -> tuple[float | None, Budget]:
    """The public number of units, declared, bought, or None where no divisor is needed, and the budget that is left for
    the token."""
    if options.method == "selection":
        budget = Budget(budget.epsilon, 0.0)
    if not (answers.folder / "run.json").exists():
        check_left(ledger, budget, options.ledger_url)
    if private.public_size is not None or options.method == "selection":
        return None if private.public_size is None else float(private.public_size), budget
    units, spent = answers.count(private, SHARE_OF_COUNT * budget.epsilon)
    return float(units), Budget(budget.epsilon - spent, budget.delta)


def _learn(
    options: PersonalizeOptions,
    private: ProtectedImages,
    public: _Public,
    plan: Plan | DPSGDPlan,
    budget: Budget,
    answers: Answers,
    internal: InternalWriter,
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """The noisy token [D], the centre it was measured from, and the public style that was voted for, if any."""
    model, ledger = public.model, private.ledger
    write_whole(answers.folder / FIXED, b"")  # from here on all options are what they are
    if isinstance(plan, DPSGDPlan):
        reservation = answers.reserve(ledger, "personalize", [plan.planned()], budget.delta)
        answers.own(reservation, ["dp_sgd.safetensors"])
        start = torch.from_numpy(public.anchor).float()
        token, applied = dp_sgd_inversion(
            model, private, start, plan, reservation, checkpoint_dir=answers.folder
        )
        np.save(answers.folder / APPLIED, applied)
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
    embed = _embedding(options, public, internal.directory("inversions"))
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
    warnings: list[str],
) -> None:
    """Write the token, see that stock diffusers loads it, draw the contact sheet, write card and page."""
    model = public.model
    rows = [part.numpy() for part in model.split(torch.from_numpy(token).float())]
    writer = ReleaseWriter(out)
    header = {"sfumato_privacy": claim, "model": model.fingerprint, "statement": claim["statement"]}
    token_file, *_ = write_token(writer.file(FILES[0]).parent, options.token, rows, header)
    pipeline = open_pipeline(options.model).to(model.device)
    large = model.size > LARGE
    model.release_memory()  # what is drawn below opens the model afresh
    row = 2 if large else PICTURES_A_ROW
    prompts = [prompt for prompt in SHEET_PROMPTS for _ in range(row)]
    bare = [prompt.replace(" in the style of {}", "") for prompt in prompts]
    shape = (len(SHEET_PROMPTS), row)
    drawing: dict[str, Any] = {"seed": options.seed, "steps": SHEET_STEPS, "at_once": 1 if large else 8}
    without = draw(pipeline, bare, **drawing)
    load_token(pipeline, token_file)
    after = draw(pipeline, [p.format(options.token) for p in prompts], **drawing)
    tables = [tower.table.base.weight.detach().cpu().numpy() for tower in model.towers]
    facts = StyleFacts(
        token=options.token, method=options.method,
        model=Path(options.model).name if Path(options.model).expanduser().exists() else options.model,
        model_hash=model.fingerprint, pipeline=model.kind, vectors=model.vectors, unit=options.unit, certificate=claim,
        prompts=SHEET_PROMPTS, without=without.reshape(*shape, *without.shape[1:]),
        with_token=after.reshape(*shape, *after.shape[1:]), norms=norm_report(rows, tables),
        noise_share=plan.noise_share if isinstance(plan, Plan) and plan.noise_multiplier is not None else None,
        chosen=chosen,
        options={
            name: value for name, value in _values(options).items() if name not in ("images", "model", "subspace")
        },
        warnings=warnings,
    )  # fmt: skip
    writer.json("privacy.json", claim)
    writer.text("README.md", style_card(facts))
    writer.text("report.html", style_report(facts))
    writer.complete()


def _dry_run(options: PersonalizeOptions, public: _Public) -> None:
    from sfumato.personalization.plan import plan_lines

    bought = options.public_size is None and options.method != "selection"
    budget = Budget(options.epsilon * (1 - SHARE_OF_COUNT * bought), options.delta)
    lines = plan_lines(
        options.method, budget, options.public_size or 100, public.anchor, public.vocabulary, public.bank,
        directions=options.directions, select=public.select,
    )  # fmt: skip
    print("\n".join(lines))
    if bought:
        print(f"a noisy count takes ε {SHARE_OF_COUNT * options.epsilon:g} of {options.epsilon:g}")
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
    kept = out / "internal" / "checkpoints"
    changed = [name for name, value in _values(options).items() if before.get(name) != value]
    if set(before) == set(_values(options)) and not (kept / FIXED).exists():
        counted = (kept / "run.json").exists()  # only what the count rests on is fixed by it
        fixed = [name for name in changed if counted and name in OF_THE_COUNT]
        if changed and not counted and options.ledger is None:
            drop_unused(out)
        changed = fixed
    if changed:
        option = "--" + changed[0].replace("_", "-")
        raise InputError(
            f"{out} holds a run with {option} {before.get(changed[0])}, not {_values(options)[changed[0]]}; no "
            "budget was spent now. Repeat that run's command to resume it, or choose another --out"
        )


def _values(options: PersonalizeOptions) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in FREE}


def _finished(out: Path) -> PersonalizeResult | None:
    path = out / "release" / "privacy.json"
    if not path.exists():
        return None
    claim = json.loads(path.read_text(encoding="utf-8"))
    return PersonalizeResult(out / "release", claim["statement"], claim["epsilon"], claim["delta"])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
