"""`sfumato retrieve index`, `add`, `delete` and `codebook`: everything that writes an index or releases from it
whole."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.data.files import write_whole
from sfumato.data.images import ProtectedImages, PublicImages, same_content
from sfumato.data.release import InternalWriter, ReleaseWriter
from sfumato.encoders.text_image import TextImageEncoder, open_text_image_encoder
from sfumato.errors import BudgetError, InputError
from sfumato.privacy.accounting import calibrate
from sfumato.privacy.answers import Answers
from sfumato.privacy.budget import Budget, delta_warning
from sfumato.privacy.codebook_sums import CodebookPlan, codebook_sums
from sfumato.privacy.ledger import Ledger, Reservation
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.privacy.run_account import check_left, open_account
from sfumato.privacy.vectors_file import add_file, count_file, is_vectors_file
from sfumato.report.certificate import certificate, software
from sfumato.retrieval.codebook import FILE, Codes
from sfumato.retrieval.collection import INDEX, PRIVATE, PUBLIC, Collection, IndexFacts
from sfumato.retrieval.options import DEFAULT_DELTA, AddOptions, CodebookOptions, DeleteOptions, IndexOptions
from sfumato.retrieval.overview import after_looking, look_over
from sfumato.retrieval.plan import RADIUS_QUANTILE, RetrievalPlan, make_plan, told
from sfumato.retrieval.prompts import checked_prompt
from sfumato.retrieval.public_side import PublicSide, embedded_public

SHARE_OF_COUNT = (
    0.02  # of ε, for a noisy count of units where only their number is needed and it is not declared
)
SCANNED = 1_000_000  # units beyond which records are kept in lists around public centroids
MOST_PROMPTS = 2000  # that are planned with
ENCODED = "encoded"  # empty file: all vectors are in place


def build_index(options: IndexOptions) -> list[str]:
    """Make an index, or go on with one; returns what to say. See `IndexOptions`.

    Guarantee: making it releases the collection's noisy number of units, mean and covariance (top-k: the number, unless
    it is declared), as a reservation of its own; the plan, and public vectors moved accordingly, follow from them.
    """
    options.check()
    out = Path(options.out)
    encoder = open_text_image_encoder(options.encoder)
    public = _public(options, encoder)
    delta = options.delta if options.delta is not None else default_delta(options.public_size)
    budget = Budget(options.epsilon, delta)
    rest = budget if options.mechanism == "topk" else after_looking(budget)
    if options.dry_run:
        return [
            *_planned(options, rest, float(options.public_size or 1), public).lines(),
            "Nothing was spent.",
        ]
    _take(out, options)
    if (out / INDEX).exists():
        return ["this index is complete; nothing was done and no budget was spent"]
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    internal = InternalWriter(out)
    if options.public_size is not None:  # what can be refused is, before anything is opened
        _planned(options, rest, float(options.public_size), public)
    ledger = open_account(options.ledger, out, budget, "retrieve")
    answers = Answers(internal.directory("checkpoints"))
    if not (answers.folder / "run.json").exists():
        check_left(ledger, budget, options.ledger or str(out / "internal" / "ledger.db"))
    try:
        facts, plan, public = _fill(options, budget, ledger, encoder, public, answers, internal)
    except BudgetError:
        if not answers.reservations:
            (answers.folder / "run.json").unlink(missing_ok=True)
        raise
    public.save(out / PUBLIC)
    write_whole(
        out / INDEX, (json.dumps(dataclasses.asdict(facts), indent=2, ensure_ascii=False) + "\n").encode()
    )
    said = plan.lines()
    if warning := delta_warning(delta, round(plan.units)):
        said.append(f"note: {warning}")
    return [*said, f"index: {out} (as private as the images; keep it where they are)"]


def _fill(
    options: IndexOptions,
    budget: Budget,
    ledger: Ledger,
    encoder: TextImageEncoder,
    public: PublicSide,
    answers: Answers,
    internal: InternalWriter,
) -> tuple[IndexFacts, RetrievalPlan, PublicSide]:
    """Encode, look over the whole, plan, reserve."""
    where = Path(options.out) / PRIVATE
    size = encoder.size if options.size is None else (options.size, options.size)
    held: ProtectedImages | None = None
    if not is_vectors_file(options.private):
        held = ProtectedImages(
            options.private, ledger=ledger, unit=options.unit, size=size, channels=3, public_size=options.public_size,
            cache_dir=internal.directory("cache"), skip_unreadable=options.skip_unreadable,
        )  # fmt: skip
        if options.public is not None:
            same_content(held, PublicImages(options.public, size=size, channels=3))
    if not (answers.folder / ENCODED).exists():
        shutil.rmtree(where, ignore_errors=True)  # of an interrupted call: nothing was asked yet
        private = ProtectedVectors.create(where, encoder.dimension)
        if held is not None:
            private.add_images(held, encoder.images, "encoding")
        else:
            add_file(private, options.private, options.unit)
        write_whole(answers.folder / ENCODED, b"")
    private = ProtectedVectors(where, encoder.dimension)
    units, left, first = float(options.public_size or 0), budget, None
    if options.mechanism != "topk":
        counted, public, first = look_over(budget, private, public, ledger, answers, options.public_size)
        units = units or counted
        left = Budget(budget.epsilon - first.epsilon, budget.delta - first.delta)
    elif not units:
        units, first = _count(SHARE_OF_COUNT * budget.epsilon, options, held, ledger, answers)
        left = Budget(budget.epsilon - first.epsilon, budget.delta)
    plan = _planned(options, left, units, public)
    reservation = answers.reserve(ledger, "retrieve", plan.events, left.delta)
    facts = IndexFacts(
        options.encoder, encoder.identity, encoder.dimension, size, options.unit, budget.epsilon, budget.delta,
        str(Path(options.ledger).resolve()) if options.ledger and "://" not in options.ledger else options.ledger or "",
        reservation.id, None if first is None else first.id, plan.to_json(),
        math.ceil(4 * math.sqrt(units)) if units > SCANNED else 0,
    )  # fmt: skip
    return facts, plan, public


def _count(
    epsilon: float, options: IndexOptions, held: ProtectedImages | None, ledger: Ledger, answers: Answers
) -> tuple[float, Reservation]:
    """A noisy number of units and what it cost."""
    if held is not None:
        bought, _ = answers.count(held, epsilon)
    else:
        bought, _ = count_file(options.private, options.unit, ledger, answers, epsilon)
    return float(bought), answers.reservations[-1]


def default_delta(public_size: int | None) -> float:
    """δ where none is named: 1/(n·ln n) of a declared n, at most 1e-6."""
    if public_size is None or public_size < 3:
        return DEFAULT_DELTA
    return min(DEFAULT_DELTA, 1 / (public_size * math.log(public_size)))


def add(options: AddOptions) -> list[str]:
    """Add records to an index; see `AddOptions`. Releases nothing."""
    collection = Collection.open(options.index)
    if is_vectors_file(options.private):
        add_file(collection.private, options.private, collection.facts.unit)
    else:
        held = ProtectedImages(
            options.private, ledger=collection.reservation.ledger, unit=collection.facts.unit,
            size=collection.facts.size, channels=3, cache_dir=InternalWriter(collection.folder).directory("cache"),
            skip_unreadable=options.skip_unreadable, joins=True,
        )  # fmt: skip
        collection.private.add_images(held, collection.encoder.images, "encoding")
    return ["added. The budget and the number of questions stay what they were."]


def delete(options: DeleteOptions) -> list[str]:
    """Delete records from an index; see `DeleteOptions`. Releases nothing."""
    collection = Collection.open(options.index)
    collection.private.delete(options.ids)
    return ["deleted. Prompts asked before are asked anew, and charged, when they come again."]


def release_codebook(options: CodebookOptions) -> list[str]:
    """Release a codebook; see `CodebookOptions`. Running the same command again finishes an interrupted one.

    Guarantee: the release is (ε, δ)-DP for adding or removing one unit, by one Gaussian mechanism on the index's
    ledger, besides what the index has reserved for questions.
    """
    options.check()
    out = Path(options.out)
    if (out / "release" / FILE).exists():
        return ["this release is complete; nothing was done and no budget was spent"]
    collection = Collection.open(options.index)
    facts, public, units = collection.facts, collection.public, collection.plan.units
    budget = Budget(options.epsilon, options.delta if options.delta is not None else facts.delta)
    codes = options.codes or int(np.clip(units * budget.epsilon / 400, 8, 256))
    share = 1 / codes
    basis = public.basis(min(16, public.dimension))
    centers = public.centers(codes)
    _, lengths = told(public, max(share, 8 / len(public.vectors)), basis)
    noise = calibrate(lambda z: [CodebookPlan(centers, z, 1.0, basis).planned()[0].event], budget)
    plan = CodebookPlan(centers, noise, float(np.quantile(lengths, RADIUS_QUANTILE)), basis)
    answers = Answers(InternalWriter(out).directory("checkpoints"))
    reservation = answers.reserve(collection.reservation.ledger, "codebook", plan.planned(), budget.delta)
    sums = codebook_sums(collection.private, plan, reservation)
    reservation.settle()
    mine = [reservation]
    if facts.overview is not None:  # the number of codes follows from it
        mine += [r for r in reservation.ledger.reservations() if r.id == facts.overview]
    allowed = Budget(
        budget.epsilon + sum(r.epsilon for r in mine[1:]), budget.delta + sum(r.delta for r in mine[1:])
    )
    claim = certificate(
        mine, unit=facts.unit, public_size=round(units), budget=allowed, software=software("transformers"),
        ledger_head=reservation.ledger.head,
    )  # fmt: skip
    writer = ReleaseWriter(out)
    released = Codes(
        centers,
        sums,
        basis,
        plan.residual_noise,
        plan.count_noise,
        units,
        facts.encoder,
        facts.encoder_identity,
    )
    released.save(writer.file(FILE), claim)
    writer.json("privacy.json", claim)
    writer.text("README.md", _card(claim, released))
    complete = writer.complete()
    return [
        claim["statement"],
        f"codebook: {complete} ({len(centers)} codes); ask it with `sfumato retrieve ask {complete}`",
    ]


def _card(claim: dict[str, Any], codes: Codes) -> str:
    return (
        "# Codebook of a private image collection\n\n"
        f"{claim['statement']}\n\n"
        f"{len(codes.centers)} public centres in the space of the encoder "
        f"`{codes.encoder_identity[:12]}…`, and at each a "
        "noisy number of private images and a noisy mean of how they differ from it. `privacy.json` "
        "lists what was done; "
        "`sfumato ledger verify` recomputes it.\n\n"
        '```\nsfumato retrieve ask . "a portrait with glasses" --out pictures\n```\n'
    )


def _planned(options: IndexOptions, budget: Budget, units: float, public: PublicSide) -> RetrievalPlan:
    return make_plan(
        options.mechanism, budget, options.queries, units, public, neighbours=options.neighbours, rate=options.rate,
        share=options.share, interpolation=options.interpolation,
    )  # fmt: skip


def _public(options: IndexOptions, encoder: TextImageEncoder) -> PublicSide:
    """The embedded public vectors, or those of the user's public images; prompts of a file, captions, or the
    images'."""
    texts: list[str] = []
    if options.planning_prompts is not None:
        texts = read_prompts(Path(options.planning_prompts), "--planning-prompts")
    if options.public is None:
        public = PublicSide.load(embedded_public())
        if public.encoder != encoder.identity:
            raise InputError(
                f"--encoder {options.encoder} needs --public: public images in the same domain; no budget was spent"
            )
        return public if not texts else PublicSide.of(public.vectors, encoder.texts(texts), encoder.identity)
    images = PublicImages(options.public, size=encoder.size, channels=3)
    vectors = np.concatenate(
        [encoder.images(np.asarray(images.images[i : i + 512])) for i in range(0, len(images), 512)]
    )
    if not texts and images.captions is not None:
        texts = list(dict.fromkeys(text for text in images.captions if text.strip()))[:MOST_PROMPTS]
    prompts = encoder.texts(texts) if len(texts) > 1 else vectors[:: max(1, len(vectors) // MOST_PROMPTS)]
    return PublicSide.of(vectors, prompts, encoder.identity)


def read_prompts(path: Path, option: str) -> list[str]:
    """The prompts of a text file, one a line, empty lines left out, each once. InputError names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(
            f"{option} {path} cannot be read ({why}); no budget was spent. Give a text file"
        ) from None
    found: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found[checked_prompt(line)] = None
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if not found:
        raise InputError(f"{option} {path} holds no prompt; no budget was spent. Give one a line")
    return list(found)


def _take(out: Path, options: IndexOptions) -> None:
    """The folder is this command's, or new."""
    path = out / "internal" / "options.json"
    wanted = json.dumps(dataclasses.asdict(options), indent=2)
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != json.loads(wanted):
            raise InputError(
                f"--out {out} was started with other options; no budget was spent. Give those, or another folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out {out} already holds something; no budget was spent. Choose another folder")
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    InternalWriter(out)
    write_whole(path, wanted.encode())
