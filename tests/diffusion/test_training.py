import numpy as np
import pytest
import torch

from sfumato.diffusion.edm import EDM
from sfumato.diffusion.networks import unet
from sfumato.diffusion.training import TrainingPlan, rate, train
from sfumato.errors import InputError

IMAGES = np.repeat(np.array([0, 255], np.uint8), 20).reshape(-1, 1, 1, 1) * np.ones((1, 8, 8, 1), np.uint8)
LABELS = np.repeat(np.array([0, 1]), 20)


def network():
    torch.manual_seed(0)
    return unet("tiny", size=(8, 8), channels=1, num_labels=2)


def loss_of(net):
    edm = EDM()
    rows = edm.rows(
        torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(LABELS),
        torch.Generator().manual_seed(9), no_label=2, label_dropout=0.0,
    )  # fmt: skip
    with torch.no_grad():
        return edm.row_loss(net, rows).mean().item()


def test_training_lowers_the_loss():
    net = network()
    before = loss_of(net)
    assert train(net, IMAGES, LABELS, TrainingPlan(steps=120, batch=16), edm=EDM(), no_label=2, seed=0) == 120
    assert loss_of(net) < 0.3 * before


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    from sfumato.diffusion import training

    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    plan = TrainingPlan(steps=12, batch=8)
    straight = network()
    train(straight, IMAGES, LABELS, plan, edm=EDM(), no_label=2, seed=3)

    class Stop(Exception):
        pass

    calls = 0

    class Stopping(EDM):
        def row_loss(self, net, rows):
            nonlocal calls
            calls += 1
            if calls == 7:
                raise Stop
            return super().row_loss(net, rows)

    resumed = network()
    with pytest.raises(Stop):
        train(resumed, IMAGES, LABELS, plan, edm=Stopping(), no_label=2, seed=3, checkpoint=tmp_path / "c")
    resumed = network()
    train(resumed, IMAGES, LABELS, plan, edm=EDM(), no_label=2, seed=3, checkpoint=tmp_path / "c")
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_time_limit_ends_training():
    plan = TrainingPlan(steps=10**6, batch=4, seconds=0.5)
    assert 0 < train(network(), IMAGES, LABELS, plan, edm=EDM(), no_label=2, seed=0) < 10**6


def test_weights_decide_what_is_drawn():
    net = network()
    weights = np.where(LABELS == 0, 1.0, 0.0)
    train(
        net, IMAGES, LABELS, TrainingPlan(steps=150, batch=8), edm=EDM(), no_label=2, seed=0, weights=weights
    )
    x = torch.zeros(1, 1, 8, 8)
    clean = EDM().denoise(net, x, torch.tensor([5.0]), torch.tensor([2]))
    assert clean.mean().item() < -0.7  # only the black images were ever seen


def test_learning_rate_warms_up_and_decays():
    assert rate(0, 0) == pytest.approx(1 / 50)
    assert rate(0, 100) == pytest.approx(1.0)
    assert rate(1.0, 100) == pytest.approx(0.1)


def test_no_images_is_an_error():
    with pytest.raises(InputError, match="no images"):
        train(network(), IMAGES[:0], LABELS[:0], TrainingPlan(steps=1), edm=EDM(), no_label=2, seed=0)


def test_adversarial_perturbation_takes_the_gradient_at_the_worst_weights_nearby():
    """On a quadratic the gradient at w + r g/|g| is known: here w = (3, 4), loss |w|^2/2, r = 1: 1.2 w."""
    from sfumato.diffusion.training import _worst_nearby

    layer = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
    seen = []

    def backward():
        layer.zero_grad()
        loss = (layer.weight**2).sum() / 2
        loss.backward()
        seen.append(layer.weight.detach().clone())
        return loss

    loss = _worst_nearby(layer, backward, 1.0)
    assert loss.item() == pytest.approx(12.5)
    assert torch.allclose(seen[1], torch.tensor([[3.6, 4.8]]))
    assert torch.allclose(layer.weight.grad, torch.tensor([[3.6, 4.8]]))
    assert torch.equal(layer.weight.detach(), torch.tensor([[3.0, 4.0]]))


def test_perturbed_training_is_flatter_around_its_weights():
    """The loss rises less under weight noise after training with a radius than without, at the same steps."""
    rises = []
    for radius in (0.0, 0.5):
        net = network()
        plan = TrainingPlan(steps=150, batch=16, perturbation=radius)
        train(net, IMAGES, LABELS, plan, edm=EDM(), no_label=2, seed=0)
        clean, noise, rise = loss_of(net), torch.Generator().manual_seed(1), 0.0
        for _ in range(5):
            before = [p.detach().clone() for p in net.parameters()]
            with torch.no_grad():
                for p in net.parameters():
                    p.add_(torch.randn(p.shape, generator=noise), alpha=0.01)
            rise += loss_of(net) - clean
            with torch.no_grad():
                for p, value in zip(net.parameters(), before, strict=True):
                    p.copy_(value)
        rises.append(rise)
    assert rises[1] < rises[0]
