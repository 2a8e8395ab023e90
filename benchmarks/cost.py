"""How cost grows: time and memory of DP-SGD against image size, network, noise levels K and number of images n.

    python benchmarks/cost.py --out runs/cost [--tier cpu|full] [--axes size network K n]

One factor at a time, from a base point (16 pixels, grey, `tiny`, K = 4). Each point runs the shipped `dp_sgd` on a
real ledger in a process of its own, with one thread. Times are processor time of that process, so other work on the
machine disturbs them little; on an accelerator (tier full) they are wall time. Points go to --out/cost.jsonl as they
finish: the same command goes on where it stopped. Tables for RESULTS.md are printed at the end. Tier cpu takes about
ten minutes of an idle core.

size, network, K: every image is in every step's batch (q = 1), so a step has an exact number of rows (image x noise
level). A step is everything between two updates: charging the ledger, drawing, gathering, clipped gradients, noise and
Adam. Memory is the peak of resident memory during these steps, above what the process held just before `dp_sgd` (on an
accelerator: the peak of what was allocated there).

n: images of 16 pixels in an idx file, opened (decoded and cached) and opened again, and a step that draws 64 rows on
average from all n; of it, drawing the batch and charging the ledger are also timed alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BASE = {"size": 16, "network": "tiny", "K": 4}
AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "cpu": {
        "size": (16, 32, 64), "network": ("tiny", "small", "medium", "paper"), "K": (1, 4, 8, 16),
        "n": (10_000, 100_000, 1_000_000),
    },
    "full": {
        "size": (16, 32, 64, 128), "network": ("tiny", "small", "medium", "paper", "large"), "K": (1, 4, 8, 16, 32),
        "n": (10_000, 100_000, 1_000_000),
    },
}  # fmt: skip
ROWS = {"cpu": 64, "full": 1024}  # of a step
SECONDS = {"cpu": 4.0, "full": 10.0}  # of steps, after the first one; two steps at least
LABELS = 10


def main() -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for cost.jsonl")
    parser.add_argument("--tier", choices=tuple(AXES), default="cpu")
    parser.add_argument("--axes", choices=("size", "network", "K", "n"), nargs="+", default=list(AXES["cpu"]))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(json.loads(options.only))))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "cost.jsonl"
    wanted = list(points(options.tier, options.axes))
    for point in wanted:
        if json.dumps(point) in finished(file):
            continue
        print("measuring", *(f"{name}={value}" for name, value in point.items()), file=sys.stderr, flush=True)
        rows = {**finished(file), json.dumps(point): {"point": point, **in_a_child(point)}}
        half = file.with_suffix(".part")
        half.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
        os.replace(half, file)
    done = finished(file)
    print(tables([done[json.dumps(point)] for point in wanted]))


def points(tier: str, axes: list[str]) -> Iterator[dict[str, Any]]:
    """The points of the chosen axes, each once."""
    met = set()
    for axis in axes:
        for value in AXES[tier][axis]:
            point = {"tier": tier, "n": value} if axis == "n" else {"tier": tier, **BASE, axis: value}
            if json.dumps(point) not in met:
                met.add(json.dumps(point))
                yield point


def finished(file: Path) -> dict[str, dict[str, Any]]:
    """Rows by point."""
    rows = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    )
    return {json.dumps(row["point"]): row for row in rows}


def in_a_child(point: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a fresh process with one thread, or an end with its last words."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    child = subprocess.run(
        [sys.executable, __file__, "--out", "-", "--only", json.dumps(point)],
        capture_output=True, text=True, env={**os.environ, **threads},
    )  # fmt: skip
    if child.returncode:
        words = (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1]
        sys.exit(f"error: the point {json.dumps(point)} failed: {words}")
    return json.loads(child.stdout.splitlines()[-1])


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """One point, in this process."""
    import torch

    torch.set_num_threads(1)
    rows, seconds = ROWS[point["tier"]], SECONDS[point["tier"]]
    device = torch.device("cuda" if point["tier"] == "full" and torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        if "n" in point:
            return count_point(Path(folder), point["n"], rows, seconds, device)
        return step_point(Path(folder), point, rows, seconds, device)


def step_point(folder: Path, point: dict[str, Any], rows: int, seconds: float, device: Any) -> dict[str, Any]:
    """Size, network or K: steps over all of `rows` / K images."""
    from sfumato.diffusion.networks import parameter_count

    units = rows // point["K"]
    write_images(folder, units, point["size"])
    network = unet(point["network"], point["size"], device)
    private = open_images(folder, point["size"])
    taken, memory = steps(folder, private, network, 1.0, units, point["K"], seconds, device)
    step = statistics.median(taken)
    return {
        "parameters": parameter_count(network), "rows": units * point["K"], "step_s": step,
        "rows_per_s": units * point["K"] / step, "peak_mb": memory, "device": device.type,
    }  # fmt: skip


def count_point(folder: Path, n: int, rows: int, seconds: float, device: Any) -> dict[str, Any]:
    """n: opening, opening again, drawing, charging, and whole steps of about `rows` rows."""
    from sfumato.privacy.randomness import SecureStream
    from sfumato.privacy.sampling import PoissonSampler

    write_images(folder, n, BASE["size"])
    network = unet(BASE["network"], BASE["size"], device)
    idle = reset_peak()
    start = time.process_time()
    open_images(folder, BASE["size"])
    opened = time.process_time()
    private = open_images(folder, BASE["size"])
    again = time.process_time()
    opening = peak_mb() - idle
    units = rows // BASE["K"]
    q = units / n
    sampler = PoissonSampler(n, q, SecureStream())
    draws = [elapsed(sampler.sample) for _ in range(5)]
    held, event = reservation(folder / "charges.db", q, 200, BASE["K"], units)
    charges = [elapsed(lambda: held.begin("dp_sgd", event)) for _ in range(20)]
    taken, memory = steps(folder, private, network, q, units, BASE["K"], seconds, device)
    return {
        "rows": units * BASE["K"], "open_s": opened - start, "again_s": again - opened, "opening_mb": opening,
        "draw_s": statistics.median(cpu for cpu, _ in draws), "charge_s": statistics.median(c for c, _ in charges),
        "charge_wall_s": statistics.median(wall for _, wall in charges), "step_s": statistics.mean(taken),
        "peak_mb": memory, "device": device.type,
    }  # fmt: skip


class Enough(Exception):
    """Ends `dp_sgd` when its steps have been watched long enough."""


def steps(
    folder: Path, private: Any, network: Any, q: float, units: int, per_unit: int, seconds: float, device: Any
) -> tuple[list[float], float]:
    """Seconds of each step of `dp_sgd` but the first, from one learning rate it asks for to the next, and the
    peak memory of these steps in MB, above what the process held before `dp_sgd`."""
    import torch

    from sfumato.checkpoint import WeightAverage
    from sfumato.diffusion.edm import EDM
    from sfumato.privacy.dp_sgd import DPSGDPlan, dp_sgd

    edm, most = EDM(), 200
    no_label = network.config.num_class_embeds - 1
    held, _ = reservation(folder / "steps.db", q, most, per_unit, units)
    idle = reset_peak()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    stamps: list[float] = []

    def rate(step: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        if len(stamps) == 1:
            reset_peak()
        stamps.append(clock())
        if len(stamps) >= 4 and stamps[-1] - stamps[1] >= seconds:
            raise Enough
        return 1e-3

    def make_rows(images: Any, labels: Any, generator: Any) -> dict[str, Any]:
        return edm.rows(images, labels, generator, no_label=no_label, label_dropout=0.1)

    with contextlib.suppress(Enough):
        dp_sgd(
            network, private, DPSGDPlan(q, most, NOISE, 1.0, per_unit, units), held, make_rows=make_rows,
            row_loss=edm.row_loss, optimizer=torch.optim.Adam(network.parameters()), lr=rate,
            ema=WeightAverage(network, 0.999),
        )  # fmt: skip
    on_device = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_mb() - idle
    return [float(s) for s in np.diff(stamps[1:])], on_device


NOISE = 100.0  # so much that pricing the reservation is quick; the time of a step does not depend on it


def reservation(where: Path, q: float, count: int, per_unit: int, units: int) -> tuple[Any, Any]:
    """An open reservation for `count` steps on a new ledger, and the event of one step."""
    from sfumato.privacy.budget import Budget
    from sfumato.privacy.dp_sgd import DPSGDPlan
    from sfumato.privacy.ledger import Ledger

    plan = DPSGDPlan(q, count, NOISE, 1.0, per_unit, units)
    ledger = Ledger.open(where, total=Budget(100.0, 1e-3))
    return ledger.reserve("cost", [plan.planned()], delta=1e-5), plan.event


def unet(name: str, size: int, device: Any) -> Any:
    """The network in the mode it is trained in, with Adam's moments not made yet."""
    import torch

    from sfumato.diffusion import networks

    torch.manual_seed(0)
    return networks.unet(name, size=(size, size), channels=1, num_labels=LABELS).to(device)


