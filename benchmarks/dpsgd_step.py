"""Speed, memory and error of per-unit gradient engines, ours and Opacus', beside a plain training step.

    python benchmarks/dpsgd_step.py [--quick] --json FILE [--threads N]

Each row is measured in a process of its own. `rows_per_s`: rows (unit x noise level) through the clipped
sum, best of the repeats. `peak_mb`: peak resident memory above that of the idle process with the network
loaded. `rel_error`: largest relative error of a unit's gradient norm or of its gradient, against one backward
pass per unit, on 3 units (none for the plain step, which has no per-unit gradients).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

MODELS = {"unet-28": False, "unet-28-attention": True}
ENGINES = ("plain", "fast", "exact", "loop", "opacus-functorch", "opacus-hooks")
ROWS = {True: 64, False: 256}  # a batch, quick and full


def network(attention: bool) -> Any:
    """28 x 28 grey, widths 32, 64, 64: about 1.05 M parameters."""
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)
    last = "Attn" if attention else ""
    net = UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", f"{last}DownBlock2D"),
        up_block_types=(f"{last}UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8, num_class_embeds=11, add_attention=attention,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def row_loss(call: Any, rows: dict[str, Any]) -> Any:
    out = call(rows["x"], rows["t"], class_labels=rows["y"]).sample
    return (out - rows["target"]).square().mean((1, 2, 3))


def random_rows(units: int, per_unit: int) -> dict[str, Any]:
    import torch

    shape = (units, per_unit, 1, 28, 28)
    return {
        "x": torch.randn(shape), "target": torch.randn(shape), "t": torch.rand(units, per_unit),
        "y": torch.randint(0, 11, (units, per_unit)),
    }  # fmt: skip


class Opacus:
    """Opacus' gradients per row, averaged over a unit's K rows, then clipped and summed as it does."""

    def __init__(self, net: Any, mode: str) -> None:
        import opacus

        self.net = net
        self.model = opacus.GradSampleModule(
            net, loss_reduction="sum", force_functorch=mode == "opacus-functorch", strict=False
        )

    def gradients(self, rows: dict[str, Any]) -> dict[str, Any]:
        units, per_unit = rows["t"].shape
        row_loss(self.model, {k: v.flatten(0, 1) for k, v in rows.items()}).sum().backward()
        found = {
            name: p.grad_sample.view(units, per_unit, *p.shape).mean(1)
            for name, p in self.net.named_parameters()
        }
        self.model.zero_grad(set_to_none=True)
        for parameter in self.net.parameters():
            parameter.grad_sample = None
        return found

    def clipped_sum(self, rows: dict[str, Any], physical: int) -> None:
        import torch

        for start in range(0, len(rows["t"]), physical):
            found = self.gradients({k: v[start : start + physical] for k, v in rows.items()})
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
            factors = (1.0 / norms).clamp_max(1.0)
            for gradient in found.values():
                torch.einsum("u,u...->...", factors, gradient)


def measure(engine: str, model: str, per_unit: int, quick: bool, threads: int) -> dict[str, Any]:
    import torch

    from sfumato.privacy.clipping import clipped_gradient_sum
    from sfumato.privacy.per_unit import per_unit_gradients, units_at_once

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    net, units = network(MODELS[model]), ROWS[quick] // per_unit
    rows, few = random_rows(units, per_unit), random_rows(3, per_unit)
    physical = units_at_once(net, row_loss, rows)
    theirs = Opacus(net, engine) if engine.startswith("opacus") else None

    def step() -> None:
        if engine == "plain":
            for start in range(0, units, physical):
                part = {k: v[start : start + physical].flatten(0, 1) for k, v in rows.items()}
                row_loss(net, part).mean().backward()
            net.zero_grad(set_to_none=True)
        elif engine.startswith("opacus"):
            assert theirs is not None
            # Opacus holds a gradient for every row, so fewer units fit the same memory.
            theirs.clipped_sum(rows, max(1, physical // per_unit))
        else:
            clipped_gradient_sum(net, row_loss, rows, clip_norm=1.0, engine=engine)  # type: ignore[arg-type]

    idle = resident_mb()
    seconds = []
    for _ in range(2 if quick else 4):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    error = None
    if engine != "plain":
        ours: Any = engine
        found = theirs.gradients(few) if theirs else per_unit_gradients(net, row_loss, few, ours)
        right = per_unit_gradients(network(MODELS[model]), row_loss, few, "loop")
        error = largest_error(found, right)
    return {
        "engine": engine, "model": model, "dtype": "float32", "K": per_unit, "threads": threads,
        "rows_per_s": round(units * per_unit / min(seconds), 1), "peak_mb": round(peak - idle),
        "rel_error": error,
    }  # fmt: skip


def largest_error(found: dict[str, Any], right: dict[str, Any]) -> float:
    import torch

    one, other = (torch.cat([g.flatten(1) for g in gs.values()], 1).double() for gs in (found, right))
    norms = other.norm(dim=1)
    return float(
        torch.maximum((one.norm(dim=1) - norms).abs() / norms, (one - other).norm(dim=1) / norms).max()
    )


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller batches, fewer repeats, K = 1 and 8")
    parser.add_argument("--json", type=Path, required=True, help="file to write the rows to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        engine, model, per_unit = options.only.split(",")
        print(json.dumps(measure(engine, model, int(per_unit), options.quick, options.threads)))
        return
    found: list[dict[str, Any]] = []
    print(
        f"{'model':18} {'K':>2} {'engine':17} {'rows/s':>8} {'x plain':>8} {'peak MB':>8} {'rel error':>10}"
    )
    for model in MODELS:
        for per_unit in (1, 8) if options.quick else (1, 4, 8):
            plain = 0.0
            for engine in ENGINES:
                command = [sys.executable, __file__, "--json", "-", "--threads", str(options.threads)]
                command += ["--only", f"{engine},{model},{per_unit}"] + ["--quick"] * options.quick
                child = subprocess.run(command, capture_output=True, text=True)
                if child.returncode:
                    failure = (child.stderr.strip().splitlines() or [f"status {child.returncode}"])[-1]
                    print(f"{model:18} {per_unit:>2} {engine:17} failed: {failure}", flush=True)
                    continue
                row = json.loads(child.stdout.splitlines()[-1])
                found.append(row)
                plain = row["rows_per_s"] if engine == "plain" else plain
                error = "" if row["rel_error"] is None else f"{row['rel_error']:.1e}"
                print(
                    f"{model:18} {per_unit:>2} {engine:17} {row['rows_per_s']:8.1f} "
                    f"{plain / row['rows_per_s']:8.2f} {row['peak_mb']:8.0f} {error:>10}",
                    flush=True,
                )
                options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
