"""Train the embedded generator of `sfumato retrieve` on public portraits, and write it as its folder.

    python benchmarks/data/portraits.py public
    python training/retrieval_generator.py --work DIR --out src/sfumato/retrieval/portraits

Stages, each kept in --work and skipped when it is there: latents of all pictures, and of a fifth of them under each
filter, by the autoencoder of the embedded text-to-image model; the encoder's vectors of these pictures and of a caption
each; their 64 nearest neighbours; and a U-Net with its condition network, v-prediction with zero terminal SNR.
`--minutes` are for the last stage, which goes on where it stopped; two cores are enough.

What it is told of a picture is the mean vector of the picture's k nearest others (or of itself and the k - 1 nearest),
k = 1, 4, 16 or 64, or sometimes its caption's vector, under Gaussian noise of a level that it is told too; after
RDM-adapt (arXiv 2403.14421), with a dropout of the condition for guidance, and levels over two orders of magnitude.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import mse_loss

from sfumato.encoders.text_image import TextImageEncoder, open_text_image_encoder
from sfumato.retrieval.generator import ConditionNetwork, RetrievalGenerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "data"))
from fetch import CACHE
from pictures import FILTERS, Portraits, as_tensor, caption, filtered, read
from portraits import PUBLIC
from text_to_image import scheduler

SIZE, LATENT, WIDTH, BATCH = 32, 8, 160, 64
NEIGHBOURS = (1, 4, 16, 64)
SHARE_FILTERED, SHARE_TEXT, SHARE_NOTHING, SHARE_CLEAN, SHARE_UNSTYLED = 0.4, 0.1, 0.12, 0.25, 0.2
NOISE = (0.003, 0.3)  # per coordinate
VAE = Path(__file__).resolve().parents[1] / "src" / "sfumato" / "personalization" / "portraits" / "vae"


@dataclass(frozen=True)
class Material:
    """latents: float16 [N, 8, 8, 8], not scaled. images, texts: unit vectors float32 [N, D]. near: int64 [N, 64], rows
    of the nearest others, nearest first. plain: the first rows, so many, are without a filter."""

    latents: Tensor
    images: Tensor
    texts: Tensor
    near: Tensor
    plain: int


def build_unet() -> UNet2DConditionModel:
    """2.5 million parameters; two levels, 8 x 8 and 4 x 4, both with attention."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=LATENT, out_channels=LATENT, block_out_channels=(72, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2, mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",) * 2, layers_per_block=1, cross_attention_dim=WIDTH,
        attention_head_dim=(3, 4), norm_num_groups=24,
    )  # fmt: skip


