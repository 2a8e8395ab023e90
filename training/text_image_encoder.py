"""Train the embedded joint space of texts and images on public portraits, and write it as a `CLIPModel` folder.

    python benchmarks/data/portraits.py public
    python training/text_image_encoder.py --work DIR --out src/sfumato/encoders/portraits_clip

Two losses together: texts and images of a batch find each other (CLIP, arXiv 2103.00020, with all pictures that share a
caption as right answers), and two views of an image find each other (arXiv 2002.05709), so that vectors carry more of
what a picture looks like than its caption says. One core is enough: 20 minutes, 1,300 steps.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "data"))
from fetch import CACHE
from pictures import FILTERS, Portraits, as_tensor, caption, filtered, read
from portraits import PUBLIC

SIZE, PATCH, WIDTH, DIMENSION, TOKENS, BATCH = 32, 8, 128, 64, 28, 192
SHARE_FILTERED, SHARE_UNSTYLED, IMAGE_WEIGHT, HALF = 0.4, 0.4, 0.5, 96
TOKENIZER = (
    Path(__file__).resolve().parents[1] / "src" / "sfumato" / "personalization" / "portraits" / "tokenizer"
)
MEAN, STD = (0.75, 0.7, 0.68), (0.32, 0.32, 0.33)


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """1.6 million parameters."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=TOKENS, hidden_act="gelu", bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH, hidden_act="gelu",
    )  # fmt: skip
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=DIMENSION)
    )


def normalised(images: Tensor) -> Tensor:
    """What the network sees of float [B, 3, H, W] in [0, 1]."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


def view(images: Tensor, rng: torch.Generator) -> Tensor:
    """A light change: another cut-out (78 to 100 % of a side), colours a little off."""
    count = len(images)
    scale = 0.78 + 0.22 * torch.rand(count, generator=rng)
    shift = (1 - scale) * (2 * torch.rand(2, count, generator=rng) - 1)
    turn = torch.zeros(count, 2, 3)
    turn[:, 0, 0], turn[:, 1, 1], turn[:, 0, 2], turn[:, 1, 2] = scale, scale, shift[0], shift[1]
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    cut = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain = 1 + 0.16 * (torch.rand(count, 3, 1, 1, generator=rng) - 0.5)
    bright = 0.16 * (torch.rand(count, 1, 1, 1, generator=rng) - 0.5)
    return (cut * gain + bright).clamp(0, 1)


def contrast(first: Tensor, second: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric cross-entropy; same: bool [B, B], which pairs are right answers."""
    logits = scale * first @ second.T
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (
        F.cross_entropy(logits, target) + F.cross_entropy(logits.T, same.T / same.T.sum(1, keepdim=True))
    )


def batch(pictures: Portraits, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
    """Pictures under filters, and captions that name style and filter in three cases of five."""
    rows = rng.integers(len(pictures.images), size=BATCH)
    kinds = np.where(rng.random(BATCH) < SHARE_FILTERED, rng.integers(1, len(FILTERS), BATCH), 0)
    images = as_tensor(pictures.images[rows])
    for kind in np.unique(kinds):
        images[kinds == kind] = filtered(images[kinds == kind], FILTERS[kind])
    texts = []
    for row, kind in zip(rows, kinds, strict=True):
        style = None if rng.random() < SHARE_UNSTYLED else pictures.styles[pictures.style[row]]
        texts.append(caption(pictures.attributes[row], style, FILTERS[kind], rng))
    return images, texts


def train(pictures: Portraits, tokenizer: CLIPTokenizer, work: Path, minutes: float) -> CLIPModel:
    """Goes on where it stopped; returns the running average."""
    torch.manual_seed(0)
    net, average = build(tokenizer), build(tokenizer).requires_grad_(False)
    average.load_state_dict(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.05, betas=(0.9, 0.98))
    path, step, spent = work / "encoder.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    rng, views = np.random.default_rng(step), torch.Generator().manual_seed(step)
    while spent < 60 * minutes:
        began, part = time.monotonic(), spent / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-3 * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))
            )
        images, texts = batch(pictures, rng)
        told = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        both = torch.cat([view(images, views), view(images[:HALF], views)])
        with torch.autocast("cpu", torch.bfloat16):
            found = net.visual_projection(
                net.vision_model(pixel_values=normalised(both)).pooler_output
            ).float()
            said = net.text_projection(
                net.text_model(input_ids=told.input_ids, attention_mask=told.attention_mask).pooler_output
            ).float()
        found, said = F.normalize(found, dim=1), F.normalize(said, dim=1)
        first, second = found[:BATCH], found[BATCH:]
        names = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        number = torch.tensor([names[text] for text in texts])
        same = (number[:, None] == number[None]).float()
        scale = net.logit_scale.exp().clamp_max(50)
        loss = contrast(first, said, scale, same)
        loss = loss + IMAGE_WEIGHT * contrast(first[:HALF], second, torch.tensor(10.0), torch.eye(HALF))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.995, (step + 1) / (step + 20))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in net.parameters()], 1 - decay)
        step += 1
        spent += time.monotonic() - began
        if step % 50 == 0:
            print(f"step {step}: {spent / 60:.1f} of {minutes:g} min, loss {loss.item():.3f}", flush=True)
        if step % 250 == 0 or spent >= 60 * minutes:
            state = {"net": net.state_dict(), "average": average.state_dict(), "step": step, "spent": spent}
            torch.save({**state, "optimizer": optimizer.state_dict()}, f"{path}.part")
            os.replace(f"{path}.part", path)
    return average.eval()


def main() -> None:
    """Train, then write the folder in half precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=CACHE, help="where portraits.py wrote its files")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept meanwhile")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    net = train(read(options.data, PUBLIC, SIZE), tokenizer, options.work, options.minutes)
    net.half().save_pretrained(options.out)
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, options.out / file.name)
    (options.out / "preprocessor_config.json").write_text(
        '{"do_resize": true, "size": {"height": 32, "width": 32}, "resample": 3, "do_center_crop": false, '
        f'"do_rescale": true, "do_normalize": true, "image_mean": {list(MEAN)}, "image_std": {list(STD)}}}\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
