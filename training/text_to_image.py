"""Train the embedded text-to-image model on public portraits, and write it as a `StableDiffusionPipeline` folder.

    python benchmarks/data/portraits.py public
    python training/text_to_image.py --work DIR --out src/sfumato/personalization/portraits

Stages, each kept in --work and skipped when it is there: a VAE (32 x 32 pixels to 8 x 8 x 8), a byte-level BPE
tokenizer from the captions, the latents of all pictures under all filters, and a text encoder and U-Net trained
together with v-prediction and zero terminal SNR (arXiv 2305.08891). `--minutes` are for the last stage. Two cores are
enough: 7 minutes for the VAE, 26 for the rest.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "data"))
from fetch import CACHE
from pictures import FILTERS, Portraits, as_tensor, caption, filtered, read
from portraits import PUBLIC

SIZE, LATENT, WIDTH, TOKENS = 32, 8, 192, 28
VAE_BATCH, BATCH = 32, 64
LATENT_NOISE = 0.05
SHARE_FILTERED, SHARE_UNSTYLED, SHARE_EMPTY = 0.4, 0.12, 0.1


def build_vae() -> AutoencoderTiny:
    """0.4 million parameters; a side becomes a quarter. Without normalisation it learns flat colours ten times as fast
    as `AutoencoderKL`, whose group norms lose them."""
    return AutoencoderTiny(
        encoder_block_out_channels=(40,) * 3, decoder_block_out_channels=(40,) * 3, num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1), latent_channels=LATENT, act_fn="relu",
    )  # fmt: skip


def build_unet() -> UNet2DConditionModel:
    """5 million parameters; two levels, 8 x 8 and 4 x 4, both with attention."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=LATENT, out_channels=LATENT, block_out_channels=(96, 144),
        down_block_types=("CrossAttnDownBlock2D",) * 2, mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",) * 2, layers_per_block=1, cross_attention_dim=WIDTH,
        attention_head_dim=(3, 4), norm_num_groups=16,
    )  # fmt: skip


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """1.5 million parameters, three layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3,
            num_attention_heads=6, max_position_embeddings=TOKENS, projection_dim=WIDTH, hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """The noise schedule: scaled linear, zero terminal SNR, v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1,
    )  # fmt: skip


def train_vae(pictures: Portraits, work: Path, minutes: float) -> AutoencoderTiny:
    """Reconstruction of plain and filtered pictures from latents with a little noise: absolute and edge error."""
    path, vae = work / "vae.safetensors", build_vae()
    if path.exists():
        vae.load_state_dict(load_file(path))
        return vae.eval()
    rng, began, step = np.random.default_rng(0), time.monotonic(), 0
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, weight_decay=1e-4, betas=(0.9, 0.98))
    while (spent := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                2e-3 * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent)))
            )
        images = as_tensor(pictures.images[rng.integers(len(pictures.images), size=VAE_BATCH)])
        third = VAE_BATCH // 3
        name = FILTERS[1 + step % (len(FILTERS) - 1)]
        images = torch.cat([images[third:], filtered(images[:third], name)]) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images).latents
            made = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample.float()
        sideways, down = ((made - images).diff(dim=d).abs().mean() for d in (2, 3))
        loss = (made - images).abs().mean() + 0.5 * (sideways + down)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 500 == 0:
            error = (made - images).square().mean().item()
            print(f"vae {step}: loss {loss.item():.4f}, PSNR {10 * math.log10(4 / error):.1f}", flush=True)
    save_file(vae.state_dict(), path)
    return vae.eval()


