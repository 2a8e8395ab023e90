"""Do canaries catch a leak in `synthesize`? The same run with its noise on and with its noise planted off.

    python benchmarks/canaries.py --out runs/canaries

Both runs claim ε = 1, are trained by DP-SGD on the same kind of training folder (`sfumato canaries plant`, 1,000
patterns of which about half are in), and differ in one thing: in "leak" the Gaussian noise of every step is replaced
by zeros. The lower bound on ε of the first has to stay below 1, that of the second must not. Each seed draws new
coins and new patterns. The same command resumes; `--table` prints what is there and stops.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from audit import in_own_process, write_result  # the script beside this one

CANARIES, CLAIM, DELTA = 1000, 1.0, 1e-5
DATA = {"source": "fashion-mnist", "size": 8, "images": 250}
WORK: dict[str, Any] = {
    "network": "tiny", "sampling_probability": 0.1, "enough_steps": 800, "noise_levels": 4, "clip_norm": 1e-2,
    "private_lr": 4e-3, "private_ema": 0.99, "num_images": 2000, "guidance": 1.0, "sampler_steps": 12,
    "time_bound": False,
}  # fmt: skip


def main() -> None:
    """Run the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="cells side by side, one thread each")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print the table of what is done, run nothing")
    options = parser.parse_args()
    if options.cell:
        kind, seed = options.cell.split(":")
        cell(options, kind, int(seed))
        return
    cells = [(kind, seed) for seed in options.seeds for kind in ("leak", "honest")]
    if not options.table:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda each: in_own_process(cell_folder(options, *each), *each), cells))
    print(table(options, cells))


def cell_folder(options: argparse.Namespace, kind: str, seed: int) -> Path:
    """Where one cell keeps its state and its result."""
    return options.out / f"{kind}-seed{seed}"


def cell(options: argparse.Namespace, kind: str, seed: int) -> None:
    """Plant, train, audit; result.json is written last."""
    import numpy as np
    import torch
    from generators import fixed_arithmetic

    from sfumato.audit.canaries import canary_scores, check_training, open_sealed, plant
    from sfumato.audit.canary_scoring import SCORES
    from sfumato.audit.epsilon_bound import best_bound
    from sfumato.audit.target import GeneratorModel
    from sfumato.data.images import OwnerImages, ProtectedImages
    from sfumato.privacy import clipping
    from sfumato.privacy.budget import Budget
    from sfumato.privacy.ledger import Ledger
    from sfumato.synthesis.presets import PRESETS
    from sfumato.synthesis.privimage import PrivImage

    torch.set_num_threads(1)
    fixed_arithmetic()
    folder, size, started = cell_folder(options, kind, seed), DATA["size"], time.process_time()
    planted = folder / "planted"
    if not (planted / "sealed.json").exists():
        some = OwnerImages(DATA["source"], size=size, channels=1, cache_dir=options.out / "cache")
        rows = np.random.default_rng(seed).choice(len(some), DATA["images"], replace=False)
        names = np.array(some.label_names)
        np.savez(
            folder / "private.npz",
            images=np.asarray(some.images)[rows],
            labels=names[np.asarray(some.labels)[rows]],
        )
        plant(folder / "private.npz", count=CANARIES, kind="pattern", out=planted, delta=DELTA)
    sealed = open_sealed(planted / "sealed.json")
    check_training(sealed, planted / "train", cache_dir=folder / "cache")
    if kind == "leak":
        clipping._noised = lambda value, scale, stream: value.detach().to(torch.float32)
    budget = Budget(CLAIM, DELTA)
    private = ProtectedImages(
        planted / "train", ledger=Ledger.open(folder / "ledger.db", total=budget), size=size, channels=1,
        public_size=sealed.expected_images, cache_dir=folder / "cache",
    )  # fmt: skip
    preset = replace(PRESETS["demo"], size=size, **WORK)
    fitted = PrivImage(budget=budget, method="dpdm", preset=preset, work_dir=folder / "work", seed=seed).fit(
        private
    )
    trained = time.process_time() - started
    generator = fitted.generator
    assert generator is not None
    images = generator.generate(preset.num_images or 0, seed=seed)[0]
    np.savez(folder / "images.npz", images=images)
    scores = canary_scores(GeneratorModel(generator), images, sealed, seed=seed)
    included = np.asarray(sealed.included)
    bounds = {
        name: best_bound(score, included, delta=DELTA, level=1 - 0.05 / SCORES)
        for name, score in scores.items()
    }
    result = {
        "kind": kind, "seed": seed, "included": int(included.sum()), "canaries": len(sealed),
        "scores": {
            name: {
                "epsilon": bound.epsilon, "correct": bound.correct, "guesses": bound.guesses, "cap": bound.cap,
                "auc": area(scores[name], included),
            }
            for name, bound in bounds.items()
        },
        "claimed": CLAIM, "noise_multiplier": fitted.plan.noise_multiplier if kind == "honest" else 0.0,
        "training_cpu_seconds": round(trained, 1), "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip
    write_result(folder, result)


def area(scores: Any, included: Any) -> float:
    """Chance that a canary that is in scores above one that is out."""
    from sfumato.audit.membership import membership

    return float(membership(scores[included], scores[~included]).auc)


def table(options: argparse.Namespace, cells: list[tuple[str, int]]) -> str:
    """One row a run and score."""
    lines = [
        "| run | seed | in | score | AUC | right of guesses | ε at least | claimed | cap | processor s |"
    ]
    lines.append("|---" * 10 + "|")
    for kind, seed in sorted(cells):
        path = cell_folder(options, kind, seed) / "result.json"
        if not path.exists():
            continue
        run = json.loads(path.read_text(encoding="utf-8"))
        for name, of in run["scores"].items():
            lines.append(
                f"| {kind} | {seed} | {run['included']} of {run['canaries']:,} | {name} | {of['auc']:.3f} | "
                f"{of['correct']} of {of['guesses']} | {of['epsilon']:.2f} | {run['claimed']:g} | {of['cap']:.2f} | "
                f"{run['cpu_seconds']:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
