"""Does the audit find what a generator memorised, and nothing where nothing was? Generators of known guilt.

    python benchmarks/data/fetch.py faces:lorelei
    python benchmarks/audit.py duplicates --faces FACES.npz --out runs/audit
    python benchmarks/audit.py overfitted --out runs/audit
    python benchmarks/audit.py false-alarms --out runs/audit

One table each. `duplicates`: drawn faces, some of them planted 5, 20 and 100 times, learnt without and with
differential privacy; how many of the planted ones come back? `overfitted`: 1,000 images of Fashion-MNIST learnt nearly
by heart; SIDE, its controls and the older attacks at equal numbers of images. `false-alarms`: fresh images passed off
as generated, 200 times. Canaries have a script of their own, `canaries.py`.

A cell (one generator and one seed) runs in a process of its own with one thread and keeps its state, so the same
command resumes; `--table` prints what is there and stops.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

TIMES = (100, 20, 5, 1)
PLANTED = 20  # faces that are planted 5, 20 and 100 times, each
RATE, LOOSE = 0.01, 0.1  # false matches that a threshold allows; the loose one is for SIDE's "low band"
FACES = {"once": 1000, "held": 2000, "drawn": 2000}
FACE = (slice(None), slice(2, 26), slice(4, 28))  # the middle 24 of 32 pixels; what is cut off is white
FASHION = {"size": 14, "train": 1000, "held": 2000, "drawn": 2000}
FRESH = {"size": 14, "train": 1000, "held": 1000, "drawn": 500, "runs": 200}
KINDS = {"duplicates": ("plain", "dp"), "overfitted": ("overfitted",), "false-alarms": ("fresh",)}


def main() -> None:
    """Run the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=tuple(KINDS))
    parser.add_argument("--faces", help="for duplicates: the .npz of `fetch.py faces:lorelei`")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; for false-alarms 0")
    parser.add_argument("--jobs", type=int, default=2, help="cells side by side, one thread each")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print the table of what is done, run nothing")
    options = parser.parse_args()
    options.seeds = options.seeds or ([0] if options.experiment == "false-alarms" else [0, 1, 2])
    if options.experiment == "duplicates" and not (options.faces or options.table):
        parser.error("--faces is missing: give the .npz that `benchmarks/data/fetch.py faces:lorelei` made")
    if options.cell:
        kind, seed = options.cell.split(":")
        cell(options, kind, int(seed))
        return
    cells = [(kind, seed) for seed in options.seeds for kind in KINDS[options.experiment]]
    if not options.table:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda each: in_own_process(cell_folder(options, *each), *each), cells))
    runs: dict[str, list[dict[str, Any]]] = {}
    for kind, seed in cells:
        path = cell_folder(options, kind, seed) / "result.json"
        if path.exists():
            runs.setdefault(kind, []).append(json.loads(path.read_text(encoding="utf-8")))
    print(
        {"duplicates": duplicates_table, "overfitted": attacks_table}.get(options.experiment, alarms_table)(
            runs
        )
    )


def in_own_process(folder: Path, kind: str, seed: int) -> None:
    """Run this script's cell as a child with one thread, unless it is done."""
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        ended = subprocess.run(
            [sys.executable, *sys.argv, "--cell", f"{kind}:{seed}"],
            env=dict(os.environ) | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, stdout=log, stderr=log,
        )  # fmt: skip
    print(f"{folder.name}: {'done' if ended.returncode == 0 else 'FAILED, see its log.txt'}", file=sys.stderr)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """result.json, whole or not at all."""
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    os.replace(partial, folder / "result.json")


def cell_folder(options: argparse.Namespace, kind: str, seed: int) -> Path:
    """Where one cell keeps its state and its result."""
    return options.out / f"{options.experiment}-{kind}-seed{seed}"


def cell(options: argparse.Namespace, kind: str, seed: int) -> None:
    """Train, attack, count; result.json is written last."""
    import torch

    torch.set_num_threads(1)
    folder = cell_folder(options, kind, seed)
    run = {"duplicates": duplicates, "overfitted": overfitted, "false-alarms": false_alarms}[
        options.experiment
    ]
    started = time.process_time()
    result = {"kind": kind, "seed": seed, **run(options, kind, seed, folder)}
    result["cpu_seconds"] = round(time.process_time() - started, 1)
    write_result(folder, result)


