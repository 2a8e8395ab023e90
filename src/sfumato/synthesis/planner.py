"""What a budget and a time limit buy: noise, steps, noise levels. Reads no private data."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sfumato.errors import InputError
from sfumato.synthesis.methods import METHODS
from sfumato.synthesis.presets import Preset

if TYPE_CHECKING:
    from sfumato.privacy.budget import Budget
    from sfumato.privacy.dp_sgd import DPSGDPlan
    from sfumato.privacy.events import PlannedEvent
    from sfumato.synthesis.private_evolution import EvolutionPlan

FEWEST_STEPS = 20
MORE_THAN_ENOUGH = 1.6  # times the preset's steps, when time is left
SAFETY = (
    0.92  # share of the time budget that is planned; the rest covers start-up, reports and a busy machine
)
SECONDS_PER_CLASSIFIER = 12.0  # of 28x28 pixels; smaller images take less
FLOOR_IMAGES = 1_000
NOISE_FOR_EPSILON = 8.0  # the presets' query and mean-image noise; smaller budgets get more in proportion


@dataclass(frozen=True)
class Speeds:
    """Measured on this machine on random images: rows per second of each kind of work."""

    public_rows: float
    private_rows: float
    denoised_rows: float


@dataclass(frozen=True)
class Plan:
    """A whole run, fixed before the private images are used. Everything in it is public.

    `units` is the declared or noisy number of units. `noise_multiplier` is that of DP-SGD, or of each vote.
    """

    method: str
    units: int
    epsilon: float
    delta: float
    preset: Preset
    sampling_probability: float
    steps: int
    noise_levels: int
    noise_multiplier: float
    public_steps: int
    public_seconds: float | None
    private_seconds: float
    generation_seconds: float
    query: bool
    means: bool

    def dp_sgd(self) -> DPSGDPlan:
        """The plan of the private stage."""
        from sfumato.privacy.dp_sgd import DPSGDPlan

        return DPSGDPlan(
            sampling_probability=self.sampling_probability,
            steps=self.steps,
            noise_multiplier=self.noise_multiplier,
            clip_norm=self.preset.clip_norm,
            rows_per_unit=self.noise_levels,
            expected_batch=self.sampling_probability * self.units,
        )

    def evolution(self) -> EvolutionPlan:
        """The plan of the private stage where the private images vote."""
        return _evolution(self.preset, self.noise_multiplier)

    def events(self) -> list[PlannedEvent]:
        """Everything that will touch the private images, for `Ledger.reserve`; empty for `public-only`."""
        kind = METHODS[self.method].private
        if kind == "none":
            return []
        stage = self.dp_sgd() if kind == "dp-sgd" else self.evolution()
        return [*_one_shot(self.preset, query=self.query, means=self.means), stage.planned()]

    def lines(self) -> list[str]:
        """The plan in words."""
        out = []
        if self.query:
            out.append(
                f"semantic query: top {self.preset.top_k} public classes of each unit, "
                f"noise multiplier {self.preset.query_noise:g}"
            )
        if self.means:
            out.append(
                f"mean images: {self.preset.means_per_label} for each label, "
                f"noise multiplier {self.preset.means_noise:g}"
            )
        if METHODS[self.method].public != "none":
            limit = "" if self.public_seconds is None else f" or {self.public_seconds:.0f} s"
            out.append(
                f"public training: {self.public_steps} steps of {self.preset.public_batch} images{limit}"
            )
        kind = METHODS[self.method].private
        if kind == "votes":
            out.append(
                f"votes: {self.preset.votes} of each unit for the nearest of {self.preset.population} generated images "
                f"({self.preset.votes_encoder}), noise multiplier {self.noise_multiplier:.4g}"
            )
        elif kind == "dp-sgd":
            out.append(
                f"DP-SGD: {self.steps} steps, sampling probability {self.sampling_probability:.4g} (about "
                f"{self.sampling_probability * self.units:.0f} units a step), {self.noise_levels} noise levels "
                f"a unit, noise multiplier {self.noise_multiplier:.4g}, clip norm {self.preset.clip_norm:g}, "
                f"about {self.private_seconds:.0f} s"
            )
        if kind == "none":
            out.append("cost: none, the private images are not used")
        else:
            out.append(f"cost: epsilon {self.epsilon:.4g} at delta {self.delta:.3g}, add or remove one unit")
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain values, for plan.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote."""
        return cls(**{**values, "preset": Preset(**values["preset"])})


