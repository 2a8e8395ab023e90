"""Every method of `sfumato synthesize` on the same data, budget and amount of work: quality of what it releases.

    python benchmarks/methods.py --data fashion-mnist --public PUBLIC.npz --out runs/fashion
    python benchmarks/methods.py --data cifar10 --private TRAIN.parquet --holdout TEST.parquet \
        --public TINY_IMAGENET.parquet --out runs/cifar

One cell of the table is one method, epsilon and seed: it trains, draws images and measures them on real held-out
images, in a process of its own with one thread. `--jobs` cells run side by side. The same command resumes: cells
that are done are read, an interrupted one goes on where it stopped. `--table` prints what is there and stops.

Equal work: in the `cpu` tier each method gets the same number of seconds *at the speeds written below*, whatever
this machine is doing meanwhile, so that a loaded machine changes nothing but the wait; rows that a method does not
spend on public training it spends on DP-SGD. The `full` tier runs the published settings (28 and 32 pixels) and
wants an accelerator; `pe` and `public-only` train on public images with them, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

METHODS = (
    "privimage", "privimage+feta", "feta", "pdp", "random-selection", "dpdm", "pe", "public-only",
)  # fmt: skip
# Selection + DP mean images + robust public training + few large steps + PLD accounting, and the same without one
# of them: without PLD the noise is what RDP accounting asks for at the same ε.
PARTS = {
    "all-parts": "privimage+feta",
    "all-but-selection": "random-selection",
    "all-but-means": "privimage",
    "all-but-robust": "privimage+feta",
    "all-but-large-steps": "privimage+feta",
    "all-but-pld": "privimage+feta",
}
UNITS = {"fashion-mnist": 60_000, "cifar10": 50_000}
EPSILONS = {"fashion-mnist": (10.0, 1.0), "cifar10": (10.0, 5.0, 1.0)}
FULL = {"fashion-mnist": "paper-fashion-mnist", "cifar10": "paper-cifar10"}
CLASSIFIERS = ("logistic-regression", "mlp", "cnn", "resnet")
METRICS = ("precision", "recall", "density", "coverage")
ROBUST_RADIUS = 0.2
# cpu tier: settings beside the preset's, and seconds of work at a speed (rows a second of one thread).
CPU = {
    "fashion-mnist": {
        "size": 14, "network": "tiny", "num_images": 2000, "guidance": 1.0, "sampler_steps": 8, "query_steps": 800,
        "sampling_probability": 1 / 200, "enough_steps": 100, "noise_levels": 2, "public_share": 0.3,
        "classes_per_label": 1, "votes": 5, "population": 2000, "votes_encoder": "pixels",
    },
    "cifar10": {
        "size": 16, "network": "tiny", "num_images": 2000, "guidance": 1.0, "sampler_steps": 8, "query_steps": 1000,
        "sampling_probability": 1 / 200, "enough_steps": 100, "noise_levels": 2, "public_share": 0.6,
        "classes_per_label": 1, "votes": 5, "population": 2000, "votes_encoder": "pixels",
    },
}  # fmt: skip
WORK = {"fashion-mnist": (75.0, (1200, 500, 2600)), "cifar10": (100.0, (850, 385, 1900))}


def main() -> None:
    """Run the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=tuple(UNITS), default="fashion-mnist")
    parser.add_argument("--private", help="default: fashion-mnist; a path is needed for cifar10")
    parser.add_argument("--holdout", help="default: fashion-mnist-test; a path is needed for cifar10")
    parser.add_argument("--public", required=True, help="labelled public images")
    parser.add_argument("--tier", choices=("cpu", "full"), default="cpu")
    parser.add_argument("--epsilons", type=float, nargs="+")
    parser.add_argument("--methods", choices=(*METHODS, *PARTS), nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="cells side by side, one thread each")
    parser.add_argument("--features", nargs="+", default=["efficientnet-lite0", "pixels"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print the table of what is done, run nothing")
    options = parser.parse_args()
    options.private = options.private or options.data
    options.holdout = options.holdout or options.data + "-test"
    options.epsilons = options.epsilons or list(EPSILONS[options.data])
    if options.cell:
        method, epsilon, seed = options.cell.split(":")
        cell(options, method, float(epsilon), int(seed))
        return
    cells = [
        (method, epsilon, seed)
        for seed in options.seeds
        for method in ("real", *options.methods)
        for epsilon in (options.epsilons if method not in ("real", "public-only") else [0.0])
    ]
    if not options.table:
        cells.sort(key=lambda each: (each[2], each[0] not in ("real", "public-only")))
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda each: in_own_process(options, *each), cells))
    print(table(options, cells))


def in_own_process(options: argparse.Namespace, method: str, epsilon: float, seed: int) -> None:
    """Run one cell as a child, unless it is done."""
    folder = cell_folder(options, method, epsilon, seed)
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if options.tier == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        ended = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--cell", f"{method}:{epsilon:g}:{seed}"],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    print(f"{folder.name}: {'done' if ended.returncode == 0 else 'FAILED, see its log.txt'}", file=sys.stderr)


