"""`sfumato ledger`: create, show, verify and close the account of one protected data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from sfumato.cli.parsing import act, parse, say
from sfumato.errors import InputError, LedgerError

HELP = """usage: sfumato ledger ACTION [options]

The account of one protected data set: its whole budget, every charge, refusal beyond it. Keep ONE ledger
for one set of sensitive images, whatever is run on it, and keep it where it is backed up.

actions:
  create LEDGER --epsilon E --delta D   start an account with a total budget, fixed for ever
  show LEDGER                           what was granted, spent, refused and is left
  verify LEDGER | RELEASE               check an account's every row, or recompute the ε of a release
  close LEDGER RESERVATION              settle a charge whose run will not be resumed

LEDGER is a file or an SQLAlchemy URL (sqlite:///x.db, postgresql://...).
Details: sfumato ledger ACTION --help
"""


@dataclass(frozen=True)
class CreateOptions:
    """Start the account of one protected data set. Its total budget cannot be changed afterwards."""

    ledger: Positional[str]
    """Where: a file, or an SQLAlchemy URL (sqlite:///x.db, postgresql://...)."""

    epsilon: float
    """Total privacy budget ε of the data set over all runs, for adding or removing one unit; above 0."""

    delta: float
    """Total δ over all runs, a probability well below 1 / number of units. Each run takes its share."""

    name: str = ""
    """Public name of the data set. Default: none."""


@dataclass(frozen=True)
class ShowOptions:
    """Show what an account granted, what was spent, refused, and what is left."""

    ledger: Positional[str]
    """The account: a file, or an SQLAlchemy URL."""


@dataclass(frozen=True)
class VerifyOptions:
    """Check an account row by row, or recompute the ε of a release from its events alone.

    Exit status 1 when something does not hold.
    """

    target: Positional[str]
    """An account (a file or an SQLAlchemy URL), or a release (its folder, the run's, or privacy.json)."""

    head: str | None = None
    """Ledger head kept elsewhere (privacy.json holds one) that the account must contain, so that an older
    copy is noticed. Default: none."""


@dataclass(frozen=True)
class CloseOptions:
    """Settle a charge whose run will not be resumed. Work that began stays spent.

    If nothing began, all is given back. If a part began, the rest is given back only with --outputs-unseen.
    """

    ledger: Positional[str]
    """The account: a file, or an SQLAlchemy URL."""

    reservation: Positional[str]
    """The charge, by its id or the beginning of it, as `sfumato ledger show` prints it."""

    outputs_unseen: bool = False
    """Your word that the run was stopped for a reason that has nothing to do with what it had put out (a
    crash, a deadline). Only then may work that never began be given back."""


def run(arguments: Sequence[str]) -> int:
    """Run one action and return its exit status."""
    actions = {"create": _create, "show": _show, "verify": _verify, "close": _close}
    return act("sfumato ledger", HELP, actions, arguments)


def _create(arguments: Sequence[str]) -> int:
    options = parse(CreateOptions, "sfumato ledger create", arguments)
    from sfumato.privacy.budget import Budget
    from sfumato.privacy.ledger import Ledger

    total = Budget(options.epsilon, options.delta)
    try:
        Ledger.open(options.ledger)
    except InputError:
        ledger = Ledger.open(options.ledger, total=total, name=options.name)
    else:
        raise LedgerError(
            f"{options.ledger} is a ledger already and was left as it is. `sfumato ledger show` shows it; "
            "an account's total is fixed."
        )
    say(f"created {options.ledger}: ε {ledger.total.epsilon:g}, δ {ledger.total.delta:g}")
    return 0


def _show(arguments: Sequence[str]) -> int:
    options = parse(ShowOptions, "sfumato ledger show", arguments)
    from sfumato.privacy.ledger import Ledger

    ledger = Ledger.open(options.ledger)
    named = f" of {ledger.name}" if ledger.name else ""
    say(f"ledger{named}: {options.ledger}")
    for name, amount in (("total", ledger.total), ("spent", ledger.spent), ("left", ledger.remaining)):
        say(f"  {name:<6} ε {amount.epsilon:<10.6g} δ {amount.delta:.3g}")
    reservations = ledger.reservations()
    if reservations:
        say("charges, oldest first (an open one counts at its full price until it is settled):")
    for reservation in reservations:
        say(
            f"  {reservation.id}  {reservation.status:<8} ε {reservation.epsilon:<10.6g} "
            f"δ {reservation.delta:<9.3g} {reservation.label}"
        )
        for planned in reservation.planned:
            begun = reservation.begun(planned.mechanism)
            say(f"      {planned.mechanism}: {begun} of {planned.count} begun; {planned.says}")
    for refusal in ledger.refusals():
        say(f"  refused {refusal['time']}  ε {refusal['epsilon']:.6g}  {refusal['label']}")
    say(f"head {ledger.head}")
    return 0


def _verify(arguments: Sequence[str]) -> int:
    options = parse(VerifyOptions, "sfumato ledger verify", arguments)
    certificate = certificate_file(options.target)
    if certificate is not None:
        return _verify_release(certificate)
    from sfumato.privacy.ledger import Ledger

    ledger = Ledger.open(options.target)
    try:
        rows = ledger.verify(*([options.head] if options.head else []))
    except LedgerError as error:
        say(f"NOT intact: {error}")
        return 1
    say(
        f"intact: {rows} rows, spent ε {ledger.spent.epsilon:.6g} of {ledger.total.epsilon:g}, "
        f"head {ledger.head}"
    )
    return 0


def _verify_release(file: Path) -> int:
    from sfumato.report.certificate import verify_certificate

    try:
        certificate = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}.") from None
    except ValueError:
        raise InputError(f"{file} is not JSON; it is no certificate of sfumato.") from None
    verification = verify_certificate(certificate)
    say(str(verification))
    return 0 if verification.ok else 1


def certificate_file(target: str) -> Path | None:
    """The privacy.json that `target` names: itself, in a release or a run; None when it is a ledger."""
    path = Path(target)
    if path.suffix == ".json":
        return path
    for file in (path / "privacy.json", path / "release" / "privacy.json"):
        if file.is_file():
            return file
    if path.is_dir():
        raise InputError(f"{target}: there is no privacy.json in it; name a release, or a ledger's file.")
    return None


def _close(arguments: Sequence[str]) -> int:
    options = parse(CloseOptions, "sfumato ledger close", arguments)
    from sfumato.privacy.ledger import Ledger

    ledger = Ledger.open(options.ledger)
    found = [each for each in ledger.reservations() if each.id.startswith(options.reservation)]
    if len(found) != 1:
        raise InputError(
            f"{options.reservation}: {'more than one' if found else 'no'} charge has this id; "
            f"nothing was changed. `sfumato ledger show {options.ledger}` lists them."
        )
    reservation = found[0]
    if reservation.status != "open":
        say(f"{reservation.id} is settled already, at ε {reservation.epsilon:.6g}")
        return 0
    before = reservation.epsilon
    reservation.settle(outputs_unseen=options.outputs_unseen)
    after = reservation.epsilon
    say(f"{reservation.id} settled at ε {after:.6g}; ε {before - after:.6g} given back")
    return 0
