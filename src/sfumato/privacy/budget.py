"""What may be spent: (epsilon, delta), and the neighbouring relation every figure is stated for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from sfumato.errors import InputError


class Relation(StrEnum):
    """Which two data sets count as neighbours. A printed epsilon always names one of these."""

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    """One data set has one unit more than the other."""

    REPLACE_ONE = "replace_one"
    """Same number of units, one of them replaced by any other."""


ADD_OR_REMOVE_ONE = Relation.ADD_OR_REMOVE_ONE
REPLACE_ONE = Relation.REPLACE_ONE


@dataclass(frozen=True)
class Amount:
    """An amount of privacy loss, possibly none: what a ledger has spent, or has left.

    Raises InputError when epsilon is negative, infinite or not a number, or delta is outside [0, 1).
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        epsilon, delta = _number(self.epsilon, "epsilon"), _number(self.delta, "delta")
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise InputError(
                f"epsilon must be a finite number and not negative, not {epsilon}; no budget was spent. "
                "Common choices are 1 (strong) to 10 (weak)"
            )
        if not 0 <= delta < 1:
            raise InputError(
                f"delta must be at least 0 and below 1, not {delta}; no budget was spent. "
                "Choose it well below 1 / (number of units), for example 1e-5 or 1e-6"
            )
        object.__setattr__(self, "epsilon", epsilon)
        object.__setattr__(self, "delta", delta)


@dataclass(frozen=True)
class Budget(Amount):
    """The most that may be spent: (epsilon, delta)-differential privacy with epsilon > 0.

    Raises InputError when epsilon is not a positive finite number or delta is outside [0, 1).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon == 0:
            raise InputError(
                "epsilon must be above 0: with none, nothing may be learnt from the private images; no "
                "budget was spent. Give a positive epsilon, or use the method public-only, which needs none"
            )


def delta_warning(delta: float, n: int) -> str | None:
    """One line of warning when `delta` is too large for `n` units (declared or DP-counted), else None.

    A mechanism that publishes one unit outright with probability 1/n is (0, 1/n)-DP, so delta must be well
    below 1/n. The line warned at is n^-1.1.
    """
    if n > 0 and delta > n**-1.1:
        return (
            f"delta {delta:g} is large for {n} units: a release that publishes one unit in full now and then "
            f"would satisfy it. Choose delta below {n**-1.1:.1g}"
        )
    return None


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise InputError(f"{name} must be a number, not {value!r}; no budget was spent")
    return float(value)  # type: ignore[arg-type]
