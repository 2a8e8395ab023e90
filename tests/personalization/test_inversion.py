"""One token per image: learnt, repeatable, each by itself to the last bit, and kept when interrupted."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.errors import InputError
from sfumato.personalization.inversion import Inversion, InversionPlan, invert, invert_style
from sfumato.personalization.text_to_image import TEMPLATES, TextToImage, open_pipeline
from sfumato.privacy.vectors import check_embed

sys.path.insert(0, str(Path(__file__).parent))
import tiny

KINDS = ("sd1", "sd2", "sdxl")
SHORT = InversionPlan(steps=4, draws=2, learning_rate=0.05, batch_size=4, seed=3)


def anchor_of(model):
    return model.token_of("art")


class Counted:
    """A model that counts how often its loss is asked for."""

    def __init__(self, model) -> None:
        self._model, self.calls = model, 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def losses(self, *given):
        self.calls += 1
        return self._model.losses(*given)


# --- learning


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(model_of, kind, vectors):
    model = model_of(kind, vectors)
    latents, anchor = tiny.latents_of(model, 3), anchor_of(model)
    tokens = invert(model, latents, anchor, InversionPlan(steps=20, draws=4, learning_rate=0.1))
    assert tokens.shape == (3, model.dimension) and tokens.dtype == np.float64 and np.isfinite(tokens).all()
    before = tiny.loss_under(model, latents, anchor.expand(3, -1))
    after = tiny.loss_under(model, latents, tokens)
    assert (after < 0.995 * before).all(), (before, after)
    assert len({token.tobytes() for token in tokens}) == 3


def test_the_first_step_is_adams_along_the_gradient_of_the_mean_over_draws(model_of):
    """Against a gradient computed by hand: Adam's first step is the learning rate, against the gradient's sign."""
    model, plan = model_of("sd1"), InversionPlan(steps=10, draws=3, learning_rate=0.02, seed=5)
    latents, anchor = tiny.latents_of(model, 2), anchor_of(model)
    source = torch.Generator().manual_seed(5)
    chosen = torch.randint(len(TEMPLATES), (3,), generator=source)
    times = ((torch.arange(3) + torch.rand(3, generator=source)) * (1000 / 3)).long()
    noise = torch.randn((3, 4, 8, 8), generator=source)
    assert [int(time) * 3 // 1000 for time in times] == [0, 1, 2]  # spread over the schedule
    found = invert(model, latents, anchor, plan, steps=1)
    for row in range(2):
        token = anchor.clone().requires_grad_(True)
        given = [tower[chosen] for tower in model.prompts()]
        losses = model.losses(latents[row].expand(3, -1, -1, -1), noise, times, given, token.expand(3, -1))
        (gradient,) = torch.autograd.grad(losses.mean(), token)
        expected = anchor - 0.02 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(torch.from_numpy(found[row]).float(), expected, atol=2e-5, rtol=0)


def test_it_repeats_and_the_seed_matters(model_of):
    model = model_of("sd1")
    latents, anchor = tiny.latents_of(model, 2), anchor_of(model)
    torch.manual_seed(1)
    first = invert(model, latents, anchor, SHORT)
    torch.manual_seed(2)
    assert np.array_equal(invert(model, latents, anchor, SHORT), first)
    assert not np.array_equal(invert(model, latents, anchor, dataclasses.replace(SHORT, seed=4)), first)


def test_nothing_but_the_rows_is_trained(model_of):
    for kind in ("sd1", "sdxl"):
        model = model_of(kind, 2)
        parts = (model.vae, model.unet, *(tower.network for tower in model.towers))
        before = [p.clone() for part in parts for p in part.parameters()]
        anchor = anchor_of(model)
        kept = anchor.clone()
        invert(model, tiny.latents_of(model, 2), anchor, SHORT)
        invert_style(model, tiny.latents_of(model, 2), torch.tensor([0, 1]), 2, anchor, SHORT)
        after = [p for part in parts for p in part.parameters()]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert all(p.grad is None and not p.requires_grad for p in after)
        assert torch.equal(anchor, kept) and anchor.grad is None
        assert all(tower.table.rows is None for tower in model.towers)


# --- each image by itself


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_gets_the_same_token_to_the_last_bit_wherever_and_with_whom(model_of, kind):
    model = model_of(kind)
    embed = Inversion(model, anchor_of(model), SHORT)
    images = tiny.pictures(4, model.size)
    among = embed(images)
    alone = np.zeros_like(images)
    alone[0] = images[2]
    with_others = np.stack([images[1], tiny.pictures(1, model.size, seed=9)[0], images[0], images[2]])
    assert among.shape == (4, model.dimension)
    assert np.array_equal(embed(alone)[0], among[2])
    assert np.array_equal(embed(with_others)[[0, 2, 3]], among[[1, 0, 2]])
    assert not np.array_equal(among[1], among[2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_mechanisms_own_check_passes(model_of, kind):
    model = model_of(kind)
    embed = Inversion(model, anchor_of(model), SHORT)
    check_embed(embed, (model.size, model.size, 3))


def test_the_check_catches_noise_that_depends_on_the_place(model_of):
    """What the module warns of: were noise drawn by position, the check would refuse it."""
    model = model_of("sd1")

    class ByPlace(Inversion):
        def __call__(self, images, steps=None):
            found = super().__call__(images, steps)
            return found + 1e-15 * np.arange(len(images))[:, None]

    with pytest.raises(InputError, match="changes with the other images of its batch or its place"):
        check_embed(ByPlace(model, anchor_of(model), SHORT), (16, 16, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_many_at_once_is_one_at_a_time(model_of, kind):
    model = model_of(kind)
    images, anchor = tiny.pictures(4, model.size), anchor_of(model)
    together = Inversion(model, anchor, SHORT)(images)
    single = Inversion(model, anchor, dataclasses.replace(SHORT, batch_size=1))
    apart = np.concatenate([single(image[None]) for image in images])
    assert np.abs(together - apart).max() < 1e-4 < np.abs(together[0] - together[1]).max()


def test_a_shorter_call_is_the_beginning_of_the_work_and_is_not_kept(model_of, tmp_path):
    model = model_of("sd1")
    images, anchor = tiny.pictures(4), anchor_of(model)
    embed = Inversion(model, anchor, SHORT, kept=tmp_path / "kept")
    short = embed(images, steps=2)
    assert not (tmp_path / "kept").exists()
    latents = torch.cat([model.latents(image[None]) for image in images])
    assert np.array_equal(short, invert(model, latents, anchor, SHORT, steps=2))
    assert not np.array_equal(short, embed(images))


# --- what is kept


@pytest.fixture
def kept(model_of, tmp_path):
    """Calls `Inversion` on four images with tokens kept, and says how often the model was asked."""
    images = tiny.pictures(4)

    def call(*, images=images, plan=SHORT, anchor="art", model=None, folder=tmp_path / "kept"):
        model = Counted(model or model_of("sd1"))
        found = Inversion(model, model.token_of(anchor), plan, kept=folder)(images)
        return found, model.calls

    return call


def test_finished_tokens_are_taken_up_again_without_asking_the_model(kept):
    first, calls = kept()
    assert calls == SHORT.steps
    again, calls = kept()
    assert np.array_equal(again, first) and calls == 0 and again.dtype == np.float64
    turned, calls = kept(images=tiny.pictures(4)[::-1])
    assert np.array_equal(turned, first[::-1]) and calls == 0
    assert kept(folder=None)[1] == SHORT.steps


def test_one_token_that_is_not_there_is_made_again_and_is_the_same(kept, tmp_path):
    first, _ = kept()
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 4 and all(file.stat().st_size == 16 * 8 for file in files)
    files[1].unlink()
    again, calls = kept()
    assert calls == SHORT.steps and np.array_equal(again, first)


def test_a_batch_that_was_interrupted_leaves_what_was_finished(kept, model_of, monkeypatch, tmp_path):
    first, _ = kept()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TextToImage, "losses", stop)
        with pytest.raises(KeyboardInterrupt):
            kept(images=tiny.pictures(4, seed=1))
    assert len(list((tmp_path / "kept").iterdir())) == 4  # no half-made ones
    again, calls = kept()
    assert np.array_equal(again, first) and calls == 0


@pytest.mark.parametrize(
    "change",
    [
        {"plan": dataclasses.replace(SHORT, steps=5)},
        {"plan": dataclasses.replace(SHORT, draws=3)},
        {"plan": dataclasses.replace(SHORT, learning_rate=0.06)},
        {"plan": dataclasses.replace(SHORT, seed=4)},
        {"anchor": "portrait"},
        {"images": tiny.pictures(4, seed=1)},
    ],
    ids=["steps", "draws", "rate", "seed", "anchor", "images"],
)
def test_tokens_of_another_plan_anchor_or_image_are_not_reused(kept, change):
    first, _ = kept()
    other, calls = kept(**change)
    assert calls == change.get("plan", SHORT).steps and not np.array_equal(other, first)


def test_tokens_of_another_model_are_not_reused(kept, folder_of):
    """Also where only the U-Net is another, and the anchor the same."""
    first, _ = kept()
    pipeline = open_pipeline(str(folder_of("sd1")))
    with torch.no_grad():
        pipeline.unet.conv_out.weight.add_(0.1)
    found, calls = kept(model=TextToImage(pipeline))
    assert calls == SHORT.steps and not np.array_equal(found, first)


# --- public styles


@pytest.mark.parametrize("kind", KINDS)
def test_each_public_style_gets_a_token_that_its_images_fit(model_of, kind):
    model = model_of(kind)
    latents = torch.cat([tiny.latents_of(model, 4, style=0), tiny.latents_of(model, 4, style=1)])
    style = torch.tensor([0] * 4 + [1] * 4)
    plan, anchor = InversionPlan(steps=20, draws=4, learning_rate=0.1), anchor_of(model)
    tokens = invert_style(model, latents, style, 2, anchor, plan)
    assert tokens.shape == (2, model.dimension) and tokens.dtype == np.float64
    before = tiny.loss_under(model, latents, anchor.expand(8, -1))
    after = tiny.loss_under(model, latents, tokens[style.numpy()])
    assert (after < 0.998 * before).all()
    assert np.array_equal(invert_style(model, latents, style, 2, anchor, plan), tokens)
    # only its own images teach a style's token
    changed = latents.clone()
    changed[4:] = 0
    other = invert_style(model, changed, style, 2, anchor, dataclasses.replace(plan, steps=2))
    same = invert_style(model, latents, style, 2, anchor, dataclasses.replace(plan, steps=2))
    assert np.abs(other[0] - same[0]).max() < 1e-5 < np.abs(other[1] - same[1]).max()


def test_many_styles_go_through_the_model_in_parts(model_of):
    """The first step of each style's token, computed by hand, also for one in the second part."""
    model = Counted(model_of("sd1"))
    latents, anchor = tiny.latents_of(model, 3).repeat(50, 1, 1, 1), anchor_of(model)
    tokens = invert_style(
        model, latents, torch.arange(150), 150, anchor, InversionPlan(steps=1, learning_rate=0.05, seed=6)
    )
    assert model.calls == 2
    source = torch.Generator().manual_seed(6)
    for _ in range(150):  # which of its images each row shows: it has one only
        torch.randint(1, (2,), generator=source)
    times = ((torch.arange(2) + torch.rand(150, 2, generator=source)) * 500).long()
    chosen = torch.randint(len(TEMPLATES), (300,), generator=source).view(150, 2)
    noise = torch.randn((300, 4, 8, 8), generator=source).view(150, 2, 4, 8, 8)
    for style in (0, *range(128, 150)):
        token = anchor.clone().requires_grad_(True)
        ids = [tower[chosen[style]] for tower in model.prompts()]
        rows = latents[style].expand(2, -1, -1, -1)
        losses = model.losses(rows, noise[style], times[style], ids, token.expand(2, -1))
        (gradient,) = torch.autograd.grad(losses.mean(), token)
        expected = anchor - 0.05 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(torch.from_numpy(tokens[style]).float(), expected, atol=2e-4, rtol=0)


# --- refusals


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"draws": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"learning_rate": 10.0},
     {"learning_rate": float("nan")}],
)  # fmt: skip
def test_a_plan_that_cannot_work_is_refused(change):
    with pytest.raises(InputError, match="no budget was spent"):
        InversionPlan(**change)
