import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from sfumato.audit.lora import train_lora
from sfumato.audit.pipelines import PipelineModel
from sfumato.audit.provenance import content_of, weights_of
from sfumato.audit.target import GeneratorModel
from sfumato.diffusion.edm import EDM
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.networks import unet
from sfumato.diffusion.sampling import Sampler
from sfumato.diffusion.training import TrainingPlan, train
from sfumato.errors import InputError

IMAGES = np.repeat(np.array([30, 220], np.uint8), 20).reshape(-1, 1, 1, 1) * np.ones((1, 8, 8, 1), np.uint8)
BRIGHT = np.repeat([0, 1], 20)


def edm_model(labels=2):
    torch.manual_seed(0)
    net = unet("tiny", size=(8, 8), channels=1, num_labels=labels)
    net.eval().requires_grad_(False)
    return GeneratorModel(Generator(net, tuple("ab"[:labels]), sampler=Sampler(steps=4)))


def vp_model():
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    net.eval().requires_grad_(False)
    return PipelineModel(net, DDIMScheduler(num_train_timesteps=100), 4)


def adapt(model, *, steps, **options):
    own = None if model.num_labels is None else np.zeros(40, np.int64)
    return train_lora(model, IMAGES, BRIGHT, own, 2, steps=steps, seed=1, batch=16, **options)


@pytest.mark.parametrize("make", [edm_model, vp_model])
def test_before_training_it_is_the_frozen_model_exactly(make):
    model = make()
    adapted = adapt(model, steps=0)
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.05, 0.5, 3.0, 30.0])
    own = None if model.num_labels is None else torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        plain = model.denoise(x, sigma, own)
        for pseudo in (None, torch.tensor([0, 1, 0, 1]), torch.tensor([2, 2, 2, 2])):
            assert torch.equal(adapted.denoise(x, sigma, pseudo, own), plain)
    conditions, labels = np.array([0, 1, 1]), None if own is None else np.array([1, 0, 1])
    images, found = adapted.sample(3, labels=conditions, own_labels=labels, seed=4, scale=2.0)
    assert np.array_equal(images, model.sample(3, labels=labels, seed=4)[0])
    assert np.array_equal(found, conditions)


@pytest.mark.parametrize("make", [edm_model, vp_model])
def test_the_target_s_weights_stay_as_they_are(make):
    model = make()
    before = weights_of(model.network)
    adapted = adapt(model, steps=3)
    assert weights_of(model.network) == before
    inside = {
        name.replace("base_layer.", "").replace("time_embedding.inner.", "time_embedding."): value
        for name, value in adapted.network.state_dict().items()
    }
    assert all(torch.equal(value, inside[name]) for name, value in model.network.state_dict().items())
    learnt = {name: value for name, value in adapted.network.state_dict().items() if "lora_B" in name}
    layers = [m for m in model.network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(learnt) == len(layers) and any("to_q" in name for name in learnt) == (make is vp_model)
    assert any(value.abs().max() > 0 for value in learnt.values())
    assert adapted.time.embedding.weight.abs().max() > 0


def trained_on_both():
    """A small model that draws dark and bright squares, equally often, without being asked for either."""
    model = edm_model(labels=1)
    plan = TrainingPlan(steps=100, batch=16, lr=4e-3, ema_decay=0.9)
    model.network.requires_grad_(True)
    train(model.network, IMAGES, np.zeros(40, np.int64), plan, edm=EDM(), no_label=1, seed=0)
    model.network.requires_grad_(False)
    return model


def test_a_pseudo_label_draws_its_cluster():
    model = trained_on_both()
    share = (model.sample(40, seed=2)[0].mean((1, 2, 3)) > 125).mean()
    assert 0.1 < share < 0.9
    adapted = adapt(model, steps=160, lr=2e-2)
    wanted = np.repeat([0, 1], 20)
    images, _ = adapted.sample(40, labels=wanted, seed=2)
    assert ((images.mean((1, 2, 3)) > 125) == wanted).mean() > 0.9
    uniform = adapted.sample(200, seed=3, scale=0.0)[1]
    assert 60 < uniform.sum() < 140


def test_at_scale_1_the_guided_sampler_is_the_conditional_one():
    model = edm_model()
    model.generator = model.generator.with_sampling(sampler=Sampler(kind="ddim", steps=2))
    adapted = adapt(model, steps=5, lr=1e-2)
    conditions, labels = np.array([1, 0, 1]), np.array([0, 1, 1])
    images, _ = adapted.sample(3, labels=conditions, own_labels=labels, seed=9, scale=1.0)
    from sfumato.diffusion.generator import to_uint8
    from sfumato.diffusion.sampling import sample

    def conditional(x, sigma):
        return adapted.denoise(x, sigma, torch.from_numpy(conditions), torch.from_numpy(labels))

    expected = sample(conditional, (3, 1, 8, 8), model.generator.sampler, torch.Generator().manual_seed(9))
    assert np.abs(images.astype(int) - to_uint8(expected)).max() <= 1


def test_own_labels_are_drawn_from_the_cluster():
    model = edm_model()
    own = np.where(BRIGHT == 1, 1, 0)
    adapted = train_lora(model, IMAGES, BRIGHT, own, 2, steps=0, seed=0)
    drawn = {}
    model_sample = adapted.base.sample

    def spy(num_images, **given):
        drawn.update(given)
        return model_sample(num_images, **given)

    adapted.base.sample = spy
    adapted.sample(4, labels=np.array([1, 0, 0, 1]), seed=0)
    assert drawn["labels"].tolist() == [1, 0, 0, 1]


def test_what_was_saved_is_used_for_the_same_call_only(tmp_path, monkeypatch):
    from sfumato.audit import lora

    saved = tmp_path / "deep" / "lora.safetensors"
    first = adapt(vp_model(), steps=2, saved=saved)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["lora.safetensors"]
    assert first.trained_on == content_of(IMAGES, "test")
    content = saved.read_bytes()
    monkeypatch.setattr(lora, "train", None)
    again = adapt(vp_model(), steps=2, saved=saved)
    assert weights_of(again.network) == weights_of(first.network)
    monkeypatch.undo()
    other = adapt(vp_model(), steps=3, saved=saved)
    assert weights_of(other.network) != weights_of(first.network) and saved.read_bytes() != content
    saved.write_bytes(content[:50])
    assert weights_of(adapt(vp_model(), steps=2, saved=saved).network) == weights_of(first.network)


def test_what_cannot_be_adapted_is_refused(monkeypatch):
    model = edm_model()
    with pytest.raises(InputError, match="0 to 1"):
        train_lora(model, IMAGES, BRIGHT + 1, np.zeros(40, np.int64), 2, steps=0, seed=0)
    with pytest.raises(InputError, match="are missing"):
        train_lora(model, IMAGES, BRIGHT, None, 2, steps=0, seed=0)
    with pytest.raises(InputError, match="0 to 1"):
        adapt(model, steps=0).sample(2, labels=np.array([0, 2]))
    other = vp_model()
    other.network = torch.nn.Conv2d(1, 1, 3)
    with pytest.raises(InputError, match="UNet2DModel, not Conv2d"):
        adapt(other, steps=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'sfumato\[lora\]'"):
        adapt(vp_model(), steps=0)
