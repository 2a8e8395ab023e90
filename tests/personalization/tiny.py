"""Stock diffusers pipelines with a few thousand random weights, and images of two styles to learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sfumato.personalization.text_to_image import TEMPLATES

LENGTH = 24
WORDS = ("a", "art", "in", "of", "portrait", "style", "the")


def tokenizer(*, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Every byte, alone and as the end of a word, `WORDS`, and the two special tokens last, as in CLIP's own."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:  # from the left: "a r t</w>" -> "ar t</w>" -> "art</w>"
            pair = (symbols[0], symbols[1])
            symbols[:2] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
            if symbols[0] not in pieces:
                pieces.append(symbols[0])
    vocab = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, unk_token="<|endoftext|>", bos_token="<|startoftext|>",
        eos_token="<|endoftext|>", pad_token=pad, model_max_length=LENGTH,
    )  # fmt: skip


def text_encoder(words: CLIPTokenizer, width: int, *, kind=CLIPTextModel, **more) -> CLIPTextModel:
    settings = {
        "vocab_size": len(words), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": LENGTH, "projection_dim": width,
        "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    return moved(kind(CLIPTextConfig(**(settings | more))), 0.15)


def unet(side: int, width: int, **more) -> UNet2DConditionModel:
    net = UNet2DConditionModel(
        sample_size=side, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=width,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2, norm_num_groups=8, **more,
    )  # fmt: skip
    with torch.no_grad():  # what the prompt says counts for more than in a network that has learnt nothing
        for name, parameter in net.named_parameters():
            if ".attn2.to_out" in name or ".attn2.to_v" in name:
                parameter.mul_(4)
    return moved(net, 0.03)


def vae(side: int, blocks: int) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=side, latent_channels=4, block_out_channels=(8, 16, 16)[:blocks], layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4, scaling_factor=0.7,
    ).eval()  # fmt: skip


def moved(net: nn.Module, by: float) -> nn.Module:
    """Every weight moved at random, so that nothing is zero and a token tells."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return net.eval()


def noise_schedule(kind=DDIMScheduler, **more):
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **more)


def tiny_sd1(folder: Path, *, seed: int = 0) -> Path:
    """SD 1.x: epsilon, one text encoder. 16 x 16 pixels."""
    torch.manual_seed(seed)
    words = tokenizer()
    return _saved(
        folder, words, text_encoder(words, 16), unet(8, 16), vae(16, 2), noise_schedule(clip_sample=False)
    )


def tiny_sd2(folder: Path, *, seed: int = 0) -> Path:
    """SD 2.x: v-prediction, another width and activation, "!" as padding. 32 x 32 pixels, a VAE of three blocks."""
    torch.manual_seed(seed)
    words = tokenizer(pad="!")
    encoder = text_encoder(words, 24, hidden_act="gelu")
    schedule = noise_schedule(clip_sample=False, prediction_type="v_prediction")
    return _saved(folder, words, encoder, unet(8, 24), vae(32, 3), schedule)


def tiny_sdxl(folder: Path, *, seed: int = 0, pooled_by_largest: bool = False) -> Path:
    """SDXL: two text encoders, of 16 and 24 numbers, and a pooled embedding of 20. 16 x 16 pixels.

    pooled_by_largest: text_encoder_2 says eos_token_id=2, as the published SDXL does, and so takes the pooled
    embedding from the largest id of a prompt, which is a new token's.
    """
    torch.manual_seed(seed)
    first, second = tokenizer(), tokenizer(pad="!")
    more = {"eos_token_id": 2} if pooled_by_largest else {}
    pipeline = StableDiffusionXLPipeline(
        vae=vae(16, 2), text_encoder=text_encoder(first, 16), tokenizer=first, tokenizer_2=second,
        text_encoder_2=text_encoder(
            second, 24, kind=CLIPTextModelWithProjection, hidden_act="gelu", projection_dim=20, **more
        ),
        unet=unet(
            8, 40, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
        ),
        scheduler=noise_schedule(EulerDiscreteScheduler), add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def _saved(folder: Path, words, encoder, network, coder, schedule) -> Path:
    pipeline = StableDiffusionPipeline(
        vae=coder, text_encoder=encoder, tokenizer=words, unet=network, scheduler=schedule, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def pictures(count: int, side: int = 16, *, seed: int = 0, style: int = 0) -> np.ndarray:
    """uint8 [count, side, side, 3]: warm stripes across (style 0) or cold stripes down (style 1), in noise."""
    rng = np.random.default_rng([seed, style])
    images = rng.integers(0, 60, (count, side, side, 3))
    bright = images[:, ::4] if style == 0 else images[:, :, ::4]
    bright[..., 2 * style] += 180
    return images.astype(np.uint8)


def latents_of(model, count, style=0):
    return torch.cat([model.latents(image[None]) for image in pictures(count, model.size, style=style)])


def loss_under(model, latents, tokens, draws=32):
    """Mean loss of each image under its own token, over noise that training has not seen."""
    source = torch.Generator().manual_seed(99)
    out = []
    with torch.no_grad():
        for row in range(len(latents)):
            noise = torch.randn((draws, *latents.shape[1:]), generator=source)
            times = torch.randint(len(model.alphas), (draws,), generator=source)
            chosen = torch.randint(len(TEMPLATES), (draws,), generator=source)
            ids = [tower[chosen] for tower in model.prompts()]
            tokens_ = torch.as_tensor(tokens[row]).float().expand(draws, -1)
            many = latents[row : row + 1].expand(draws, -1, -1, -1)
            out.append(float(model.losses(many, noise, times, ids, tokens_).mean()))
    return np.array(out)