def train_tokenizer(pictures: Portraits, work: Path) -> CLIPTokenizer:
    """Byte-level BPE, as CLIP's, from captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = work / "tokenizer"
    if not folder.exists():
        rng = np.random.default_rng(0)
        texts = [
            caption(words, pictures.styles[style], FILTERS[rng.integers(len(FILTERS))], rng)
            for words, style in zip(pictures.attributes, pictures.style, strict=True)
        ]
        texts += ["art", "a face", "an icon", "a photo", "illustration"] * 300
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
        as_clip = CLIPTokenizer()._tokenizer
        raw.normalizer, raw.pre_tokenizer = as_clip.normalizer, as_clip.pre_tokenizer
        trainer = trainers.BpeTrainer(
            vocab_size=1000, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>",
            initial_alphabet=sorted(alphabet), show_progress=False,
        )  # fmt: skip
        raw.train_from_iterator(texts, trainer)
        model = json.loads(raw.to_str())["model"]
        vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
        for character in sorted(alphabet):  # CLIP's tokenizer wants every byte also as the end of a word
            vocab.setdefault(character + "</w>", len(vocab))
        tokenizer = CLIPTokenizer(
            vocab=vocab, merges=merges, unk_token="<|endoftext|>", bos_token="<|startoftext|>",
            eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=TOKENS,
        )  # fmt: skip
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def encode(pictures: Portraits, vae: AutoencoderTiny, work: Path) -> Tensor:
    """Latents of all pictures under all filters, float16 [filters, N, 8, 8, 8], not yet scaled."""
    path = work / "latents.safetensors"
    if not path.exists():
        latents = torch.empty(
            (len(FILTERS), len(pictures.images), LATENT, SIZE // 4, SIZE // 4), dtype=torch.float16
        )
        for start in range(0, len(pictures.images), 256):
            images = as_tensor(pictures.images[start : start + 256])
            for number, name in enumerate(FILTERS):
                with torch.autocast("cpu", torch.bfloat16):
                    found = vae.encode(filtered(images, name) * 2 - 1).latents
                latents[number, start : start + len(images)] = found.half()
        save_file({"latents": latents}, path)
    return load_file(path)["latents"]


def train(
    pictures: Portraits, latents: Tensor, tokenizer: CLIPTokenizer, work: Path, minutes: float, scale: float
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Text encoder and U-Net together, v-prediction; returns their running average. Goes on where it stopped."""
    torch.manual_seed(0)
    nets = torch.nn.ModuleDict({"unet": build_unet(), "text": build_text_encoder(tokenizer)})
    average, path = copy.deepcopy(nets).requires_grad_(False), work / "training.pt"
    optimizer = torch.optim.AdamW(nets.parameters(), lr=0.0, weight_decay=1e-3, betas=(0.9, 0.98))
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        nets.load_state_dict(state["nets"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    rng = np.random.default_rng(step)
    alphas = scheduler().alphas_cumprod
    running = 0.0
    while spent < 60 * minutes:
        began, part = time.monotonic(), spent / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-3 * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))
            )
        rows = rng.integers(len(pictures.images), size=BATCH)
        kinds = np.where(rng.random(BATCH) < SHARE_FILTERED, rng.integers(1, len(FILTERS), BATCH), 0)
        texts = []
        for row, kind in zip(rows, kinds, strict=True):
            shown = rng.random()
            style = None if shown < SHARE_UNSTYLED else pictures.styles[pictures.style[row]]
            empty = shown > 1 - SHARE_EMPTY
            texts.append("" if empty else caption(pictures.attributes[row], style, FILTERS[kind], rng))
        kinds = np.where([not text or " in the style of " not in text for text in texts], 0, kinds)
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).input_ids
        clean = latents[torch.from_numpy(kinds), torch.from_numpy(rows)].float() * scale
        noise = torch.randn_like(clean)
        times = (torch.arange(BATCH) + torch.rand(BATCH)) * (
            1000 / BATCH
        )  # one from each part of the schedule
        times = times.long()[torch.randperm(BATCH)].clamp_max(999)
        signal, spread = (
            alphas[times].sqrt().view(-1, 1, 1, 1),
            (1 - alphas[times]).sqrt().view(-1, 1, 1, 1),
        )
        with torch.autocast("cpu", torch.bfloat16):
            text = nets["text"](ids)[0]
            made = nets["unet"](signal * clean + spread * noise, times, text).sample.float()
        loss = mse_loss(made, signal * noise - spread * clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 20))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in nets.parameters()], 1 - decay)
        step += 1
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        spent += time.monotonic() - began
        if step % 100 == 0:
            print(f"step {step}: {spent / 60:.1f} of {minutes:g} min, loss {running:.4f}", flush=True)
        if step % 500 == 0 or spent >= 60 * minutes:
            state = {"nets": nets.state_dict(), "average": average.state_dict(), "step": step, "spent": spent}
            torch.save({**state, "optimizer": optimizer.state_dict()}, f"{path}.part")
            os.replace(f"{path}.part", path)
    return average["unet"].eval(), average["text"].eval()


def main() -> None:
    """All stages, then the pipeline's folder in half precision."""

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=CACHE, help="where portraits.py wrote its files")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between stages")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--minutes", type=float, default=26, help="of the text encoder and the U-Net")
    parser.add_argument("--vae-minutes", type=float, default=7)
    parser.add_argument("--stop-after", choices=["vae"], help="for looking at what is there")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    pictures = read(options.data, PUBLIC, SIZE)
    vae = train_vae(pictures, options.work, options.vae_minutes)
    if options.stop_after == "vae":
        return
    tokenizer = train_tokenizer(pictures, options.work)
    latents = encode(pictures, vae, options.work)
    scale = 1 / latents[0, ::7].float().std().item()
    vae.register_to_config(scaling_factor=scale)
    unet, text = train(pictures, latents, tokenizer, options.work, options.minutes, scale)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(options.out)


if __name__ == "__main__":
    main()
