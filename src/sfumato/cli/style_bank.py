"""`sfumato style-bank`: public styles as tokens, for less noise in `sfumato personalize`."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.parsing import parse, say
from sfumato.personalization.options import StyleBankOptions


def run(arguments: Sequence[str]) -> int:
    """Parse, learn the public tokens, write the file."""
    options = parse(StyleBankOptions, "sfumato style-bank", arguments)
    options.check()
    from sfumato.personalization.make_bank import make_bank

    bank = make_bank(options)
    say(
        f"{len(bank.names)} styles, {bank.basis.shape[1]} directions, clip radius "
        f"{bank.radius(bank.directions(None)):.3g}"
    )
    say(f"style bank: {options.out}")
    return 0
