"""Private Evolution: the population moves to the private images, by votes alone; resuming; what is refused."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.diffusion.edm import EDM
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.sampling import Sampler, noise_levels
from sfumato.errors import BudgetError, InputError, LedgerError
from sfumato.privacy import votes as votes_module
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.votes import MECHANISM, VoteCounter
from sfumato.synthesis import private_evolution as module
from sfumato.synthesis.private_evolution import STATE, EvolutionPlan, evolve, survivors, vary

SIDE = 4
NAMES = ("a", "b")


@dataclass(frozen=True)
class Blobs(EDM):
    """The exact denoiser of grey images whose every pixel is N(mean, 0.5^2): the same one for all labels."""

    mean: float = -0.3

    def denoise(self, net, x_noisy, sigma, labels):
        s = sigma.reshape(-1, 1, 1, 1)
        return (0.25 * x_noisy + s**2 * self.mean) / (0.25 + s**2)


class Nothing(nn.Module):
    """Stands for a network: a parameter to find the device by, and the sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(sample_size=SIDE, in_channels=1)
        self.rows = 0


class Counting(Blobs):
    def denoise(self, net, x_noisy, sigma, labels):
        net.rows += len(x_noisy)
        return super().denoise(net, x_noisy, sigma, labels)


GENERATOR = Generator(Nothing(), NAMES, Blobs(), Sampler(steps=8, kind="ddim"))
PLAN = EvolutionPlan(
    iterations=4, population=120, noise_multiplier=0.5, threshold=2.0, sigma_first=1.0, sigma_last=0.2
)
TARGETS = np.stack([np.eye(SIDE), np.eye(SIDE)[::-1]])[..., None] * 160 + 50


def protected(units: int = 300, seed: int = 0) -> Any:
    """Label a: a bright diagonal; label b: the other one."""
    draw = np.random.default_rng(seed)
    labels = np.arange(units) % 2
    images = np.clip(TARGETS[labels] + draw.normal(0, 8, (units, SIDE, SIDE, 1)), 0, 255).astype(np.uint8)
    return SimpleNamespace(
        _images=images, _labels=labels, _units=[np.array([i]) for i in range(units)], label_names=NAMES,
        size=(SIDE, SIDE), channels=1,
    )  # fmt: skip


def pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


class Reserved:
    """Counts what began; no ledger."""

    id = "one"

    def __init__(self, most: int = 99) -> None:
        self.count, self.most = 0, most

    def begin(self, mechanism: str, event: Any, units: int = 1) -> None:
        if self.count >= self.most:
            raise LedgerError("all that was reserved has begun")
        self.count += 1

    def begun(self, mechanism: str) -> int:
        return self.count


def run(folder: Path, *, plan: EvolutionPlan = PLAN, reservation: Any = None, **more: Any) -> Any:
    given = {"generator": GENERATOR, "private": protected(), "encoder": pixels, "seed": 3, **more}
    return evolve(plan=plan, reservation=reservation or Reserved(), work_dir=folder, **given)


def distance(images: np.ndarray, labels: np.ndarray) -> float:
    """Mean over pixels and images of the distance to the pattern of the image's label, in grey levels."""
    return float(np.abs(images - TARGETS[labels]).mean())


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(votes_module, "discrete_gaussian", lambda values, scale: np.asarray(values))


# --- what it does


def test_the_population_moves_to_the_private_images(tmp_path):
    first, labels = GENERATOR.generate(120, seed=3)
    done = run(tmp_path)
    assert (done.images.shape, done.images.dtype) == ((120, SIDE, SIDE, 1), np.uint8)
    assert done.labels.dtype == np.int64 and np.bincount(done.labels).tolist() == [60, 60]
    assert (done.iterations_begun, done.iterations_applied) == (4, 4)
    assert distance(done.images, done.labels) < 0.7 * distance(first, labels)
    assert distance(done.images, done.labels) < 0.8 * distance(done.images, 1 - done.labels)


