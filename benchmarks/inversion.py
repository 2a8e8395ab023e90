"""Textual inversion of many images at once, beside one image at a time: seconds per image and the tokens themselves.

    python benchmarks/inversion.py [--images 158] [--steps 60] [--json FILE]

Three loops with the same model, steps, noise levels and prompts: ours (a batch of images, latents encoded once,
gradients to the rows only), ours one image at a time, and the loop of the usual training script (one image at a time,
the picture encoded at every step, gradients to the whole token table, all other rows put back). The slow loops are
timed on `--slow` images. Random weights would do; the embedded model is used so that the tokens mean something.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.data.glyphs import render_glyphs
from sfumato.personalization.inversion import InversionPlan, invert
from sfumato.personalization.text_to_image import TEMPLATES, TextToImage, open_pipeline


def usual(pipeline: Any, image: np.ndarray, anchor: torch.Tensor, plan: InversionPlan) -> np.ndarray:
    """One image as the usual script learns it; the same draws as `invert`. float64 [D]."""
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    first = len(tokenizer)
    encoder.resize_token_embeddings(first + 1, mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    table.data[first] = anchor
    kept = table.detach().clone()
    pipeline.vae.requires_grad_(False)
    pipeline.unet.requires_grad_(False)
    encoder.requires_grad_(False)
    table.requires_grad_(True)
    tokenizer.add_tokens(["<one>"])
    optimizer = torch.optim.Adam([table], lr=plan.learning_rate, betas=(0.9, 0.99))
    source = torch.Generator().manual_seed(plan.seed)
    alphas, levels = pipeline.scheduler.alphas_cumprod, len(pipeline.scheduler.alphas_cumprod)
    pixels = torch.from_numpy(image[None]).permute(0, 3, 1, 2).float() / 127.5 - 1
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * (1 - 0.9 * step / plan.steps)
        with torch.no_grad():
            found = pipeline.vae.encode(pixels)
            latents = found.latents if hasattr(found, "latents") else found.latent_dist.mean
            latents = latents * pipeline.vae.config.scaling_factor
        chosen = torch.randint(len(TEMPLATES), (plan.draws,), generator=source)
        times = (torch.arange(plan.draws) + torch.rand(plan.draws, generator=source)) * (levels / plan.draws)
        times = times.long().clamp_max(levels - 1)
        noise = torch.randn((plan.draws, *latents.shape[1:]), generator=source)
        texts = [TEMPLATES[i].format("<one>") for i in chosen]
        ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        signal, spread = (
            alphas[times].sqrt().view(-1, 1, 1, 1),
            (1 - alphas[times]).sqrt().view(-1, 1, 1, 1),
        )
        made = pipeline.unet(signal * latents + spread * noise, times, encoder(ids)[0]).sample
        (made - (signal * noise - spread * latents)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[:first] = kept[:first]
    return table.detach()[first].double().numpy()


def main() -> None:
    """Time the three loops in turn and compare their tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="portraits")
    parser.add_argument("--images", type=int, default=158)
    parser.add_argument("--slow", type=int, default=4, help="images of the one-at-a-time loops")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TextToImage.open(options.model, device=device)
    drawn, _, _ = render_glyphs(size=model.size, per_class=4, seed=0)
    images = np.repeat(drawn[np.random.default_rng(0).permutation(len(drawn))[: options.images]], 3, axis=3)
    plan, anchor = InversionPlan(steps=options.steps, batch_size=options.batch_size), model.token_of("art")

    def many(some: np.ndarray, size: int) -> tuple[np.ndarray, float]:
        began, out = time.perf_counter(), []
        for start in range(0, len(some), size):
            out.append(invert(model, model.latents(some[start : start + size]), anchor, plan))
        return np.concatenate(out), (time.perf_counter() - began) / len(some)

    invert(model, model.latents(images[:2]), anchor, replace(plan, steps=2))
    slow = images[: options.slow]
    one, seconds_one = many(slow, 1)
    ours, seconds_ours = many(images, options.batch_size)
    again, seconds_again = many(slow, 1)
    rows: dict[str, Any] = {
        "images": len(images), "steps": plan.steps, "draws": plan.draws, "device": device,
        "seconds_per_image": {"many at once": seconds_ours, "one at a time": min(seconds_one, seconds_again)},
        "repeat_is_identical": bool(np.array_equal(one, again)),
    }  # fmt: skip
    if model.kind == "StableDiffusionPipeline" and model.prediction == "v_prediction" and device == "cpu":
        began, found = time.perf_counter(), []
        for image in slow:
            found.append(usual(open_pipeline(options.model), image, anchor, plan))
        rows["seconds_per_image"]["usual script"] = (time.perf_counter() - began) / len(slow)
        rows["difference_to_usual"] = _difference(np.stack(found), ours[: len(slow)], anchor)
    rows["difference_to_one_at_a_time"] = _difference(one, ours[: len(slow)], anchor)
    rows["times_faster"] = {
        name: seconds / seconds_ours
        for name, seconds in rows["seconds_per_image"].items()
        if name != "many at once"
    }
    text = json.dumps(rows, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


def _difference(first: np.ndarray, second: np.ndarray, anchor: torch.Tensor) -> float:
    """Largest distance between two tokens of one image, over how far the token moved from the anchor."""
    moved = np.linalg.norm(second - anchor.cpu().double().numpy(), axis=1)
    return float((np.linalg.norm(first - second, axis=1) / moved).max())


if __name__ == "__main__":
    main()
