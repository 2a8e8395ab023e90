"""Membership attacks against denoisers whose training set is known, their ROC figures."""

from __future__ import annotations

import math
from dataclasses import asdict
from statistics import NormalDist

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from sfumato.audit import membership as module
from sfumato.audit.canary_patterns import draw_patterns
from sfumato.audit.membership import (
    ddpm_sigma,
    loss_scores,
    membership,
    pia_scores,
    secmi_scores,
    sima_scores,
)
from sfumato.audit.target import GeneratorModel
from sfumato.data.digits import load_digits
from sfumato.diffusion.edm import EDM
from sfumato.diffusion.generator import Generator, to_float
from sfumato.diffusion.networks import unet
from sfumato.diffusion.training import TrainingPlan, train
from sfumato.errors import InputError

ATTACKS = [loss_scores, secmi_scores, pia_scores, sima_scores]


class Kernel:
    """The denoiser that is optimal for a finite training set: the posterior mean of its images; a Model.

    width: each image stands for a Gaussian of this width around it; wide ones are a smooth distribution.
    """

    size, channels, device, sigma_range = (28, 28), 1, torch.device("cpu"), (0.002, 80.0)

    def __init__(self, images, labels=None, *, width=0.0):
        self.x, self.width, self.calls = to_float(images).flatten(1), width, 0
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.num_labels = None if labels is None else int(labels.max()) + 1
        self.label_names = None if self.num_labels is None else tuple(map(str, range(self.num_labels)))

    def denoise(self, x, sigma, labels):
        self.calls += 1
        assert (labels is None) == (self.num_labels is None) and sigma.shape == (len(x),)
        flat, total = x.flatten(1), sigma[:, None] ** 2 + self.width**2
        weights = -(torch.cdist(flat, self.x) ** 2) / (2 * total)
        if labels is not None:
            weights = weights.masked_fill(labels[:, None] != self.labels, -1e9)
        mean = weights.softmax(1) @ self.x
        return ((self.width**2 * flat + sigma[:, None] ** 2 * mean) / total).reshape(x.shape)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits()
    order = np.random.default_rng(1).permutation(len(images))
    return images[order], labels[order]


@pytest.mark.parametrize("attack", ATTACKS)
def test_members_of_a_memoriser_are_told_apart(attack, digits):
    images, _ = digits
    model = Kernel(images[:150])
    found = membership(attack(model, images[:150]), attack(model, images[150:300]))
    assert found.auc > 0.95 and found.auc_ci[0] > 0.9 and found.tpr["0.01"].value > 0.8


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_model_of_other_images_tells_nothing(attack, digits):
    images, _ = digits
    scores = attack(Kernel(images[600:900], width=0.5), images[:600])
    found = membership(scores[:300], scores[300:])
    assert abs(found.auc - 0.5) < 0.08 and found.auc_ci[0] < 0.5 < found.auc_ci[1]


@pytest.mark.parametrize("attack", ATTACKS)
def test_scores_depend_on_the_image_alone_and_come_again(attack, digits, monkeypatch):
    images, _ = digits
    model = Kernel(images[:50], width=0.3)
    scores = attack(model, images[:20], seed=3)
    assert scores.shape == (20,) and scores.dtype == np.float64
    np.testing.assert_array_equal(scores, attack(model, images[:20], seed=3))
    monkeypatch.setattr(module, "BATCH_PIXELS", 784 * 3)
    np.testing.assert_allclose(attack(model, images[:20][::-1], seed=3)[::-1], scores, rtol=1e-4)


def test_how_often_each_attack_asks_the_model(digits):
    for attack, calls in ((loss_scores, 10), (secmi_scores, 12), (pia_scores, 2), (sima_scores, 1)):
        model = Kernel(digits[0][:10])
        attack(model, digits[0][:10])
        assert model.calls == calls


