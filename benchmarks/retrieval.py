"""Private queries a second, and memory.

    python benchmarks/retrieval.py --quick --json FILE     # 100,000 vectors; a few minutes
    python benchmarks/retrieval.py --json FILE             # also a million; needs 10 GB of memory and 3 of disk

For random unit vectors of 512 numbers around 200 centres, one process and the threads given: seconds a query of top-k
(Poisson rate 0.01, k = 20), of a ball of about 0.2 %, and of the same with per-unit budgets, noise and durable charges
included; beside top-k with a mask over the whole set for each query, as released code does it, without noise or ledger:
all scores and a mask in torch, and faiss (`pip install faiss-cpu`, left out where it is missing) with a selector of the
sampled rows. All search exactly. Memory is what opening the index and asking adds to the process, over the size of the
vectors. The service under load is in retrieval_service.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.private_query import Ball, BallPlan, NearestPlan, ball_sum, nearest_mean
from sfumato.privacy.protected_vectors import ProtectedVectors

DIMENSION, DIRECTIONS, K, RATE, SHARE = 512, 64, 20, 0.01, 0.002


def vectors(count: int, rng: np.random.Generator) -> np.ndarray:
    """Clustered unit vectors, float32 [N, 512]."""
    centers = rng.normal(size=(200, DIMENSION)).astype(np.float32)
    out = np.empty((count, DIMENSION), np.float32)
    for start in range(0, count, 50_000):
        part = out[start : start + 50_000]
        part[:] = (
            rng.normal(size=part.shape).astype(np.float32) + 0.7 * centers[rng.integers(200, size=len(part))]
        )
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return out


def masked_top_k(held: np.ndarray, direction: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The baseline: a coin for every record, scores of all, the best of those with heads."""
    scores = torch.from_numpy(held) @ torch.from_numpy(direction)
    scores[torch.from_numpy(rng.random(len(held)) >= RATE)] = -2
    return torch.topk(scores, K).indices.numpy()


def faiss_top_k(held: np.ndarray, directions: np.ndarray, rng: np.random.Generator) -> Any:
    """The same with faiss: a flat index, and a selector made of the rows with heads; None where faiss is missing."""
    try:
        import faiss  # type: ignore[import-not-found]
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(DIMENSION)
    index.add(held)  # type: ignore[call-arg]

    def asked(i: int) -> np.ndarray:
        rows = np.flatnonzero(rng.random(len(held)) < RATE)
        chosen = faiss.SearchParameters(sel=faiss.IDSelectorBatch(rows))  # type: ignore[call-arg]
        return index.search(directions[i : i + 1], K, params=chosen)[1][0]  # type: ignore[call-arg]

    return asked


def measure(count: int, queries: int, folder: Path) -> list[dict[str, Any]]:
    """Seconds a query of each way, on one collection."""
    rng = np.random.default_rng(0)
    held = vectors(count, rng)
    directions = vectors(queries, np.random.default_rng(1))
    basis = np.linalg.qr(rng.normal(size=(DIMENSION, DIRECTIONS)))[0]
    sample = held[rng.integers(count, size=min(count, 20_000))]
    cuts = [float(np.quantile(sample @ d, 1 - SHARE)) for d in directions]
    private = ProtectedVectors.create(folder / f"vectors-{count}", DIMENSION)
    names = [str(i) for i in range(count)]
    started = time.monotonic()
    private.add(held, names, names)
    build = time.monotonic() - started
    ledger = Ledger.open(folder / f"{count}.db", total=Budget(1e6, 0.5))
    top = NearestPlan(K, 1.0, queries, RATE)
    ball = BallPlan(5.0, 0.5, queries, basis)
    budgets = BallPlan(5.0, 0.5, queries, basis, per_unit_cap=100)
    ways: dict[str, Any] = {
        "mask over the whole set, no ledger": lambda i: masked_top_k(held, directions[i], rng),
    }
    if (peer := faiss_top_k(held, directions, rng)) is not None:
        ways["faiss, selector of the sampled rows, no ledger"] = peer
    for name, plan in (("top-k", top), ("ball", ball), ("ball, per-unit budgets", budgets)):
        reservation = ledger.reserve(name, plan.planned(), delta=1e-6)

        def asked(i: int, name: str = name, plan: Any = plan, reservation: Any = reservation) -> None:
            key = f"{name} {i}"
            if isinstance(plan, NearestPlan):
                nearest_mean(private, directions[i], plan, reservation, key)
            else:
                center = np.zeros(DIMENSION)
                ball_sum(private, Ball(directions[i].astype(float), cuts[i], center), plan, reservation, key)

        ways[name] = asked
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(queries):  # in turns, so that all see the same machine
        for name, way in ways.items():
            started = time.monotonic()
            way(i)
            seconds[name].append(time.monotonic() - started)
    return [
        {"records": count, "way": name, "queries": queries, "median_s": float(np.median(each)),
         "p90_s": float(np.quantile(each, 0.9)), "build_s": build}
        for name, each in seconds.items()
    ]  # fmt: skip


def memory(count: int, folder: Path) -> float:
    """What opening the index and asking adds to a process at most, over the size of the vectors (Linux)."""
    code = f"""
import numpy as np
from pathlib import Path
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.privacy.vector_search import ranked, within
def resident(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name))
z = np.zeros((1, {DIMENSION})); z[0, 0] = 1
import torch; torch.ones(9, 9) @ torch.ones(9, 9)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
private = ProtectedVectors(Path({str(folder / f"vectors-{count}")!r}), {DIMENSION})
within(private, z, np.array([0.2]))
ranked(private, z[0], {K}, None, np.random.default_rng(0).random({count}) < {RATE})
print((resident("VmHWM") - before) * 1024 / ({count} * {DIMENSION} * 4))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="100,000 vectors only")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where the vectors are put meanwhile; default: a temporary folder"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)  # numpy's
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        for count in (100_000,) if options.quick else (100_000, 1_000_000):
            rows += measure(count, options.queries, folder)
            ratio = memory(count, folder)
            print(
                f"{count:,} records, made in {rows[-1]['build_s']:.1f} s; memory {ratio:.2f} of the vectors' size"
            )
            for row in [row for row in rows if row["records"] == count]:
                row["memory"] = ratio
                print(f"  {row['way']:<46} {1000 * row['median_s']:8.1f} ms (p90 {1000 * row['p90_s']:.1f})")
    print(
        f"largest resident set of the whole run: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