def cell_folder(options: argparse.Namespace, method: str, epsilon: float, seed: int) -> Path:
    """Where one cell keeps its state and its result."""
    return options.out / f"{options.data}-{options.tier}-{method}-eps{epsilon:g}-seed{seed}"


def settings(options: argparse.Namespace, method: str):
    """The preset, the seconds of work and the speeds they are counted at (None: the preset as it is)."""
    from sfumato.synthesis.planner import Speeds
    from sfumato.synthesis.presets import PRESETS

    if options.tier == "full":
        preset, seconds, speeds = PRESETS[FULL[options.data]], 0.0, None
    else:
        preset = replace(PRESETS[options.data], **CPU[options.data])
        seconds, speeds = WORK[options.data][0], Speeds(*WORK[options.data][1])
    return altered(preset, method), seconds, speeds


def altered(preset, method: str):
    """The preset with the parts that `method` names put in or left out."""
    if method in PARTS and method != "all-but-robust":
        preset = replace(preset, perturbation=ROBUST_RADIUS)
    if method in PARTS and method != "all-but-means":
        preset = replace(preset, means_per_label=1)
    if method == "all-but-large-steps":
        q = preset.sampling_probability / 8
        preset = replace(preset, sampling_probability=q, enough_steps=8 * preset.enough_steps)
    return preset


