"""`sfumato style-bank`: from public images, one folder for each style, to a bank for one model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.data.images import PublicImages
from sfumato.errors import InputError
from sfumato.machine import best_defaults
from sfumato.personalization.inversion import InversionPlan, invert, invert_style
from sfumato.personalization.options import StyleBankOptions
from sfumato.personalization.style_bank import StyleBank, principal_directions
from sfumato.personalization.text_to_image import TextToImage, open_pipeline
from sfumato.progress import Progress

FEWEST_STYLES = 3
IMAGES_OF_A_STYLE = 64  # at most, for the style's own token


def make_bank(options: StyleBankOptions) -> StyleBank:
    """Learn the tokens and write the bank to `options.out`. Public images only: no guarantee is given or needed."""
    out = Path(options.out)
    if out.is_dir() or out.suffix != ".safetensors":
        raise InputError(f"--out {out} cannot be used: give the name of a .safetensors file")
    out.parent.mkdir(parents=True, exist_ok=True)
    defaults = best_defaults()
    torch.set_num_threads(defaults.threads)
    model = TextToImage(
        open_pipeline(options.model), vectors=options.vectors, device=defaults.device,
        autocast=defaults.public_dtype == "bfloat16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sfumato-style-bank-") as cache:
        public = PublicImages(options.styles, size=model.size, channels=3, cache_dir=Path(cache))
        if public.label_names is None or len(public.label_names) < FEWEST_STYLES:
            raise InputError(
                f"{options.styles} has fewer than {FEWEST_STYLES} styles: give one folder of public images for "
                "each style, ten or more"
            )
        images, labels = np.asarray(public.images), np.asarray(public.labels)
        plan = InversionPlan(
            steps=options.steps, learning_rate=options.learning_rate, batch_size=options.batch_size, seed=options.seed
        )  # fmt: skip
        bank = bank_from_images(
            model, images, labels, public.label_names, anchor=model.token_of(options.anchor), plan=plan,
            images_per_style=options.images_per_style, directions=options.directions,
        )  # fmt: skip
    bank.save(out)
    return bank


def bank_from_images(
    model: TextToImage,
    images: np.ndarray,
    labels: np.ndarray,
    names: tuple[str, ...],
    *,
    anchor: Tensor,
    plan: InversionPlan,
    images_per_style: int,
    directions: int,
) -> StyleBank:
    """images uint8 [N, H, W, 3] with labels int64 [N], positions in `names`.

    First a token for each style from all of its images, starting from `anchor`. Their mean is the bank's anchor, and
    from it single images are inverted exactly as private ones will be.
    """
    rng = np.random.default_rng(plan.seed)
    own = [rng.permutation(np.flatnonzero(labels == number)) for number in range(len(names))]
    if empty := [name for name, rows in zip(names, own, strict=True) if not len(rows)]:
        raise InputError(f"the style {empty[0]} has no image: give at least one for each style")
    rows = np.concatenate([mine[:IMAGES_OF_A_STYLE] for mine in own])
    latents = _latents(model, images, rows)
    style = torch.from_numpy(labels[rows])
    with Progress("styles", plan.steps, f"steps for {len(names)} styles") as progress:
        tokens = invert_style(model, latents, style, len(names), anchor, plan, advance=progress.advance)
    if not np.isfinite(tokens).all():
        raise InputError("learning the public styles did not converge (NaN): give a smaller --learning-rate")
    middle = tokens.mean(0)
    single = np.concatenate([mine[:images_per_style] for mine in own])
    found = []
    with Progress("single images", len(single), "images") as progress:
        for start in range(0, len(single), plan.batch_size):
            some = single[start : start + plan.batch_size]
            found.append(invert(model, _latents(model, images, some), torch.from_numpy(middle), plan))
            progress.advance(len(some))
    image_tokens = np.concatenate(found)
    fine = np.isfinite(image_tokens).all(1)
    return StyleBank(
        names=tuple(names), tokens=tokens.astype(np.float32), image_tokens=image_tokens[fine].astype(np.float32),
        image_style=labels[single][fine].astype(np.int64), anchor=middle.astype(np.float32),
        basis=principal_directions(tokens, middle, directions), model=model.fingerprint, vectors=model.vectors,
    )  # fmt: skip


def _latents(model: TextToImage, images: np.ndarray, rows: np.ndarray) -> Tensor:
    return torch.cat([model.latents(images[rows[start : start + 64]]) for start in range(0, len(rows), 64)])
