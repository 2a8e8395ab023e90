"""DP-SGD over units of protected images (arXiv 1607.00133) with K noise levels per unit (arXiv 2210.09929).

Formal guarantee. `dp_sgd` releases the weights after every step; all of them together satisfy the guarantee
of `plan.planned().total`, a `SelfComposedDpEvent` of `PoissonSampledDpEvent(q,
GaussianDpEvent(noise_multiplier))`, for *add or remove one unit*. It rests on: a fresh Poisson sample of
units at each step from the operating system's randomness; each unit's contribution clipped to
`plan.clip_norm` after averaging over its K rows; noise of standard deviation noise_multiplier * clip_norm
added once to the sum, also to the sum of an empty batch; division by the public `plan.expected_batch`.
Every step is written down in the ledger before its batch is drawn.

Row randomness (noise levels, label dropout, flips) depends on a unit's place in the batch: adding one unit
shifts the draws of those behind it. With publicly known draws all of these would change at once and the sum
could move by far more than clip_norm. So `make_rows` gets a `torch.Generator` whose state is filled afresh at
each step from the secure stream, and must draw from nothing else; a user's seed never reaches it. (Seeding
would not do on a CPU: torch uses 32 bits of a seed there, few enough to try them all.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.checkpoint import Averaged, load_checkpoint, save_checkpoint
from sfumato.errors import InputError, LedgerError, SfumatoError
from sfumato.privacy.clipping import ClippedSum, clipped_gradient_sum, empty_gradient_sum
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.per_unit import Engine, RowLoss, Rows
from sfumato.privacy.randomness import SecureStream
from sfumato.privacy.ranks import Ranks
from sfumato.privacy.sampling import PoissonSampler
from sfumato.privacy.selfcheck import selfcheck
from sfumato.progress import Progress

MECHANISM = "dp_sgd"
_MT19937_WORDS = slice(24, 24 + 624 * 8)  # in the bytes of a CPU generator's state
CHECKPOINT = "dp_sgd.safetensors"
SECONDS_BETWEEN_CHECKPOINTS = 10.0
PIXELS_AT_ONCE = 16_000_000  # rows are built for blocks of units, to bound memory

MakeRows = Callable[[Tensor, Tensor, torch.Generator], dict[str, Tensor]]


class Reservation(Protocol):
    """What DP-SGD needs of a ledger's reservation."""

    @property
    def id(self) -> Any: ...
    def begin(self, mechanism: str, event: Any, units: int = 1) -> Any: ...
    def begun(self, mechanism: str) -> int: ...


@dataclass(frozen=True)
class DPSGDPlan:
    """Everything that enters the accounting, fixed before the first step. All of it is public.

    sampling_probability: q, chance of each unit to be in a step's batch. steps: T. noise_multiplier:
    standard deviation of the noise over clip_norm. clip_norm: C. rows_per_unit: K, rows averaged inside a
    unit before clipping. expected_batch: the divisor, q times the *declared or noised* number of units,
    never the true one.
    """

    sampling_probability: float
    steps: int
    noise_multiplier: float
    clip_norm: float
    rows_per_unit: int
    expected_batch: float

    def __post_init__(self) -> None:
        limits = {
            "sampling_probability": 0 < self.sampling_probability <= 1,
            "steps": self.steps >= 1,
            "noise_multiplier": 0 < self.noise_multiplier < float("inf"),
            "clip_norm": 0 < self.clip_norm < float("inf"),
            "rows_per_unit": self.rows_per_unit >= 1,
            "expected_batch": 0 < self.expected_batch < float("inf"),
        }
        for name, fine in limits.items():
            if not fine:
                raise InputError(
                    f"{name}={getattr(self, name)} is out of range; no budget was spent; choose it positive"
                )

    @property
    def event(self) -> Any:
        """The `DpEvent` of one step."""
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

        return PoissonSampledDpEvent(self.sampling_probability, GaussianDpEvent(self.noise_multiplier))

    def planned(self, label: str = "") -> PlannedEvent:
        """All steps, for `Ledger.reserve`; `label` opens the sentence shown in the certificate."""
        says = (
            f"{label + ': ' if label else ''}{self.steps} steps, clip norm {self.clip_norm:g}, "
            f"{self.rows_per_unit} noise levels per unit"
        )
        return PlannedEvent(mechanism=MECHANISM, says=says, event=self.event, count=self.steps)


@dataclass(frozen=True)
class DPSGDResult:
    """steps_begun: charged in the ledger; steps_applied: contained in the weights (fewer after a crash)."""

    steps_begun: int
    steps_applied: int


