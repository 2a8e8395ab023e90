"""What a run asked of private images and was answered: reserved once, kept on disk, never asked twice."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.data.files import write_whole
from sfumato.errors import BudgetError, LedgerError
from sfumato.privacy import mechanisms
from sfumato.privacy.events import PlannedEvent

if TYPE_CHECKING:
    from sfumato.data.images import ProtectedImages


class Answers:
    """The reservations of one run, in `reservations`, and the files under `folder` that hold released values."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reservations: list[Any] = []

    def reserve(self, ledger: Any, label: str, events: list[PlannedEvent], delta: float) -> Any:
        """This run's reservation of that name: granted by the ledger the first time, found again afterwards."""
        path = self.folder / "run.json"
        if not path.exists():
            write_whole(path, json.dumps({"run": uuid.uuid4().hex}).encode())
        run = json.loads(path.read_text(encoding="utf-8"))["run"]
        reservation = ledger.reserve(label, events, delta=delta, key=f"{run}:{label}")
        self.reservations.append(reservation)
        return reservation

    def ask(
        self, mechanism: str, reservation: Any, ask: Callable[[], np.ndarray], *, turn: int | None = None
    ) -> np.ndarray:
        """A mechanism's released value: from its file when it has been asked, else asked and saved.

        turn: which of several equal questions this is, from 0; None for a mechanism that is asked once.

        Raises:
            BudgetError: the question was charged and its answer lost, so it cannot be asked again.
            LedgerError: there is an answer that this run's reservation did not pay for.
        """
        name, before = (mechanism, 0) if turn is None else (f"{mechanism}-{turn:03d}", turn)
        path = self.folder / f"{name}.npy"
        if path.exists():
            self.paid_here(path, mechanism, reservation, before + 1)
            return np.load(path, allow_pickle=False)
        if reservation.begun(mechanism) > before:
            raise BudgetError(
                f"the run was stopped after {mechanism} was charged and before its answer was saved: that cost is "
                "spent and the answer is lost. `sfumato ledger close LEDGER ID --outputs-unseen` gives back what "
                "never began; then start again with another --out, on a ledger with budget left"
            )
        value, content = ask(), io.BytesIO()
        np.save(content, value, allow_pickle=False)
        write_whole(path, content.getvalue())
        return value

    def count(self, private: ProtectedImages, epsilon: float) -> tuple[int, float]:
        """The noisy number of units and what it cost, as a reservation of its own: it sets later parameters.

        Guarantee: (epsilon, 0)-DP for adding or removing one unit, see `mechanisms.count`.
        """
        event = PlannedEvent(mechanisms.COUNT, "number of units", mechanisms.count_event(epsilon))
        reservation = self.reserve(private.ledger, "count", [event], 0.0)
        units = self.ask(
            mechanisms.COUNT,
            reservation,
            lambda: np.array(mechanisms.count(private, epsilon, reservation)[0]),
        )
        reservation.settle()
        return int(units), reservation.epsilon

    def own(self, reservation: Any, names: Sequence[str]) -> None:
        """Claim these files of the run for a reservation, before any of them is made from what it paid for.

        Raises:
            LedgerError: one is there already and another reservation, or nobody known, paid for it.
        """
        path = self.folder / "paid_by.json"
        payer = json.loads(path.read_text(encoding="utf-8"))["reservation"] if path.exists() else None
        found = [self.folder / name for name in names if (self.folder / name).exists()]
        if found and payer != reservation.id:
            raise self._not_paid(found[0])
        if payer != reservation.id:
            write_whole(path, json.dumps({"reservation": reservation.id}).encode())

    def paid_here(self, path: Path, mechanism: str, reservation: Any, units: int) -> None:
        """Refuse to go on from what this reservation did not pay for: it would be left out of the certificate."""
        if reservation.begun(mechanism) < units:
            raise self._not_paid(path)

    def _not_paid(self, path: Path) -> LedgerError:
        return LedgerError(
            f"{path} was made under another reservation than the ledger has for this run: another ledger, or an "
            "older copy of it, or files of the run are gone. Put back what the run was started with, or start again "
            "with another --out; no budget was spent"
        )
