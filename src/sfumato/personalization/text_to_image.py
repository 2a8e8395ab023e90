"""A frozen text-to-image model, and the loss of images under tokens that are not in its vocabulary.

Opened from a folder or hub id in `StableDiffusionPipeline` layout (SD 1.x, 2.x) or `StableDiffusionXLPipeline` layout
(two text encoders). A *token* here is `vectors` rows for each text encoder, laid end to end as one flat vector of
`dimension` numbers; many images can be in one batch, each with a token of its own (arXiv 2208.01618 trains one).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sfumato.encoders.quiet import quiet
from sfumato.errors import InputError

EMBEDDED = "portraits"
KINDS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
TEMPLATES = (
    "a portrait in the style of {}", "a picture in the style of {}", "a painting in the style of {}",
    "a drawing in the style of {}", "a rendering in the style of {}", "a depiction in the style of {}",
    "a sketch in the style of {}",
)  # fmt: skip
"""Style prompts that a token is learnt under (after arXiv 2208.01618); {} stands for the token."""


class TokenEmbedding(nn.Module):
    """A text encoder's token table, with rows of the caller's own for ids beyond the vocabulary.

    `rows` [B, vectors, width], or None: entry b of a batch finds its own rows under ids first, first + 1, ...
    """

    def __init__(self, base: nn.Embedding, first: int) -> None:
        super().__init__()
        self.base, self.first = base, first
        self.rows: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, L] -> [B, L, width]."""
        own = ids >= self.first
        found = self.base(torch.where(own, 0, ids))
        if self.rows is None:
            return found
        place = (ids - self.first).clamp(0, self.rows.shape[1] - 1)
        rows = torch.gather(self.rows, 1, place.unsqueeze(2).expand(-1, -1, self.rows.shape[2]))
        return torch.where(own.unsqueeze(2), rows.to(found.dtype), found)


@dataclass(frozen=True)
class Tower:
    """One text encoder: its tokenizer, its network, and the token table put into it."""

    tokenizer: Any
    network: Any
    table: TokenEmbedding

    @property
    def width(self) -> int:
        return self.table.base.embedding_dim