def test_random_votes_move_it_nowhere(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    monkeypatch.setattr(
        VoteCounter,
        "votes",
        lambda self, f, y, r: (r.begin("", None), (draw.integers(0, 9, len(f)), None))[1],
    )
    done = run(tmp_path)
    first, labels = GENERATOR.generate(120, seed=3)
    assert distance(done.images, done.labels) > 0.9 * distance(first, labels)


def test_votes_drowned_in_noise_move_it_nowhere(tmp_path):
    done = run(tmp_path, plan=replace(PLAN, noise_multiplier=1000.0, threshold=0.0))
    first, labels = GENERATOR.generate(120, seed=3)
    assert distance(done.images, done.labels) > 0.85 * distance(first, labels)


def test_looking_ahead_also_finds_them(tmp_path):
    done = run(tmp_path, plan=replace(PLAN, lookahead=3))
    first, labels = GENERATOR.generate(120, seed=3)
    assert distance(done.images, done.labels) < 0.7 * distance(first, labels)


def test_candidates_stand_where_the_mean_of_their_variations_is(tmp_path, monkeypatch):
    asked, made = [], []
    real_vary = module.vary
    monkeypatch.setattr(
        VoteCounter, "votes",
        lambda self, f, y, r: (r.begin("", None), asked.append(f), (np.ones(len(f), int), None))[2],
    )  # fmt: skip
    monkeypatch.setattr(module, "vary", lambda *a, **b: (made.append(real_vary(*a, **b)), made[-1])[1])
    run(tmp_path, plan=replace(PLAN, iterations=1, lookahead=2))
    assert len(made) == 3 and not np.array_equal(made[0], made[1])
    assert asked[0] == pytest.approx((pixels(made[0]) + pixels(made[1])) / 2, abs=1e-6)


@pytest.mark.parametrize("num_images", [7, 120, 500])
def test_as_many_images_as_wanted(tmp_path, num_images):
    done = run(tmp_path, num_images=num_images)
    assert len(done.images) == len(done.labels) == num_images
    assert np.ptp(np.bincount(done.labels)) <= 1
    assert distance(done.images, done.labels) < 60


def test_same_votes_and_seed_same_images(tmp_path, no_noise):
    first, again = run(tmp_path / "a"), run(tmp_path / "b")
    other = run(tmp_path / "c", seed=4)
    assert np.array_equal(first.images, again.images) and not np.array_equal(first.images, other.images)


# --- its parts


def test_survivors_in_proportion_to_the_votes_above_the_threshold():
    labels = np.array([0, 0, 0, 1, 1, 1])
    chosen = survivors(
        np.array([5, 12, 8, 4, -3, 5]), labels, np.zeros(6000, int), 5.0, np.random.default_rng(0)
    )
    shares = np.bincount(chosen, minlength=6) / 6000
    assert shares == pytest.approx([0, 0.7, 0.3, 0, 0, 0], abs=0.03)


def test_a_label_without_votes_keeps_all_its_candidates():
    labels, wanted = np.array([0, 0, 1, 1, 1]), np.array([1, 0, 1, 0, 1, 1, 1, 1])
    chosen = survivors(np.array([9, 0, 2, -7, 5]), labels, wanted, 5.0, np.random.default_rng(0))
    assert (labels[chosen] == wanted).all()
    assert chosen[wanted == 0].tolist() == [0, 0]
    assert np.bincount(chosen, minlength=5)[2:].tolist() == [2, 2, 2]


def test_a_variation_is_the_noised_image_denoised():
    """The posterior of N(m, 0.5^2) pixels seen through noise: known mean and spread, whatever the steps."""
    images = np.full((3000, SIDE, SIDE, 1), 205, dtype=np.uint8)
    x, s, m = 205 / 127.5 - 1, 0.4, -0.3
    fine = replace(GENERATOR, sampler=Sampler(steps=200))
    varied = vary(fine, images, np.zeros(3000, int), s, seed=0) / 127.5 - 1
    # The flow scales distances from m by 0.5 / sqrt(0.25 + s^2).
    shrink = 0.5 / (0.25 + s**2) ** 0.5
    assert varied.mean() == pytest.approx(m + (x - m) * shrink, abs=0.01)
    # Cut at white, so compare below the middle only.
    low = np.quantile(varied, 0.1587)
    assert low == pytest.approx(m + (x - m) * shrink - s * shrink, abs=0.015)


def test_less_noise_varies_less_and_no_noise_not_at_all():
    images = np.random.default_rng(0).integers(40, 200, (50, SIDE, SIDE, 1), dtype=np.uint8)
    moved = [
        np.abs(vary(GENERATOR, images, np.zeros(50, int), s, 1).astype(int) - images).mean()
        for s in (1, 0.3, 0.05)
    ]
    assert moved[0] > 1.5 * moved[1] > 4 * moved[2] > 0
    assert np.abs(vary(GENERATOR, images, np.zeros(50, int), 0.0021, 1).astype(int) - images).max() <= 1


def test_guidance_and_labels_reach_the_network():
    seen = []

    class Listening(Blobs):
        def denoise(self, net, x_noisy, sigma, labels):
            seen.append(labels.tolist())
            return super().denoise(net, x_noisy, sigma, labels)

    generator = Generator(Nothing(), NAMES, Listening(), Sampler(steps=4), guidance=1.5)
    vary(generator, np.zeros((2, SIDE, SIDE, 1), np.uint8), np.array([1, 0]), 0.5, 0)
    assert [1, 0] in seen and [2, 2] in seen


@pytest.mark.parametrize("kind", ["heun", "ddim", "churn"])
@pytest.mark.parametrize("guidance, lookahead, num_images", [(1.0, 0, None), (1.3, 2, 17)])
def test_the_stated_cost_is_the_cost(tmp_path, kind, guidance, lookahead, num_images):
    net = Nothing()
    generator = Generator(net, NAMES, Counting(), Sampler(steps=7, kind=kind), guidance)
    plan = replace(PLAN, lookahead=lookahead, population=10)
    run(tmp_path, plan=plan, generator=generator, num_images=num_images)
    assert net.rows == plan.denoised_rows(generator.sampler, guidance, num_images)


def test_variations_get_smaller_and_use_the_levels_below():
    assert PLAN.sigmas == pytest.approx([1.0, 0.2 ** (1 / 3), 0.2 ** (2 / 3), 0.2])
    partial = module._partial(Sampler(steps=10), 1.0)
    assert noise_levels(partial)[0] == pytest.approx(1.0) and partial.steps == 5
    assert module._partial(Sampler(steps=10), 0.003).steps == 3


# --- what it costs, and interruptions


def test_all_votes_are_one_planned_event(tmp_path):
    ledger = Ledger.open(tmp_path / "l.db", total=Budget(20, 1e-4))
    plan = replace(PLAN, noise_multiplier=2.0)
    reservation = ledger.reserve("synthesize", [plan.planned("private evolution")], delta=1e-5, key="k")
    run(tmp_path, plan=plan, reservation=reservation)
    assert reservation.begun(MECHANISM) == 4
    assert plan.planned().count == 4 and "120 generated candidates" in plan.planned().says
    reservation.settle()
    assert 0 < ledger.spent.epsilon < 20


class Killed(BaseException):
    pass


def kill_at(monkeypatch, place: str, turn: int) -> None:
    """Die in iteration `turn`: before its vote begins, after it was charged, or after the answer was saved."""
    if place == "before":
        real_features, calls = module._features, []

        def features(*given):
            calls.append(1)
            if len(calls) == turn:
                raise Killed
            return real_features(*given)

        monkeypatch.setattr(module, "_features", features)
    elif place == "charged":
        real_noise, drawn = votes_module.discrete_gaussian, []

        def noise(*given):
            drawn.append(1)
            if len(drawn) == turn:
                raise Killed
            return real_noise(*given)

        monkeypatch.setattr(votes_module, "discrete_gaussian", noise)
    else:
        real_next = module._next

        def following(generator, state, plan, seed, at, num_images):
            if at == turn:
                raise Killed
            return real_next(generator, state, plan, seed, at, num_images)

        monkeypatch.setattr(module, "_next", following)


@pytest.mark.parametrize("turn", [1, 3, 4])
@pytest.mark.parametrize("place", ["before", "answered"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch, no_noise, place, turn):
    whole = run(tmp_path / "whole", num_images=50)
    reservation = Reserved(most=4)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, place, turn)
        run(tmp_path, reservation=reservation, num_images=50)
    assert reservation.count == turn - (place == "before")
    done = run(tmp_path, reservation=reservation, num_images=50)
    assert np.array_equal(done.images, whole.images) and np.array_equal(done.labels, whole.labels)
    assert (reservation.count, done.iterations_begun, done.iterations_applied) == (4, 4, 4)
    again = run(tmp_path, reservation=reservation, num_images=50, encoder=None)  # nothing is asked any more
    assert np.array_equal(again.images, whole.images)


@pytest.mark.parametrize("turn", [1, 2, 4])
@pytest.mark.parametrize("num_images", [None, 50])
def test_a_lost_answer_is_never_asked_again(tmp_path, monkeypatch, no_noise, turn, num_images):
    reservation = Reserved(most=4)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, "charged", turn)
        run(tmp_path, reservation=reservation, num_images=num_images)
    assert reservation.count == turn
    done = run(tmp_path, reservation=reservation, num_images=num_images)
    assert (reservation.count, done.iterations_begun, done.iterations_applied) == (4, 4, 3)
    assert len(done.images) == (num_images or 120) and distance(done.images, done.labels) < 65


