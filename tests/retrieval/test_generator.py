"""The generator: its folder, what it is told, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

from sfumato.data.images import OwnerArray
from sfumato.errors import InputError
from sfumato.retrieval import generator as module
from sfumato.retrieval.generator import ConditionNetwork, RetrievalGenerator, open_generator

D = 6
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ENCODER = SimpleNamespace(name="tiny", identity="ab" * 32, dimension=D)
VECTOR = np.array([0.5, -0.5, 0.5, 0.5, 0.0, 0.0], np.float32)


def tiny() -> RetrievalGenerator:
    """16 x 16 pixels, a few thousand random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16, 16), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), mid_block_type=None, layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3, num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3, scaling_factor=0.7,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    condition = ConditionNetwork(D, hidden=16, tokens=2, width=8)
    with torch.no_grad():  # what it is told counts for more than in a network that has learnt nothing
        for name, parameter in unet.named_parameters():
            if ".attn2.to_out" in name or ".attn2.to_v" in name:
                parameter.mul_(8)
        for parameter in condition.layers.parameters():
            parameter.mul_(3)
    return RetrievalGenerator(unet, vae, scheduler, condition, ENCODER.identity)


def pictures(generator, vector=VECTOR, noise=0.1, n=2, **more):
    return generator.generate(vector, noise, n, **({"seed": 3, "steps": 3} | more))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("generator")
    tiny().save_pretrained(where)
    return where


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_folder_holds_all_of_it(folder, tmp_path):
    opened = open_generator(str(folder), ENCODER)
    assert isinstance(opened, RetrievalGenerator)
    assert (opened.dimension, opened.size, opened.encoder) == (D, 16, ENCODER.identity)
    opened.save_pretrained(tmp_path)
    for name in ("condition", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        first, again = (load_file(place / f"{name}.safetensors") for place in (folder, tmp_path))
        assert first.keys() == again.keys()
        assert all(first[key].dtype == torch.float16 and torch.equal(first[key], again[key]) for key in first)
    made = pictures(opened)
    assert made.dtype == np.uint8 and made.shape == (2, 16, 16, 3) and made.std() > 1
    assert np.array_equal(made, pictures(RetrievalGenerator.from_pretrained(tmp_path)))
    # Half precision is of the folder alone: the one that was saved goes on as before.
    assert np.abs(made.astype(int) - pictures(tiny())).mean() < 2


def test_stock_diffusers_loads_its_parts(folder):
    assert UNet2DConditionModel.from_pretrained(folder / "unet").config.cross_attention_dim == 8
    assert AutoencoderTiny.from_pretrained(folder / "vae").config.scaling_factor == 0.7
    assert DDIMScheduler.from_pretrained(folder / "scheduler").config.prediction_type == "v_prediction"


def test_pictures_follow_seed_and_vector():
    generator = tiny()
    made = pictures(generator)
    assert np.array_equal(made, pictures(generator))
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made, pictures(generator, seed=4))
    assert not np.array_equal(made, pictures(generator, -VECTOR))
    assert not np.array_equal(made, pictures(generator, steps=4))


def test_batches_are_pieces_of_one_drawing(monkeypatch, capsys):
    generator = tiny()
    whole = pictures(generator, n=5)
    assert "draw" not in capsys.readouterr().err
    monkeypatch.setattr(module, "BATCH", 2)
    assert np.abs(whole.astype(int) - pictures(generator, n=5)).max() <= 1
    assert "draw: 5/5 pictures" in capsys.readouterr().err


def test_it_is_told_the_noise_level():
    generator = tiny()
    levels = torch.tensor([0.0, 0.01, 0.03, 0.3])
    told = generator.told(torch.from_numpy(VECTOR).expand(4, -1), levels)
    apart = torch.cdist(told.flatten(1), told.flatten(1)) + torch.eye(4)
    assert told.shape == (4, 2, 8) and apart.min() > 0.01
    assert not np.array_equal(pictures(generator, noise=0.0), pictures(generator, noise=0.3))


def test_vector_and_noise_are_scaled_to_variance_one():
    heard = []
    condition = ConditionNetwork(D)
    condition.layers[0].register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    torch.manual_seed(0)
    clean = torch.nn.functional.normalize(torch.randn(4000, D))
    for level in (0.0, 0.05, 2.0):
        condition(clean + level * torch.randn_like(clean), torch.full((4000,), level))
        assert heard[-1][:, :D].square().mean().item() == pytest.approx(1, rel=0.05)
    # no noise is told as a level, not as minus infinity
    assert heard[0][0, D].item() == pytest.approx(math.log(0.01) / 3)


def test_guidance_is_against_no_condition():
    generator = tiny()
    made = {weight: pictures(generator, guidance=weight) for weight in (0.0, 1.0, 2.0)}
    assert not np.array_equal(made[1.0], made[2.0])
    assert np.array_equal(
        made[0.0], pictures(generator, -VECTOR, guidance=0.0)
    )  # nothing but `nothing` is left


def test_another_encoder_is_refused(folder):
    other = SimpleNamespace(name="other", identity="cd" * 32, dimension=D)
    with pytest.raises(InputError, match=r"made for another encoder than 'other'; no budget was spent. Use"):
        open_generator(str(folder), other)


@pytest.mark.parametrize("lost", ["condition.safetensors", "unet", "vae/config.json", "scheduler", WEIGHTS])
def test_a_folder_that_lacks_something_is_refused(copied, lost):
    path = copied / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=r"cannot be opened \(.*no budget was spent"):
        open_generator(str(copied), ENCODER)


def test_missing_weights_are_not_made_up(copied):
    path = copied / WEIGHTS
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path)
    with pytest.raises(InputError, match="unet lacks weights"):
        open_generator(str(copied), ENCODER)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other/1"}, "format 'other/1'"),
        ({"size": 64}, "disagree"),
        ({"dimension": D + 1}, "size mismatch"),
        ({"dimension": "six"}, "cannot be opened"),
        ({"width": None}, "cannot be opened"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(copied, change, said):
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=said):
        open_generator(str(copied), ENCODER)


@pytest.mark.parametrize("content", ["", "[]", "{}", "\xff"])
def test_a_broken_config_is_refused(copied, content):
    (copied / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="cannot be opened"):
        open_generator(str(copied), ENCODER)


def test_what_is_no_generator_is_refused(tmp_path):
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            InputError, match=r"neither model_index.json nor config.json; no budget was spent. Give"
        ):
            open_generator(str(place), ENCODER)


def test_private_features_are_not_drawn_from():
    with pytest.raises(TypeError, match="nothing is drawn"):
        pictures(tiny(), VECTOR.view(OwnerArray))


@pytest.mark.parametrize(
    "wrong",
    [
        {"vector": VECTOR[:-1]},
        {"vector": VECTOR[None]},
        {"vector": VECTOR * np.nan},
        {"noise": -0.1},
        {"noise": math.nan},
        {"n": 0},
    ],
)
def test_wrong_arguments_are_errors(wrong):
    with pytest.raises(ValueError, match="must be"):
        pictures(tiny(), **wrong)


def test_libraries_speak_again_afterwards(folder):
    before = logging.get_verbosity()
    RetrievalGenerator.from_pretrained(folder)
    assert logging.get_verbosity() == before and logging.is_progress_bar_enabled()
