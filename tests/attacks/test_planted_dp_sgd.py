"""Rules of DP-SGD as checks: each passes on the real code and fails on the bugs planted against it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import beta, norm
from torch import nn

import sfumato.privacy.clipping as clipping
import sfumato.privacy.dp_sgd as module
from sfumato.privacy.clipping import ClippedSum
from sfumato.privacy.dp_sgd import DPSGDPlan, dp_sgd

CANARY = torch.tensor([1.0, 1.0, -1.0, -1.0]) / 2


class Private:
    """Units of one grey 2x2 image; the canary is white above and black below."""

    def __init__(self, units: int, canary: bool = False) -> None:
        self._images = np.full((units + canary, 2, 2, 1), 160, dtype=np.uint8)
        if canary:
            self._images[-1] = np.array([[[255], [255]], [[0], [0]]])
        self._labels = np.zeros(units + canary, dtype=np.int64)
        self._units = [np.array([i]) for i in range(units + canary)]
        self.size, self.channels, self.label_names = (2, 2), 1, ("all",)


class Reservation:
    id = "attack"

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def begin(self, mechanism, event, units=1) -> None:
        self.log.append("begin")

    def begun(self, mechanism) -> int:
        return self.log.count("begin")


class Net(nn.Module):
    """Its gradient is proportional to the image: others pull along (1, 1, 1, 1), the canary along CANARY."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))[:, 0]


def row_loss(call, rows):
    return 100.0 * call(rows["x"]) * rows["sign"]


def make_rows(images, labels, generator):
    return {"x": images, "sign": torch.ones(len(images))}


def run(
    private, *, steps=1, q=1.0, noise=1.0, clip=1.0, per_unit=1, divisor=1.0, log=None, rows=make_rows
) -> Net:
    net = Net()
    plan = DPSGDPlan(q, steps, noise, clip, per_unit, divisor)
    held = Reservation([] if log is None else log)
    dp_sgd(net, private, plan, held, make_rows=rows, row_loss=row_loss,
           optimizer=torch.optim.SGD(net.parameters(), lr=1.0))  # fmt: skip
    return net


def released(private, **more) -> torch.Tensor:
    """The update of one step times the divisor: the noised sum, [4]."""
    return -run(private, **more).linear.weight.detach().flatten() * more.get("divisor", 1.0)


# ------------------------------------------------ checks: AssertionError when a rule is broken


def check_noise_hides_a_canary() -> None:
    """White-box distinguishing: the projection on the canary's direction, with and without it, many runs.

    The lower bound on epsilon (Clopper-Pearson at 99.9 %, threshold fixed) must not exceed the claim.
    """
    trials, sigma, delta = 300, 2.0, 1e-5
    scores = []
    for canary in (False, True):
        found = [float(released(Private(3, canary), noise=sigma) @ CANARY) for _ in range(trials)]
        scores.append(np.array(found))
    base = float(exact_sum(Private(3)) @ CANARY)
    hit = int((scores[1] > base + 0.9).sum())
    false_alarm = int((scores[0] > base + 0.9).sum())
    tpr = beta.ppf(0.0005, hit, trials - hit + 1) if hit else 0.0
    fpr = beta.ppf(0.9995, false_alarm + 1, trials - false_alarm) if false_alarm < trials else 1.0
    bound = math.log(max((tpr - delta) / fpr, 1.0))
    claimed = gaussian_epsilon(sigma, delta)
    assert bound <= claimed, f"measured epsilon >= {bound:.2f} > claimed {claimed:.2f}"


def check_noise_matches_the_event() -> None:
    """Spread of the released sum = noise_multiplier x clip norm; two-sided, so that more is a bug as well."""
    values = torch.stack([released(Private(600), noise=3.0, clip=0.5) for _ in range(150)])
    spread = float(values.std(0).square().mean().sqrt())
    assert abs(spread / 1.5 - 1) < 0.15, f"spread {spread:.2f} instead of 1.5"


def check_one_unit_counts_once() -> None:
    """The exact sum moves by at most the clip norm when a unit joins, also with many rows per unit."""
    for per_unit in (1, 8):
        moved = exact_sum(Private(20, canary=True), per_unit=per_unit) - exact_sum(
            Private(20), per_unit=per_unit
        )
        assert 0.99 < float(moved.norm()) <= 1.0 + 1e-4, f"a unit moves the sum by {float(moved.norm()):.3f}"


def check_batches_are_poisson() -> None:
    """Sizes vary as a binomial's; a unit's presence says nothing about whether it comes again next step."""
    sizes = np.array([round(float(exact_sum(Private(100), q=0.5)[0] * 2)) for _ in range(120)])
    assert 35 < sizes.mean() < 65
    assert 2.5 < sizes.std() < 8, f"batch sizes vary by {sizes.std():.1f} instead of 5"