def cell(options: argparse.Namespace, method: str, epsilon: float, seed: int) -> None:
    """Train, draw, measure; result.json is written last."""
    import numpy as np
    import torch

    from sfumato.data.images import OwnerImages

    if options.tier == "cpu":
        torch.set_num_threads(1)
    folder = cell_folder(options, method, epsilon, seed)
    preset, _, _ = settings(options, method)
    common = {"size": preset.size, "channels": preset.channels, "cache_dir": options.out / "cache"}
    held = OwnerImages(options.holdout, **common)
    result: dict[str, object] = {"method": method, "epsilon": epsilon, "seed": seed}
    started = time.process_time()
    if method == "real":
        real = OwnerImages(options.private, **common)
        rows = np.random.default_rng(seed).choice(len(real), 2 * len(held) // 10, replace=False)
        images, labels = np.asarray(real.images)[rows], np.asarray(real.labels)[rows]
    else:
        images, labels, about = released(options, method, epsilon, seed, folder, common)
        result |= about
    result["training_cpu_seconds"] = round(time.process_time() - started, 1)
    result |= measured(options, images, labels, held, folder)
    result["cpu_seconds"] = round(time.process_time() - started, 1)
    np.savez_compressed(folder / "some.npz", images=images[:: max(1, len(images) // 80)])
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    os.replace(partial, folder / "result.json")
    shutil.rmtree(folder / "features", ignore_errors=True)


def released(options, method, epsilon, seed, folder, common):
    """What `method` releases (images, labels), and what it did."""
    import numpy as np

    from sfumato.data.images import ProtectedImages, PublicImages
    from sfumato.machine import Defaults
    from sfumato.privacy import accounting
    from sfumato.privacy.budget import Budget
    from sfumato.privacy.ledger import Ledger
    from sfumato.synthesis import privimage
    from sfumato.synthesis.options import default_delta

    preset, seconds, speeds = settings(options, method)
    if speeds is not None:  # the same work on every machine, and the kind of arithmetic with it
        fixed = Defaults(1, "cpu", "bfloat16", "fast", "")
        privimage.best_defaults = lambda: fixed
    delta = default_delta(UNITS[options.data])
    ledger = Ledger.open(folder / "ledger.db", total=Budget(epsilon or 1.0, delta))
    private = ProtectedImages(options.private, ledger=ledger, public_size=UNITS[options.data], **common)
    public = PublicImages(options.public, **common)
    base = PARTS.get(method, method)
    if method == "all-but-pld":
        accounting.calibrate = noise_by_rdp
    work, kept = folder / "work", folder / "images.npz"
    if not kept.exists():
        share_public_work(options, method, epsilon, seed, work)
        model = privimage.PrivImage(
            budget=Budget(epsilon or 1.0, delta), method=base, preset=preset, seconds=seconds,
            num_images=preset.num_images, work_dir=work, seed=seed, speeds=speeds,
        ).fit(private, public)  # fmt: skip
        images, labels = model.generate(preset.num_images or UNITS[options.data], seed=seed)
        about = {"plan": model.plan.lines(), "spent": ledger.spent.epsilon}
        if model.selection is not None and public.label_names is not None:
            about["selection"] = [[public.label_names[c] for c in row] for row in model.selection.classes]
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
        np.savez(kept, images=images, labels=labels)
    with np.load(kept) as saved:
        return saved["images"], saved["labels"], json.loads((folder / "about.json").read_text())


def noise_by_rdp(make_events, budget) -> float:
    """The smallest noise multiplier (within 0.1 %) that fits the budget by RDP accounting."""
    from sfumato.privacy.accounting import epsilon_of

    def fits(noise: float) -> bool:
        return epsilon_of(make_events(noise), budget.delta, accountant="rdp") <= budget.epsilon

    low, high = 0.1, 0.2
    while not fits(high):
        low, high = high, 2 * high
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def share_public_work(options, method, epsilon, seed, work: Path) -> None:
    """Take over the stages of a finished cell that rest on the same public images and seed, and on no budget."""
    for other in options.epsilons:
        done = cell_folder(options, method, other, seed)
        if other == epsilon or not (done / "images.npz").exists():
            continue
        work.mkdir(parents=True, exist_ok=True)
        if method in ("pdp", "random-selection", "pe") and not (work / "public").exists():
            shutil.copytree(done / "work" / "public", work / "public")
        query = done / "work" / "query.safetensors"
        if query.exists() and not (work / query.name).exists():
            shutil.copy(query, work / query.name)
        return


def measured(options, images, labels, held, folder: Path) -> dict[str, object]:
    """Distances to the held-out images in each feature space, and accuracy on them."""
    import numpy as np

    from sfumato.encoders.encoder import open_encoder
    from sfumato.evaluation.accuracy import downstream_accuracies
    from sfumato.evaluation.features import cached_features
    from sfumato.evaluation.frechet import Moments, frechet_distance
    from sfumato.evaluation.kernel_distance import kernel_distance
    from sfumato.evaluation.neighbours import neighbour_metrics

    real, targets = np.asarray(held.images), np.asarray(held.labels)
    features: dict[str, dict[str, float]] = {}
    for name in options.features:
        encoder = open_encoder(name)
        there = cached_features(
            real, encoder, directory=options.out / "features", content=f"held-{options.data}-{real.shape}".ljust(16),
            description=f"held out: {name}",
        )  # fmt: skip
        here = cached_features(
            images, encoder, directory=folder / "features", content="these images".ljust(16), description=name
        )
        features[name] = {"frechet": frechet_distance(Moments.of(there), Moments.of(here))}
        if name == options.features[0]:
            near = neighbour_metrics(there, here)
            features[name] |= {each: getattr(near, each) for each in METRICS}
            features[name]["kid"] = kernel_distance(there, here, subsets=20).value
    accuracy = downstream_accuracies(
        images, labels, real, targets, num_classes=len(held.label_names), seeds=(0,),
        remembered=folder / "accuracy.json", description=folder.name,
    )  # fmt: skip
    return {"features": features, "accuracy": {name: each.mean for name, each in accuracy.items()}}


def table(options: argparse.Namespace, cells: list[tuple[str, float, int]]) -> str:
    """Means over seeds, with the standard deviation of the mean accuracy and of each Fréchet distance."""
    found: dict[tuple[str, float], list[dict]] = {}
    for method, epsilon, seed in cells:
        path = cell_folder(options, method, epsilon, seed) / "result.json"
        if path.exists():
            found.setdefault((method, epsilon), []).append(json.loads(path.read_text(encoding="utf-8")))
    head = ["method", "ε", *(f"FD {name}" for name in options.features), "KID", "precision", "recall"]
    head += ["coverage", *CLASSIFIERS, "mean accuracy", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (method, epsilon), runs in sorted(found.items(), key=lambda each: (-each[0][1], each[0][0])):
        first = options.features[0]

        def feature(metric: str, name: str = first, runs: list[dict] = runs) -> list[float]:
            return [run["features"][name][metric] for run in runs]

        row = [method, "–" if not epsilon else f"{epsilon:g}"]
        row += [spread(feature("frechet", name), "{:.1f}") for name in options.features]
        row += [f"{mean(feature(metric)):.3f}" for metric in ("kid", "precision", "recall", "coverage")]
        row += [f"{100 * mean(run['accuracy'][name] for run in runs):.1f}" for name in CLASSIFIERS]
        row += [spread([100 * run["accuracy"]["mean"] for run in runs], "{:.1f}"), str(len(runs))]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *ratios(options, found)])


def ratios(options: argparse.Namespace, found: dict[tuple[str, float], list[dict]]) -> list[str]:
    """PrivImage beside the best of the other DP-SGD methods: the paper's two claims as ratios."""
    lines, first = [], options.features[0]
    for epsilon in options.epsilons:
        here = {method: runs for (method, eps), runs in found.items() if eps == epsilon}
        others = [m for m in ("pdp", "random-selection", "dpdm", "feta") if m in here]
        for ours in ("privimage", "privimage+feta"):
            if ours not in here or not others:
                continue

            def distance(method: str, here: dict[str, list[dict]] = here) -> float:
                return mean(run["features"][first]["frechet"] for run in here[method])

            def accuracy(method: str, here: dict[str, list[dict]] = here) -> float:
                return mean(run["accuracy"]["mean"] for run in here[method])

            near, sharp = min(others, key=distance), max(others, key=accuracy)
            lines.append(
                f"ε = {epsilon:g}: {ours} has {1 - distance(ours) / distance(near):+.0%} lower FD {first} than "
                f"{near}, and {accuracy(ours) / accuracy(sharp) - 1:+.0%} accuracy of {sharp}"
            )
    return lines


def spread(values: list[float], form: str) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    text = form.format(mean(values))
    return text if len(values) < 2 else f"{text} ± {form.format(stdev(values))}"


if __name__ == "__main__":
    main()
