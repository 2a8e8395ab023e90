"""Downstream accuracy of each method of `sfumato synthesize` on the same data, budget and time.

    python benchmarks/synthesize.py --data fashion-mnist --tier cpu --time-budget 20m --out runs/bench
    python benchmarks/synthesize.py --data demo:digits --tier cpu --epsilons 8 1 --time-budget 8m --out runs/bench

Runs `sfumato synthesize` once for each method and epsilon, each with the same time budget on this machine, and
prints a table for RESULTS.md. The same command resumes: finished runs are read, not repeated.
`--tier full` uses the published settings (28 pixels, no time limit) and wants an accelerator.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

PUBLIC = "demo:glyphs"
METHODS = ("privimage", "dpdm", "public-only")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("fashion-mnist", "demo:digits"), default="fashion-mnist")
    parser.add_argument("--tier", choices=("cpu", "full"), default="cpu")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[10.0])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--time-budget", default="20m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    rows = []
    for epsilon in options.epsilons:
        for method in options.methods:
            folder = (
                options.out
                / f"{options.data.replace(':', '-')}-{options.tier}-{method}-eps{epsilon:g}-{options.seed}"
            )
            command = [
                sys.executable, "-m", "sfumato", "synthesize", options.data, "--epsilon", str(epsilon),
                "--method", method, "--time-budget", options.time_budget, "--seed", str(options.seed),
                "--out", str(folder),
            ]  # fmt: skip
            if method != "dpdm":
                command += ["--public", PUBLIC]
            if options.tier == "full":
                command += ["--preset", "paper-fashion-mnist"]
            subprocess.run(command, check=True)
            measured = json.loads((folder / "internal" / "evaluation.json").read_text(encoding="utf-8"))
            claim = json.loads((folder / "release" / "privacy.json").read_text(encoding="utf-8"))
            rows.append(
                (epsilon, method, claim["epsilon"], {r["name"]: r["accuracy"] for r in measured["accuracy"]})
            )
    print(f"{options.data}, tier {options.tier}, {options.time_budget} a run, seed {options.seed}\n")
    print("| method | ε spent | this release | public-only generator | selected public images | real data |")
    print("|---|---|---|---|---|---|")
    names = (
        "this release", "public-only generator (floor)", "selected public images (floor)", "real data (ceiling)"
    )  # fmt: skip
    for _, method, spent, accuracy in rows:
        cells = (f"{accuracy[name]:.1%}" if name in accuracy else "–" for name in names)
        print(f"| {method} | {spent:.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