def write_images(folder: Path, n: int, size: int) -> None:
    """Random grey images and labels as idx files, a block at a time."""
    rng = np.random.default_rng(0)
    with (
        open(folder / "images-idx3-ubyte", "wb") as images,
        open(folder / "labels-idx1-ubyte", "wb") as labels,
    ):
        images.write(struct.pack(">BBBBIII", 0, 0, 8, 3, n, size, size))
        labels.write(struct.pack(">BBBBI", 0, 0, 8, 1, n))
        for start in range(0, n, 10_000):
            block = min(10_000, n - start)
            images.write(rng.bytes(block * size * size))
            labels.write((np.arange(block) % LABELS).astype(np.uint8).tobytes())


def open_images(folder: Path, size: int) -> Any:
    """The handle, decoded into a cache in `folder` at the first call."""
    from sfumato.data.images import ProtectedImages

    return ProtectedImages(
        folder / "images-idx3-ubyte", ledger=None, size=size, channels=1, cache_dir=folder / "cache"
    )


def elapsed(work: Any) -> tuple[float, float]:
    """Processor and wall seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_mb() -> float:
    """Peak resident memory of this process since `reset_peak` (Linux), else since its start."""
    if Path("/proc/self/status").is_file():
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> float:
    """Forget the peak of resident memory where the system can; what is resident now, in MB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_mb()


