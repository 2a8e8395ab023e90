"""The clipped sum keeps its promise: sensitivity, empty batches, order, broken units, noise."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.privacy.budget import REPLACE_ONE
from sfumato.privacy.clipping import ClippedSum, clipped_gradient_sum, clipped_vector_sum, unit_norms
from sfumato.privacy.per_unit import per_unit_gradients
from sfumato.privacy.randomness import SecureStream

sys.path.insert(0, str(Path(__file__).parent))
from nets import Mixed, mixed_loss, mixed_rows, unet, unet_loss, unet_rows

ENGINES = ["fast", "exact", "loop"]


def flat(total: ClippedSum) -> torch.Tensor:
    return torch.cat([value.flatten() for value in total._values.values()]).double()


def total(net, rows, clip_norm, engine="fast", physical_batch=None, loss=mixed_loss) -> torch.Tensor:
    return flat(
        clipped_gradient_sum(
            net, loss, rows, clip_norm=clip_norm, engine=engine, physical_batch=physical_batch
        )
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("clip_norm", [1e-3, 0.2, 1e3])
def test_equals_clipping_each_unit_by_hand(engine, clip_norm):
    net, rows = unet(attention=True), unet_rows(5, 2)
    gradients = per_unit_gradients(net, unet_loss, rows, "loop")
    by_hand = torch.cat([g.flatten(1) for g in gradients.values()], 1).double()
    by_hand = by_hand * (clip_norm / by_hand.norm(dim=1, keepdim=True)).clamp_max(1)
    found = total(net, rows, clip_norm, engine, loss=unet_loss)
    assert (found - by_hand.sum(0)).norm() < 1e-4 * by_hand.sum(0).norm()


@settings(max_examples=25, deadline=None)
@given(
    units=st.integers(0, 4),
    per_unit=st.integers(1, 3),
    clip_norm=st.floats(1e-6, 1e3),
    scale=st.floats(0, 1e6),
    engine=st.sampled_from(ENGINES),
    seed=st.integers(0, 2**31),
)
def test_one_unit_more_moves_the_sum_by_at_most_the_clip_norm(
    units, per_unit, clip_norm, scale, engine, seed
):
    net, rows = Mixed(), mixed_rows(units + 1, per_unit, seed)
    rows["x"][0] *= scale

    def loss(call, flat_rows):
        return mixed_loss(call, flat_rows) * (1 + flat_rows["x"].abs().amax((1, 2, 3)))

    with_one = total(net, rows, clip_norm, engine, loss=loss)
    without = total(net, {k: v[1:] for k, v in rows.items()}, clip_norm, engine, loss=loss)
    alone = total(net, {k: v[:1] for k, v in rows.items()}, clip_norm, engine, loss=loss)
    assert alone.norm() <= clip_norm  # exactly: the margin covers the rounding
    assert (with_one - without).norm() <= clip_norm * (1 + 1e-5)  # sums are rounded in float32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40), st.floats(1e-9, 1e9))
def test_a_clipped_vector_is_never_longer_than_the_clip_norm(values, clip_norm):
    assert flat(clipped_vector_sum(torch.tensor([values]), clip_norm)).norm() <= clip_norm


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("size", [1, 1023, 1025, 3_000_001])
def test_norms_of_large_layers_are_not_short(value, size):
    """A float32 norm of millions of equal values is short by up to 1 %, and the unit would count for more."""
    vector = torch.full((1, size), value)
    length = float(vector[0, 0].double()) * size**0.5
    assert abs(float(unit_norms({"layer": vector})) / length - 1) < 2e-6
    assert flat(clipped_vector_sum(vector, 1e-2)).norm() <= 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_no_units_is_exactly_zero_in_the_right_shapes(engine):
    net, rows = Mixed(), {k: v[:0] for k, v in mixed_rows(1, 2).items()}
    values = clipped_gradient_sum(net, mixed_loss, rows, clip_norm=1.0, engine=engine)._values
    assert {k: v.shape for k, v in values.items()} == {k: p.shape for k, p in net.named_parameters()}
    assert all((v == 0).all() for v in values.values())


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 7))
def test_order_and_physical_batch_change_rounding_only(order, physical_batch):
    net, rows = Mixed(), mixed_rows(6, 2)
    reference = total(net, rows, 0.3)
    shuffled = {k: v[list(order)] for k, v in rows.items()}
    assert (total(net, shuffled, 0.3, physical_batch=physical_batch) - reference).norm() < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("physical_batch", [None, 1])
def test_a_unit_without_a_finite_gradient_contributes_nothing(engine, broken, physical_batch):
    net, rows = Mixed(), mixed_rows(4, 2)
    rows["x"][2, 1] = broken

    def loss(call, flat_rows):
        return mixed_loss(call, flat_rows) * (1 + flat_rows["x"].square().sum((1, 2, 3)))

    found = total(net, rows, 0.3, engine, physical_batch, loss)
    others = total(net, {k: v[[0, 1, 3]] for k, v in rows.items()}, 0.3, engine, loss=loss)
    assert found.isfinite().all()
    assert (found - others).norm() <= 1e-5


def test_rows_of_a_unit_are_averaged_before_the_clip():
    """K copies of a row give the same clipped gradient as one: rows are not clipped one by one."""
    net, rows = Mixed(), mixed_rows(3, 1)
    copies = {k: v.expand(v.shape[0], 4, *v.shape[2:]) for k, v in rows.items()}
    one, four = total(net, rows, 1e-3), total(net, copies, 1e-3)
    assert (one - four).norm() < 1e-4 * one.norm()


def test_sensitivity_and_noise():
    zero = ClippedSum({"a": torch.zeros(200, 100), "b": torch.zeros(3)}, 0.5)
    assert zero.sensitivity() == 0.5 and zero.sensitivity(REPLACE_ONE) == 1.0
    noised = zero.add_noise(4.0, SecureStream())
    assert noised["a"].dtype == torch.float32 and noised["a"].shape == (200, 100)
    assert noised["a"].std().item() == pytest.approx(2.0, rel=0.03)
    assert abs(noised["a"].mean().item()) < 0.1
    with pytest.raises(ValueError, match="released already"):
        zero.add_noise(4.0, SecureStream())


def test_noise_is_drawn_once_per_coordinate():
    class Counting:
        drawn = 0

        def gaussian(self, shape):
            self.drawn += int(np.prod(shape))
            return np.ones(shape)

    stream = Counting()
    noised = ClippedSum({"a": torch.full((4, 5), 7.0)}, 0.5).add_noise(2.0, stream)
    assert stream.drawn == 20 and torch.equal(noised["a"], torch.full((4, 5), 8.0))


def test_exact_values_cannot_be_read_copied_or_misused():
    exact = ClippedSum({"a": torch.full((2,), 123.0)}, 1.0)
    assert "123" not in repr(exact) + str(exact)
    assert [name for name in dir(exact) if not name.startswith("_")] == [
        "add_noise",
        "clip_norm",
        "sensitivity",
    ]
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            attempt(exact)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError):
            exact.add_noise(bad, SecureStream())
        with pytest.raises(ValueError):
            ClippedSum({}, bad)
    with pytest.raises(ValueError):
        exact._add(ClippedSum({"a": torch.zeros(2)}, 2.0))
    with pytest.raises(ValueError):
        exact.sensitivity("something else")  # type: ignore[arg-type]
