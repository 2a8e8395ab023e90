"""The check passes on sound set-ups and stops each kind of unsound one before any budget is spent."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sfumato.privacy.per_unit as per_unit
from sfumato.errors import InputError
from sfumato.privacy.selfcheck import selfcheck

sys.path.insert(0, str(Path(__file__).parent))
from nets import Mixed, mixed_loss, mixed_rows, unet, unet_loss, unet_rows

right_fast = per_unit.fast_gradients


@pytest.mark.parametrize("engine", ["fast", "exact", "loop"])
@pytest.mark.parametrize("attention", [False, True])
def test_passes_on_sound_networks_and_leaves_them_alone(engine, attention):
    net = unet(attention=attention)
    before = copy.deepcopy(net.state_dict())
    found = selfcheck(net, unet_loss, unet_rows(3, 2), engine)
    assert found.ok and found.max_rel_error < 1e-4 and found.max_mixing <= 1e-5
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_passes_in_channels_last():
    net = unet(attention=True).to(memory_format=torch.channels_last)
    assert selfcheck(net, unet_loss, unet_rows(3, 2), "fast").ok


def halved_convolution(gradients):
    return {name: g / 2 if name == "conv_in.weight" else g for name, g in gradients.items()}


def wrong_layout(gradients):
    """What reading a transposed activation as if it were contiguous does: right norm, wrong places."""
    swapped = dict(gradients)
    name = next(n for n in gradients if n.endswith("to_q.weight"))
    swapped[name] = gradients[name].transpose(1, 2)
    return swapped


def leaking_unit(gradients):
    return {name: g + 1e-3 * g.roll(1, 0) for name, g in gradients.items()}


def bias_forgotten(gradients):
    return {name: torch.zeros_like(g) if name == "conv_out.bias" else g for name, g in gradients.items()}


@pytest.mark.parametrize("bug", [halved_convolution, wrong_layout, leaking_unit, bias_forgotten])
def test_planted_wrong_engines_are_caught(monkeypatch, bug):
    monkeypatch.setattr(per_unit, "fast_gradients", lambda *given: bug(right_fast(*given)))
    with pytest.raises(InputError, match="no budget was spent"):
        selfcheck(unet(attention=True), unet_loss, unet_rows(3, 2), "fast")


def test_errors_behind_layers_initialised_to_zero_are_caught(monkeypatch):
    """At a zero last layer every other gradient is zero, and a wrong engine looks right."""
    net = unet()
    with torch.no_grad():
        net.conv_out.weight.zero_()
        net.conv_out.bias.zero_()
    monkeypatch.setattr(per_unit, "fast_gradients", lambda *given: halved_convolution(right_fast(*given)))
    with pytest.raises(InputError, match="differs from one backward"):
        selfcheck(net, unet_loss, unet_rows(3, 2), "fast")


class WithBatchNorm(nn.Module):
    def __init__(self, track: bool):
        super().__init__()
        self.inner, self.norm = Mixed(), nn.BatchNorm2d(1, track_running_stats=track)

    def forward(self, x, words):
        return self.inner(self.norm(x), words)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("engine", ["fast", "exact", "loop"])
def test_batch_norm_is_refused(track, engine):
    with pytest.raises(InputError, match=r"no budget was spent; .*GroupNorm"):
        selfcheck(WithBatchNorm(track), mixed_loss, mixed_rows(3, 2), engine)


def test_a_loss_normalised_over_the_batch_is_refused():
    def loss(call, rows):
        values = mixed_loss(call, rows)
        return values / values.detach().mean()

    with pytest.raises(InputError, match="influence each other"):
        selfcheck(Mixed(), loss, mixed_rows(3, 2), "fast")


def test_dropout_is_refused_unless_switched_off():
    net = unet(dropout=0.1)
    with pytest.raises(InputError, match="dropout"):
        selfcheck(net.train(), unet_loss, unet_rows(3, 1), "fast")
    assert selfcheck(net.eval(), unet_loss, unet_rows(3, 1), "fast").ok


def test_random_losses_and_losses_without_value_are_refused():
    def noisy(call, rows):
        return mixed_loss(call, rows) * (1 + torch.rand(len(rows["x"])))

    def broken(call, rows):
        return mixed_loss(call, rows) * float("nan")

    for loss in (noisy, broken):
        with pytest.raises(InputError, match="no budget was spent"):
            selfcheck(Mixed(), loss, mixed_rows(3, 1), "fast")
    with pytest.raises(InputError, match="at least 2 units"):
        selfcheck(Mixed(), mixed_loss, mixed_rows(1, 1), "fast")