def _evolution(preset: Preset, noise_multiplier: float) -> EvolutionPlan:
    from sfumato.synthesis.private_evolution import EvolutionPlan

    return EvolutionPlan(preset.votes, preset.population, noise_multiplier)


def _one_shot(preset: Preset, *, query: bool, means: bool) -> list[PlannedEvent]:
    from sfumato.privacy import mechanisms
    from sfumato.privacy.events import PlannedEvent

    planned = []
    if query:
        planned.append(
            PlannedEvent(
                mechanisms.SEMANTIC_HISTOGRAM,
                f"top-{preset.top_k} public classes of each unit, one row per label",
                mechanisms.semantic_histogram_event(preset.query_noise),
            )
        )
    if means:
        planned.append(
            PlannedEvent(
                mechanisms.MEAN_IMAGES,
                f"{preset.means_per_label} mean images per label, clip norm {preset.means_clip_norm:.4g}",
                mechanisms.mean_images_event(preset.means_noise),
            )
        )
    return planned


def make_plan(
    *,
    method: str,
    units: int,
    budget: Budget,
    preset: Preset,
    seconds: float,
    speeds: Speeds,
    num_images: int,
    num_labels: int,
    public_classes: int | None = None,
    classifiers: int = 0,
    count_work: bool = False,
) -> Plan:
    """Choose steps T, noise levels K and sampling probability q for a time budget, then the least noise.

    Steps come first, up to what the preset calls enough, then noise levels; what is left buys more steps. q
    shrinks only when even the fewest steps would not fit. The noise multiplier is the least whose PLD
    epsilon (query, mean images and DP-SGD composed) is within `budget`. With `classifiers`
    to measure the result, time is kept for them and for FLOOR_IMAGES images of the generator before DP-SGD.
    `count_work`: public training ends after as many steps as fit into its time at `speeds`, not by the clock.
    Raises InputError when the time or the budget is too small.
    """
    from sfumato.privacy.accounting import calibrate
    from sfumato.privacy.dp_sgd import DPSGDPlan

    if units < 2:
        raise InputError(
            f"{units} private unit(s), as declared or by a noisy count: differential privacy cannot hide one in so "
            "few; no budget was spent. Collect more images, or declare their number (--public-size)"
        )
    if preset.time_bound and budget.epsilon < NOISE_FOR_EPSILON:
        scale = NOISE_FOR_EPSILON / budget.epsilon
        preset = replace(
            preset, query_noise=preset.query_noise * scale, means_noise=preset.means_noise * scale
        )  # fmt: skip
    kind = METHODS[method]
    if kind.means and preset.means_per_label == 0:
        preset = replace(preset, means_per_label=1)
    query, private, votes = kind.public == "queried", kind.private != "none", kind.private == "votes"
    means = kind.private == "dp-sgd" and preset.means_per_label > 0
    if kind.public in ("queried", "random") and public_classes is not None:
        per_label = min(preset.classes_per_label, public_classes // num_labels)
        if per_label < 1:
            raise InputError(
                f"{num_labels} labels need at least as many public classes, and there are {public_classes}; no "
                "budget was spent. Use a public set with more classes, or --method dpdm"
            )
        preset = replace(
            preset, classes_per_label=per_label, top_k=min(preset.top_k, public_classes)
        )  # fmt: skip
    calls = preset.sampler_steps * (1 if preset.sampler == "ddim" else 2) - 1
    calls *= 1 if preset.guidance == 1 else 2
    generation = num_images * calls / speeds.denoised_rows
    if votes:
        preset = replace(preset, population=max(num_labels, min(preset.population, num_images)))
        rows = _evolution(preset, 1.0).denoised_rows(preset.sampling(), preset.guidance, num_images)
        generation = rows / speeds.denoised_rows
    q, steps, levels = preset.sampling_probability, preset.enough_steps, preset.noise_levels
    public_steps, public_seconds = preset.public_steps, None
    if preset.time_bound:
        area = preset.size**2 / 784
        before = kind.public != "none" and private and classifiers > 0
        floor = FLOOR_IMAGES * calls / speeds.denoised_rows if before else 0.0
        around = generation + floor + classifiers * (2 + SECONDS_PER_CLASSIFIER * area)
        around += preset.query_steps * 0.03 * area if query else 0
        left = SAFETY * seconds - around
        if left < max(0.2 * seconds, 5):
            raise InputError(
                f"the time budget is too short: {seconds:.0f} s are left of it, and all but training takes about "
                f"{around:.0f} s here ({num_images} images, {classifiers} classifiers to measure them); no budget "
                "was spent. Give more time or fewer images (--num-images)"
            )
        if kind.public != "none":
            public_seconds = left * (preset.public_share if kind.private == "dp-sgd" else 1.0)
        rows = (left - (public_seconds or 0)) * speeds.private_rows
        q, steps, levels = _fit(q, steps, levels, units, rows)
    if count_work and public_seconds is not None:
        passes = 2 if preset.perturbation else 1
        public_steps = max(1, round(public_seconds * speeds.public_rows / preset.public_batch / passes))
        public_seconds = None
    private_seconds = q * units * steps * levels / speeds.private_rows if kind.private == "dp-sgd" else 0.0
    noise = 0.0
    if private:
        one_shot = [planned.total for planned in _one_shot(preset, query=query, means=means)]

        def events(noise_multiplier: float) -> Sequence[Any]:
            if votes:
                return [*one_shot, _evolution(preset, noise_multiplier).planned().total]
            plan = DPSGDPlan(q, steps, noise_multiplier, preset.clip_norm, levels, q * units)
            return [*one_shot, plan.planned().total]

        noise = calibrate(events, budget)
    return Plan(
        method=method, units=units, epsilon=budget.epsilon, delta=budget.delta, preset=preset,
        sampling_probability=q, steps=steps, noise_levels=levels, noise_multiplier=noise,
        public_steps=public_steps, public_seconds=public_seconds, private_seconds=private_seconds,
        generation_seconds=generation, query=query, means=means,
    )  # fmt: skip


def _fit(q: float, steps: int, levels: int, units: int, rows: float) -> tuple[float, int, int]:
    """Spend `rows` gradient rows on K and T (`steps`: how many are enough), K at least 1, T at least the fewest."""
    per_step = q * units
    fewest = min(FEWEST_STEPS, steps)
    levels = max(1, min(levels, math.floor(rows / (per_step * steps))))
    fitting = math.floor(rows / (per_step * levels))
    if fitting < fewest:
        q = q * fitting / fewest if fitting else rows / (fewest * units)
        q = max(min(q, 1.0), 1.0 / units)
        fitting = fewest
    return q, min(math.ceil(MORE_THAN_ENOUGH * steps), fitting), levels


def measure_speeds(network: Any, edm: Any, *, size: tuple[int, int], channels: int, autocast: bool) -> Speeds:
    """Time each kind of work on random images for a few seconds; leaves the network as it was."""
    import torch

    from sfumato.privacy.dp_sgd import measure_step_seconds, rows_of_units

    device = next(network.parameters()).device
    generator = torch.Generator(device=device).manual_seed(0)
    no_label = network.config.num_class_embeds - 1
    batch = 64

    def make_rows(images: Any, labels: Any, source: Any) -> dict[str, Any]:
        return edm.rows(images, labels, source, no_label=no_label, label_dropout=0.1)

    images = torch.rand((batch, channels, *size), generator=generator, device=device) * 2 - 1
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    rows = make_rows(images, labels, generator)

    def public() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            edm.row_loss(network, rows).mean().backward()
        network.zero_grad(set_to_none=True)

    @torch.no_grad()
    def denoise() -> None:
        edm.denoise(network, images, rows["sigma"], labels)

    per_unit = 2
    private = measure_step_seconds(
        network,
        edm.row_loss,
        rows_of_units(images, labels, make_rows, generator, per_unit),
        units=batch // per_unit,
    )
    return Speeds(
        public_rows=batch / _seconds(public, device),
        private_rows=batch / private,
        denoised_rows=batch / _seconds(denoise, device),
    )


def _seconds(work: Any, device: Any) -> float:
    import torch

    work()
    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[1]
