"""What questions tell about CIFAR-10 when Tiny-ImageNet is public, in vectors, without pictures.

    python benchmarks/retrieve_vectors.py --data ../shared/data --out DIR      # an hour of a core; resumable

The collection of retrieval_noise.py: 20,000 CIFAR-10 images as private, 20,000 of Tiny-ImageNet as public, in 64 public
directions of EfficientNet-Lite0. There is no joint space of texts and natural images here, so prompts are pictures:
Tiny-ImageNet's validation images of the 21 classes that belong to a class of CIFAR-10 (1,050 prompts). Real
mechanisms on a real ledger, T planned questions, δ = 1e-5; the test prompts are asked last, after T - 1,050 others,
where records have budgets of their own. Measured: the distance of conditions from the mean of the 200 nearest private
vectors, that of public neighbours alone being 100 %; and the share of conditions that a classifier of CIFAR-10
(logistic regression on the private vectors, for evaluation only) puts into the class the prompt belongs to. Writes
rows.jsonl and table.md into --out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from retrieval_noise import RECORDS, collection, features
from sklearn.linear_model import LogisticRegression

from sfumato.privacy.answers import Answers
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.private_query import BallPlan, NearestPlan, ball_sum, nearest_mean
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.progress import Progress
from sfumato.retrieval.conditions import ball_condition, nearest_condition
from sfumato.retrieval.overview import look_over
from sfumato.retrieval.plan import NEAREST_SHARE, Mechanism, make_plan
from sfumato.retrieval.public_side import PublicSide

DELTA, NEAREST, PLANNED_WITH = 1e-5, 200, 2_000
CLASSES = {
    "automobile": ("n02814533", "n03100240", "n03670208", "n04285008"), "bird": ("n01855672", "n02002724", "n02058221"),
    "cat": ("n02123045", "n02123394", "n02124075"), "deer": ("n02423022",),
    "dog": ("n02085620", "n02094433", "n02099601", "n02099712", "n02106662"), "frog": ("n01641577", "n01644900"),
    "ship": ("n03662601",), "truck": ("n03796401", "n03977966"),
}  # fmt: skip
"""Synsets of Tiny-ImageNet that are, or look like, a class of CIFAR-10."""
CELLS: tuple[tuple[Mechanism, float, int], ...] = tuple(
    (mechanism, epsilon, queries)
    for queries in (2_000, 10_000)
    for epsilon in (10.0, 1.0)
    for mechanism in ("topk", "ball", "ball-filter")
)


def prompts(data: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """(unit vectors float32 [1050, 64], number of the CIFAR-10 class of each)."""
    table = pq.read_table(data / "tiny_imagenet_32_val.parquet")
    order = np.random.default_rng(0).permutation(len(table))  # as `images` takes them
    synsets = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    names = json.loads(pq.read_schema(data / "cifar10_train.parquet").metadata[b"huggingface"])["info"][
        "features"
    ]["label"]["names"]
    number = {synset: names.index(name) for name, group in CLASSES.items() for synset in group}
    mine = np.array([number.get(synsets[i].split()[0], -1) for i in np.array(table["label"])[order].tolist()])
    asked = features("asked", data / "tiny_imagenet_32_val.parquet", 0, len(table), out)
    public = features("tiny", data / "tiny_imagenet_32_train.parquet", 0, RECORDS, out)
    _, axes = np.linalg.eigh(np.cov((public - public.mean(0)).astype(np.float64), rowvar=False))
    along = (asked[mine >= 0] - public.mean(0)) @ axes[:, ::-1][:, :64]
    return (along / np.linalg.norm(along, axis=1, keepdims=True)).astype(np.float32), mine[mine >= 0]


def answers(
    cell: tuple[Mechanism, float, int],
    private: np.ndarray,
    public: PublicSide,
    asked: np.ndarray,
    folder: Path,
) -> tuple[np.ndarray, np.ndarray]:
    """(conditions, what is told without asking) for the test prompts, float64 [1050, 64] each."""
    mechanism, epsilon, queries = cell
    folder.mkdir(parents=True)
    held = ProtectedVectors.create(folder / "vectors", private.shape[1])
    names = [str(i) for i in range(len(private))]
    held.add(private, names, names)
    ledger = Ledger.open(folder / "ledger.db", total=Budget(epsilon, DELTA))
    (folder / "answers").mkdir()
    kept, budget = Answers(folder / "answers"), Budget(epsilon, DELTA)
    if mechanism != "topk":
        _, public, first = look_over(budget, held, public, ledger, kept, len(private))
        budget = Budget(epsilon - first.epsilon, DELTA - first.delta)
    plan = make_plan(mechanism, budget, queries, float(len(private)), public)
    reservation = kept.reserve(ledger, "retrieve", plan.events, budget.delta)
    count, query = public.count(min(NEAREST_SHARE, plan.share)), plan.query

    def ask(key: str, direction: np.ndarray) -> np.ndarray:
        if isinstance(query, NearestPlan):
            answer, _ = nearest_mean(held, direction, query, reservation, key)
            return nearest_condition(answer, public.center(direction, count), plan, False).vector
        assert isinstance(query, BallPlan)
        ball = public.ball(direction, plan.public_count(public))
        answer, _ = ball_sum(held, ball, query, reservation, key)
        return ball_condition(answer, public.center(direction, count), plan, False).vector

    if mechanism == "ball-filter":  # elsewhere what others asked changes nothing
        others = np.random.default_rng(5).integers(len(public.prompts), size=queries - len(asked))
        with Progress(f"{mechanism}, ε {epsilon:g}: other questions", total=len(others)) as progress:
            for number, row in enumerate(others):
                direction = public.prompts[row].astype(np.float64)
                noise = (
                    np.random.default_rng(number).normal(size=len(direction)) / 40
                )  # no question comes twice
                ask(f"other {number}", (direction + noise) / np.linalg.norm(direction + noise))
                progress.advance()
    told = np.array([ask(f"mine {i}", z) for i, z in enumerate(asked.astype(np.float64))])
    return told, np.array([public.center(z, count) for z in asked])


def main() -> None:
    """Work through the cells that are missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    private, public = collection(options.data, options.out)
    asked, classes = prompts(options.data, options.out)
    public = PublicSide.of(public.vectors, public.prompts[:PLANNED_WITH], public.encoder)
    order = np.random.default_rng(0).permutation(
        pq.read_metadata(options.data / "cifar10_train.parquet").num_rows
    )
    labels = np.array(pq.read_table(options.data / "cifar10_train.parquet", columns=["label"])["label"])[
        order
    ][:RECORDS]
    judge = LogisticRegression(max_iter=2000).fit(private, labels)
    nearest = np.argsort(-(asked @ private.T), axis=1)[:, :NEAREST]
    truth = private.astype(np.float64)[nearest].mean(1)
    alone = np.array([public.center(z, public.count(NEAREST / RECORDS)) for z in asked])
    far = np.linalg.norm(alone - truth, axis=1).mean()

    def row(key: str, told: np.ndarray) -> dict[str, Any]:
        error = np.linalg.norm(told - truth, axis=1).mean() / far
        return {
            "key": key,
            "error": float(error),
            "agreement": float((judge.predict(told) == classes).mean()),
        }

    path, rows = options.out / "rows.jsonl", {}
    if path.exists():
        rows = {each["key"]: each for each in map(json.loads, path.read_text(encoding="utf-8").splitlines())}

    def done(key: str, made: Callable[[], dict[str, Any]]) -> None:
        if key not in rows:
            rows[key] = made()
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[key]) + "\n")
            print(rows[key], flush=True)

    done("public only | – | –", lambda: row("public only | – | –", alone))
    done("non-private | – | –", lambda: row("non-private | – | –", truth))
    for cell in CELLS:
        key = f"{cell[0]} | {cell[1]:g} | {cell[2]:,}"

        def made(cell: Any = cell, key: str = key) -> dict[str, Any]:
            number = sum(1 for _ in options.out.glob("cell-*"))  # an interrupted one is left behind
            told, without = answers(cell, private, public, asked, options.out / f"cell-{number}")
            return row(key, told) | {"without_asking": row("", without)}

        done(key, made)
    lines = [
        "| method | ε | T | condition's error | in the prompt's class | the same without asking |",
        "|---|---|---|---|---|---|",
    ]
    for each in rows.values():
        without = each.get("without_asking")
        said = "–" if without is None else f"{without['error']:.0%}, {without['agreement']:.0%}"
        lines.append(f"| {each['key']} | {each['error']:.0%} | {each['agreement']:.0%} | {said} |")
    (options.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