def dp_sgd(
    net: nn.Module,
    private: Any,
    plan: DPSGDPlan,
    reservation: Reservation | None,
    *,
    make_rows: MakeRows,
    row_loss: RowLoss,
    optimizer: torch.optim.Optimizer,
    lr: Callable[[int], float] | None = None,
    ema: Averaged | None = None,
    checkpoint_dir: str | Path | None = None,
    engine: Engine = "fast",
    physical_batch: int | None = None,
) -> DPSGDResult:
    """Train `net` in place until `plan.steps` steps have begun in `reservation`; see the module for the
    guarantee.

    private: `ProtectedImages`. reservation: holds `plan.planned()` (None on ranks other than 0).
    make_rows(images [R, C, H, W] float32 in [-1, 1], labels [R] int64, generator): builds row tensors [R,
    ...]; must treat rows independently and draw from `generator` only. row_loss(call, rows) -> losses [R].
    lr(step): learning rate of step 0 ... steps - 1. ema: updated after each step (rank 0 only).
    checkpoint_dir: where state is kept, under `internal/`. With it, calling again after an interruption
    goes on from the last checkpoint; steps that had begun but are not in it stay spent and are never
    replayed. physical_batch: units processed at once; a speed knob.

    The network is used in the mode it is in; `selfcheck` runs first, on random images, and refuses active
    dropout, layers that mix units and engines that do not agree with one-backward-per-unit (InputError, no
    budget was spent). Losses, norms and batch sizes are neither returned nor shown.
    """
    ranks, stream = Ranks(), SecureStream()
    units = [private._units[i] for i in ranks.share(len(private._units))]
    sampler = PoissonSampler(len(units), plan.sampling_probability, stream)
    device = next(net.parameters()).device
    state = None if checkpoint_dir is None else Path(checkpoint_dir) / CHECKPOINT
    ranks.on_first(lambda: _check(net, private, plan, make_rows, row_loss, engine))

    def resume() -> int:
        assert reservation is not None
        if state is None:
            return 0
        about = load_checkpoint(state, net, optimizer, ema, owner=str(reservation.id))
        contained = int(about.get("steps_applied", 0))
        if contained > reservation.begun(MECHANISM):
            raise LedgerError(
                f"{state} contains {contained} steps, more than the ledger knows of: an older copy of the ledger was "
                "put back, and going on would not be charged in full. Put back the newest copy of the ledger, or "
                "start again with another --out"
            )
        return contained

    def begin() -> None:
        assert reservation is not None
        reservation.begin(MECHANISM, plan.event, 1)

    def save() -> None:
        if state is not None and ranks.first and reservation is not None:
            about = {"steps_applied": applied}
            save_checkpoint(state, net, optimizer, ema, owner=str(reservation.id), about=about)

    applied = ranks.on_first(resume)
    begun = ranks.on_first(lambda: reservation.begun(MECHANISM) if reservation else 0)
    ranks.copy_from_first(net.parameters())
    whole = True  # False while weights, moments and average are of different steps
    saved_at = time.monotonic()
    with Progress("dp-sgd", total=plan.steps, unit="steps") as progress:
        progress.advance(begun)
        try:
            while begun < plan.steps:
                ranks.on_first(begin)  # charged before the batch exists: a killed step is a spent step
                chosen = [units[i] for i in sampler.sample()]
                total = _sum_over_batch(
                    net, private, chosen, plan, make_rows, row_loss, stream, device, engine, physical_batch
                )
                total = ranks.sum_to_first(total)
                if ranks.first:
                    noised = total.add_noise(plan.noise_multiplier, stream)
                    whole = False
                    _apply(net, noised, plan.expected_batch, optimizer, lr(begun) if lr else None, ema)
                    applied, whole = applied + 1, True
                ranks.copy_from_first(net.parameters())
                begun += 1
                progress.advance(1)
                if time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                    save()
                    saved_at = time.monotonic()
            save()
        except KeyboardInterrupt:
            if whole:
                save()
            raise
    return DPSGDResult(steps_begun=begun, steps_applied=applied)


def _apply(
    net: nn.Module,
    noised: dict[str, Tensor],
    expected_batch: float,
    optimizer: torch.optim.Optimizer,
    rate: float | None,
    ema: Averaged | None,
) -> None:
    """One optimiser step on the noised sum over the public divisor. Post-processing."""
    for name, parameter in net.named_parameters():
        if name in noised:
            parameter.grad = noised[name].to(parameter.dtype) / expected_batch
    if rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ema is not None:
        ema.update(net)