class TextToImage:
    """See above. Everything is frozen and in eval mode.

    towers: one or two. vectors: rows of a token. dimension: D, numbers in a token, over all towers. size: side of its
    images in pixels. kind: one of `KINDS`. fingerprint: SHA-256 over all weights and the noise schedule: a token
    only means something under these. autocast: whether losses are computed in bfloat16 where that is faster.
    """

    def __init__(
        self, pipeline: Any, *, vectors: int = 1, device: str | torch.device = "cpu", autocast: bool = False
    ) -> None:
        self.device, self.autocast = torch.device(device), autocast
        self.kind = type(pipeline).__name__
        self.vae = _float32(pipeline.vae, self.device).eval().requires_grad_(False)
        self.unet = _float32(pipeline.unet, self.device).eval().requires_grad_(False)
        self.vectors = vectors
        self.fingerprint = _fingerprint(pipeline)
        pairs = [(pipeline.tokenizer, pipeline.text_encoder)]
        if self.kind == KINDS[1]:
            pairs.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
        self.towers = tuple(self._tower(*pair) for pair in pairs)
        self.dimension = vectors * sum(tower.width for tower in self.towers)
        self.size = int(self.unet.config.sample_size) * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._scheduler = pipeline.scheduler
        self.prediction = str(self._scheduler.config.get("prediction_type", "epsilon"))
        if self.prediction not in ("epsilon", "v_prediction"):
            raise InputError(
                f"the model predicts {self.prediction!r}: only epsilon and v_prediction can be trained; no budget was "
                "spent. Use another --model"
            )
        self.alphas = self._scheduler.alphas_cumprod.to(self.device, torch.float32)

    @classmethod
    def open(
        cls, where: str, *, vectors: int = 1, device: str | torch.device = "cpu", autocast: bool = False
    ) -> TextToImage:
        """The model of a folder or hub id; see `open_pipeline` for what is refused."""
        return cls(open_pipeline(where), vectors=vectors, device=device, autocast=autocast)

    def _tower(self, tokenizer: Any, network: Any) -> Tower:
        network = _float32(network, self.device).eval().requires_grad_(False)
        table = TokenEmbedding(network.get_input_embeddings(), len(tokenizer))
        network.set_input_embeddings(table)
        return Tower(tokenizer, network, table)

    def release_memory(self) -> None:
        """Move the networks off an accelerator."""
        for network in (self.vae, self.unet, *(tower.network for tower in self.towers)):
            network.to("cpu")

    def split(self, tokens: Tensor) -> list[Tensor]:
        """Flat tokens [..., D] -> for each tower [..., vectors, width]."""
        parts = tokens.split([self.vectors * tower.width for tower in self.towers], dim=-1)
        return [
            part.unflatten(-1, (self.vectors, tower.width))
            for part, tower in zip(parts, self.towers, strict=True)
        ]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The reverse of `split`."""
        return torch.cat([part.flatten(-2) for part in parts], -1)

    def token_of(self, words: str) -> Tensor:
        """The flat token [D] that existing words amount to: their mean embedding, in every row.

        InputError when a tokenizer knows none of them.
        """
        parts = []
        for tower in self.towers:
            ids = tower.tokenizer(words, add_special_tokens=False).input_ids
            if not ids or any(i == tower.tokenizer.unk_token_id for i in ids):
                raise InputError(
                    f"--anchor {words!r} is not in the model's vocabulary; no budget was spent. Give an ordinary word, "
                    "such as art"
                )
            with torch.no_grad():
                mean = tower.table.base(torch.tensor(ids, device=self.device)).float().mean(0)
            parts.append(mean.expand(self.vectors, -1))
        return self.join(parts)

    def prompts(self, templates: Sequence[str] = TEMPLATES) -> list[Tensor]:
        """Token ids of each template with the token in the place of {}: for each tower int64 [T, length]."""
        out = []
        for tower in self.towers:
            length = min(tower.tokenizer.model_max_length, tower.network.config.max_position_embeddings)
            rows = []
            for template in templates:
                before, _, after = template.partition("{}")
                first, count = tower.table.first, self.vectors if "{}" in template else 0
                ids = _ids(tower, before) + list(range(first, first + count)) + _ids(tower, after)
                ids = [tower.tokenizer.bos_token_id, *ids[: length - 2], tower.tokenizer.eos_token_id]
                rows.append(ids + [tower.tokenizer.pad_token_id] * (length - len(ids)))
            out.append(torch.tensor(rows, device=self.device))
        return out

    def conditions(self, ids: Sequence[Tensor], tokens: Tensor | None) -> dict[str, Any]:
        """What the U-Net is told: `ids` for each tower [B, length], tokens [B, D] or None."""
        parts = self.split(tokens) if tokens is not None else [None] * len(self.towers)
        states: list[Tensor] = []
        pooled = None
        for tower, given, rows in zip(self.towers, ids, parts, strict=True):
            tower.table.rows = rows
            try:
                found = tower.network(given, output_hidden_states=self.kind == KINDS[1])
            finally:
                tower.table.rows = None
            states.append(found.hidden_states[-2] if self.kind == KINDS[1] else found[0])
            pooled = found[0]
        if self.kind == KINDS[0]:
            return {"encoder_hidden_states": states[0]}
        side = float(self.size)
        times = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=self.device).expand(len(ids[0]), -1)
        return {
            "encoder_hidden_states": torch.cat(states, -1),
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times},
        }

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Latents with noise at `times` int64 [B], and what the network should say of them; same shapes."""
        shape = (-1, 1, 1, 1)
        signal, spread = self.alphas[times].sqrt().view(shape), (1 - self.alphas[times]).sqrt().view(shape)
        target = noise if self.prediction == "epsilon" else signal * noise - spread * latents
        return signal * latents + spread * noise, target

    def losses(
        self, latents: Tensor, noise: Tensor, times: Tensor, ids: Sequence[Tensor], tokens: Tensor | None
    ) -> Tensor:
        """Squared error of the prediction for each row, [B]; all arguments have B rows."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            told = self.conditions(ids, tokens)
        return self.losses_told(latents, noise, times, told)

    def losses_told(self, latents: Tensor, noise: Tensor, times: Tensor, told: dict[str, Any]) -> Tensor:
        """The same under conditions that were worked out before."""
        given, target = self.noised(latents, noise, times)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            made = self.unet(given, times, **told).sample
        return (made.float() - target).square().flatten(1).mean(1)

    @torch.no_grad()
    def latents(self, images: np.ndarray) -> Tensor:
        """uint8 [B, size, size, 3] -> the VAE's mean latents, scaled as the U-Net knows them."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2).float()
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        return self.encoded(pixels / 127.5 - 1)

    @torch.no_grad()
    def encoded(self, pixels: Tensor) -> Tensor:
        """The same for pixels [B, 3, size, size] in [-1, 1]."""
        found = self.vae.encode(pixels)
        tiny = not hasattr(found, "latent_dist")  # AutoencoderTiny gives no distribution
        latents = found.latents if tiny else found.latent_dist.mean
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * self.vae.config.scaling_factor