def test_the_schedule_is_the_linear_one_of_ddpm():
    assert ddpm_sigma(0) == pytest.approx(math.sqrt(1 / (1 - 1e-4) - 1))
    assert ddpm_sigma(999) == pytest.approx(math.sqrt(1 / 4.0358e-5 - 1), rel=1e-3)  # alpha_bar of step 1,000


def test_losses_of_a_gaussian_equal_their_closed_form():
    """Data N(0, s^2): D(x) = x s^2 / (s^2 + sigma^2); of an image c the loss averaged over +n and -n is known."""

    class Gaussian(Kernel):
        size = (4, 4)

        def denoise(self, x, sigma, labels):
            return x * 0.25 / (0.25 + sigma[:, None, None, None] ** 2)

    image = np.full((1, 4, 4, 1), 255, np.uint8)
    draw = torch.Generator().manual_seed(5)
    expected = []
    for sigma in module.LOSS_LEVELS:
        n = torch.randn((1, 4, 4), generator=draw).double()
        shrink = 0.25 / (0.25 + sigma**2)
        error = (1 - shrink) ** 2 + (shrink * sigma) ** 2 * float((n**2).mean())
        expected.append(error * (sigma**2 + 0.25) / (0.5 * sigma) ** 2)
    np.testing.assert_allclose(loss_scores(Gaussian(image), image, seed=5), [-np.mean(expected)], rtol=1e-5)
    norm = 16**0.25 * module.ddpm_sigma(100) / (0.25 + module.ddpm_sigma(100) ** 2)
    np.testing.assert_allclose(sima_scores(Gaussian(image), image), [-norm], rtol=1e-5)


def test_the_own_label_is_used_and_an_unknown_one_is_averaged_over(digits):
    images, labels = digits
    few = labels < 3
    images, labels = images[few][:90], labels[few][:90]
    model = Kernel(images, labels)
    wrong = sima_scores(model, images[:20], (labels[:20] + 1) % 3)
    right, unknown = (sima_scores(model, images[:20], each) for each in (labels[:20], None))
    assert (right > wrong).all() and (right > unknown).all()
    mixed = labels[:20].copy()
    mixed[10:] = -1
    found = sima_scores(model, images[:20], mixed)
    np.testing.assert_allclose(found, np.concatenate([right[:10], unknown[10:]]), rtol=1e-4, atol=1e-5)


def test_levels_stay_where_the_model_was_trained(digits):
    class Narrow(Kernel):
        sigma_range = (0.1, 1.0)

        def denoise(self, x, sigma, labels):
            assert (sigma >= 0.1).all() and (sigma <= 1.0).all()
            return super().denoise(x, sigma, labels)

    for attack in ATTACKS:
        attack(Narrow(digits[0][:20]), digits[0][:5])


def test_a_broken_model_and_a_wrong_size_are_told(digits):
    class Broken(Kernel):
        def denoise(self, x, sigma, labels):
            return x * float("nan")

    with pytest.raises(InputError, match="not finite; nothing was audited"):
        sima_scores(Broken(digits[0][:5]), digits[0][:5])
    with pytest.raises(InputError, match="nothing was audited"):
        sima_scores(Kernel(digits[0][:5]), digits[0][:5, :14])


def test_the_area_equals_sklearns_and_the_curve_joins_its_corners():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 40, 500) / 10 + 0.4, rng.integers(0, 40, 700) / 10  # with ties
    found = membership(a, b)
    truth = np.repeat([1, 0], [500, 700])
    assert found.auc == pytest.approx(roc_auc_score(truth, np.concatenate([a, b])))
    assert (found.members, found.nonmembers) == (500, 700)
    curve = np.array(found.roc)
    assert (
        curve[0].tolist() == [0, 0] and curve[-1].tolist() == [1, 1] and (np.diff(curve, axis=0) >= 0).all()
    )
    fine = np.array(membership(rng.normal(1, 1, 5000), rng.normal(0, 1, 5000)).roc)
    assert len(fine) <= 200 and (fine[1:, 0] <= 0.01).sum() > 20
    assert np.trapezoid(fine[:, 1], fine[:, 0]) == pytest.approx(NormalDist().cdf(1 / math.sqrt(2)), abs=0.02)
    assert (
        all(isinstance(each, float) for point in found.roc for each in point) and asdict(found)["tpr"]["0.01"]
    )


