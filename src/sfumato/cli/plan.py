"""`sfumato plan`: what noise, steps and time a budget buys. Reads no private data and spends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sfumato.cli.parsing import parse, say
from sfumato.errors import InputError
from sfumato.personalization.options import DEFAULT_DELTA
from sfumato.personalization.options import Method as StyleMethod
from sfumato.synthesis.options import Method, Preset, default_delta, seconds


@dataclass(frozen=True)
class PlanOptions:
    """Show what a privacy and a time budget buy on this machine. Reads no private data, costs nothing.

    The machine's speed is measured on random images for a few seconds.
    """

    units: int
    """Number of private units (images, or groups) to plan for; a public figure or a guess, above 1."""

    epsilon: float
    """Privacy budget ε: for adding or removing one unit. A number above 0: below 1 is strong, 10 is weak."""

    delta: float | None = None
    """Probability δ with which the ε bound may fail. Default: 1/(n·ln n), n the units, never above n^-1.1; 1e-5 for
    the methods of `sfumato personalize`."""

    method: Method | StyleMethod = "privimage"
    """The method to plan for, as in `sfumato synthesize` or `sfumato personalize`; of the latter for the
    embedded model."""

    preset: Preset | None = None
    """The settings to plan with, as in `sfumato synthesize`. Default: the demo's."""

    time_budget: str = "10m"
    """Wall-clock time the run may take on this machine: 90s, 10m, 2h."""

    size: int | None = None
    """Side of the square images, in pixels. Default: the preset's."""

    channels: Literal[1, 3] | None = None
    """Colour channels: 1 (grey) or 3 (RGB). Default: the preset's."""

    labels: int = 10
    """Number of labels; 1 for a set without labels."""

    public_classes: int | None = None
    """Number of classes in the public set. Default: as many as the preset can use."""

    num_images: int | None = None
    """How many synthetic images to write. Default: the preset's, else as many as the units."""

    def check(self) -> None:
        """Refuse values that can never work, before anything heavy is imported (InputError)."""
        for name, fits in (
            ("units", self.units >= 2),
            ("epsilon", 0 < self.epsilon < float("inf")),
            ("delta", self.delta is None or 0 < self.delta < 1),
            ("size", self.size is None or 8 <= self.size <= 256),
            ("labels", self.labels >= 1),
            ("public_classes", self.public_classes is None or self.public_classes >= 1),
            ("num_images", self.num_images is None or self.num_images >= 1),
        ):
            if not fits:
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} {getattr(self, name)} cannot be used; see `sfumato plan --help`.")
        seconds(self.time_budget)


def run(arguments: Sequence[str]) -> int:
    """Parse, measure this machine, plan, print."""
    options = parse(PlanOptions, "sfumato plan", arguments)
    options.check()
    if options.method in get_args(StyleMethod):
        return _style(options)
    from sfumato.machine import best_defaults
    from sfumato.privacy.budget import Budget, delta_warning
    from sfumato.synthesis.presets import preset_for
    from sfumato.synthesis.run import plan_for

    chosen = preset_for(options.preset, "")
    preset = replace(chosen, size=options.size or chosen.size, channels=options.channels or chosen.channels)
    delta = options.delta if options.delta is not None else default_delta(options.units)
    budget = Budget(options.epsilon, delta)
    plan = plan_for(
        method=options.method, preset=preset, budget=budget, time_budget=options.time_budget,
        units=options.units, labels=options.labels, public_classes=options.public_classes,
        num_images=options.num_images,
    )  # fmt: skip
    defaults = best_defaults()
    say(f"plan for {options.units:,} units, on {defaults.threads} threads ({defaults.device})")
    for line in plan.lines():
        say(f"  {line}")
    if warning := delta_warning(budget.delta, options.units):
        say(f"  note: {warning}")
    say("No private data was read and no budget was spent.")
    return 0


def _style(options: PlanOptions) -> int:
    from sfumato.personalization.plan import embedded_plan
    from sfumato.privacy.budget import Budget

    delta = options.delta if options.delta is not None else DEFAULT_DELTA
    for line in embedded_plan(options.method, Budget(options.epsilon, delta), options.units):  # type: ignore[arg-type]
        say(line)
    say("No private data was read and no budget was spent.")
    return 0