def open_pipeline(where: str) -> Any:
    """A stock diffusers pipeline, in float32, from a folder, a hub id, or "portraits", the embedded model.

    Raises InputError: nothing there, another kind of model, no text encoder or tokenizer.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    path = Path(where).expanduser()
    if where == EMBEDDED and not path.exists():
        path = embedded_folder()
    if path.exists():
        check_folder(path, where)
    elif where.count("/") != 1 or where.startswith((".", "/", "~")):
        raise InputError(
            f"--model {where} does not exist; no budget was spent. Give a folder in StableDiffusionPipeline layout, a "
            "hub id such as OWNER/NAME, or leave it out for the embedded model"
        )
    try:
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(
                str(path) if path.exists() else where, torch_dtype=torch.float32, use_safetensors=True,
                **({"safety_checker": None, "requires_safety_checker": False} if _is_first_kind(path, where) else {}),
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--model {where} cannot be opened ({reason}); no budget was spent") from None
    if type(pipeline).__name__ not in KINDS:
        raise InputError(
            f"--model {where} is a {type(pipeline).__name__}, not one of {', '.join(KINDS)}; no budget was spent"
        )
    missing = [name for name in ("text_encoder", "tokenizer") if getattr(pipeline, name, None) is None]
    if missing:
        raise InputError(
            f"--model {where} has no {missing[0]}, so it has no token to learn; no budget was spent. Give a "
            "text-to-image model"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embedded_folder() -> Path:
    """Where the embedded model of portraits lies."""
    return Path(__file__).parent / EMBEDDED


def check_folder(path: Path, where: str) -> None:
    """Refuse what is no text-to-image pipeline before diffusers is asked (InputError)."""
    index = path / "model_index.json"
    if not index.is_file():
        raise InputError(
            f"--model {where} has no model_index.json, so it is no diffusers pipeline; no budget was spent. Give "
            "a folder in StableDiffusionPipeline layout"
        )
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        kind = parts["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"--model {where}: model_index.json cannot be read; no budget was spent") from None
    if kind not in KINDS:
        raise InputError(f"--model {where} is a {kind}, not one of {', '.join(KINDS)}; no budget was spent")
    wanted = ["text_encoder", "tokenizer", "unet", "vae", "scheduler"]
    wanted += ["text_encoder_2", "tokenizer_2"] if kind == KINDS[1] else []
    for name in wanted:
        part, held = parts.get(name), path / name
        there = held.is_dir() and isinstance(part, list) and part and part[0] is not None
        if name.startswith("tokenizer"):  # without a vocabulary it opens all the same, and knows no word
            there = there and any((held / file).is_file() for file in ("tokenizer.json", "vocab.json"))
        if not there:
            raise InputError(
                f"--model {where} has no {name}, so it is no whole text-to-image model; no budget was spent. Give a "
                "complete one"
            )


def _is_first_kind(path: Path, where: str) -> bool:
    if not path.exists():
        return "xl" not in where.lower()
    return json.loads((path / "model_index.json").read_text(encoding="utf-8"))["_class_name"] == KINDS[0]


def _float32(network: Any, device: torch.device) -> Any:
    """On the device in single precision; a network that is there already is left alone."""
    if any(p.dtype != torch.float32 or p.device != device for p in network.parameters()):
        with quiet():
            network = network.to(device, torch.float32)
    return network


def _ids(tower: Tower, text: str) -> list[int]:
    return tower.tokenizer(text.strip(), add_special_tokens=False).input_ids if text.strip() else []


def _fingerprint(pipeline: Any) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str).encode())
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        part = getattr(pipeline, name, None)
        if part is None:
            continue
        for key, value in sorted(part.state_dict().items()):
            digest.update(f"{name}.{key}".encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
