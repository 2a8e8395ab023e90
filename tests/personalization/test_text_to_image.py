"""The frozen model says exactly what the stock pipeline says once the token is loaded into that."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
)
from PIL import Image

from sfumato.errors import InputError
from sfumato.personalization import text_to_image
from sfumato.personalization.text_to_image import TEMPLATES, TextToImage, check_folder, open_pipeline

KINDS = ("sd1", "sd2", "sdxl", "sdxl-largest")
TOKEN = "<the-style>"
PROMPTS = (
    *TEMPLATES,
    "{}",
    "a {}, in the style of art",
    "a " * 21 + "{}",  # of two vectors, the second is cut off
    "art of zebras, 9 of them, in a room that is too long to be said in {}",
    "a portrait",
)


@pytest.fixture
def stock(folder_of):
    """A pipeline of its own, with a token's rows loaded the way users load them."""

    def opened(kind, parts=()):
        pipeline = DiffusionPipeline.from_pretrained(str(folder_of(kind)), safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        for part, end in zip(parts, ("", "_2"), strict=False):
            pipeline.load_textual_inversion(
                {TOKEN: part}, text_encoder=getattr(pipeline, "text_encoder" + end),
                tokenizer=getattr(pipeline, "tokenizer" + end),
            )  # fmt: skip
        return pipeline

    return opened


def said_by(pipeline, prompts):
    """The embeddings, and the pooled ones or None, of the stock pipeline."""
    prompts = [prompt.replace("{}", TOKEN) for prompt in prompts]
    with torch.no_grad():
        if "XL" in type(pipeline).__name__:
            found = pipeline.encode_prompt(
                prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            return found[0], found[2]
        found = pipeline.encode_prompt(
            prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return found[0], None


def some_tokens(model, count, seed=0):
    return torch.randn((count, model.dimension), generator=torch.Generator().manual_seed(seed))


# --- against the stock pipeline


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_tiny_pipelines_are_whole_stock_pipelines(stock, kind):
    pipeline = stock(kind)
    made = pipeline("a portrait in the style of art", num_inference_steps=2, output_type="np").images
    assert (
        made.shape == (1, *[32 if kind == "sd2" else 16] * 2, 3)
        and np.isfinite(made).all()
        and made.std() > 0
    )


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_conditions_are_those_of_the_stock_pipeline_with_the_token_loaded(model_of, stock, kind, vectors):
    model = model_of(kind, vectors)
    token = some_tokens(model, 1)
    pipeline = stock(kind, [part[0] for part in model.split(token)])
    expected, pooled = said_by(pipeline, PROMPTS)
    ids = model.prompts(PROMPTS)
    with torch.no_grad():
        found = model.conditions(ids, token.expand(len(PROMPTS), -1))
        other = model.conditions(ids, 1.5 * token.expand(len(PROMPTS), -1))
    torch.testing.assert_close(found["encoder_hidden_states"], expected, atol=1e-5, rtol=1e-5)
    moved = (other["encoder_hidden_states"] - expected).abs().amax((1, 2))
    assert (moved[:8] > 1e-2).all() and moved[-1] == 0  # the token tells, where there is one
    if pooled is None:
        assert set(found) == {"encoder_hidden_states"}
        return
    added = found["added_cond_kwargs"]
    torch.testing.assert_close(added["text_embeds"], pooled, atol=1e-5, rtol=1e-5)
    assert ((other["added_cond_kwargs"]["text_embeds"] - pooled).abs().amax(1)[:8] > 1e-3).all()
    side = (model.size, model.size)
    times = pipeline._get_add_time_ids(side, (0, 0), side, torch.float32, pooled.shape[1])
    assert torch.equal(added["time_ids"], times.expand(len(PROMPTS), -1))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_every_row_of_a_batch_has_a_token_of_its_own(model_of, kind):
    model = model_of(kind, 2)
    tokens, ids = some_tokens(model, 4), model.prompts([TEMPLATES[0]] * 4)
    with torch.no_grad():
        together = model.conditions(ids, tokens)
        for row in range(4):
            alone = model.conditions([given[row : row + 1] for given in ids], tokens[row : row + 1])
            torch.testing.assert_close(
                together["encoder_hidden_states"][row],
                alone["encoder_hidden_states"][0],
                atol=1e-5,
                rtol=1e-5,
            )
    assert (together["encoder_hidden_states"][0] - together["encoder_hidden_states"][1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_prompts_without_a_token_need_none(model_of, stock, kind):
    model = model_of(kind)
    expected, _ = said_by(stock(kind), ["a portrait", ""])
    with torch.no_grad():
        found = model.conditions(model.prompts(["a portrait", ""]), None)
    torch.testing.assert_close(found["encoder_hidden_states"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_loss_is_that_of_the_stock_parts(model_of, stock, kind):
    model = model_of(kind, 2)
    token, times = some_tokens(model, 1), torch.tensor([10, 500, 990])
    latents, noise = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    pipeline = stock(kind, [part[0] for part in model.split(token)])
    schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
    states, pooled = said_by(pipeline, TEMPLATES[:3])
    more = {}
    if pooled is not None:
        side = (model.size, model.size)
        ids = pipeline._get_add_time_ids(side, (0, 0), side, torch.float32, pooled.shape[1])
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids.expand(3, -1)}}
    with torch.no_grad():
        made = pipeline.unet(schedule.add_noise(latents, noise, times), times, states, **more).sample
        target = schedule.get_velocity(latents, noise, times) if kind == "sd2" else noise
        found = model.losses(latents, noise, times, model.prompts(TEMPLATES[:3]), token.expand(3, -1))
    torch.testing.assert_close(found, (made - target).square().mean((1, 2, 3)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_noise_is_that_of_the_scheduler(model_of, stock, kind):
    model = model_of(kind)
    schedule = DDPMScheduler.from_config(stock(kind).scheduler.config)
    times = torch.tensor([0, 1, 333, 998, 999])
    latents, noise = torch.randn((2, 5, 4, 8, 8), generator=torch.Generator().manual_seed(2))
    given, target = model.noised(latents, noise, times)
    torch.testing.assert_close(given, schedule.add_noise(latents, noise, times), atol=1e-6, rtol=1e-5)
    wanted = schedule.get_velocity(latents, noise, times) if kind == "sd2" else noise
    torch.testing.assert_close(target, wanted, atol=1e-6, rtol=1e-5)
    assert model.prediction == ("v_prediction" if kind == "sd2" else "epsilon")


def test_zero_terminal_noise_levels_are_taken_over(folder_of, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(str(folder_of("sd2")))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    model = TextToImage(pipeline)
    latents, noise = torch.randn((2, 1, 4, 8, 8))
    given, target = model.noised(latents, noise, torch.tensor([999]))
    torch.testing.assert_close(given, noise, atol=1e-3, rtol=0)
    torch.testing.assert_close(target, -latents, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_latents_are_those_of_the_pipelines_own_preparation(model_of, stock, kind):
    model, pipeline = model_of(kind), stock(kind)
    images = np.random.default_rng(0).integers(0, 256, (3, model.size, model.size, 3), dtype=np.uint8)
    pixels = pipeline.image_processor.preprocess([Image.fromarray(image) for image in images])
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mean * 0.7
    assert expected.std() > 1e-2
    torch.testing.assert_close(model.latents(images), expected, atol=1e-5, rtol=1e-5)
    grey = images[..., :1]
    torch.testing.assert_close(
        model.latents(grey), model.latents(grey.repeat(3, axis=3)), atol=1e-5, rtol=1e-5
    )


def test_the_light_autoencoder_serves_as_well(folder_of):
    """AutoencoderTiny (TAESD) has neither a distribution nor a deterministic mean to ask for."""
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(str(folder_of("sd1")), safety_checker=None)
    pipeline.vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3, num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1), latent_channels=4, scaling_factor=0.5, shift_factor=0.25,
    )  # fmt: skip
    model = TextToImage(pipeline)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = pipeline.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latents
    assert model.size == 32 and expected.shape == (2, 4, 8, 8)
    torch.testing.assert_close(model.latents(images), (expected - 0.25) * 0.5, atol=1e-5, rtol=1e-5)


# --- what a token is


@pytest.mark.parametrize(("kind", "numbers"), [("sd1", 16), ("sd2", 24), ("sdxl", 40)])
def test_flat_tokens_and_their_parts(model_of, kind, numbers):
    model = model_of(kind, 3)
    assert model.dimension == 3 * numbers and model.size == (32 if kind == "sd2" else 16)
    tokens = some_tokens(model, 5).view(5, 1, -1)
    parts = model.split(tokens)
    assert [part.shape for part in parts] == [
        (5, 1, 3, width) for width in ({16: [16], 24: [24], 40: [16, 24]}[numbers])
    ]
    assert torch.equal(model.join(parts), tokens)
    assert torch.equal(parts[0][2, 0].flatten(), tokens[2, 0, : parts[0][0].numel()])


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_token_of_words_is_their_mean_embedding_in_every_row(model_of, kind):
    model = model_of(kind, 2)
    for part, tower in zip(model.split(model.token_of("art portrait")), model.towers, strict=True):
        vocab, table = tower.tokenizer.get_vocab(), tower.network.get_input_embeddings().weight
        mean = (table[vocab["art</w>"]] + table[vocab["portrait</w>"]]) / 2
        torch.testing.assert_close(part, mean.expand(2, -1))
    assert torch.equal(model.token_of("art"), model.token_of("Art "))
    assert not torch.equal(model.token_of("art"), model.token_of("style"))


@pytest.mark.parametrize("words", ["", "  ", "<|endoftext|>"])
def test_an_anchor_that_is_no_word_is_refused(model_of, words):
    with pytest.raises(InputError, match=r"--anchor .* not in the model's vocabulary; no budget was spent"):
        model_of("sd1").token_of(words)


def test_everything_is_frozen_and_in_eval_mode(model_of):
    for kind in ("sd1", "sdxl"):
        model = model_of(kind)
        for part in (model.vae, model.unet, *(tower.network for tower in model.towers)):
            assert not part.training and not any(p.requires_grad for p in part.parameters())


def test_the_fingerprint_changes_with_one_weight_of_any_part_that_gives_a_token_its_meaning(
    folder_of, model_of
):
    for kind, parts in (
        ("sd1", ("text_encoder", "unet")),
        ("sdxl", ("text_encoder", "text_encoder_2", "unet")),
    ):
        before = model_of(kind).fingerprint
        assert TextToImage(open_pipeline(str(folder_of(kind))), vectors=2).fingerprint == before
        for name in parts:
            pipeline = open_pipeline(str(folder_of(kind)))
            with torch.no_grad():
                list(getattr(pipeline, name).parameters())[-1].view(-1)[0] += 1e-3
            assert TextToImage(pipeline).fingerprint != before, name
    assert model_of("sd1").fingerprint != model_of("sd2").fingerprint


def test_half_precision_weights_become_single(folder_of, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(str(folder_of("sd1")))
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half")
    model = TextToImage.open(str(tmp_path / "half"))
    assert all(p.dtype == torch.float32 for p in model.unet.parameters())
    tokens = some_tokens(model, 1)
    losses = model.losses(*torch.randn((2, 1, 4, 8, 8)), torch.tensor([5]), model.prompts(["{}"]), tokens)
    assert losses.dtype == torch.float32 and torch.isfinite(losses).all()


# --- refusals


def refused(where, says):
    """It is refused, in one line that says so, and that nothing was spent."""
    with pytest.raises(InputError, match=says) as found:
        open_pipeline(str(where))
    assert "\n" not in str(found.value) and "no budget was spent" in str(found.value)
    assert str(where) in str(found.value)


@pytest.fixture
def copied(folder_of, tmp_path):
    return lambda kind: shutil.copytree(folder_of(kind), tmp_path / "model")


@pytest.mark.parametrize("where", ["{}/nothing", "./nothing", "nothing", "~/nothing-here", "a/b/c"])
def test_what_is_not_there_is_refused(tmp_path, where):
    refused(where.format(tmp_path), "does not exist")


def test_the_embedded_model_is_meant_by_its_name_unless_a_folder_has_it(folder_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_to_image, "embedded_folder", lambda: folder_of("sd2"))
    assert open_pipeline("portraits").text_encoder.config.hidden_size == 24
    shutil.copytree(folder_of("sd1"), tmp_path / "portraits")
    assert open_pipeline("portraits").text_encoder.config.hidden_size == 16


def test_a_folder_or_file_that_is_no_pipeline_is_refused(tmp_path):
    refused(tmp_path, "has no model_index.json")
    (tmp_path / "file.safetensors").write_bytes(b"x")
    refused(tmp_path / "file.safetensors", "has no model_index.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"[1]", b'"text"', b"7", b"null", b"{}", b"\xff\xfe\x00", b'{"unet": ["a", "b"]}'],
)
def test_a_damaged_index_is_refused(copied, content):
    folder = copied("sd1")
    (folder / "model_index.json").write_bytes(content)
    refused(folder, r"model_index\.json cannot be read")


@pytest.mark.parametrize("value", [None, [], [None, None], 7, "text", {}])
def test_an_index_whose_parts_make_no_sense_is_refused(copied, value):
    folder = copied("sd1")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": value}))
    refused(folder, "has no vae")


def test_another_kind_of_pipeline_is_refused(tmp_path):
    net = UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(tmp_path)
    refused(tmp_path, "is a DDPMPipeline, not one of StableDiffusionPipeline, StableDiffusionXLPipeline")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("sd1", name) for name in ("text_encoder", "tokenizer", "unet", "vae", "scheduler")),
        ("sdxl", "text_encoder_2"),
        ("sdxl", "tokenizer_2"),
    ],
)
def test_a_missing_part_is_named(copied, kind, name):
    folder = copied(kind)
    index = json.loads((folder / "model_index.json").read_text())
    check_folder(folder, "here")  # whole: says nothing
    shutil.move(folder / name, folder / "elsewhere")
    refused(folder, f"has no {name}, so it is no whole text-to-image model")
    shutil.move(folder / "elsewhere", folder / name)
    (folder / "model_index.json").write_text(json.dumps({**index, name: [None, None]}))
    refused(folder, f"has no {name}, so it is no whole text-to-image model")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: next((folder / "unet").glob("*.safetensors")).unlink(),
        lambda folder: next((folder / "unet").glob("*.safetensors")).write_bytes(b"no weights"),
        lambda folder: _cut(next((folder / "text_encoder").glob("*.safetensors"))),
        lambda folder: next((folder / "vae").glob("*.safetensors")).write_bytes(b""),
        lambda folder: (folder / "unet" / "config.json").write_text("{"),
        lambda folder: (folder / "unet" / "config.json").unlink(),
        lambda folder: (folder / "text_encoder" / "config.json").write_text("{"),
        lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(),
        lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"),
        lambda folder: [file.unlink() for file in (folder / "tokenizer").iterdir()],
        lambda folder: _another_class(folder),
    ],
    ids=[
        "no weights", "no safetensors", "cut short", "empty", "config cut short", "no config", "encoder's config",
        "no scheduler", "tokenizer cut short", "no tokenizer", "a class nobody has",
    ],
)  # fmt: skip
def test_a_damaged_part_is_refused(copied, damage):
    folder = copied("sd1")
    damage(folder)
    refused(folder, "cannot be opened|has no")


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _another_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "NoSuchModel"]}))


@pytest.mark.parametrize("prediction", ["sample", "flow_prediction"])
def test_another_prediction_is_refused(folder_of, prediction):
    pipeline = open_pipeline(str(folder_of("sd1")))
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    with pytest.raises(InputError, match=f"the model predicts '{prediction}'.*no budget was spent"):
        TextToImage(pipeline)
