"""What a budget buys for a style: noise beside what a style usually is, and what would be enough.

Reads nothing private."""

from __future__ import annotations

import numpy as np

from sfumato.personalization.aggregation import TOO_NOISY, geometry, make_plan, what_would_do
from sfumato.personalization.dp_sgd_inversion import dp_sgd_plan
from sfumato.personalization.options import Method
from sfumato.personalization.style_bank import StyleBank, embedded_bank
from sfumato.personalization.text_to_image import EMBEDDED
from sfumato.privacy.budget import Budget, delta_warning
from sfumato.report.words import claim


def plan_lines(
    method: Method,
    budget: Budget,
    units: int,
    anchor: np.ndarray,
    vocabulary: np.ndarray,
    bank: StyleBank | None,
    *,
    directions: int | None = None,
    select: bool = False,
) -> list[str]:
    """The plan of `sfumato personalize` in words."""
    lines = []
    candidates = len(bank.names) if bank is not None else 0
    if method == "dp-sgd":
        plan = dp_sgd_plan(budget, units)
        lines.append(
            f"dp-sgd: {plan.steps} steps of {plan.expected_batch:g} units on average, noise multiplier "
            f"{plan.noise_multiplier:.3g}"
        )
    else:
        shape = geometry(method, anchor, vocabulary, bank, directions)
        made = make_plan(method, budget, units, shape, candidates=candidates, select=select)
        if made.noise_multiplier is None:
            lines.append(
                f"{method}: one vote for each unit among {candidates} public styles, ε {budget.epsilon:g} and δ 0"
            )
        else:
            lines.append(
                f"{method}: noise multiplier {made.noise_multiplier:.4g} on {shape.directions} numbers, clip radius "
                f"{shape.radius:.3g}; noise {100 * made.noise_share:.0f} % as long as a usual style"
            )
            enough, epsilon = what_would_do(made, budget)
            verdict = "enough" if made.noise_share <= TOO_NOISY else "NOT ENOUGH"
            lines.append(
                f"{verdict}: it takes {enough} units at this ε, or ε {claim(epsilon)} with {units} units"
            )
    if warning := delta_warning(budget.delta, units):
        lines.append(f"note: {warning}")
    return lines


def embedded_plan(method: Method, budget: Budget, units: int) -> list[str]:
    """The plan for the embedded model and its bank."""
    bank = StyleBank.load(embedded_bank())
    return [
        *plan_lines(method, budget, units, bank.anchor.astype(np.float64), bank.tokens, bank),
        f"for the embedded model ({EMBEDDED}); another model's figures come from its own style bank, with `sfumato "
        "personalize … --dry-run`",
    ]
