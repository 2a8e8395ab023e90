"""Stock pipelines under a condition vector: what they are told, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from sfumato.encoders.encoder import Preprocessing
from sfumato.errors import InputError
from sfumato.retrieval import adapters
from sfumato.retrieval.adapters import IpAdapterGenerator, UnclipGenerator, noise_level
from sfumato.retrieval.generator import open_generator

D, WIDTH = 12, 16
VECTOR = np.full(D, 0.8 / math.sqrt(D), np.float32)
MEAN, STD = 0.3, 0.5  # of the image normaliser, in each coordinate


def tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], unk_token="<|endoftext|>",
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=8,
    )  # fmt: skip


def tower(seed: int = 0, dimension: int = D) -> CLIPVisionModelWithProjection:
    torch.manual_seed(seed)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=4, projection_dim=dimension,
        )
    ).eval()  # fmt: skip


def encoder(seed: int = 0, dimension: int = D) -> SimpleNamespace:
    """The open encoder of a tower: unit vectors."""
    network = tower(seed, dimension)
    prepare = Preprocessing((16, 16), "bicubic", adapters._CLIP_MEAN, adapters._CLIP_STD)

    @torch.inference_mode()
    def images(pixels: np.ndarray) -> np.ndarray:
        found = network(prepare(torch.from_numpy(pixels).permute(0, 3, 1, 2))).image_embeds
        return torch.nn.functional.normalize(found).numpy()

    return SimpleNamespace(name="tiny", identity="ab" * 32, dimension=dimension, images=images)


def parts(**more):
    """Text encoder, U-Net and the rest that both pipelines have; 16 x 16 pixels."""
    torch.manual_seed(0)
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2, norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more,
    )  # fmt: skip
    settings = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return {
        "tokenizer": words, "text_encoder": CLIPTextModel(settings), "unet": unet, "vae": vae,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
    }  # fmt: skip


def saved_unclip(folder, *, normalised: int = D):
    normaliser = StableUnCLIPImageNormalizer(normalised)
    with torch.no_grad():
        normaliser.mean.fill_(MEAN)
        normaliser.std.fill_(STD)
    held = parts(class_embed_type="projection", projection_class_embeddings_input_dim=2 * normalised)
    with torch.no_grad():
        for parameter in held["unet"].class_embedding.parameters():
            parameter.mul_(8)
    StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(), image_encoder=tower(), image_normalizer=normaliser,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"), **held,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def unclip(tmp_path_factory):
    return saved_unclip(tmp_path_factory.mktemp("unclip"))


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """A plain pipeline, and beside it an adapter, told from nothing else: only keys and values of its own."""
    folder = tmp_path_factory.mktemp("diffusion")
    pipeline = StableDiffusionPipeline(
        **parts(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder / "pipeline")
    save_file(adapter_of(pipeline.unet, D), folder / "adapter.safetensors")
    return folder


def adapter_of(unet, dimension: int) -> dict[str, torch.Tensor]:
    """A base IP-Adapter in the published layout, with random weights that tell."""
    torch.manual_seed(5)
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * WIDTH, dimension), "image_proj.proj.bias": torch.randn(4 * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH), "image_proj.norm.bias": torch.zeros(WIDTH),
    }  # fmt: skip
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for part in ("k", "v"):
                shape = getattr(attention, f"to_{part}").weight.shape
                tensors[f"ip_adapter.{number}.to_{part}_ip.weight"] = torch.randn(shape)
    return tensors


def opened(diffusion, **more):
    return open_generator(f"{diffusion / 'pipeline'}+{diffusion / 'adapter.safetensors'}", encoder(**more))


def pictures(generator, vector=VECTOR, noise=0.05, n=2, **more):
    return generator.generate(vector, noise, n, **({"seed": 3, "steps": 2} | more))


@pytest.mark.parametrize("kind", ["unclip", "ip-adapter"])
def test_pictures_follow_vector_noise_seed_and_guidance(kind, unclip, diffusion):
    generator = open_generator(str(unclip), encoder()) if kind == "unclip" else opened(diffusion)
    assert isinstance(generator, UnclipGenerator if kind == "unclip" else IpAdapterGenerator)
    assert (generator.dimension, generator.size) == (D, 16)
    made = pictures(generator)
    assert made.dtype == np.uint8 and made.shape == (2, 16, 16, 3) and not np.array_equal(made[0], made[1])
    assert np.array_equal(made, pictures(generator))
    other = VECTOR * np.where(np.arange(D) % 2, 1, -1)
    for changed in ({"vector": other}, {"noise": 0.2}, {"seed": 4}, {"guidance": 1.0}, {"guidance": 4.0}):
        assert not np.array_equal(made, pictures(generator, **changed)), changed
    assert pictures(generator, n=5).shape == (5, 16, 16, 3)
    with pytest.raises(ValueError, match="must be"):
        pictures(generator, VECTOR[1:])


def test_levels_are_where_the_schedule_has_that_much_noise():
    schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    alphas = schedule.alphas_cumprod.numpy().astype(float)
    for relative in (0.05, 0.3, 1.0, 3.0):
        level = noise_level(schedule, relative)
        assert math.sqrt((1 - alphas[level]) / alphas[level]) == pytest.approx(relative, rel=0.05)
        assert math.sqrt((1 - alphas[level - 1]) / alphas[level - 1]) < relative
    assert noise_level(schedule, 0.0) == 0
    assert noise_level(schedule, 1e9) == 999


def test_an_unclip_is_told_an_embedding_of_typical_length_and_its_own_noise(unclip):
    """What reaches the U-Net, put back into normalised coordinates, is sqrt(α) x + sqrt(1 - α) n of the level told."""
    generator = open_generator(str(unclip), encoder())
    pipeline = generator.pipeline
    labels = []
    pipeline.unet.register_forward_pre_hook(
        lambda _, args, given: labels.append(given["class_labels"]), with_kwargs=True
    )
    noise, rng, residues = 0.06, np.random.default_rng(0), []
    length = math.sqrt(D * (MEAN**2 + STD**2))
    clean = (length * VECTOR / np.linalg.norm(VECTOR) - MEAN) / STD
    levels, add = [], pipeline.noise_image_embeddings
    pipeline.noise_image_embeddings = lambda **given: levels.append(int(given["noise_level"])) or add(**given)
    for _ in range(80):
        pictures(generator, VECTOR + noise * rng.standard_normal(D).astype(np.float32), noise, n=1, steps=1)
        told = labels[-1].numpy()
        assert told.shape == (2, 2 * D) and not told[0].any()  # guidance is against nothing
        alpha = float(pipeline.image_noising_scheduler.alphas_cumprod[levels[-1]])
        residues.append(((told[1, :D] - MEAN) / STD - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha))
    assert np.sqrt(np.square(residues).mean()) == pytest.approx(1, rel=0.1)
    expected = length * noise / (0.8 * STD)
    assert np.median(levels) == pytest.approx(
        noise_level(pipeline.image_noising_scheduler, expected), rel=0.05
    )


def test_an_unclip_without_noise_is_told_none(unclip):
    generator = open_generator(str(unclip), encoder())
    seen = []
    add = generator.pipeline.noise_image_embeddings
    generator.pipeline.noise_image_embeddings = lambda **given: seen.append(given) or add(**given)
    pictures(generator, 0.2 * VECTOR, 0.0)
    assert int(seen[0]["noise_level"]) == 0
    assert float(seen[0]["image_embeds"].norm()) == pytest.approx(generator.length, rel=1e-5)
    pictures(generator, VECTOR, 1.0)  # more noise than vector: s is no smaller than a tenth
    assert 0 < int(seen[1]["noise_level"]) <= 999
    assert float(seen[1]["image_embeds"].norm()) == pytest.approx(10 * generator.length, rel=1e-5)


def test_an_adapter_is_told_the_direction_and_its_share_of_signal(diffusion):
    generator = opened(diffusion)
    told = []
    layer = generator.pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    layer.register_forward_pre_hook(lambda _, args: told.append(args[0]))
    scales = []
    for noise in (0.0, 0.1, 5.0):
        pictures(generator, VECTOR, noise, n=1, steps=1)
        processors = generator.pipeline.unet.attn_processors.values()
        scales.append([p.scale[0] for p in processors if hasattr(p, "scale")])
    assert len(scales[0]) == 4  # cross-attention layers
    for found, expected in zip(scales, (1.0, math.sqrt(0.64 - D * 0.01) / 0.8, 0.1), strict=True):
        assert found == pytest.approx([expected] * 4)
    nothing, embedding = told[0]
    assert not nothing.any()
    assert torch.allclose(embedding, torch.from_numpy(VECTOR) / 0.8 * math.sqrt(D), atol=1e-5)


@pytest.mark.parametrize("beside", ["adapter", "pipeline"])
def test_an_image_tower_gives_an_adapter_its_length(diffusion, tmp_path, beside):
    place = shutil.copytree(diffusion, tmp_path / "copy")
    network = tower()
    network.save_pretrained((place if beside == "adapter" else place / "pipeline") / "image_encoder")
    assert opened(place).length == pytest.approx(adapters._check_space(place, network, encoder()))
    assert opened(place).length != pytest.approx(opened(diffusion).length)
    with pytest.raises(InputError, match=r"another space than encoder 'tiny'; no budget was spent. Use"):
        opened(place, seed=1)


def test_another_space_is_refused(unclip):
    with pytest.raises(InputError, match=r"another space than encoder 'tiny'; no budget was spent. Use"):
        open_generator(str(unclip), encoder(seed=1))


def test_dimensions_that_do_not_fit_are_refused(unclip, diffusion, tmp_path):
    with pytest.raises(InputError, match=f"takes vectors of {D} numbers and the encoder gives 20"):
        open_generator(str(unclip), encoder(dimension=20))
    with pytest.raises(InputError, match=f"takes vectors of {D} numbers and the encoder gives 20"):
        opened(diffusion, dimension=20)
    with pytest.raises(InputError, match="takes vectors of 20 numbers and the encoder gives 12"):
        open_generator(str(saved_unclip(tmp_path, normalised=20)), encoder())


def changed_adapter(diffusion, tmp_path, change):
    tensors = load_file(diffusion / "adapter.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter.safetensors")
    return f"{diffusion / 'pipeline'}+{tmp_path / 'adapter.safetensors'}"


def narrower(tensors):
    tensors["image_proj.proj.weight"] = torch.zeros(4 * WIDTH - 8, D)


def not_base(tensors):
    del tensors["image_proj.proj.weight"]


def incomplete(tensors):
    del tensors[next(name for name in tensors if name.startswith("ip_adapter"))]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (narrower, "cross-attention of width 16 and the adapter is for 14"),
        (not_base, "is no base IP-Adapter"),
        (incomplete, "cannot take this adapter"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(diffusion, tmp_path, change, said):
    with pytest.raises(InputError, match=f"{said}.*no budget was spent"):
        open_generator(changed_adapter(diffusion, tmp_path, change), encoder())


def test_what_is_no_pipeline_or_adapter_is_refused(unclip, diffusion, tmp_path):
    pipeline, adapter = diffusion / "pipeline", diffusion / "adapter.safetensors"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    for spec, said in (
        (str(pipeline), "is a StableDiffusionPipeline, which takes no image embedding here"),
        (f"{unclip}+{adapter}", f"is a {adapters.UNCLIP}, which"),
        (f"{tmp_path / 'absent'}+{adapter}", "is no diffusers pipeline"),
        (f"{pipeline}+{tmp_path / 'absent.safetensors'}", "is no .safetensors file of an adapter"),
        (f"{pipeline}+{tmp_path}", "is no .safetensors file of an adapter"),
        (f"{pipeline}+{broken}", "cannot be read"),
    ):
        with pytest.raises(InputError, match=f"{said}.*no budget was spent"):
            open_generator(spec, encoder())


@pytest.mark.parametrize("damage", ["unet", "normaliser", "index"])
def test_a_broken_pipeline_is_refused(unclip, tmp_path, damage):
    place = shutil.copytree(unclip, tmp_path / "copy")
    if damage == "unet":
        (place / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    elif damage == "normaliser":
        shutil.rmtree(place / "image_normalizer")
    else:
        (place / "model_index.json").write_text(json.dumps(["nothing"]))
    with pytest.raises(InputError, match="no budget was spent"):
        open_generator(str(place), encoder())
