"""The token as a network of one parameter: sound per-unit gradients, a plan that fits, learning, resuming."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sfumato.privacy.dp_sgd as dp_sgd_module
from sfumato.errors import BudgetError, InputError
from sfumato.personalization.dp_sgd_inversion import (
    DPSGDSettings,
    TokenNet,
    dp_sgd_inversion,
    dp_sgd_plan,
    row_loss,
    token_rows,
)
from sfumato.personalization.text_to_image import TEMPLATES
from sfumato.privacy.accounting import epsilon_of
from sfumato.privacy.budget import Budget
from sfumato.privacy.dp_sgd import DPSGDPlan, random_rows
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.per_unit import per_unit_gradients
from sfumato.privacy.selfcheck import selfcheck

sys.path.insert(0, str(Path(__file__).parent))
import tiny

KINDS = (("sd1", 1), ("sd2", 2), ("sdxl", 2))


def learnt(*arguments, **more):
    """The token alone."""
    return dp_sgd_inversion(*arguments, **more)[0]


class Held:
    """A reservation that counts what began, and can be interrupted when a step begins."""

    id = "held"

    def __init__(self, stop_at: int | None = None) -> None:
        self.begun_, self.stop_at = 0, stop_at

    def begin(self, mechanism, event, units=1) -> None:
        if self.begun_ == self.stop_at:
            self.stop_at = None
            raise KeyboardInterrupt
        self.begun_ += 1

    def begun(self, mechanism) -> int:
        return self.begun_


def private_of(model, count=4, *, grouped=False):
    images = (
        np.concatenate([tiny.pictures(count, model.size)] * 2)
        if grouped
        else tiny.pictures(count, model.size)
    )
    units = [np.array([i, i + count]) if grouped else np.array([i]) for i in range(count)]
    return SimpleNamespace(
        _images=images, _labels=np.zeros(len(images), np.int64), _units=units, size=(model.size,) * 2, channels=3,
        label_names=("all",),
    )  # fmt: skip


def plan(**change) -> DPSGDPlan:
    settings = {
        "sampling_probability": 1.0, "steps": 6, "noise_multiplier": 1.0, "clip_norm": 0.02, "rows_per_unit": 2,
        "expected_batch": 4.0,
    }  # fmt: skip
    return DPSGDPlan(**(settings | change))


def rows_of(model, units=4, per_unit=3):
    return random_rows((model.size,) * 2, 3, 1, units, per_unit, token_rows(model), "cpu")


def net_of(model) -> TokenNet:
    return TokenNet(model, model.token_of("art"))


# --- the network of one parameter


@pytest.mark.parametrize(("kind", "vectors"), KINDS)
def test_only_the_token_is_trained_and_it_starts_at_the_anchor(model_of, kind, vectors):
    model = model_of(kind, vectors)
    net = net_of(model)
    assert [(name, p.shape) for name, p in net.named_parameters()] == [("rows.weight", (1, model.dimension))]
    assert torch.equal(net.rows.weight[0], model.token_of("art"))
    with torch.no_grad():
        net.rows.weight.add_(1)
    assert not torch.equal(net.rows.weight[0], model.token_of("art"))  # a copy


def test_a_copy_of_the_net_shares_the_frozen_model(model_of, monkeypatch):
    """`selfcheck` works on a deep copy, and a second SDXL would not fit beside the first."""
    model = model_of("sd1")
    net = net_of(model)
    monkeypatch.setattr(
        type(model.unet), "__deepcopy__", lambda *_: pytest.fail("the U-Net was copied"), raising=False
    )
    other = copy.deepcopy(net)
    rows = {name: value.flatten(0, 1) for name, value in rows_of(model).items()}
    with torch.no_grad():
        before = row_loss(net, rows)
        other.rows.weight.add_(0.5)
        assert torch.equal(row_loss(net, rows), before) and not torch.equal(row_loss(other, rows), before)


@pytest.mark.parametrize(("kind", "vectors"), KINDS)
def test_the_loss_is_the_models_with_the_token_in_every_row(model_of, kind, vectors):
    model = model_of(kind, vectors)
    rows = {name: value.flatten(0, 1) for name, value in rows_of(model).items()}
    ids = [torch.stack([tower[number] for number in rows["template"]]) for tower in model.prompts(TEMPLATES)]
    with torch.no_grad():
        tokens = model.token_of("art").expand(12, -1)
        expected = model.losses(rows["latents"], rows["noise"], rows["times"], ids, tokens)
        found = row_loss(net_of(model), rows)
    assert found.shape == (12,) and len(set(rows["template"].tolist())) > 1
    torch.testing.assert_close(found, expected)


def test_rows_are_the_images_latents_with_draws_from_the_given_generator_only(model_of):
    model = model_of("sd1")
    images = tiny.pictures(5)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    make, labels = token_rows(model), torch.zeros(5, dtype=torch.int64)
    torch.manual_seed(1)
    first = make(pixels, labels, torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    again = make(pixels, labels, torch.Generator().manual_seed(7))
    other = make(pixels, labels, torch.Generator().manual_seed(8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["noise"], other["noise"]) and not torch.equal(first["times"], other["times"])
    torch.testing.assert_close(first["latents"], model.latents(images), atol=1e-5, rtol=1e-5)
    assert abs(float(first["noise"].std()) - 1) < 0.1 and not torch.equal(
        first["noise"][0], first["noise"][1]
    )
    alone = make(pixels[3:4], labels[:1], torch.Generator().manual_seed(7))
    torch.testing.assert_close(alone["latents"][0], first["latents"][3], atol=1e-6, rtol=1e-6)
    many = make(
        pixels[:1].expand(500, -1, -1, -1)[:, :, :8, :8], torch.zeros(500), torch.Generator().manual_seed(1)
    )
    assert set(many["template"].tolist()) == set(range(len(TEMPLATES)))
    assert many["times"].min() < 20 and 980 <= many["times"].max() < 1000


# --- gradients of single units


@pytest.mark.parametrize("per_unit", [1, 3])
@pytest.mark.parametrize(("kind", "vectors"), KINDS)
def test_the_fast_engine_agrees_with_one_backward_per_unit(model_of, kind, vectors, per_unit):
    model = model_of(kind, vectors)
    net, rows = net_of(model), rows_of(model, 4, per_unit)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="engine 'fast' gives way")
        fast = per_unit_gradients(net, row_loss, rows, "fast")["rows.weight"]
    loop = per_unit_gradients(net, row_loss, rows, "loop")["rows.weight"]
    assert fast.shape == (4, 1, model.dimension)
    norms = loop.flatten(1).norm(dim=1)
    assert (norms > 1e-4).all() and ((fast - loop).flatten(1).norm(dim=1) < 1e-4 * norms).all()
    assert (loop[0] - loop[1]).norm() > 1e-2 * norms[0]
    assert net.rows.weight.grad is None and all(not p.requires_grad for p in model.unet.parameters())


@pytest.mark.parametrize(("kind", "vectors"), KINDS)
def test_the_selfcheck_passes(model_of, kind, vectors):
    model = model_of(kind, vectors)
    net = net_of(model)
    found = selfcheck(net, row_loss, rows_of(model, 3, 2), "fast")
    assert found.ok and found.max_rel_error < 1e-4
    assert torch.equal(net.rows.weight[0], model.token_of("art"))


# --- the plan


@pytest.mark.parametrize(
    ("units", "batch", "probability"), [(20, 20, 1.0), (8, 8, 1.0), (128, 32, 0.25), (0.4, 1.0, 1.0)]
)
def test_the_plan_costs_exactly_the_budget(units, batch, probability):
    budget = Budget(2.0, 1e-5)
    found = dp_sgd_plan(budget, units, DPSGDSettings(steps=2))
    assert 0.999 * 2 < epsilon_of([found.planned().total], 1e-5) <= 2
    assert found.sampling_probability == pytest.approx(probability) and found.expected_batch == batch
    assert (found.steps, found.clip_norm, found.rows_per_unit) == (2, 0.1, 2)
    assert found.planned().count == 2


def test_the_default_settings_and_a_delta_of_zero():
    assert DPSGDSettings() == DPSGDSettings(100, 32.0, 2, 0.1, 0.01)
    with pytest.raises((InputError, BudgetError), match="no budget was spent"):
        dp_sgd_plan(Budget(1.0, 0.0), 20)


# --- training


@pytest.mark.parametrize(("kind", "vectors"), KINDS)
def test_the_loss_falls_with_almost_no_noise(model_of, kind, vectors):
    model = model_of(kind, vectors)
    anchor = model.token_of("art")
    kept = anchor.clone()
    chosen = plan(steps=25, noise_multiplier=1e-6, clip_norm=10.0)
    token = learnt(model, private_of(model), anchor, chosen, Held(), learning_rate=0.1)
    assert token.shape == (model.dimension,) and token.dtype == torch.float32
    latents = tiny.latents_of(model, 4)
    before = tiny.loss_under(model, latents, anchor.expand(4, -1)).mean()
    after = tiny.loss_under(model, latents, token.expand(4, -1)).mean()
    assert after < 0.995 * before
    assert torch.equal(anchor, kept) and not token.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in model.unet.parameters())


def test_a_step_is_clipped_noised_once_and_divided_by_the_public_batch(model_of, monkeypatch):
    """One step by hand, with known noise: what Adam is given is (clipped sum + noise) / expected_batch."""
    model, seen = model_of("sd1"), []

    class Known(dp_sgd_module.SecureStream):
        def gaussian(self, shape):
            return np.full(shape, 0.25)

    step = torch.optim.Adam.step
    monkeypatch.setattr(dp_sgd_module, "SecureStream", Known)
    monkeypatch.setattr(
        torch.optim.Adam, "step",
        lambda self, *a: (seen.append(self.param_groups[0]["params"][0].grad.clone()), step(self, *a)),
    )  # fmt: skip
    chosen = plan(steps=1, clip_norm=1e-3, noise_multiplier=2.0, expected_batch=10.0)
    learnt(model, private_of(model), model.token_of("art"), chosen, Held())
    clipped = seen[0][0] * 10 - 2.0 * 1e-3 * 0.25
    assert 0 < clipped.norm() <= 4 * 1e-3 * (1 + 1e-5)
    learnt(model, private_of(model, 0), model.token_of("art"), chosen, Held())
    torch.testing.assert_close(seen[1], torch.full((1, 16), 2.0 * 1e-3 * 0.25 / 10))


@pytest.mark.parametrize("units", [0, 3])
def test_empty_batches_take_a_noisy_step(model_of, units):
    model, held = model_of("sd1"), Held()
    anchor = model.token_of("art")
    token = learnt(model, private_of(model, units), anchor, plan(steps=3, sampling_probability=1e-12), held)
    assert held.begun_ == 3 and (token != anchor).all() and torch.isfinite(token).all()
    assert (token - anchor).abs().max() < 3 * 0.011


def test_units_of_several_images_are_taken(model_of):
    model, held = model_of("sd1"), Held()
    token = learnt(model, private_of(model, 3, grouped=True), model.token_of("art"), plan(steps=2), held)
    assert held.begun_ == 2 and torch.isfinite(token).all()


def test_the_learning_rate_falls_to_a_tenth(model_of, monkeypatch):
    seen = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a: (seen.append(self.param_groups[0]["lr"]), step(self, *a))
    )
    model = model_of("sd1")
    learnt(model, private_of(model, 0), model.token_of("art"), plan(steps=10), Held(), learning_rate=0.5)
    assert np.allclose(seen, [0.5 * (1 - 0.09 * step) for step in range(10)])


def test_a_run_on_a_real_ledger_spends_what_was_planned(model_of, tmp_path):
    model, budget = model_of("sd1"), Budget(5.0, 1e-5)
    chosen = dp_sgd_plan(budget, 4, DPSGDSettings(steps=3))
    ledger = Ledger.open(tmp_path / "ledger.db", total=budget)
    held = ledger.reserve("test", [chosen.planned()], delta=1e-5, key="test")
    learnt(model, private_of(model), model.token_of("art"), chosen, held)
    held.settle()
    assert held.begun("dp_sgd") == 3 and 4.99 < ledger.spent.epsilon <= 5 and ledger.spent.delta == 1e-5


def test_an_interrupted_run_goes_on_where_it_stopped(model_of, tmp_path):
    model, held = model_of("sd1"), Held(stop_at=4)
    anchor = model.token_of("art")

    def call(rate, held, folder=tmp_path):
        return learnt(
            model, private_of(model), anchor, plan(steps=6), held, learning_rate=rate, checkpoint_dir=folder
        )

    with pytest.raises(KeyboardInterrupt):
        call(0.3, held)
    assert held.begun_ == 4
    token = call(1e-9, held)  # from there on it hardly moves
    assert held.begun_ == 6
    assert (token - anchor).abs().max() > 0.1
    assert (
        torch.equal(call(0.3, held), token) and held.begun_ == 6
    )  # complete: nothing is done, nothing begins
    fresh = call(1e-9, Held(), None)
    assert (fresh - anchor).abs().max() < 1e-6
    other = Held()
    other.id = "another"
    with pytest.raises(InputError, match="another run"):
        call(0.3, other)
    assert other.begun_ == 0
