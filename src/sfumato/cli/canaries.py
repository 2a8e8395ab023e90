"""`sfumato canaries`: plant canaries in a training set, so that an audit can bound ε from below."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from sfumato.audit.canary_options import PlantOptions
from sfumato.cli.parsing import parse, say
from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.audit.canaries import Sealed

HELP = """usage: sfumato canaries ACTION [options]

Images whose membership in the training set was drawn by coins: an audit of what was trained on it then bounds
its ε from below. A bound above the claim shows a fault; a low bound is no evidence of privacy.

actions:
  plant PRIVATE --count N --out DIR   draw the coins, seal them, write the folder to train on

Details: sfumato canaries ACTION --help
"""


def run(arguments: Sequence[str]) -> int:
    """Run one action and return its exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        say(HELP.rstrip())
        return 0 if arguments else 2
    action = arguments[0]
    if action != "plant":
        near = get_close_matches(action, ["plant"], n=1)
        hint = f" Did you mean `sfumato canaries {near[0]}`?" if near else " See `sfumato canaries --help`."
        raise InputError(f"unknown action {action!r}; it is plant; nothing was planted.{hint}")
    return _plant(arguments[1:])


def _plant(arguments: Sequence[str]) -> int:
    options = parse(PlantOptions, "sfumato canaries plant", arguments)
    options.check()
    from sfumato.audit.canaries import plant

    sealed = plant(
        options.private, count=options.count, out=options.out, kind=options.kind, delta=options.delta,
        size=options.size, channels=options.channels, skip_unreadable=options.skip_unreadable,
    )  # fmt: skip
    for line in planted(sealed):
        say(line)
    return 0


def planted(sealed: Sealed) -> list[str]:
    """What was planted, what it can show, and what to do next, as lines of text; nothing of who is in."""
    train, seal = sealed.folder / "train", sealed.folder / "sealed.json"
    which = "private images, about half left out" if sealed.kind == "own" else "patterns, about half added"
    needed = (f"ε {claim}: {count or 0:,}" for claim, count in sealed.needed.items() if count is not None)
    hopeless = ", ".join(f"ε {claim}" for claim, count in sealed.needed.items() if count is None)
    return [
        f"planted: {len(sealed):,} canaries ({which}) in {train}, seal {sealed.identity[:16]}",
        f"they can show ε {sealed.cap:.2f} at most (δ {sealed.delta:g}, 95 %, every guess right); an audit, "
        f"which tries up to {sealed.looks} ways of guessing, {sealed.audit_cap:.2f}",
        f"canaries without which an audit cannot contradict a claim of {', '.join(needed)}"
        + (f"; of {hopeless}: no number can at this δ" if hopeless else ""),
        "Nobody who trains may look at the seal. Train with each image a unit, charged to the ledger of the private "
        "images like any training, then audit:",
        f"  sfumato synthesize {train} --public-size {sealed.expected_images} --ledger LEDGER --epsilon E --out RUN",
        f"  sfumato audit RUN --train {train} --holdout HELD --canaries {seal}",
        f"{sealed.folder} holds private images and who of them is in: for their owner only, not for release.",
    ]
