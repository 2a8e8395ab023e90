"""`sfumato audit`: what a generator memorised, and whether it may be released; for the owner's eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.audit.options import AuditOptions
from sfumato.cli.parsing import aligned, parse, say


def run(arguments: Sequence[str]) -> int:
    """Parse, audit, print the verdict; the exit status is the verdict's: 0 pass, 3 fail, 4 undecided."""
    options = parse(AuditOptions, "sfumato audit", arguments)
    options.check()
    from sfumato.audit.run import audit

    done = audit(options)
    result = done.result.value
    for line in table(result):
        say(line)
    say(f"result:  {done.folder / 'audit.json'}")
    say(f"report:  {done.folder / 'report.html'}")
    say(result["statement"])
    say(f"{result['verdict'].upper()}: {result['sentence']}")
    for reason in result["reasons"]:
        say(f"  - {reason}")
    return done.exit_status


def table(result: Mapping[str, Any]) -> list[str]:
    """The figures of an audit.json as lines of text."""
    lines = []
    if result["attacks"]:
        rows = [["attack", "images", "matches", "AMS", "UMS", "excess over holdout", "interval"]]
        for name, of in result["attacks"].items():
            rows.append([
                name, f"{of['num_images']:,}", f"{of['matches']:,}", f"{of['ams']:.2%}", f"{of['ums']:.2%}",
                f"{of['excess']:+.2%}", f"{of['ci'][0]:+.2%} to {of['ci'][1]:+.2%}",
            ])  # fmt: skip
        lines += [*aligned(rows), ""]
    if result["membership"]:
        rows = [["membership", "AUC", "TPR at 1 % FPR", "TPR at 0.1 % FPR"]]
        for name, of in result["membership"].items():
            rows.append([name, f"{of['auc']:.3f}", *(_rate(of["tpr"].get(key)) for key in ("0.01", "0.001"))])
        rows.append(["blind (no model)", f"{result['blind']['auc']:.3f}", "", ""])
        lines += [*aligned(rows), ""]
    bound, claimed = result["epsilon_lower_bound"], result["epsilon_claimed"]
    if claimed is not None:
        lines.append(f"claimed ε: {claimed['epsilon']:g} (δ = {claimed['delta']:g})")
    if bound is not None:
        lines.append(
            f"ε is at least {bound['epsilon']:g}, by {bound['canaries']:,} canaries that can show {bound['cap']:g} "
            "at most; a low bound is no evidence of privacy"
        )
    lines += [f"skipped: {each['attack']}: {each['why']}" for each in result["skipped"]]
    return lines


def _rate(of: Mapping[str, Any] | None) -> str:
    if of is None or of["value"] is None:
        return "too few images"
    return f"{of['value']:.1%} ({of['true_positives']:,})"
