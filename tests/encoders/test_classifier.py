"""The one training loop: what it computes to the last bit, which state it keeps, and its networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.diffusion import generator
from sfumato.encoders import classifier
from sfumato.encoders.classifier import (
    mlp,
    predict,
    query_network,
    resnet,
    small_cnn,
    to_float,
    train_classifier,
)


def halves(count, seed, *, channels=1, size=8):
    """Images uint8 in noise, bright in the upper (label 0) or the left half (label 1)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    images = rng.integers(0, 120, (count, size, size, channels), np.uint8)
    images[labels == 0, : size // 2] += 100
    images[labels == 1, :, : size // 2] += 100
    return images, labels


def plainly_trained(network, images, labels, *, steps, seed, smoothing):
    """What the query classifier and the demo's figures have been trained by since their first release."""
    order = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        rows = order.integers(len(images), size=128)
        floats = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        dy, dx = (int(d) for d in order.integers(-2, 3, size=2))
        loss = F.cross_entropy(
            network(torch.roll(floats, (dy, dx), (2, 3))),
            torch.from_numpy(labels[rows]),
            label_smoothing=smoothing,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("make", "smoothing"), [(query_network, 0.0), (small_cnn, 0.05)])
def test_the_loop_is_the_same_to_the_last_bit(make, smoothing):
    images, labels = halves(60, 1, channels=3)
    torch.manual_seed(4)
    wanted = plainly_trained(make(3, 2), images, labels, steps=4, seed=4, smoothing=smoothing)
    torch.manual_seed(4)
    network = train_classifier(
        make(3, 2), images, labels, steps=4, seed=4, description="x", label_smoothing=smoothing
    )
    assert same_state(network, wanted)
    torch.manual_seed(4)
    other = train_classifier(
        make(3, 2), images, labels, steps=4, seed=5, description="x", label_smoothing=smoothing
    )
    assert not same_state(other, wanted)


def test_floats_are_those_of_the_generators():
    images = np.arange(256, dtype=np.uint8).reshape(2, 8, 8, 2)
    assert torch.equal(to_float(images), generator.to_float(images))


@pytest.mark.parametrize("size", [8, 15, 28, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_take_all_sizes_and_judge_each_image_by_itself(size, channels):
    images = np.random.default_rng(0).integers(0, 256, (5, size, size, channels), np.uint8)
    for network in (
        query_network(channels, 7),
        small_cnn(channels, 7),
        mlp(channels * size**2, 7),
        resnet(channels, 7),
    ):
        network.eval()
        with torch.no_grad():
            logits = network(to_float(images))
            alone = network(to_float(images[2:3]))
        assert logits.shape == (5, 7) and torch.isfinite(logits).all()
        assert torch.allclose(alone[0], logits[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [small_cnn, resnet, lambda channels, classes: mlp(64, classes)])
def test_networks_learn(make):
    torch.manual_seed(0)
    network = train_classifier(
        make(1, 2), *halves(300, 1), steps=25, seed=0, description="x", largest_shift=0
    )
    assert not network.training
    images, labels = halves(200, 2)
    assert np.mean(predict(network, images) == labels) > 0.95


def watched(monkeypatch, right_at_look):
    """Training whose validation accuracy is as given; the network kept, and its state at each look."""
    seen, train = [], halves(40, 1)
    held = np.zeros((2, 8, 8, 1), np.uint8), np.array([1, 1])

    def looked(network, images):
        assert images is held[0]
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        network.eval()
        return held[1] if right_at_look[len(seen) - 1] else 1 - held[1]

    monkeypatch.setattr(classifier, "predict", looked)
    torch.manual_seed(0)
    kept = train_classifier(
        query_network(1, 2), *train, steps=8, seed=0, description="x", validation=held, checks=4, batch=16
    )
    return kept.state_dict(), seen


@pytest.mark.parametrize(
    ("right", "wanted"), [((0, 1, 0, 0), 1), ((1, 0, 0, 0), 0), ((0, 1, 1, 0), 2), ((0, 0, 0, 0), 3)]
)
def test_the_state_of_the_best_look_is_kept_and_of_equals_the_later(monkeypatch, right, wanted):
    kept, seen = watched(monkeypatch, right)
    assert len(seen) == 4
    assert [all(torch.equal(kept[n], state[n]) for n in kept) for state in seen] == [
        look == wanted for look in range(4)
    ]


def test_looking_changes_nothing(monkeypatch):
    kept, _ = watched(monkeypatch, (0, 0, 0, 1))
    torch.manual_seed(0)
    blind = train_classifier(query_network(1, 2), *halves(40, 1), steps=8, seed=0, description="x", batch=16)
    assert all(torch.equal(kept[name], value) for name, value in blind.state_dict().items())


def test_fewer_steps_than_looks():
    images, labels = halves(40, 1)
    network = train_classifier(
        query_network(1, 2), images, labels, steps=2, seed=0, description="x", validation=(images, labels)
    )
    assert predict(network, images).shape == (40,)


def test_predictions_of_many_and_of_none():
    network = query_network(1, 3).eval()
    images = np.random.default_rng(0).integers(0, 256, (1203, 8, 8, 1), np.uint8)
    with torch.no_grad():
        wanted = network(to_float(images)).argmax(1).numpy()
    network.train()
    assert np.mean(predict(network, images) == wanted) > 0.999  # float32 may round otherwise in other batches
    assert predict(network, images[:0]).shape == (0,)
