"""DPImageBench's accountant beside ours, on DPImageBench's own configurations.

    git clone https://github.com/2019ChenGong/DPImageBench
    python benchmarks/peers/dpimagebench.py --checkout DPImageBench [--json FILE]

For DPDM and PrivImage on MNIST, Fashion-MNIST and CIFAR-10 at epsilon 1 and 10 it lets the checkout's own code (the
Opacus it brings along, in a process of its own) choose the noise multiplier from its configuration files, and states
epsilon of that noise by its RDP accountant, by ours with RDP, and by ours with PLD, then the noise ours needs for the
same epsilon. Takes about a minute. Nothing of the checkout is imported here or copied.

Sampling rate and steps are those of its code: q = 1 / ceil(n / batch), for the n images left when its evaluation mode
splits off a validation set, and int(epochs / q) steps. PrivImage's query is one Gaussian with the `sigma` of the
configuration, over all images, which its calibration counts in.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS = ("DPDM", "PrivImage")
DATA = {"mnist_28": "MNIST", "fmnist_28": "F-MNIST", "cifar10_32": "CIFAR-10"}
EPSILONS = ("1.0", "10.0")
IMAGES = {"mnist_28": (55_000, 60_000), "fmnist_28": (55_000, 60_000), "cifar10_32": (45_000, 50_000)}
"""Private images with and without `eval.mode: val`, as in its data/dataset_loader.py."""

THEIRS = """
import json, sys, warnings
warnings.simplefilter("ignore")
from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
found = []
for case in json.load(sys.stdin):
    query = [(case["query"], 1.0, 1)] if case["query"] else None
    noise = get_noise_multiplier(
        target_epsilon=case["epsilon"], target_delta=case["delta"], sample_rate=case["q"], epochs=case["epochs"],
        accountant="rdp", account_history=query,
    )
    both, training = RDPAccountant(), RDPAccountant()
    training.history = [(noise, case["q"], case["steps"])]
    both.history = (query or []) + training.history
    found.append({
        "noise": noise, "rdp": both.get_epsilon(case["delta"]), "logged": training.get_epsilon(case["delta"]),
    })
print(json.dumps(found))
"""
"""Run with the checkout's Opacus first on the path. `logged`: what its training loop logs, without the query."""


def main() -> None:
    """Compute every row and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, required=True, help="folder with DPImageBench's files")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    cases = distinct(configurations(options.checkout))
    rows = [
        compared(case, theirs) for case, theirs in zip(cases, by_theirs(options.checkout, cases), strict=True)
    ]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def configurations(checkout: Path) -> list[dict[str, Any]]:
    """What each configuration file says, and what its code makes of it."""
    import yaml

    cases = []
    for method in METHODS:
        for data, title in DATA.items():
            for epsilon in EPSILONS:
                path = checkout / "configs" / method / f"{data}_eps{epsilon}.yaml"
                if not path.is_file():
                    sys.exit(f"error: no {path}: give --checkout the folder of a DPImageBench checkout")
                config = yaml.safe_load(path.read_text(encoding="utf-8"))
                train, dp = config["train"], config["train"]["dp"]
                private = IMAGES[data][config["eval"]["mode"] != "val"]
                q = 1 / math.ceil(private / train["batch_size"])
                cases.append({
                    "method": method, "data": [title], "epsilon": float(dp["epsilon"]), "delta": float(dp["delta"]),
                    "private": private, "q": q, "epochs": train["n_epochs"], "steps": int(train["n_epochs"] / q),
                    "query": config["public_data"]["selective"]["sigma"] if method == "PrivImage" else None,
                })  # fmt: skip
    return cases


def distinct(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases, those that differ by data only made one."""
    merged: dict[str, dict[str, Any]] = {}
    for case in cases:
        key = json.dumps({name: value for name, value in case.items() if name != "data"})
        if key in merged:
            merged[key]["data"] += case["data"]
        else:
            merged[key] = case
    return list(merged.values())


def by_theirs(checkout: Path, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Noise multiplier and epsilon by the checkout's own Opacus."""
    library = (checkout / "opacus").resolve()
    if not (library / "opacus" / "accountants").is_dir():
        sys.exit(f"error: no accountants in {library}: give --checkout the folder of a DPImageBench checkout")
    done = subprocess.run(
        [sys.executable, "-c", THEIRS], input=json.dumps(cases), capture_output=True, text=True, cwd=library,
        env={**os.environ, "PYTHONPATH": str(library)},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"error: its accountant failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(case: dict[str, Any], theirs: dict[str, float]) -> dict[str, Any]:
    """The case with its figures and ours."""
    from dp_accounting.dp_event import (
        DpEvent,
        GaussianDpEvent,
        PoissonSampledDpEvent,
        SelfComposedDpEvent,
    )

    from sfumato.privacy.accounting import calibrate, epsilon_of
    from sfumato.privacy.budget import Budget

    def events(noise: float) -> list[DpEvent]:
        training = SelfComposedDpEvent(
            PoissonSampledDpEvent(case["q"], GaussianDpEvent(noise)), case["steps"]
        )
        return [training] if case["query"] is None else [GaussianDpEvent(case["query"]), training]

    spent = {
        kind: epsilon_of(events(theirs["noise"]), case["delta"], accountant=kind) for kind in ("rdp", "pld")
    }
    ours = calibrate(events, Budget(case["epsilon"], case["delta"]))
    return {**case, "theirs": theirs, "ours": {**spent, "noise": ours}}


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table."""
    lines = [
        "| method, data | ε wanted | 1/q · T · query | its noise | its RDP | our RDP | our PLD | our noise | less |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs, ours, query = row["theirs"], row["ours"], row["query"]
        lines.append(
            f"| {row['method']}, {' and '.join(row['data'])} | {row['epsilon']:g} | {1 / row['q']:.0f} · {row['steps']}"
            f" · {f'{query:g}' if query else '–'} | {theirs['noise']:.4f} | {theirs['rdp']:.4f} | {ours['rdp']:.4f} | "
            f"**{ours['pld']:.4f}** | **{ours['noise']:.4f}** | {1 - ours['noise'] / theirs['noise']:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
