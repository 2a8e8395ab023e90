"""The three engines agree with each other, with plain autograd and with Opacus' functorch gradients."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato.errors import InputError
from sfumato.privacy.per_unit import per_unit_gradients, units_at_once

sys.path.insert(0, str(Path(__file__).parent))
from nets import Mixed, mixed_loss, mixed_rows, unet, unet_loss, unet_rows, unlabelled_loss

NETS = {
    "plain": (lambda: unet(), unet_loss, lambda u, k: unet_rows(u, k)),
    "attention": (lambda: unet(attention=True), unet_loss, lambda u, k: unet_rows(u, k)),
    "scale-shift": (
        lambda: unet(resnet_time_scale_shift="scale_shift"),
        unet_loss,
        lambda u, k: unet_rows(u, k),
    ),
    "odd, unlabelled": (
        lambda: unet(labels=None, size=7, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                     up_block_types=("UpBlock2D",)),
        unlabelled_loss,
        lambda u, k: unet_rows(u, k, size=7),
    ),
    "larger, convolution per unit": (lambda: unet(size=16), unet_loss, lambda u, k: unet_rows(u, k, size=16)),
    "every layer": (Mixed, mixed_loss, mixed_rows),
    "grouped": (lambda: Mixed(groups=2), mixed_loss, mixed_rows),
}  # fmt: skip


def largest_difference(one, other) -> float:
    assert one.keys() == other.keys()
    whole = max(g.norm() for g in other.values())
    return max(float((one[name] - other[name]).norm() / (other[name].norm() + 1e-2 * whole)) for name in one)


@pytest.fixture(autouse=True)
def no_silent_fall_back():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="engine 'fast' gives way")
        yield


@pytest.mark.parametrize("per_unit", [1, 3])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("engine", ["fast", "exact"])
def test_engines_agree_with_one_backward_per_unit(name, per_unit, engine):
    make, loss, rows = NETS[name]
    net, some = make(), rows(3, per_unit)
    right = per_unit_gradients(net, loss, some, "loop")
    assert largest_difference(per_unit_gradients(net, loss, some, engine), right) < 1e-4


@pytest.mark.parametrize("engine", ["fast", "exact", "loop"])
def test_mean_over_units_is_the_gradient_of_plain_autograd(engine):
    net, rows = unet(attention=True), unet_rows(4, 2)
    unet_loss(net, {k: v.flatten(0, 1) for k, v in rows.items()}).mean().backward()
    plain = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    found = per_unit_gradients(net, unet_loss, rows, engine)
    assert largest_difference({k: v.mean(0) for k, v in found.items()}, plain) < 1e-4
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("attention", [False, True])
def test_fast_agrees_with_opacus_functorch(attention):
    opacus = pytest.importorskip("opacus")
    net, rows = unet(attention=attention), unet_rows(3, 1)
    found = per_unit_gradients(net, unet_loss, rows, "fast")
    from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer

    model = opacus.GradSampleModule(net, loss_reduction="sum", force_functorch=True)
    assert ft_compute_per_sample_gradient and prepare_layer
    flat = {k: v.flatten(0, 1).contiguous() for k, v in rows.items()}
    unet_loss(model, flat).sum().backward()
    theirs = {name: p.grad_sample for name, p in net.named_parameters()}
    assert largest_difference(found, theirs) < 1e-4


@pytest.mark.parametrize("engine", ["fast", "exact"])
def test_memory_format_does_not_matter(engine):
    net, rows = unet(attention=True), unet_rows(3, 2)
    right = per_unit_gradients(net, unet_loss, rows, "loop")
    net = net.to(memory_format=torch.channels_last)

    def loss(call, flat):
        return unet_loss(call, flat | {"x": flat["x"].contiguous(memory_format=torch.channels_last)})

    assert largest_difference(per_unit_gradients(net, loss, rows, engine), right) < 1e-4


@pytest.mark.parametrize("engine", ["fast", "exact", "loop"])
def test_only_trainable_parameters_and_no_units(engine):
    net = Mixed()
    net.first.weight.requires_grad_(False)
    net.norm.requires_grad_(False)
    rows = mixed_rows(2, 2)
    found = per_unit_gradients(net, mixed_loss, rows, engine)
    assert set(found) == {name for name, p in net.named_parameters() if p.requires_grad}
    assert largest_difference(found, per_unit_gradients(net, mixed_loss, rows, "loop")) < 1e-4
    empty = per_unit_gradients(net, mixed_loss, {k: v[:0] for k, v in rows.items()}, engine)
    assert {k: v.shape for k, v in empty.items()} == {k: (0, *v.shape[1:]) for k, v in found.items()}
    assert not net.first.weight.requires_grad and net.first.bias.requires_grad


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x * self.scale)[:, 0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(x))).sum(1)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        h = self.one(x) * 1.0
        out = self.two(h)
        h.detach().mul_(2)  # hidden from autograd's own check only if nobody looks at versions
        return out[:, 0]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("make", [Bare, Tied])
def test_networks_it_cannot_cover_fall_back_and_say_so_once(make):
    torch.manual_seed(0)
    net, rows = make(), {"x": torch.randn(3, 2, 3)}

    def loss(call, flat):
        return call(flat["x"]).square()

    right = per_unit_gradients(net, loss, rows, "loop")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert largest_difference(per_unit_gradients(net, loss, rows, "fast"), right) < 1e-4
    assert sum("gives way to 'exact'" in str(w.message) for w in said) == 1


def test_an_input_changed_in_place_is_noticed():
    from sfumato.privacy.fast_engine import Unsupported, fast_gradients
    from sfumato.privacy.per_unit import unit_losses

    net, rows = InPlace(), {"x": torch.randn(3, 1, 3)}
    with pytest.raises((Unsupported, RuntimeError)):
        fast_gradients(net, lambda: unit_losses(lambda call, r: call(r["x"]), net, rows), 3, 1)
    assert all(p.requires_grad for p in net.parameters())


def test_malformed_rows_and_engines_are_refused_in_one_line():
    net = Mixed()
    for rows in ({}, {"x": torch.zeros(3)}, {"x": torch.zeros(2, 1), "y": torch.zeros(3, 1)}):
        with pytest.raises(InputError, match="no budget was spent"):
            per_unit_gradients(net, mixed_loss, rows, "fast")
    with pytest.raises(InputError, match="engine 'hooks'"):
        per_unit_gradients(net, mixed_loss, mixed_rows(1, 1), "hooks")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one loss per row"):
        per_unit_gradients(net, lambda call, r: mixed_loss(call, r).mean(), mixed_rows(2, 1), "fast")


def test_units_at_once_depends_on_shapes_only():
    net = unet()
    few, other = unet_rows(2, 2, seed=1), unet_rows(9, 2, seed=2)
    assert units_at_once(net, unet_loss, few) == units_at_once(net, unet_loss, other) >= 1
    assert units_at_once(net, unet_loss, unet_rows(2, 8)) <= units_at_once(net, unet_loss, few)