def test_when_every_answer_was_lost_nothing_is_passed_off_as_a_result(tmp_path, monkeypatch):
    reservation, plan = Reserved(most=1), replace(PLAN, iterations=1)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, "charged", 1)
        run(tmp_path, plan=plan, reservation=reservation)
    for _ in range(2):
        with pytest.raises(BudgetError, match="spent"):
            run(tmp_path, plan=plan, reservation=reservation)


def test_a_state_of_another_run_is_refused(tmp_path):
    reservation = Reserved()
    run(tmp_path, reservation=reservation)
    other = Reserved()
    other.id, other.count = "two", 4  # type: ignore[misc]
    with pytest.raises(LedgerError, match="no budget was spent"):
        run(tmp_path, reservation=other)
    with pytest.raises(LedgerError, match="no budget was spent"):
        run(tmp_path, reservation=Reserved())  # an older copy of the ledger, which knows of no vote
    for changed in ({"plan": replace(PLAN, threshold=1.0)}, {"seed": 9}, {"num_images": 5}):
        with pytest.raises(InputError, match="no budget was spent"):
            run(tmp_path, reservation=reservation, **changed)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        run(tmp_path, reservation=reservation)


# --- what is refused, and what is never touched


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0}, {"population": 0}, {"noise_multiplier": 0.0}, {"noise_multiplier": float("nan")},
        {"threshold": -1.0}, {"lookahead": -1}, {"sigma_first": float("inf")}, {"sigma_last": 5.0},
        {"sigma_last": 0.0},
    ],
)  # fmt: skip
def test_plans_without_meaning(wrong):
    with pytest.raises(InputError, match="no budget was spent"):
        replace(PLAN, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"generator": replace(GENERATOR, label_names=("a", "c"))},
        {"plan": replace(PLAN, population=1)},
        {"num_images": 1},
        {"plan": replace(PLAN, sigma_last=0.001)},
        {"encoder": lambda images: np.full((len(images), 3), np.nan)},
        {"encoder": lambda images: np.zeros((len(images) + 1, 3))},
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_spent(tmp_path, wrong):
    reservation = Reserved()
    with pytest.raises(InputError, match="no budget was spent"):
        run(tmp_path, reservation=reservation, **wrong)
    assert reservation.count == 0


def test_images_of_another_size_are_refused(tmp_path):
    private = protected()
    private.size = (8, 8)
    with pytest.raises(InputError, match="no budget was spent"):
        run(tmp_path, private=private)


def test_private_images_are_touched_by_the_mechanism_only(tmp_path):
    """The module names none of the handle's private attributes, and a handle that watches sees no other reader."""
    import inspect

    source = inspect.getsource(module)
    touched = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    assert not touched & {"_images", "_labels", "_units"}
    readers = set()

    class Watching:
        def __getattr__(self, name):
            frame = inspect.currentframe()
            assert frame is not None and frame.f_back is not None
            if name in ("_images", "_labels", "_units"):
                readers.add(frame.f_back.f_globals["__name__"])
            return getattr(kept, name)

    kept = protected()
    run(tmp_path, private=Watching())
    assert readers and all(name.startswith("sfumato.privacy.") for name in readers)
