import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sfumato.audit import time_classifier
from sfumato.audit.provenance import content_of
from sfumato.audit.time_classifier import TimeClassifier, draw_sigma, posterior, train_time_classifier
from sfumato.diffusion.generator import to_float
from sfumato.errors import InputError

RANGE = (0.002, 80.0)


def stripes(each=40, seed=0):
    """8x8 images of four kinds: a bright bar at the top, the bottom, the left, the right; with some variety."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 60, (4 * each, 8, 8, 1))
    labels = np.repeat(np.arange(4), each)
    bars = [np.s_[:2, :], np.s_[6:, :], np.s_[:, :2], np.s_[:, 6:]]
    for image, label in zip(images, labels, strict=True):
        image[bars[label]] += 180
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def trained():
    images, labels = stripes()
    return train_time_classifier(
        images, labels, 4, steps=120, seed=0, sigma_range=RANGE, batch=32, lr=2e-3, description="test"
    )


def noisy(images, sigma, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = to_float(images)
    return x + sigma * torch.randn(x.shape, generator=generator), torch.full((len(x),), float(sigma))


def test_it_knows_new_images_with_little_noise_and_nothing_of_drowned_ones(trained):
    images, labels = stripes(seed=7)
    with torch.no_grad():
        clear = trained(*noisy(images, 0.05))
        drowned = trained(*noisy(images, 80.0)).softmax(1)
    assert (clear.argmax(1).numpy() == labels).mean() > 0.95
    right = (drowned.argmax(1).numpy() == labels).mean()
    assert right < 0.4  # chance is 0.25, and 160 images are 0.034 either way
    assert drowned.max().item() < 0.6


def test_the_gradient_is_that_of_the_wanted_log_probability(trained):
    classifier = TimeClassifier((8, 8), 1, 4).double()
    classifier.load_state_dict({k: v.double() for k, v in trained.state_dict().items()})
    classifier.requires_grad_(False).eval()
    x, sigma = noisy(stripes()[0][[0, 50, 90]], 0.7)
    x, sigma = x.double(), torch.tensor([0.3, 0.7, 2.0], dtype=torch.float64)
    conditions, rows = np.array([9, 9, 2, 1, 3])[2:], np.array([2, 0, 1])
    found = classifier.gradient(conditions)(x, sigma, rows)
    wanted = conditions[rows]
    for row, channel, i, j in ((0, 0, 1, 3), (1, 0, 7, 7), (2, 0, 4, 0)):
        step = torch.zeros_like(x)
        step[row, channel, i, j] = 1e-5
        up, down = (
            classifier(moved, sigma).log_softmax(1)[row, wanted[row]] for moved in (x + step, x - step)
        )
        assert found[row, channel, i, j].item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-5)
    assert found.abs().sum(dim=(1, 2, 3)).min() > 0


def test_rows_do_not_influence_each_other(trained):
    x, sigma = noisy(stripes()[0][:6], 1.0)
    gradient = trained.gradient(np.array([0, 1, 2, 3, 0, 1]))
    together = gradient(x, sigma, np.arange(6))
    for row in range(6):
        alone = gradient(x[row : row + 1], sigma[row : row + 1], np.array([row]))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-6)
    others = x.clone()
    others[1:] = 100.0
    torch.testing.assert_close(gradient(others, sigma, np.arange(6))[0], together[0], rtol=1e-4, atol=1e-6)


def test_following_the_gradient_makes_the_wanted_class_likelier(trained):
    images, labels = stripes()
    wanted = (labels + 1) % 4
    x, sigma = noisy(images, 2.0)
    pushed = x + sigma.reshape(-1, 1, 1, 1) ** 2 * trained.gradient(wanted)(x, sigma, np.arange(len(x)))
    with torch.no_grad():
        before, after = (
            trained(at, sigma).log_softmax(1)[torch.arange(len(x)), torch.from_numpy(wanted)].mean()
            for at in (x, pushed)
        )
    assert after > before + 0.3


def test_posterior_is_bayes_rule():
    images = torch.tensor([[0.0], [1.0], [3.0]]).reshape(3, 1, 1, 1)
    x, sigma = torch.tensor([0.4]).reshape(1, 1, 1, 1), torch.tensor([0.5])
    density = np.exp(-((0.4 - np.array([0.0, 1.0, 3.0])) ** 2) / (2 * 0.25))
    found = posterior(x, sigma, images, torch.tensor([1, 0, 1]), 3)
    assert found[0].tolist() == pytest.approx(
        [density[1] / density.sum(), (density[0] + density[2]) / density.sum(), 0.0], rel=1e-5
    )


def test_it_learns_bayes_probabilities(trained):
    """Cross-entropy at middle noise comes near the least possible one, of the images it was trained on."""
    images, labels = stripes()
    x, sigma = noisy(np.repeat(images, 3, 0), 4.0, seed=3)
    targets = torch.from_numpy(np.repeat(labels, 3))
    bayes = posterior(x, sigma, to_float(images), torch.from_numpy(labels), 4)
    with torch.no_grad():
        ours = F.cross_entropy(trained(x, sigma), targets).item()
    least = F.nll_loss(bayes.clamp_min(1e-12).log(), targets).item()
    assert 0.2 < least < 1.2 and ours < least + 0.25


def test_a_sample_of_many_images_suffices(monkeypatch):
    monkeypatch.setattr(time_classifier, "CANDIDATES", 40)
    images, labels = stripes()
    classifier = train_time_classifier(
        images, labels, 4, steps=60, seed=0, sigma_range=RANGE, batch=32, lr=2e-3
    )
    with torch.no_grad():
        right = classifier(*noisy(stripes(seed=2)[0], 0.05)).argmax(1).numpy() == labels
    assert right.mean() > 0.9


def test_noise_levels_stay_in_the_target_s_range():
    generator = torch.Generator().manual_seed(0)
    sigma = draw_sigma(5000, (0.01, 157.0), generator)
    assert sigma.min() >= 0.01 and sigma.max() <= 157
    assert 0.3 < (sigma < np.exp(0.3)).float().mean() < 0.7  # around the log-normal's median
    assert (sigma > 40).any() and (sigma < 0.03).any()


def train_briefly(saved, *, seed=0, labels=None, steps=4):
    images, own = stripes(each=5)
    return train_time_classifier(
        images,
        own if labels is None else labels,
        4,
        steps=steps,
        seed=seed,
        sigma_range=RANGE,
        batch=8,
        saved=saved,
    )


def weights(classifier):
    return torch.cat([p.flatten() for p in classifier.parameters()])


def test_what_was_saved_is_used_for_the_same_call_only(tmp_path, monkeypatch):
    saved = tmp_path / "classifiers" / "one.safetensors"
    first = train_briefly(saved)
    content = saved.read_bytes()
    monkeypatch.setattr(time_classifier, "_train", None)
    again = train_briefly(saved)
    assert torch.equal(weights(first), weights(again)) and saved.read_bytes() == content
    assert again.trained_on == first.trained_on == content_of(stripes(each=5)[0], "test")
    monkeypatch.undo()
    for changed in ({"seed": 1}, {"steps": 5}, {"labels": np.roll(stripes(each=5)[1], 1)}):
        assert not torch.equal(weights(train_briefly(saved, **changed)), weights(first))
        assert saved.read_bytes() != content
    saved.write_bytes(content[:100])
    assert torch.equal(weights(train_briefly(saved)), weights(first))


def test_same_seed_same_classifier_whatever_was_drawn_before():
    torch.manual_seed(1)
    one = train_briefly(None)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(weights(one), weights(train_briefly(None)))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_of_any_size_and_colour():
    for side, channels in ((4, 1), (9, 3), (32, 3), (100, 1)):
        classifier = TimeClassifier((side, side + 1), channels, 3).requires_grad_(False)
        x = torch.randn(2, channels, side, side + 1)
        assert classifier.gradient(np.array([0, 2]))(x, torch.ones(2), np.arange(2)).shape == x.shape


@pytest.mark.parametrize(
    ("images", "labels", "classes"),
    [
        (np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0), 2),
        (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(3), 2),
        (np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4), 1),
        (np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 2, 1]), 2),
        (np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, -1, 1]), 2),
    ],
)
def test_what_teaches_nothing_is_refused(images, labels, classes):
    with pytest.raises(InputError, match="nothing was audited"):
        train_time_classifier(images, labels, classes, steps=1, seed=0, sigma_range=RANGE)


def test_conditions_that_do_not_exist_are_refused(trained):
    for conditions in ([0, 4], [-1], []):
        with pytest.raises(ValueError, match="0 to 3"):
            trained.gradient(np.array(conditions, np.int64))
