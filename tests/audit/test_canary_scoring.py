"""Scores of canaries, and the bounds they give for models that hold all, none or some of what was planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.audit.canaries import Sealed
from sfumato.audit.canary_patterns import draw_patterns
from sfumato.audit.canary_scoring import SCORES, canary_scores
from sfumato.audit.epsilon_bound import best_bound, cap, looks_of
from sfumato.diffusion.generator import to_float
from sfumato.errors import InputError


class Kernel:
    """The optimal denoiser of a finite training set, each image widened to a Gaussian; a Model without labels."""

    channels, device, sigma_range = 1, torch.device("cpu"), (0.002, 80.0)
    num_labels = label_names = None

    def __init__(self, images, width=0.0):
        self.x, self.width, self.size = to_float(images).flatten(1), width, images.shape[1:3]

    def denoise(self, x, sigma, labels):
        flat, total = x.flatten(1), sigma[:, None] ** 2 + self.width**2
        mean = (-(torch.cdist(flat, self.x) ** 2) / (2 * total)).softmax(1) @ self.x
        return ((self.width**2 * flat + sigma[:, None] ** 2 * mean) / total).reshape(x.shape)


class Labelled(Kernel):
    """The same with labels, which are noted down."""

    def __init__(self, images, names):
        super().__init__(images)
        self.label_names, self.num_labels, self.asked = names, len(names), []

    def denoise(self, x, sigma, labels):
        self.asked.append(labels.tolist())
        return super().denoise(x, sigma, labels)


def sealed_of(images, included, labels=None, names=None):
    labels = np.full(len(images), -1) if labels is None else labels
    return Sealed(
        images, labels, names, included, "pattern", 1e-5, 0.0, 28, 0.0, {}, "0" * 64, 0, 0, Path("nowhere")
    )


@pytest.fixture(scope="module")
def canaries():
    return draw_patterns(100, np.zeros((1, 16, 16, 1), np.uint8), np.random.default_rng(0))


@pytest.fixture
def half():
    return np.random.default_rng(1).permutation(np.arange(100) % 2 == 0)


def test_a_generator_that_repeats_who_is_in_gives_the_cap(canaries, half):
    scores = canary_scores(None, canaries[half], sealed_of(canaries, half))
    assert set(scores) == {"pixels", "efficientnet-lite0"}
    for score in scores.values():
        assert score.shape == (100,) and score.dtype == float and score[half].min() > score[~half].max()
        bound = best_bound(score, half, delta=1e-5)
        assert (
            bound.epsilon == pytest.approx(cap(100, 1e-5, looks=len(looks_of(100)))) and bound.epsilon > 2.9
        )


def test_flips_of_who_is_in_are_found_too(canaries, half):
    scores = canary_scores(
        None, canaries[half][:, :, ::-1], sealed_of(canaries, half), extractors=("pixels",)
    )
    assert scores["pixels"][half].min() > scores["pixels"][~half].max()


def test_a_model_of_who_is_in_gives_the_cap(canaries, half):
    scores = canary_scores(Kernel(canaries[half]), None, sealed_of(canaries, half))
    assert set(scores) == {"loss", "sima"}
    for score in scores.values():
        assert best_bound(score, half, delta=1e-5).epsilon > 2.9


def test_a_generator_that_never_saw_any_is_seldom_accused(canaries):
    """Theorem: with epsilon = 0 the bound exceeds 0 in at most 5 % of draws of the coins."""
    rng = np.random.default_rng(2)
    generated = rng.integers(0, 256, (200, 16, 16, 1), dtype=np.uint8)
    model = Kernel(rng.integers(0, 256, (50, 16, 16, 1), dtype=np.uint8), width=0.5)
    scores = canary_scores(model, generated, sealed_of(canaries, np.zeros(100, bool)), extractors=("pixels",))
    for score in scores.values():
        bounds = [best_bound(score, rng.random(100) < 0.5, delta=0).epsilon for _ in range(150)]
        assert np.mean(np.array(bounds) > 0) <= 0.05 + 3 * (0.05 * 0.95 / 150) ** 0.5
        assert np.mean(bounds) < 0.05


def test_scores_do_not_see_the_coins(canaries, half):
    model, generated = Kernel(canaries[:30]), canaries[20:60]
    scores, others = (
        canary_scores(model, generated, sealed_of(canaries, coins), extractors=("pixels",))
        for coins in (half, ~half)
    )
    assert scores.keys() == others.keys() and len(scores) == SCORES - 1
    for name, score in scores.items():
        np.testing.assert_array_equal(score, others[name])


def test_a_reference_model_is_subtracted(canaries, half):
    sealed, model = sealed_of(canaries, half), Kernel(canaries[half], width=0.3)
    reference = Kernel(np.random.default_rng(3).integers(0, 256, (40, 16, 16, 1), dtype=np.uint8), width=0.3)
    plain, own = (canary_scores(each, None, sealed) for each in (model, reference))
    for name, score in canary_scores(model, None, sealed, reference=reference).items():
        np.testing.assert_allclose(score, plain[name] - own[name])
    same = canary_scores(model, None, sealed, reference=model)
    assert all((score == 0).all() for score in same.values())


def test_labels_go_by_name_and_unknown_names_are_averaged_over(canaries):
    images, labels = canaries[:4], np.array([0, 1, 0, 1])
    sealed = sealed_of(images, labels > 0, labels, ("cat", "dog"))
    model = Labelled(images, ("dog", "bird", "cat"))
    canary_scores(model, None, sealed)
    assert set(map(tuple, model.asked)) == {(2, 0, 2, 0)}
    for names in (("a", "b"), None):
        strange = Labelled(images, ("a", "b"))
        strange.label_names = names
        canary_scores(strange, None, sealed)
        assert set(map(tuple, strange.asked)) == {(0, 0, 0, 0), (1, 1, 1, 1)}


def test_canaries_come_in_the_size_of_what_is_asked(canaries, half):
    sealed = sealed_of(canaries, half)
    small = np.random.default_rng(4).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    assert canary_scores(None, small, sealed, extractors=("pixels",))["pixels"].shape == (100,)
    model = Kernel(small[..., :1])
    assert canary_scores(model, None, sealed)["loss"].shape == (100,)


def test_nothing_to_look_in_is_told(canaries, half):
    with pytest.raises(InputError, match="nothing was audited"):
        canary_scores(None, None, sealed_of(canaries, half))
