"""Leave-one-out: does one out-of-distribution record leave a trace in the answers? A membership game.

    python benchmarks/retrieval_canary.py --out DIR [--rounds 400]      # minutes of a core

1,000 unit vectors of 64 numbers in clusters; the canary lies far from all of them. In each round a fair coin decides
whether it is in a new collection, then an attacker who knows all other vectors asks `--queries` prompts, each as near
to the canary as can be, and adds up the answers along the canary's part (the likelihood ratio, where the noise is
Gaussian). Mechanisms: top-k, ball, ball with per-record budgets, each at ε = 1 and 10 over all prompts, by the real
code with real ledgers; and two planted faults, which have to be found: an answer without noise, and budgets that are
given back after every prompt. From right guesses follows a lower bound on ε (Clopper-Pearson, 95 %; a low bound is no
evidence of privacy).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from canary_token import _guessed  # benchmarks/canary_token.py

from sfumato.privacy import private_query
from sfumato.privacy.accounting import calibrate
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.private_query import Ball, BallPlan, NearestPlan, ball_sum, nearest_mean
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.progress import Progress

RECORDS, DIMENSION, DELTA, RADIUS, K = 1_000, 64, 1e-5, 1.0, 20
EPSILONS = (1.0, 10.0)
LONG = 100  # prompts of the games with a cap of one participation


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32."""
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def plans(epsilon: float, queries: int) -> dict[str, BallPlan | NearestPlan]:
    """The three mechanisms at the same price."""
    budget = Budget(epsilon, DELTA)
    each = calibrate(lambda z: [NearestPlan(K, z, queries).planned()[0].total], budget)
    once = calibrate(lambda z: [NearestPlan(K, z, 1).planned()[0].total], budget)
    cap = max(1, queries // 2)
    return {
        "top-k": NearestPlan(K, each, queries),
        "ball": BallPlan(each, RADIUS, queries),
        "ball, per-record budgets": BallPlan(
            once * cap**0.5 * (1 + 1e-12), RADIUS, queries, per_unit_cap=cap
        ),
        "ball, per-record budgets, cap 1": BallPlan(once, RADIUS, queries, per_unit_cap=1),
    }


def play(
    folder: Path,
    plan: BallPlan | NearestPlan,
    epsilon: float,
    held: np.ndarray,
    canary: np.ndarray,
    queries: int,
    coin: bool,
) -> float:
    """One round: a new collection, all prompts, the attacker's score."""
    shutil.rmtree(folder, ignore_errors=True)
    private = ProtectedVectors.create(folder / "vectors", DIMENSION)
    vectors = np.concatenate([held, canary[None]]) if coin else held
    names = [str(i) for i in range(len(vectors))]
    private.add(vectors, names, names)
    ledger = Ledger.open(folder / "ledger.db", total=Budget(epsilon, DELTA))
    reservation = ledger.reserve("retrieve", plan.planned(), delta=DELTA)
    rng, score = np.random.default_rng(0), 0.0
    for number in range(queries):
        direction = unit(canary + 0.02 * rng.normal(size=DIMENSION)).astype(np.float64)
        if isinstance(plan, NearestPlan):
            nearest = held[np.argsort(-(held @ direction))[:K]].astype(np.float64)
            gone = nearest[-1] if coin is not None else 0  # what the canary would push out
            answer, _ = nearest_mean(private, direction, plan, reservation, str(number))
            score += float((answer * K - nearest.sum(0)) @ (canary - gone))
        else:
            answer, _ = ball_sum(
                private, Ball(direction, 0.9, np.zeros(DIMENSION)), plan, reservation, str(number)
            )
            score += float(answer[:-1] @ canary / RADIUS + answer[-1] * plan.count_weight)
    return score


def without_noise(call: Callable[[], float]) -> float:
    """A planted fault: the discrete Gaussian adds nothing."""
    honest = private_query.discrete_gaussian
    private_query.discrete_gaussian = lambda values, scale: values  # type: ignore[assignment]
    try:
        return call()
    finally:
        private_query.discrete_gaussian = honest


def without_budgets(call: Callable[[], float]) -> float:
    """A planted fault: no unit ever drops out, though the noise is that of the cap."""
    used = private_query.USED_UNIT
    private_query.USED_UNIT = 0  # nothing is used
    try:
        return call()
    finally:
        private_query.USED_UNIT = used


def main() -> None:
    """Play, print, write canary.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--queries", type=int, default=20)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    source = np.random.default_rng(0)
    centers = source.normal(size=(8, DIMENSION))
    held = unit(centers[source.integers(8, size=RECORDS)] + 0.5 * source.normal(size=(RECORDS, DIMENSION)))
    canary = unit(np.linalg.svd(centers)[2][-1])
    print(f"the canary's nearest neighbour has similarity {float((held @ canary).max()):.2f}")
    rows: list[dict[str, Any]] = []
    for epsilon in EPSILONS:
        games: list[tuple[str, Any, Callable[[Callable[[], float]], float]]] = [
            (name, plan, lambda call: call())
            for name, plan in plans(epsilon, options.queries).items()
            if "cap 1" not in name
        ]
        games.append(("planted: no noise", plans(epsilon, options.queries)["ball"], without_noise))
        one = plans(epsilon, LONG)["ball, per-record budgets, cap 1"]
        games.append(("ball, per-record budgets, cap 1", one, lambda call: call()))
        games.append(("planted: budgets given back", one, without_budgets))
        for name, plan, around in games:
            rounds = options.rounds if plan.queries == options.queries else max(60, options.rounds // 4)
            coins, scores = source.random(rounds) < 0.5, []
            with Progress(f"{name}, ε {epsilon:g}", total=rounds, unit="rounds") as progress:
                for coin in coins:

                    def call(epsilon: float = epsilon, plan: Any = plan, coin: bool = bool(coin)) -> float:
                        return play(options.out / "world", plan, epsilon, held, canary, plan.queries, coin)

                    scores.append(around(call))
                    progress.advance()
            rows.append({"mechanism": name, "epsilon": epsilon, **_guessed(np.array(scores), coins)})
            print(json.dumps(rows[-1]), flush=True)
    (options.out / "canary.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