def check_divisor_is_public() -> None:
    """With one unit more, the update changes by clip norm / expected batch and not through the divisor."""
    few, many = (exact_sum(Private(units), divisor=10.0) for units in (4, 8))
    assert torch.allclose(2 * few, many, atol=1e-3)


def check_empty_batches_step() -> None:
    net = run(Private(5), q=1e-15, steps=2, clip=1.0)
    assert bool((net.linear.weight != 0).all()), "no noisy step was taken on an empty batch"


def check_charged_before_sampling() -> None:
    """`begin` once a step, and before the batch of that step is drawn."""
    log: list[str] = []
    real = module.PoissonSampler.sample

    def spy(self):
        log.append("sample")
        return real(self)

    with patched(module.PoissonSampler, "sample", spy):
        run(Private(5), steps=3, log=log)
    assert log == ["begin", "sample"] * 3, log


def check_noise_does_not_repeat() -> None:
    first, again = released(Private(5)), released(Private(5))
    assert not torch.equal(first, again)
    net = run(Private(0), steps=1)
    two = run(Private(0), steps=2)
    assert not torch.allclose(2 * net.linear.weight, two.linear.weight)


def check_row_randomness_is_fresh() -> None:
    """Noise levels come from a generator that nobody can guess: filled anew at each step, not by 32 bits."""
    draws: list[float] = []

    def rows(images, labels, generator):
        draws.append(float(torch.rand((), generator=generator, dtype=torch.float64)))
        return make_rows(images, labels, generator)

    with patched(module.SecureStream, "seed", lambda self: 7):  # torch would use the low half of it only
        for _ in range(2):
            run(Private(5), steps=2, rows=rows)
    draws = [draw for place, draw in enumerate(draws) if place % 3]  # without the two public checks
    assert len(set(draws)) == 4, "the row randomness came twice"


class Parts(Net):
    """A part that is trained, one that is frozen, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(1, 1)
        self.frozen = nn.Linear(1, 1)
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = torch.zeros(len(x), dtype=torch.int64)
        return self.frozen((super().forward(x) + self.bias(place)[:, 0])[:, None])[:, 0]


def check_what_is_updated_is_noised() -> None:
    """A step on an empty batch moves every trained coordinate and nothing else."""
    net = Parts()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plan = DPSGDPlan(1e-15, 1, 1.0, 1.0, 1, 1.0)
    dp_sgd(net, Private(5), plan, Reservation([]), make_rows=make_rows, row_loss=row_loss,
           optimizer=torch.optim.SGD(net.parameters(), lr=1.0))  # fmt: skip
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    for name, value in net.state_dict().items():
        moved = value != before[name]
        assert bool(moved.all()) if name in trained else not bool(moved.any()), name


# ---------------------------------------------------------------- tools


def exact_sum(private, **more) -> torch.Tensor:
    """What a step would release without its noise, [4]."""
    with patched(module.SecureStream, "gaussian", lambda self, shape: np.zeros(shape)):
        return released(private, **more)


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Epsilon of one Gaussian release with sensitivity 1 (Balle and Wang 2018, theorem 8), by bisection."""
    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        a, b = 0.5 / sigma, middle * sigma
        if norm.cdf(a - b) - math.exp(middle) * norm.cdf(-a - b) > delta:
            low = middle
        else:
            high = middle
    return high


@contextlib.contextmanager
def patched(owner, name: str, value):
    real = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield real
    finally:
        setattr(owner, name, real)


# ---------------------------------------------------------------- planted bugs


def noise_left_out():
    return patched(ClippedSum, "add_noise", lambda self, multiplier, stream: self._values)


def noise_per_micro_batch():
    """Noise on the sum of every physical batch as well as at the end: more noise than the event says."""
    real = module.clipped_gradient_sum

    def each(*args, **more):
        part = real(*args, **more)
        return ClippedSum(part.add_noise(3.0, module.SecureStream()), part.clip_norm)

    return patched(module, "clipped_gradient_sum", each)


def clip_norm_doubled():
    real = clipping._add_clipped
    return patched(clipping, "_add_clipped", lambda total, g, clip: real(total, g, 2 * clip))


def sensitivity_halved():
    return patched(ClippedSum, "sensitivity", lambda self, relation=None: self.clip_norm / 2)


def clip_after_averaging():
    """The batch's mean gradient is clipped instead of each unit's, and scaled up to look like a sum."""

    def wrong(total, gradients, clip_norm):
        for name, g in gradients.items():
            total[name] += clip_norm * g.sum(0) / max(float(g.mean(0).norm()), clip_norm)

    return patched(clipping, "_add_clipped", wrong)


def rows_clipped_instead_of_units():
    real = module.clipped_gradient_sum

    def each_row(net, row_loss, rows, **more):
        return real(net, row_loss, {k: v.flatten(0, 1).unsqueeze(1) for k, v in rows.items()}, **more)

    return patched(module, "clipped_gradient_sum", each_row)


