"""`sfumato checks`: is this machine, with this software, fit to use, and is its gradient engine right?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.cli.parsing import parse, say
from sfumato.errors import InputError

ENGINES = ("fast", "exact")


@dataclass(frozen=True)
class ChecksOptions:
    """Show versions, threads, allocator and device, and test the gradient engine on this machine.

    Exit status 1 when the self-test fails: then no private training should be run here. Uses no private data.
    """

    json: bool = False
    """Print one JSON object instead of a table, for a bug report."""


def run(arguments: Sequence[str]) -> int:
    """Parse, look at the machine, test the engines, print."""
    options = parse(ChecksOptions, "sfumato checks", arguments)
    from dataclasses import asdict

    import torch

    from sfumato.machine import best_defaults, machine_report

    report, chosen = machine_report(), best_defaults()
    report["chosen_by_measurement"] = asdict(chosen)
    torch.set_num_threads(chosen.threads)  # as a run does
    tests = [self_test(engine) for engine in ENGINES]
    passed = all(test["ok"] for test in tests)
    if options.json:
        import json

        say(json.dumps(report | {"self_test": tests, "ok": passed}, indent=2, default=str))
        return 0 if passed else 1
    for name, value in report.items():
        _say_table(name, value)
    say("self-test of the gradient engines, against one backward pass per unit")
    for test in tests:
        say(f"  {test['engine']:<8} {'right' if test['ok'] else 'WRONG'}: {test['found']}")
    if not passed:
        say("private training must not be run on this machine with this software")
    return 0 if passed else 1


def self_test(engine: str) -> dict[str, Any]:
    """Compare an engine with one backward pass per unit, on the published network with random public rows."""
    import torch

    from sfumato.diffusion.edm import EDM
    from sfumato.diffusion.networks import unet
    from sfumato.privacy.selfcheck import selfcheck

    units, levels, labels, side = 2, 2, 3, 8
    generator = torch.Generator().manual_seed(0)
    network = unet("paper", size=(side, side), channels=1, num_labels=labels)
    images = torch.rand(units * levels, 1, side, side, generator=generator) * 2 - 1
    classes = torch.randint(0, labels, (units * levels,), generator=generator)
    edm = EDM()
    flat = edm.rows(images, classes, generator, no_label=labels, label_dropout=0.1)
    rows = {name: value.reshape(units, levels, *value.shape[1:]) for name, value in flat.items()}
    try:
        found = selfcheck(network, edm.row_loss, rows, engine)  # type: ignore[arg-type]
    except InputError as error:
        return {"engine": engine, "ok": False, "found": str(error)}
    return {
        "engine": engine,
        "ok": found.ok,
        "found": f"largest relative error {found.max_rel_error:.1e}, mixing of units {found.max_mixing:.1e}",
    }


def _say_table(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        say(name.replace("_", " "))
        width = max((len(str(key)) for key in value), default=0)
        for key, item in value.items():
            say(f"  {str(key).replace('_', ' '):<{width}}  {item}")
    else:
        say(
            f"{name.replace('_', ' '):<18} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        )
