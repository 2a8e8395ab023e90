"""Token files that stock diffusers loads, and pictures drawn with stock diffusers.

`learned_embeds.safetensors` holds exactly one key, {token: float32 [v, width]} (load_textual_inversion refuses more);
for SDXL `learned_embeds_2.safetensors` holds the second text encoder's rows. The certificate is in the files' header.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sfumato.errors import InputError
from sfumato.progress import Progress

FILES = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")
AT_ONCE = 8


def check_new(pipeline: Any, token: str, vectors: int) -> None:
    """Refuse a token that a tokenizer knows already, in any of the names diffusers gives its rows (InputError)."""
    names = [token, *(f"{token}_{number}" for number in range(1, max(2, vectors)))]
    for tokenizer in (pipeline.tokenizer, getattr(pipeline, "tokenizer_2", None)):
        known = {} if tokenizer is None else tokenizer.get_vocab()
        words = {word.lower() for word in known}
        if any(name.lower() in words or f"{name.lower()}</w>" in words for name in names):
            raise InputError(
                f"--token {token!r} is already in the model's vocabulary, and prompts with it would mean "
                f'something else; no budget was spent. Choose another, such as "<my-{token.strip("<>")}>"'
            )


def write_token(folder: Path, token: str, rows: Sequence[np.ndarray], header: dict[str, Any]) -> list[Path]:
    """One file for each text encoder's rows [v, width]; `header` goes into each file's metadata as JSON."""
    paths = []
    for name, values in zip(FILES, rows, strict=False):
        path = folder / name
        metadata = {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()
        }
        save_file({token: np.ascontiguousarray(values, np.float32)}, path, metadata=metadata)
        paths.append(path)
    return paths


def read_token(path: Path) -> tuple[str, np.ndarray, dict[str, str]]:
    """(token, rows float32 [v, width], header) of a token file. InputError when it is none."""
    try:
        with safe_open(path, framework="numpy") as held:
            names = list(held.keys())
            if len(names) != 1:
                raise ValueError(f"it holds {len(names)} entries instead of one")
            rows = np.atleast_2d(held.get_tensor(names[0])).astype(np.float32)
            return names[0], rows, held.metadata() or {}
    except FileNotFoundError:
        raise InputError(
            f"--token-file {path} does not exist. Give learned_embeds.safetensors of a release"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"--token-file {path} is no token file ({' '.join(str(error).split())[:100]}). Give "
            "learned_embeds.safetensors of a release"
        ) from None


def load_token(pipeline: Any, path: Path) -> str:
    """Put a token file, and its companion for SDXL, into a stock pipeline; returns the token.

    InputError: the token is there already, its rows have another width, the second file is missing.
    """
    token, rows, _ = read_token(path)
    check_new(pipeline, token, len(rows))
    encoders = [(path, rows, pipeline.text_encoder, pipeline.tokenizer)]
    if getattr(pipeline, "text_encoder_2", None) is not None:
        second = path.with_name(FILES[1])
        if not second.exists():
            raise InputError(
                f"--token-file: {second} is missing, and this model has two text encoders. Put it beside {path.name}"
            )
        encoders.append((second, read_token(second)[1], pipeline.text_encoder_2, pipeline.tokenizer_2))
    for file, values, encoder, tokenizer in encoders:
        width = encoder.get_input_embeddings().weight.shape[1]
        if values.shape[1] != width:
            raise InputError(
                f"--token-file {file} has rows of {values.shape[1]} numbers, and the model's have {width}: it was "
                "learnt for another model"
            )
        pipeline.load_textual_inversion(
            str(file.parent), weight_name=file.name, text_encoder=encoder, tokenizer=tokenizer
        )
    return token


@torch.no_grad()
def draw(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 30,
    guidance: float = 3.0,
    negative_prompt: str | None = None,
    at_once: int = AT_ONCE,
    advance: Callable[[int], None] | None = None,
) -> np.ndarray:
    """One picture for each prompt, uint8 [N, H, W, 3], by the stock pipeline. Picture i starts from noise that only
    `seed` and i decide, so the same place can be compared between prompts and tokens."""
    made = []
    for start in range(0, len(prompts), at_once):
        some = list(prompts[start : start + at_once])
        noise = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(some))]
        found = pipeline(
            some, num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="np",
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(some),
        ).images  # fmt: skip
        made.append(np.round(np.clip(np.nan_to_num(found), 0, 1) * 255).astype(np.uint8))
        if advance is not None:
            advance(len(some))
    return np.concatenate(made)


def render(
    model: str,
    token_file: Path,
    prompt: str,
    count: int,
    *,
    seed: int,
    steps: int,
    guidance: float,
    negative_prompt: str | None,
    device: str,
) -> tuple[np.ndarray, bool]:
    """`count` pictures of a prompt with the token loaded, and whether the prompt names the token."""
    from sfumato.personalization.text_to_image import open_pipeline

    pipeline = open_pipeline(model).to(device)
    token = load_token(pipeline, token_file)
    with Progress("drawing", count, "pictures") as progress:
        pictures = draw(
            pipeline, [prompt] * count, seed=seed, steps=steps, guidance=guidance, negative_prompt=negative_prompt,
            advance=progress.advance,
        )  # fmt: skip
    return pictures, token in prompt