def _sum_over_batch(
    net: nn.Module,
    private: Any,
    chosen: Sequence[np.ndarray],
    plan: DPSGDPlan,
    make_rows: MakeRows,
    row_loss: RowLoss,
    stream: SecureStream,
    device: torch.device,
    engine: Engine,
    physical_batch: int | None,
) -> ClippedSum:
    """Clipped gradient sum of the chosen units; each of their K rows is an image drawn uniformly."""
    per_unit = plan.rows_per_unit
    generator = secret_generator(stream, device)
    total = empty_gradient_sum(net, plan.clip_norm)
    block = max(1, PIXELS_AT_ONCE // (per_unit * int(np.prod(private._images.shape[1:]))))
    for start in range(0, len(chosen), block):
        some = chosen[start : start + block]
        picked = np.concatenate([np.asarray(unit)[stream.integers(len(unit), per_unit)] for unit in some])
        images = torch.from_numpy(np.ascontiguousarray(private._images[picked])).to(device)
        labels = torch.from_numpy(np.asarray(private._labels[picked], dtype=np.int64)).to(device)
        rows = rows_of_units(
            images.permute(0, 3, 1, 2).float() / 127.5 - 1, labels, make_rows, generator, per_unit
        )
        total = total._add(
            clipped_gradient_sum(
                net, row_loss, rows, clip_norm=plan.clip_norm, engine=engine, physical_batch=physical_batch
            )
        )
    return total


def secret_generator(stream: SecureStream, device: torch.device) -> torch.Generator:
    """A generator that nobody can guess: 64 secret bits on an accelerator, all 19,968 of its state on a CPU."""
    generator = torch.Generator(device=device)
    generator.manual_seed(stream.seed())
    if device.type == "cpu":
        state = generator.get_state()
        words = state.numpy()[_MT19937_WORDS].view(np.uint64)  # each holds 32 bits
        if len(words) != 624 or words[0] != generator.initial_seed() & 0xFFFFFFFF:
            raise SfumatoError(
                "this version of torch keeps its random state otherwise; use a version below it"
            )
        words[:] = stream.uniform64(624) >> np.uint64(32)
        generator.set_state(state)
    return generator


def rows_of_units(
    images: Tensor, labels: Tensor, make_rows: MakeRows, generator: torch.Generator, per_unit: int
) -> dict[str, Tensor]:
    """`make_rows` on [U*K] rows, reshaped to the [U, K, ...] that the engines take."""
    made = make_rows(images, labels, generator)
    for name, value in made.items():
        if value.shape[:1] != labels.shape:
            raise InputError(
                f"make_rows returned {name!r} of shape {tuple(value.shape)} for {len(labels)} rows; "
                "return tensors with one entry per row"
            )
    return {name: value.unflatten(0, (-1, per_unit)) for name, value in made.items()}


def random_rows(
    size: tuple[int, int],
    channels: int,
    labels: int,
    units: int,
    per_unit: int,
    make_rows: MakeRows,
    device: Any,
) -> dict[str, Tensor]:
    """Rows [U, K, ...] made from uniform random images and labels: for checks and timing."""
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (units * per_unit, channels, *size)
    images = torch.rand(shape, generator=generator, device=device) * 2 - 1
    drawn = torch.randint(0, labels, shape[:1], generator=generator, device=device)
    return rows_of_units(images, drawn, make_rows, generator, per_unit)


def _check(
    net: nn.Module, private: Any, plan: DPSGDPlan, make_rows: MakeRows, row_loss: RowLoss, engine: Engine
) -> None:
    device = next(net.parameters()).device
    labels, per_unit = len(private.label_names), plan.rows_per_unit  # as used: engines choose by it
    rows = random_rows(private.size, private.channels, labels, 3, per_unit, make_rows, device)
    selfcheck(net, row_loss, rows, engine)


def measure_step_seconds(
    net: nn.Module, row_loss: RowLoss, example_rows: Rows, engine: Engine = "fast", units: int = 32
) -> float:
    """Seconds that the clipped gradient sum of `units` units takes here, for the planner.

    `example_rows` [U, K, ...] must be public (see `random_rows`); they are repeated up to `units`. The
    network is left as it is. Grows linearly with units once `units` fills a physical batch; best of two
    runs after a warm-up.
    """
    repeats = -(-units // next(iter(example_rows.values())).shape[0])
    rows = {
        name: value.repeat(repeats, *[1] * (value.dim() - 1))[:units] for name, value in example_rows.items()
    }
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        clipped_gradient_sum(net, row_loss, rows, clip_norm=1.0, engine=engine)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