def each_picture_once(train: Any, held: Any) -> tuple[Any, Any]:
    """Rows of both sets without duplicates and without what both have, as the audit leaves them."""
    import numpy as np

    from sfumato.audit.duplicates import duplicate_groups

    groups = duplicate_groups(train, held)
    shared = np.intersect1d(groups.train, groups.holdout)
    rows = []
    for numbers in (groups.train, groups.holdout):
        found, first = np.unique(numbers, return_index=True)
        rows.append(np.sort(first[~np.isin(found, shared)]))
    return rows[0], rows[1]


# Planted duplicates


def duplicates(options: argparse.Namespace, kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """Extraction of faces by how often they were in the training set (0: held out), from 2,000 generated images."""
    import numpy as np
    from generators import learnt, learnt_privately

    from sfumato.audit.evidence import References, figures
    from sfumato.audit.similarity import open_extractor
    from sfumato.data.images import OwnerImages

    faces = OwnerImages(options.faces, size=32, channels=1, cache_dir=options.out / "cache")
    pixels = np.asarray(faces.images)[FACE]
    order = np.random.default_rng(seed).permutation(len(pixels))
    once, held = FACES["once"], FACES["held"]
    unique = pixels[order[: once + 3 * PLANTED]]
    times = np.repeat(TIMES, [PLANTED, PLANTED, PLANTED, once])
    train, holdout = np.repeat(unique, times, axis=0), pixels[order[-held:]]
    kept = folder / "images.npz"
    if not kept.exists():
        make = learnt if kind == "plain" else learnt_privately
        images = make(train, seed, folder).generate(FACES["drawn"], seed=seed)[0]
        np.savez(kept, images=images)
    with np.load(kept) as saved:
        images = saved["images"]
    mine, theirs = each_picture_once(unique, holdout)
    references = References(
        unique[mine], holdout[theirs], open_extractor("pixels"), seed=seed, directory=folder / "features"
    )
    threshold = references.threshold(references.matches, RATE)
    found = references.search(images, references.matches)
    hits, rows, of = found.similarity >= threshold.value, [], times[mine]
    for number in reversed(TIMES):
        here = hits & (of[found.index] == number)
        rows.append(counted(number, int((of == number).sum()), found.index[here]))
    # The same for as many held-out faces as there are training faces: what chance matches.
    among = references.holdout[references.held_rows]
    chance, where = references.matches(images, among)
    rows.insert(0, counted(0, len(among), where[chance >= threshold.value]))
    result = figures(found, threshold, level=0.95)
    return {"times": rows, "images": len(train), "groups": len(mine), "held": len(theirs), "figures": result}


def counted(times: int, faces: int, matched: Any) -> dict[str, Any]:
    """times: how often each of `faces` faces was in the training set; matched: the face of each match."""
    import numpy as np

    return {"times": times, "faces": faces, "matches": len(matched), "extracted": len(np.unique(matched))}


def duplicates_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Shares over all seeds, with the counts."""
    from sfumato.audit.calibration import clopper_pearson

    lines = [
        "| generator | in the training set | faces | extracted | share of faces | matches of a face in 1,000 images |"
    ]
    lines.append("|---" * 6 + "|")
    for kind, found in runs.items():
        for row, times in enumerate((0, *reversed(TIMES))):
            rows = [run["times"][row] for run in found]
            faces, matches = (sum(each[name] for each in rows) for name in ("faces", "matches"))
            extracted = sum(each["extracted"] for each in rows)
            drawn = sum(run["figures"]["num_images"] for run in found)
            low, high = clopper_pearson(extracted, faces)
            rate = 1000 * matches / (faces / len(found)) / drawn
            lines.append(
                f"| {kind} | {f'{times}×' if times else 'held out'} | {faces:,} | {extracted:,} | "
                f"{extracted / faces:.1%} ({low:.1%} to {high:.1%}) | {rate:.3f} |"
            )
    lines += ["", *attack_lines({kind: [run["figures"] for run in found] for kind, found in runs.items()})]
    return "\n".join(lines)


# A generator that knows its images by heart


def overfitted(options: argparse.Namespace, kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """SIDE, its controls and the older attacks on a generator that nearly knows its images by heart."""
    import numpy as np
    from generators import by_heart

    from sfumato.audit.evidence import References, figures
    from sfumato.audit.side import SideSettings, classifier_conditioned, side_attack
    from sfumato.audit.similarity import open_extractor
    from sfumato.audit.target import GeneratorModel
    from sfumato.data.images import OwnerImages
    from sfumato.encoders.encoder import open_encoder

    size, count = FASHION["size"], FASHION["train"]
    fashion = OwnerImages("fashion-mnist", size=size, channels=1, cache_dir=options.out / "cache")
    order = np.random.default_rng(seed).permutation(len(fashion))
    train, labels = (np.asarray(each)[order[:count]] for each in (fashion.images, fashion.labels))
    holdout = np.asarray(fashion.images)[order[count : count + FASHION["held"]]]
    model = GeneratorModel(by_heart(train, seed, folder))
    mine, theirs = each_picture_once(train, holdout)
    references = References(
        train[mine], holdout[theirs], open_extractor("pixels"), seed=seed, directory=folder / "features"
    )
    settings, drawn = SideSettings(), FASHION["drawn"]
    common: dict[str, Any] = {
        "num_images": drawn, "score_pilot": references.closeness, "settings": settings, "seed": seed, "folder": folder,
    }  # fmt: skip
    synthetic, own = model.sample(
        settings.synthetic_images, seed=seed + 1, description="images for the surrogate"
    )
    side = side_attack(model, synthetic, own, open_encoder("efficientnet-lite0"), **common)
    arms = {name: side.arms[name].images for name in ("random", "side", "side-shuffled")}
    older = classifier_conditioned(model, train[mine], labels[mine], **common)
    arms["conditioned"] = older.arm.images
    scores: dict[str, Callable[..., Any]] = dict.fromkeys(arms, references.matches)
    scores |= {"carlini": references.carlini, "gu": references.gu}
    attacks, loose = {}, {}
    for name, score in scores.items():
        found = references.search(arms.get(name, arms["random"]), score)
        for rate, entries in ((RATE, attacks), (LOOSE, loose)):
            entries[name] = figures(found, references.threshold(score, rate), level=1 - 0.05 / len(scores))
    return {
        "attacks": attacks, "loose": loose, "train": len(mine), "held": len(theirs),
        "side": {"clusters": side.clusters, "kept": len(side.surrogate), "scale": side.scale},
        "conditioned": {"scale": older.scale},
    }  # fmt: skip


def attacks_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Means over seeds beside each attack's own interval, and each attack's ratio to random sampling."""
    found = runs.get("overfitted", [])
    lines = []
    for entries, rate in (("attacks", RATE), ("loose", LOOSE)):
        by_name = {
            name: [run[entries][name] for run in found] for name in (found[0][entries] if found else ())
        }
        lines += [f"False matches allowed: {rate:.0%}", "", *attack_lines(by_name), ""]
        for name in ("side", "side-shuffled", "conditioned"):
            for score in ("ams", "ums"):
                pairs = zip(by_name.get(name, ()), by_name.get("random", ()), strict=True)
                ratios = [attack[score] / random[score] for attack, random in pairs if random[score]]
                if ratios:
                    lines.append(f"- {name} / random, {score.upper()}: {ratio_interval(ratios)}")
        lines.append("")
    return "\n".join(
        lines
        + [
            f"- seed {run['seed']}: SIDE with {run['side']['kept']} of {run['side']['clusters']} clusters at scale "
            f"{run['side']['scale']:g}, labels at scale {run['conditioned']['scale']:g}; "
            f"{run['cpu_seconds']:.0f} s of processor"
            for run in found
        ]
    )


def ratio_interval(ratios: list[float]) -> str:
    """Geometric mean over seeds, with the 95 % interval of Student's t on logarithms where there are several."""
    from scipy.stats import t

    logs = [math.log(each) if each > 0 else -math.inf for each in ratios]
    if len(logs) < 2 or not all(map(math.isfinite, logs)):
        return " ".join(f"{each:.2f}" for each in ratios)
    half = float(t.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    middle, low, high = (math.exp(mean(logs) + sign * half) for sign in (0, -1, 1))
    return f"{middle:.2f} ({low:.2f} to {high:.2f}; seeds: {each})"


def attack_lines(by_name: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One row an attack: means over seeds with their standard deviation, the interval of each seed's excess."""
    lines = [
        "| attack | AMS % | UMS % | excess % | intervals of the excess, by seed | distinct copies | images a seed |"
    ]
    lines.append("|---" * 7 + "|")
    for name, runs in by_name.items():
        ci = "; ".join(f"{100 * run['ci'][0]:.1f} to {100 * run['ci'][1]:.1f}" for run in runs)
        row = [spread([100 * run[each] for run in runs]) for each in ("ams", "ums", "excess")]
        distinct = spread([run["distinct"] for run in runs], "{:.0f}")
        lines.append("| " + " | ".join([name, *row, ci, distinct, f"{runs[0]['num_images']:,}"]) + " |")
    return lines


# Fresh images passed off as generated


def false_alarms(options: argparse.Namespace, kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """How often nothing is taken for something: training, held-out and "generated" images drawn anew each time."""
    import numpy as np

    from sfumato.audit.evidence import References, figures
    from sfumato.audit.similarity import open_extractor
    from sfumato.data.images import OwnerImages
    from sfumato.progress import Progress

    size, count, held, drawn = (FRESH[name] for name in ("size", "train", "held", "drawn"))
    fashion = OwnerImages("fashion-mnist", size=size, channels=1, cache_dir=options.out / "cache")
    pixels, extractor = np.asarray(fashion.images), open_extractor("pixels")
    rows: list[dict[str, Any]] = []
    path = folder / "runs.json"
    if path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))
    with Progress("false alarms", FRESH["runs"], "runs") as progress:
        progress.advance(len(rows))
        for run in range(len(rows), FRESH["runs"]):
            order = np.random.default_rng([seed, run]).permutation(len(pixels))[: count + held + drawn]
            train, holdout, fresh = np.split(pixels[order], [count, count + held])
            mine, theirs = each_picture_once(train, holdout)
            references = References(
                train[mine], holdout[theirs], extractor, seed=run, directory=folder / "features"
            )
            threshold = references.threshold(references.matches, RATE)
            found = figures(references.search(fresh, references.matches), threshold, level=0.95)
            rows.append({name: found[name] for name in ("num_images", "matches", "excess", "ci")})
            path.write_text(json.dumps(rows), encoding="utf-8")
            progress.advance(1)
    return {"runs": rows}


def alarms_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Shares of the runs, and of their images, that were flagged."""
    from sfumato.audit.calibration import clopper_pearson

    rows = [row for run in runs.get("fresh", []) for row in run["runs"]]
    if not rows:
        return "nothing is done yet"
    images, matches = sum(row["num_images"] for row in rows), sum(row["matches"] for row in rows)
    lines = ["| what | of | flagged | share | 95 % interval | allowed |", "|---" * 6 + "|"]
    above, failed, below = (
        sum(test(*row["ci"]) for row in rows)
        for test in (lambda low, _: low > 0, lambda low, _: low > 0.01, lambda _, high: high < 0)
    )
    for what, flagged, of, allowed in (
        ("fresh images at or above the threshold", matches, images, RATE),
        ("runs whose 95 % interval of the excess lies above 0", above, len(rows), 0.025),
        ("runs whose interval lies above the policy's 1 %", failed, len(rows), 0.025),
        ("runs whose interval lies below 0", below, len(rows), 0.025),
    ):
        low, high = clopper_pearson(flagged, of)
        if of == images:  # those of a run share its threshold
            shares = [row["matches"] / row["num_images"] for row in rows]
            half = 1.96 * stdev(shares) / math.sqrt(len(shares))
            low, high = mean(shares) - half, mean(shares) + half
        lines.append(
            f"| {what} | {of:,} | {flagged:,} | {flagged / of:.2%} | {low:.2%} to {high:.2%} | {allowed:.1%} |"
        )
    excesses = [row["excess"] for row in rows]
    lines += ["", f"mean excess {mean(excesses):+.3%}, standard deviation {stdev(excesses):.3%}"]
    return "\n".join(lines)


def spread(values: list[float], form: str = "{:.1f}") -> str:
    """Mean, and standard deviation over seeds where there are several."""
    text = form.format(mean(values))
    return text if len(values) < 2 else f"{text} ± {form.format(stdev(values))}"


if __name__ == "__main__":
    main()
