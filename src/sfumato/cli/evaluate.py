"""`sfumato evaluate`: how good synthetic images are, measured against real ones for their owner's eyes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.cli.parsing import aligned, parse, say
from sfumato.evaluation.options import EvaluateOptions

COLUMNS = {
    "FD": "frechet", "KID": "kid", "precision": "precision", "recall": "recall", "density": "density",
    "coverage": "coverage", "authentic": "authenticity", "FLD": "fld",
}  # fmt: skip


def run(arguments: Sequence[str]) -> int:
    """Parse, measure, write summary.json and report.html, and print a table."""
    options = parse(EvaluateOptions, "sfumato evaluate", arguments)
    options.check()
    from sfumato.data.images import OwnerOnly
    from sfumato.evaluation.run import evaluate
    from sfumato.report.evaluation import evaluation_report

    result = evaluate(options)
    report = result.place.text(
        "report.html", evaluation_report(result.summary, result.gallery, result.points)
    )
    if not result.fresh:
        print("this evaluation is complete: everything was known from an earlier call", file=sys.stderr)
    summary = result.summary.value if isinstance(result.summary, OwnerOnly) else result.summary
    for line in table(summary):
        say(line)
    say(f"summary: {result.place.path / 'summary.json'}")
    say(f"report:  {report}")
    say(summary["statement"])
    return 0


def table(summary: Mapping[str, Any]) -> list[str]:
    """The figures of a summary as lines of text, what real images reach below each."""
    from sfumato.report.evaluation import CLASSIFIERS, figure, notes, spread

    rows = [["", *COLUMNS]]
    for name, of in summary["features"].items():
        for said, figures in ((name, of), ("  held-out real", of.get("attainable"))):
            if figures is not None:
                found = [figures.get(key) for key in COLUMNS.values()]
                rows.append([said, *("-" if value is None else figure(value) for value in found)])
    lines = aligned(rows)
    if summary["accuracy"]:
        ceiling = summary.get("ceiling", {}).get("accuracy", {})
        rows = [["accuracy on held-out", "synthetic", "real (ceiling)"]]
        for name, of in summary["accuracy"].items():
            best = spread(ceiling[name]) if name in ceiling else "-"
            rows.append([f"  {CLASSIFIERS.get(name, name)}", spread(of), best])
        lines += ["", *aligned(rows)]
    return [*lines, "", *(f"note: {note}" for note in notes(summary))]
