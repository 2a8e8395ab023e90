"""An index opened for asking: prompt in, condition for a generator out, charged once.

INDEX/index.json and public.safetensors hold the plan and the public side; INDEX/internal holds vectors, state and
answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.encoders.text_image import TextImageEncoder, open_text_image_encoder
from sfumato.errors import BudgetError, InputError, LedgerError
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger, Reservation
from sfumato.privacy.private_query import (
    BALL_QUERY,
    BALL_SUM,
    NEAREST_MEAN,
    BallPlan,
    NearestPlan,
    ball_sum,
    nearest_mean,
    question_key,
)
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.privacy.vector_search import Lists
from sfumato.report.certificate import certificate, software
from sfumato.retrieval.codebook import FILE as CODEBOOK
from sfumato.retrieval.codebook import Codebook
from sfumato.retrieval.conditions import Condition, ball_condition, nearest_condition, public_condition
from sfumato.retrieval.plan import NEAREST_SHARE, RetrievalPlan
from sfumato.retrieval.prompts import checked_prompt
from sfumato.retrieval.public_side import PublicSide

FORMAT = "sfumato-index/1"
INDEX, PUBLIC, PRIVATE = "index.json", "public.safetensors", Path("internal") / "vectors"
COUNTED = {"topk": NEAREST_MEAN, "ball": BALL_SUM, "ball-filter": BALL_QUERY}
"""The mechanism whose begun units are the questions asked."""


@dataclass(frozen=True)
class IndexFacts:
    """What index.json holds; public. ledger: a URL, or "" for the index's own. centroids: lists, 0 for an exact
    scan."""

    encoder: str
    encoder_identity: str
    dimension: int
    size: tuple[int, int]
    unit: str
    epsilon: float
    delta: float
    ledger: str
    reservation: str
    overview: str | None
    plan: dict[str, Any]
    centroids: int = 0
    format: str = FORMAT

    @classmethod
    def load(cls, folder: Path) -> IndexFacts:
        """Read INDEX/index.json. InputError where it is none."""
        path = folder / INDEX
        if not path.is_file():
            raise InputError(
                f"{folder} is no index (no {INDEX}); no budget was spent. Make one with `sfumato retrieve "
                "index`, or run "
                "that command again if it was interrupted"
            )
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            if held.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return cls(**{**held, "size": tuple(held["size"])})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); no budget was spent. Put back the file of this index"
            ) from None

    def ledger_of(self, folder: Path) -> Ledger:
        """The account that this index is charged to."""
        return Ledger.open(self.ledger or folder / "internal" / "ledger.db")

    def encoder_for(self, given: str | None) -> TextImageEncoder:
        """The encoder the index was built with, here or at another path; InputError for any other."""
        encoder = open_text_image_encoder(given or self.encoder)
        if encoder.identity != self.encoder_identity:
            raise InputError(
                f"the index was built with another encoder than {given or self.encoder} (its hash is "
                f"{self.encoder_identity[:12]}…, this one's {encoder.identity[:12]}…); no budget was spent. Give "
                "that one, "
                "or make a new index"
            )
        return encoder


@dataclass
class Collection:
    """A private collection that answers prompts within its budget. Several processes may have it open."""

    folder: Path
    facts: IndexFacts
    encoder: TextImageEncoder
    public: PublicSide
    plan: RetrievalPlan
    reservation: Reservation
    private: ProtectedVectors = field(repr=False)
    _lists: Lists | None = field(default=None, repr=False)

    @classmethod
    def open(cls, folder: str | Path, *, encoder: str | None = None) -> Collection:
        """The index in this folder. InputError or LedgerError where anything of it is missing or does not fit."""
        folder = Path(folder)
        facts = IndexFacts.load(folder)
        public = PublicSide.load(folder / PUBLIC)
        if public.encoder != facts.encoder_identity:
            raise InputError(
                f"{folder / PUBLIC} is of another encoder than the index; no budget was spent. Put back its own"
            )
        ledger = facts.ledger_of(folder)
        found = [each for each in ledger.reservations() if each.id == facts.reservation]
        if not found:
            raise LedgerError(
                f"the ledger does not hold what {folder} was built under ({facts.reservation}); nothing was "
                "released. Put "
                "back the ledger of this index"
            )
        plan = RetrievalPlan.from_json(facts.plan, public)
        private = ProtectedVectors(folder / PRIVATE, facts.dimension)
        lists = None
        if facts.centroids:
            lists = Lists(public.centers(facts.centroids), max(1, facts.centroids // 16))
        return cls(folder, facts, facts.encoder_for(encoder), public, plan, found[0], private, lists)

    def condition(self, prompt: str, *, fallback: bool = False) -> Condition:
        """What the generator is told for a prompt.

        A new prompt is charged before it is answered; the same prompt again is answered from what was kept, for free.

        Guarantee: the answers to all prompts together, however they are chosen, are (ε, δ)-DP with the figures of the
        index, for adding or removing one unit.

        Raises:
            InputError: an empty or too long prompt, or one with control characters.
            BudgetError: all planned questions were asked; with `fallback` the public condition is returned instead.
        """
        text = checked_prompt(prompt)
        direction = self.encoder.texts([text])[0].astype(np.float64)
        nearest = self.public.center(direction, self.public.count(min(NEAREST_SHARE, self.plan.share)))
        key = question_key(text, self.facts.plan)
        query = self.plan.query
        try:
            if isinstance(query, NearestPlan):
                answer, cached = nearest_mean(
                    self.private, direction, query, self.reservation, key, self._lists
                )
                return nearest_condition(answer, nearest, self.plan, cached)
            assert isinstance(query, BallPlan)
            ball = self.public.ball(direction, self.plan.public_count(self.public))
            answer, cached = ball_sum(self.private, ball, query, self.reservation, key, self._lists)
            return ball_condition(answer, nearest, self.plan, cached)
        except LedgerError:
            if self._left() > 0:
                raise
        if fallback:
            return public_condition(nearest)
        raise BudgetError(
            f"all {query.queries:,} questions of this index were asked; the prompt was not answered and "
            "nothing was spent. "
            "Prompts asked before are still answered; --fallback draws without asking"
        )

    def status(self) -> dict[str, Any]:
        """Public figures only: what was asked, what is left, what it all costs."""
        asked = self.reservation.begun(COUNTED[self.plan.mechanism])
        planned = self.plan.query.queries
        return {
            "mechanism": self.plan.mechanism, "epsilon": self.facts.epsilon, "delta": self.facts.delta,
            "unit": self.facts.unit, "queries_asked": asked, "queries_left": self._left(),
            "queries_planned": planned,
            "statement": (
                f"All answers together are (ε = {self.facts.epsilon:g}, δ = {self.facts.delta:g})-differentially "
                "private "
                f"for adding or removing one {self.facts.unit}."
            ),
        }  # fmt: skip

    def certificate(self) -> dict[str, Any]:
        """privacy.json of what was answered: the whole index's price, however little was asked so far."""
        mine = {self.facts.reservation, self.facts.overview}
        ledger = self.reservation.ledger
        found = [each for each in ledger.reservations() if each.id in mine]
        return certificate(
            found, unit=self.facts.unit, public_size=round(self.plan.units),
            budget=Budget(self.facts.epsilon, self.facts.delta),
            software=software("transformers"), ledger_head=ledger.head,
        )  # fmt: skip

    def _left(self) -> int:
        query = self.plan.query
        left = query.queries - self.reservation.begun(COUNTED[self.plan.mechanism])
        return left if self.reservation.status == "open" else 0


def open_source(folder: str | Path, *, encoder: str | None = None) -> Collection | Codebook:
    """An index, or a released codebook, whichever the folder holds."""
    if (Path(folder) / CODEBOOK).is_file():
        return Codebook.open(folder, encoder=encoder)
    return Collection.open(folder, encoder=encoder)
