"""The account that a run is charged to: a ledger the user names, or one of the run's own under internal/."""

from __future__ import annotations

from pathlib import Path

from sfumato.errors import BudgetError
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger

OWN = Path("internal") / "ledger.db"


def open_account(named: str | None, out: Path, budget: Budget, name: str) -> Ledger:
    """The ledger `named`, which has to be there, or the run's own, made with this budget as its total."""
    if named is not None:
        return Ledger.open(named)
    (out / OWN).parent.mkdir(
        mode=0o700, parents=True, exist_ok=True
    )  # what comes to lie beside it is private
    return Ledger.open(str(out / OWN), total=budget, name=name)


def check_left(ledger: Ledger, budget: Budget, where: str) -> None:
    """Refuse a run that the ledger cannot pay for before even a count is bought (BudgetError)."""
    left, slack = ledger.remaining, 1 + 1e-9
    for option, wanted, there in (
        ("--epsilon", budget.epsilon, left.epsilon),
        ("--delta", budget.delta, left.delta),
    ):
        if wanted > there * slack:
            raise BudgetError(
                f"{option} {wanted:g} is more than {where} has left ({there:.6g}); no budget was "
                "spent. Ask for less; `sfumato ledger show` lists what was spent"
            )


def drop_unused(out: Path) -> None:
    """Remove the run's own ledger if nothing was ever granted in it: its total is that of other options."""
    own = out / OWN
    if own.exists() and not Ledger.open(own).reservations():
        for suffix in ("", "-wal", "-shm", "-journal"):
            own.with_name(own.name + suffix).unlink(missing_ok=True)