def fixed_batches():
    def half(self):
        return np.sort(
            np.random.default_rng().permutation(self._num_units)[: int(self._num_units * self.probability)]
        )

    return patched(module.PoissonSampler, "sample", half)


def divisor_from_the_batch():
    real, sizes = module._sum_over_batch, []

    def remember(net, private, chosen, *rest):
        sizes.append(max(1, len(chosen)))
        return real(net, private, chosen, *rest)

    apply = module._apply
    stack = contextlib.ExitStack()
    stack.enter_context(patched(module, "_sum_over_batch", remember))
    stack.enter_context(
        patched(module, "_apply", lambda net, noised, divisor, *rest: apply(net, noised, sizes[-1], *rest))
    )
    return stack


def empty_batches_skipped():
    real, sizes = module._sum_over_batch, []

    def remember(net, private, chosen, *rest):
        sizes.append(len(chosen))
        return real(net, private, chosen, *rest)

    apply = module._apply
    stack = contextlib.ExitStack()
    stack.enter_context(patched(module, "_sum_over_batch", remember))
    stack.enter_context(patched(module, "_apply", lambda *given: apply(*given) if sizes[-1] else None))
    return stack


def begin_forgotten():
    """Charges only the last step, as a loop that settles at the end would."""
    stack = contextlib.ExitStack()
    calls: list[int] = []

    def begin(self, mechanism, event, units=1):
        calls.append(1)
        if len(calls) == 3:
            self.log += ["begin"] * 3

    stack.enter_context(patched(Reservation, "begin", begin))
    return stack


def begin_after_sampling():
    real = module._sum_over_batch
    held: list[Reservation] = []
    stack = contextlib.ExitStack()
    stack.enter_context(patched(Reservation, "begin", lambda self, *rest: held.append(self)))

    def late(*given):
        found = real(*given)
        held[-1].log.append("begin")
        return found

    stack.enter_context(patched(module, "_sum_over_batch", late))
    return stack


def noise_repeats():
    def fixed(self, shape):
        return np.random.default_rng(0).standard_normal(shape)

    return patched(module.SecureStream, "gaussian", fixed)


def row_seed_repeats():
    return patched(module, "secret_generator", lambda stream, device: torch.Generator().manual_seed(1234))


def row_seed_of_32_bits():
    def seeded(stream, device):
        return torch.Generator(device=device).manual_seed(stream.seed())

    return patched(module, "secret_generator", seeded)


def label_embedding_not_noised():
    real = ClippedSum.add_noise

    def some(self, multiplier, stream):
        raw = self._values["bias.weight"].clone()
        return {**real(self, multiplier, stream), "bias.weight": raw}

    return patched(ClippedSum, "add_noise", some)


def buffer_carries_data_out():
    """The forward pass keeps what it saw; the check of the network, left out here, would refuse it."""
    real = module._sum_over_batch

    def seeing(net, *rest):
        net.seen += 1.0
        return real(net, *rest)

    return patched(module, "_sum_over_batch", seeing)


CHECKS: dict[Callable[[], None], list[Callable]] = {
    check_noise_hides_a_canary: [noise_left_out],
    check_noise_matches_the_event: [noise_left_out, noise_per_micro_batch, sensitivity_halved],
    check_one_unit_counts_once: [clip_norm_doubled, rows_clipped_instead_of_units, clip_after_averaging],
    check_batches_are_poisson: [fixed_batches],
    check_divisor_is_public: [divisor_from_the_batch],
    check_empty_batches_step: [empty_batches_skipped],
    check_charged_before_sampling: [begin_forgotten, begin_after_sampling],
    check_noise_does_not_repeat: [noise_repeats],
    check_row_randomness_is_fresh: [row_seed_repeats, row_seed_of_32_bits],
    check_what_is_updated_is_noised: [label_embedding_not_noised, buffer_carries_data_out],
}


@pytest.fixture(autouse=True)
def without_the_engine_check(monkeypatch, request):
    """The check of the engine has tests of its own and would run hundreds of times here."""
    if "fresh" not in str(request.node.callspec.id):
        monkeypatch.setattr(module, "_check", lambda *given: None)
    monkeypatch.setattr(module, "Progress", Quiet)


class Quiet:
    def __init__(self, *given, **more) -> None: ...
    def __enter__(self):
        return self

    def __exit__(self, *given) -> None: ...
    def advance(self, *given) -> None: ...


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_real_code_keeps_the_rule(check):
    check()


@pytest.mark.parametrize(
    ("check", "bug"),
    [(check, bug) for check, bugs in CHECKS.items() for bug in bugs],
    ids=lambda value: value.__name__,
)
def test_the_planted_bug_is_caught(check, bug):
    with bug(), pytest.raises(AssertionError):
        check()
