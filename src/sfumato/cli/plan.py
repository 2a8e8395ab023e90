"""`sfumato plan`: what noise, steps and time a budget buys. Reads no private data and spends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sfumato.cli.parsing import parse, say
from sfumato.errors import InputError
from sfumato.synthesis.options import Method, seconds


@dataclass(frozen=True)
class PlanOptions:
    """Show what a privacy and a time budget buy on this machine. Reads no private data, costs nothing."""

    units: int
    """Number of private units (images, or groups) to plan for; a public figure or a guess, above 0."""

    epsilon: float
    """Privacy budget ε, for adding or removing one unit; above 0."""

    delta: float | None = None
    """Probability δ with which the ε bound may fail. Default: 1/(n·ln n), n the units, never above n^-1.1."""

    method: Method = "privimage"
    """The method to plan for, as in `sfumato synthesize`."""

    time_budget: str = "10m"
    """Wall-clock time the run may take on this machine: 90s, 10m, 2h."""

    size: int = 28
    """Side of the square images, in pixels."""

    channels: Literal[1, 3] = 1
    """Colour channels: 1 (grey) or 3 (RGB)."""

    labels: int = 10
    """Number of labels; 1 for a set without labels."""

    def check(self) -> None:
        """Refuse values that can never work (InputError)."""
        for name, fits in (
            ("units", self.units >= 1),
            ("epsilon", 0 < self.epsilon < float("inf")),
            ("delta", self.delta is None or 0 < self.delta < 1),
            ("size", 8 <= self.size <= 256),
            ("labels", self.labels >= 1),
        ):
            if not fits:
                raise InputError(f"--{name} {getattr(self, name)} cannot be used. See `sfumato plan --help`.")
        seconds(self.time_budget)


def run(arguments: Sequence[str]) -> int:
    """Parse, plan, print."""
    options = parse(PlanOptions, "sfumato plan", arguments)
    options.check()
    from sfumato.synthesis.planner import make_plan

    say(str(make_plan(options)))
    return 0