def shown(pictures: Portraits, rows: np.ndarray, name: str) -> np.ndarray:
    """Some pictures under a filter, uint8 [B, 32, 32, 3]."""
    made = filtered(as_tensor(pictures.images[rows]), name).clamp(0, 1) * 255
    return made.round().byte().permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def prepare(pictures: Portraits, vae: AutoencoderTiny, encoder: TextImageEncoder, work: Path) -> Material:
    """Latents, vectors and neighbours, once for these pictures and this encoder."""
    path = work / f"material-{len(pictures.images)}-{encoder.identity[:12]}.safetensors"
    if not path.exists():
        rng = np.random.default_rng(0)
        count = len(pictures.images)
        parts = [(FILTERS[0], np.arange(count))]
        parts += [(name, np.sort(rng.choice(count, count // 5, replace=False))) for name in FILTERS[1:]]
        latents, images, texts = [], [], []
        for name, rows in parts:
            for some in np.array_split(rows, math.ceil(len(rows) / 256)):
                pixels = shown(pictures, some, name)
                latents.append(vae.encode(as_tensor(pixels) * 2 - 1).latents.half().contiguous())
                images.append(encoder.images(pixels))
                styles = [pictures.styles[pictures.style[row]] for row in some]
                named = rng.random(len(some)) >= (SHARE_UNSTYLED if name == FILTERS[0] else 0)
                said = [
                    caption(pictures.attributes[row], style if with_style else None, name, rng)
                    for row, style, with_style in zip(some, styles, named, strict=True)
                ]
                texts.append(encoder.texts(said))
            print(f"{name}: {sum(map(len, images)):,} pictures encoded", flush=True)
        vectors = np.concatenate(images)
        found = {
            "latents": torch.cat(latents).contiguous(), "images": torch.from_numpy(vectors),
            "texts": torch.from_numpy(np.concatenate(texts)), "near": nearest(vectors),
        }  # fmt: skip
        save_file(found, f"{path}.part")
        os.replace(f"{path}.part", path)
    return Material(**load_file(path), plain=len(pictures.images))


def nearest(vectors: np.ndarray) -> Tensor:
    """Rows of the 64 nearest other vectors of each, int64 [N, 64], by inner product, exactly."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    found = np.empty((len(vectors), NEIGHBOURS[-1]), np.int64)
    for start in range(0, len(vectors), 4096):
        _, near = index.search(vectors[start : start + 4096], NEIGHBOURS[-1] + 1)
        for row, rows in enumerate(near, start):  # itself is among the first, unless many are the same
            found[row] = rows[rows != row][: NEIGHBOURS[-1]]
    return torch.from_numpy(found)


def conditions(material: Material, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """What is told of each of these pictures: noisy vectors [B, D], and the noise in each coordinate [B]."""
    told = torch.empty(len(rows), material.images.shape[1])
    for place, row in enumerate(rows):
        if rng.random() < SHARE_TEXT:
            told[place] = material.texts[row]
            continue
        k, near = int(rng.choice(NEIGHBOURS)), material.near[row]
        among = near[:k] if rng.random() < 0.5 else torch.cat([torch.tensor([row]), near[: k - 1]])
        told[place] = material.images[among].mean(0)
    levels = np.exp(rng.uniform(*np.log(NOISE), len(rows)))
    noise = torch.from_numpy(np.where(rng.random(len(rows)) < SHARE_CLEAN, 0, levels)).float()
    return told + noise.unsqueeze(1) * torch.randn_like(told), noise


def train(
    material: Material, encoder: TextImageEncoder, work: Path, minutes: float, scale: float
) -> tuple[UNet2DConditionModel, ConditionNetwork]:
    """U-Net and condition network together; returns their running average. Goes on where it stopped."""
    torch.manual_seed(0)
    condition = ConditionNetwork(encoder.dimension, width=WIDTH)
    nets = torch.nn.ModuleDict({"unet": build_unet(), "condition": condition})
    average = copy.deepcopy(nets).requires_grad_(False)
    path = work / f"training-{encoder.identity[:12]}.pt"
    optimizer = torch.optim.AdamW(nets.parameters(), lr=0.0, weight_decay=1e-3, betas=(0.9, 0.98))
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        nets.load_state_dict(state["nets"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    rng = np.random.default_rng(step)
    torch.manual_seed(step)
    alphas = scheduler().alphas_cumprod
    running = None
    while spent < 60 * minutes:
        began, part = time.monotonic(), spent / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-3 * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))
            )
        rows = np.where(
            rng.random(BATCH) < SHARE_FILTERED,
            rng.integers(material.plain, len(material.latents), BATCH),
            rng.integers(material.plain, size=BATCH),
        )
        vectors, deviations = conditions(material, rows, rng)
        dropped = torch.from_numpy(rng.random(BATCH) < SHARE_NOTHING)
        clean = material.latents[torch.from_numpy(rows)].float() * scale
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
            told = nets["condition"](vectors, deviations)
            told = torch.where(dropped.view(-1, 1, 1), nets["condition"].nothing, told)
            made = nets["unet"](signal * clean + spread * noise, times, told).sample.float()
        loss = mse_loss(made, signal * noise - spread * clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 20))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in nets.parameters()], 1 - decay)
        step += 1
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        spent += time.monotonic() - began
        if step % 100 == 0:
            print(f"step {step}: {spent / 60:.1f} of {minutes:g} min, loss {running:.4f}", flush=True)
        if step % 500 == 0 or spent >= 60 * minutes:
            state = {"nets": nets.state_dict(), "average": average.state_dict(), "step": step, "spent": spent}
            torch.save({**state, "optimizer": optimizer.state_dict()}, f"{path}.part")
            os.replace(f"{path}.part", path)
    return average["unet"].eval(), average["condition"].eval()


def main() -> None:
    """All stages, then the generator's folder in half precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=CACHE, help="where portraits.py wrote its files")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between stages")
    parser.add_argument("--out", type=Path, required=True, help="folder of the generator")
    parser.add_argument("--encoder", default="portraits", help="as --encoder of sfumato retrieve")
    parser.add_argument(
        "--vae", type=Path, default=VAE, help="folder of an AutoencoderTiny, 32 x 32 to 8 x 8 x 8"
    )
    parser.add_argument("--minutes", type=float, default=26, help="of the last stage")
    parser.add_argument("--styles", type=int, default=len(PUBLIC), help="only so many, to try the program")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    encoder = open_text_image_encoder(options.encoder)
    vae = AutoencoderTiny.from_pretrained(
        options.vae, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
    )
    assert isinstance(vae, AutoencoderTiny)
    vae = vae.float().eval().requires_grad_(False)
    pictures = read(options.data, PUBLIC[: options.styles], SIZE)
    material = prepare(pictures, vae, encoder, options.work)
    scale = float(vae.config["scaling_factor"])
    unet, condition = train(material, encoder, options.work, options.minutes, scale)
    generator = RetrievalGenerator(unet, vae, scheduler(), condition, encoder.identity)
    generator.save_pretrained(options.out)
    parameters = sum(p.numel() for part in (unet, condition) for p in part.parameters())
    print(f"{options.out}: {parameters:,} parameters trained")


if __name__ == "__main__":
    main()