def tables(rows: list[dict[str, Any]]) -> str:
    """One markdown table for steps and one for n."""
    lines = []
    single = [row for row in rows if "n" not in row["point"]]
    if single:
        kind = "wall" if any(row["device"] == "cuda" for row in single) else "processor, one thread"
        lines += [
            f"| pixels | network | parameters | K | rows a step | s a step ({kind}) | rows/s | peak MB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in single:
            p = row["point"]
            lines.append(
                f"| {p['size']} | {p['network']} | {row['parameters'] / 1e6:.2f} M | {p['K']} | {row['rows']} | "
                f"{row['step_s']:.3f} | {row['rows_per_s']:.0f} | {row['peak_mb']:.0f} |"
            )
    several = [row for row in rows if "n" in row["point"]]
    if several:
        lines += [
            *([""] if lines else []),
            "| n | open, s (processor) | again, s | opening, MB | draw a batch, ms | charge a step, ms (wall) | "
            "a step, s | steps, MB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in several:
            lines.append(
                f"| {row['point']['n']:,} | {row['open_s']:.1f} | {row['again_s']:.2f} | {row['opening_mb']:.0f} | "
                f"{1e3 * row['draw_s']:.2f} | {1e3 * row['charge_s']:.1f} ({1e3 * row['charge_wall_s']:.1f}) | "
                f"{row['step_s']:.3f} | {row['peak_mb']:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