def test_true_positives_are_counted_above_a_threshold_that_keeps_the_rate():
    nonmembers = np.arange(1000.0)
    members = np.concatenate([np.full(30, 998.5), np.full(20, 2000.0), np.full(50, -1.0)])
    tpr = membership(members, nonmembers).tpr
    at = tpr["0.001"]  # one non-member may score above: the threshold is 998
    assert (at.true_positives, at.false_positives, at.value) == (50, 1, 0.5)
    assert at.low == pytest.approx(0.3983, abs=1e-4) and at.high == pytest.approx(0.6017, abs=1e-4)
    assert tpr["0.01"].false_positives == 10
    tied = membership(members, np.repeat(np.arange(100.0), 10)).tpr["0.001"]
    assert (tied.false_positives, tied.true_positives) == (0, 50)


def test_too_few_nonmembers_for_a_rate_is_said_not_guessed():
    tpr = membership(np.arange(50.0), np.arange(100.0)).tpr
    assert tpr["0.001"].value is None and tpr["0.001"].true_positives is None
    assert tpr["0.01"].value == 0 and tpr["0.01"].false_positives == 1
    assert membership(np.arange(50.0), np.arange(99.0)).tpr["0.01"].value is None
    for bad in (np.array([1.0]), np.array([1.0, np.nan])):
        with pytest.raises(InputError, match="nothing was audited"):
            membership(bad, np.arange(5.0))


def test_the_interval_of_the_area_covers_it():
    truth, covered = NormalDist().cdf(1 / math.sqrt(2)), 0
    rng = np.random.default_rng(2)
    for _ in range(400):
        low, high = membership(rng.normal(1, 1, 60), rng.normal(0, 1, 80)).auc_ci
        covered += low <= truth <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_full_separation_has_an_interval_too():
    low, high = membership(np.arange(10.0) + 100, np.arange(20.0)).auc_ci
    assert high == 1 and low == pytest.approx(0.025**0.1)


def test_our_own_generators_are_asked_with_and_without_labels():
    torch.manual_seed(0)
    network = unet("tiny", size=(8, 8), channels=3, num_labels=2)
    model = GeneratorModel(Generator(network.eval(), ("cat", "dog")))
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    for attack in ATTACKS:
        known, unknown = attack(model, images, np.array([0, 1, 0, 1, 0, 1])), attack(model, images)
        assert np.isfinite(known).all() and np.isfinite(unknown).all() and (known != unknown).all()


@pytest.mark.slow
def test_an_overfitted_network_gives_its_members_away():
    """100 patterns among 200 training images of 14 pixels, 500 steps: minutes on one core."""
    order = np.random.default_rng(0).permutation(4000)
    digits = load_digits()[0][order][:100, ::2, ::2]
    patterns, labels = draw_patterns(200, digits, np.random.default_rng(2)), np.zeros(200, np.int64)
    torch.manual_seed(0)
    network = unet("tiny", size=(14, 14), channels=1, num_labels=1)
    plan = TrainingPlan(steps=500, batch=32)
    train(network, np.concatenate([digits, patterns[:100]]), labels, plan, edm=EDM(), no_label=1, seed=0)
    model = GeneratorModel(Generator(network, ("all",)))
    for attack, least in ((loss_scores, 0.6), (secmi_scores, 0.5), (pia_scores, 0.6), (sima_scores, 0.75)):
        scores = attack(model, patterns, labels)
        found = membership(scores[:100], scores[100:])
        assert found.auc > least, (attack.__name__, found.auc)
