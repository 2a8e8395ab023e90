"""Noise at equal guarantee: top-k as published, full top-k, ball, and ball with per-record budgets.

    python benchmarks/retrieval_noise.py --data ../shared/data --out DIR      # half an hour of a core; resumable

Private: 20,000 images of CIFAR-10; public: 20,000 of Tiny-ImageNet; prompts: other Tiny-ImageNet images. Vectors are
EfficientNet-Lite0 features along 64 public principal directions, of length 1. A neighbourhood is what lies within the
similarity of a prompt's public neighbour of the same rank. Writes loads.json (how often private records lie in balls,
measured over all prompts) and table.md: the standard deviation, per coordinate, of a mean over the neighbourhood, at
equal (ε, δ) for adding or removing one image. `--run` puts 10,000 real questions to the real mechanism and counts who
dropped out.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from sfumato.encoders.encoder import open_encoder
from sfumato.privacy.accounting import calibrate
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.private_query import BallPlan, NearestPlan, ball_sum
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.progress import Progress
from sfumato.retrieval.plan import best_cap, loads
from sfumato.retrieval.public_side import PublicSide

RECORDS, PROMPTS, DIRECTIONS, DELTA = 20_000, 10_000, 64, 1e-5
QUERIES, EPSILONS, NEIGHBOURHOODS, RATE = (100, 1_000, 10_000), (1.0, 10.0), (50, 200, 1_000), 0.01


def images(path: Path, start: int, count: int) -> np.ndarray:
    """uint8 [count, 32, 32, 3] of a Hugging Face parquet file, every so many rows so that all classes come."""
    column = pq.read_table(path, columns=["image"])["image"].to_pylist()
    chosen = np.random.default_rng(0).permutation(len(column))[start : start + count]
    return np.stack([np.asarray(Image.open(io.BytesIO(column[i]["bytes"])).convert("RGB")) for i in chosen])


def features(name: str, path: Path, start: int, count: int, out: Path) -> np.ndarray:
    """EfficientNet-Lite0 features, float32 [count, 1280], kept in a file."""
    held = out / f"{name}.npy"
    if not held.exists():
        encoder, pictures = open_encoder("efficientnet-lite0"), images(path, start, count)
        parts = []
        with Progress(name, total=count, unit="images") as progress:
            for first in range(0, count, 256):
                parts.append(encoder(pictures[first : first + 256]))
                progress.advance(len(parts[-1]))
        np.save(held, np.concatenate(parts))
    return np.load(held)


def frame(public: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """From features to unit vectors along 64 principal directions of the public ones, float32 [N, 64]."""
    mean = public.mean(0)
    _, axes = np.linalg.eigh(np.cov((public - mean).astype(np.float64), rowvar=False))
    basis = axes[:, ::-1][:, :DIRECTIONS]

    def along(found: np.ndarray) -> np.ndarray:
        vectors = (found - mean) @ basis
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    return along


def collection(data: Path, out: Path) -> tuple[np.ndarray, PublicSide]:
    """(private unit vectors [20,000, 64], the public side with 10,000 prompts)."""
    private = features("cifar10", data / "cifar10_train.parquet", 0, RECORDS, out)
    public = features("tiny", data / "tiny_imagenet_32_train.parquet", 0, RECORDS, out)
    asked = features("prompts", data / "tiny_imagenet_32_train.parquet", RECORDS, PROMPTS, out)
    along = frame(public)
    return along(private), PublicSide.of(along(public), along(asked), "efficientnet-lite0/64")


def private_loads(private: np.ndarray, public: PublicSide, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(questions each private record is near to, size of each ball), over all prompts."""
    load, sizes = np.zeros(len(private), np.int64), []
    for start in range(0, len(public.prompts), 500):
        asked = public.prompts[start : start + 500]
        cuts = -np.partition(-(asked @ public.vectors.T), rank - 1, axis=1)[:, rank - 1]
        inside = asked @ private.T >= cuts[:, None]
        load += inside.sum(0)
        sizes.append(inside.sum(1))
    return load, np.concatenate(sizes)


