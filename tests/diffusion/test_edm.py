import math

import pytest
import torch
from diffusers import EDMEulerScheduler

from sfumato.diffusion.edm import EDM
from sfumato.diffusion.networks import unet


def linear_network(sample, timestep, class_labels, return_dict):
    return (0.3 * sample + timestep.reshape(-1, 1, 1, 1),)


@pytest.mark.parametrize("sigma", [0.003, 0.1, 0.5, 3.0, 70.0])
def test_preconditioning_is_that_of_diffusers(sigma):
    edm = EDM(sigma_data=0.5)
    scheduler = EDMEulerScheduler(sigma_data=0.5)
    x = torch.randn(4, 1, 6, 6)
    level = torch.full((4,), sigma)
    ours = edm.denoise(linear_network, x, level, torch.zeros(4, dtype=torch.long))
    raw = linear_network(
        scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(level), None, False
    )[0]
    torch.testing.assert_close(ours, scheduler.precondition_outputs(x, raw, torch.tensor(sigma)))


def test_zero_network_gives_unit_loss_at_every_noise_level_for_data_of_variance_sigma_data():
    """Table 1: lambda makes the loss of F = 0 equal to one whatever sigma, when Var(x) = sigma_data^2."""
    edm = EDM()
    n = 400
    for sigma in (0.01, 0.5, 20.0):
        rows = {
            "x": edm.sigma_data * torch.randn(n, 1, 12, 12),
            "n": torch.randn(n, 1, 12, 12),
            "sigma": torch.full((n,), sigma),
            "labels": torch.zeros(n, dtype=torch.long),
        }
        loss = edm.row_loss(lambda x, *_, **__: (torch.zeros_like(x),), rows)
        assert loss.shape == (n,)
        assert loss.mean().item() == pytest.approx(1.0, abs=0.03)


def test_noise_levels_are_log_normal():
    drawn = EDM().draw_sigma(200_000, torch.Generator().manual_seed(1)).log()
    assert drawn.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert drawn.std().item() == pytest.approx(1.2, abs=0.02)


def test_rows_do_not_interact():
    edm, net = EDM(), unet("tiny", size=(8, 8), channels=1, num_labels=3)
    generator = torch.Generator().manual_seed(0)
    rows = edm.rows(
        torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]), generator, no_label=3, label_dropout=0
    )
    before = edm.row_loss(net, rows)
    rows["x"] = rows["x"].clone()
    rows["x"][2] += 1.0
    after = edm.row_loss(net, rows)
    changed = (before - after).abs() > 1e-5
    assert changed.tolist() == [False, False, True, False, False]


def test_label_dropout_replaces_labels_by_the_null_label_at_its_rate():
    generator = torch.Generator().manual_seed(0)
    rows = EDM().rows(
        torch.zeros(20_000, 1, 2, 2),
        torch.zeros(20_000, dtype=torch.long),
        generator,
        no_label=7,
        label_dropout=0.1,
    )
    dropped = (rows["labels"] == 7).double().mean().item()
    assert dropped == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 20_000))
    assert set(rows["labels"].unique().tolist()) == {0, 7}