def noise(private: np.ndarray, public: PublicSide, out: Path) -> str:
    """The table, as Markdown; loads.json beside it."""
    measured: dict[str, Any] = {}
    lines = [
        "| M | T | ε | top-k, q = 0.01 | full top-M | ball | ball + budgets | cap L | kept | dropped out |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    single: dict[tuple[str, int, float], float] = {}
    for epsilon in EPSILONS:
        budget = Budget(epsilon, DELTA)
        for queries in QUERIES:
            for way, rate in (("sampled", RATE), ("full", 1.0)):
                plan = NearestPlan(1, 1.0, queries, rate).planned()[0].event
                if rate < 1:
                    made = lambda z, q=queries: [NearestPlan(1, z, q, RATE).planned()[0].total]  # noqa: E731
                else:
                    made = lambda z, q=queries: [NearestPlan(1, z, q).planned()[0].total]  # noqa: E731
                del plan
                single[way, queries, epsilon] = calibrate(made, budget)
        single["once", 1, epsilon] = calibrate(lambda z: [NearestPlan(1, z, 1).planned()[0].total], budget)
    for size in NEIGHBOURHOODS:
        load, sizes = private_loads(private, public, size)
        measured[str(size)] = {
            "load": {str(q): float(np.quantile(load, q)) for q in (0.5, 0.9, 0.99, 1.0)},
            "ball": {str(q): float(np.quantile(sizes, q)) for q in (0.1, 0.5, 0.9)},
        }
        for queries in QUERIES:
            share = load * (queries / len(public.prompts))
            cap = best_cap(
                loads(public, size / len(public.vectors), queries), queries
            )  # from public figures alone
            kept = np.minimum(share, cap).sum() / share.sum()
            for epsilon in EPSILONS:
                once = single["once", 1, epsilon]
                row = (
                    2 * single["sampled", queries, epsilon] / max(1, round(size * RATE)),
                    2 * single["full", queries, epsilon] / size,
                    single["full", queries, epsilon] / size,
                    once * np.sqrt(cap) / size,
                )
                lines.append(
                    f"| {size:,} | {queries:,} | {epsilon:g} | " + " | ".join(f"{x:.3g}" for x in row)
                    + f" | {cap:,} | {kept:.0%} | {(share > cap).mean():.1%} |"
                )  # fmt: skip
    (out / "loads.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return "\n".join(lines) + "\n\n" + json.dumps(measured, indent=1) + "\n"


def run(private: np.ndarray, public: PublicSide, out: Path, size: int, epsilon: float) -> str:
    """10,000 real questions to the mechanism with per-record budgets; what was kept, and who dropped out."""
    cap = best_cap(loads(public, size / len(public.vectors), PROMPTS), PROMPTS)
    once = calibrate(lambda z: [NearestPlan(1, z, 1).planned()[0].total], Budget(epsilon, DELTA))
    plan = BallPlan(once * cap**0.5 * (1 + 1e-12), 1.0, PROMPTS, per_unit_cap=cap)
    folder = out / f"index-{size}-{epsilon:g}"
    names = [str(i) for i in range(len(private))]
    if not folder.exists():
        ProtectedVectors.create(folder, DIRECTIONS).add(private, names, names)
    held = ProtectedVectors(folder, DIRECTIONS)
    ledger = Ledger.open(out / f"index-{size}-{epsilon:g}.ledger.db", total=Budget(epsilon, DELTA))
    reservation = ledger.reserve("retrieve", plan.planned(), delta=DELTA, key="run")
    counted, truth = [], []
    with Progress("questions", total=PROMPTS) as progress:
        for number, direction in enumerate(public.prompts):
            ball = public.ball(direction, size)
            answer, _ = ball_sum(held, ball, plan, reservation, f"prompt {number}")
            counted.append(answer[-1])
            truth.append(int((private @ direction >= ball.threshold).sum()))
            progress.advance()
    counted, truth = np.array(counted), np.array(truth)
    parts = [slice(i * PROMPTS // 5, (i + 1) * PROMPTS // 5) for i in range(5)]
    kept = [f"{counted[p].sum() / truth[p].sum():.1%}" for p in parts]
    return (
        f"M {size}, ε {epsilon:g}: cap {cap}, noise of the number {plan.count_noise:.1f}; counted over there, by "
        f"fifths of the run: {', '.join(kept)}\n"
    )


def main() -> None:
    """Encode, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--run", type=int, nargs="*", help="neighbourhoods to put 10,000 real questions to, e.g. 200"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    private, public = collection(options.data, options.out)
    table = noise(private, public, options.out)
    for size in options.run or ():
        for epsilon in EPSILONS:
            table += run(private, public, options.out, size, epsilon)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
