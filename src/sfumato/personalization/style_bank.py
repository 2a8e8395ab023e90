"""Public styles as tokens: where private ones are likely to lie, and from which direction they are not.

A bank is made from public images alone and says, for one model: a token for each public style, an anchor (their mean),
the directions in which styles differ most, how far they spread along each, and how far the token of a *single* image
of a public style lies from the anchor. From the last two come the clip radius and the shrinkage of noise, so that
nothing about private images has to be guessed or asked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sfumato.errors import InputError
from sfumato.personalization.text_to_image import embedded_folder

FORMAT = "sfumato-style-bank/1"
DIRECTIONS = 16
RADIUS_QUANTILE = 0.5
LEAST_SPREAD = 0.05  # of the uncorrected figure, so that no direction is written off by chance


@dataclass(frozen=True)
class StyleBank:
    """Everything is public.

    names: S styles. tokens: float32 [S, D]. anchor: float32 [D]. basis: float32 [D, k], orthonormal columns, the
    principal directions of the styles' tokens about the anchor. image_tokens: float32 [I, D], tokens of single images,
    and image_style: int64 [I], whose they are. model: fingerprint of the model. vectors: rows of a token.
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    image_tokens: np.ndarray
    image_style: np.ndarray
    anchor: np.ndarray
    basis: np.ndarray
    model: str
    vectors: int

    @property
    def dimension(self) -> int:
        """D."""
        return self.tokens.shape[1]

    def directions(self, count: int | None) -> np.ndarray:
        """The first `count` columns of the basis, float64 [D, count], orthonormal again in double precision."""
        count = int(self.basis.shape[1]) if count is None else count
        if not 1 <= count <= self.basis.shape[1]:
            raise InputError(
                f"the style bank has {self.basis.shape[1]} directions, not {count}; no budget was spent"
            )
        return np.linalg.qr(self.basis[:, :count].astype(np.float64))[0]

    def radius(self, basis: np.ndarray | None, center: np.ndarray | None = None) -> float:
        """Clip radius R: the median length of public single-image residuals, along the basis where there is one."""
        along = self._residuals(basis, center)
        return float(np.quantile(np.linalg.norm(along, axis=1), RADIUS_QUANTILE))

    def spread(self, basis: np.ndarray | None, radius: float, center: np.ndarray | None = None) -> np.ndarray:
        """The prior that shrinkage uses, float64 [k]: mean square, over public styles and in each direction, of a
        style's mean clipped residual from the centre (by default the anchor). What few images per style add to it by
        chance is taken off (one-way analysis of variance)."""
        along = self._residuals(basis, center)
        length = np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-12)
        clipped = along * np.minimum(1, radius / length)
        groups = [clipped[self.image_style == style] for style in np.unique(self.image_style)]
        between = np.mean([np.square(group.mean(0)) for group in groups], axis=0)
        chance = [group.var(0, ddof=1) / len(group) for group in groups if len(group) > 1]
        return np.maximum(between - (np.mean(chance, axis=0) if chance else 0.0), LEAST_SPREAD * between)

    def _residuals(self, basis: np.ndarray | None, center: np.ndarray | None) -> np.ndarray:
        """Single images' tokens from the centre, along the basis where there is one: float64 [I, k]."""
        residual = self.image_tokens.astype(np.float64) - (self.anchor if center is None else center)
        return residual if basis is None else residual @ basis

    def check(self, model: str, dimension: int, vectors: int, where: str) -> None:
        """Refuse a bank that was made for another model (InputError)."""
        if self.dimension != dimension or self.vectors != vectors:
            raise InputError(
                f"{where} holds tokens of {self.vectors} x {self.dimension // self.vectors} numbers, and the "
                f"model's have {vectors} x {dimension // vectors}: it was made for another model; no budget was spent. "
                "Make one for this model with `sfumato style-bank`"
            )
        if self.model != model:
            raise InputError(
                f"{where} was made for another model (its hash is {self.model[:12]}…, this model's {model[:12]}…); no "
                "budget was spent. Make one for this model with `sfumato style-bank`"
            )

    def save(self, path: Path) -> None:
        """Write it as safetensors, in half precision but for the basis and the anchor."""
        header = {
            "format": FORMAT, "names": json.dumps(self.names), "model": self.model, "vectors": str(self.vectors),
        }  # fmt: skip
        arrays = {
            "tokens": self.tokens.astype(np.float16), "image_tokens": self.image_tokens.astype(np.float16),
            "image_style": self.image_style.astype(np.int32), "anchor": self.anchor.astype(np.float32),
            "basis": self.basis.astype(np.float32),
        }  # fmt: skip
        # safetensors writes an array's memory as it lies, whatever its order
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata=header
        )

    @classmethod
    def load(cls, path: str | Path) -> StyleBank:
        """What `save` wrote. InputError for anything else."""
        path = Path(path)
        try:
            with safe_open(path, framework="numpy") as held:
                header, arrays = held.metadata() or {}, {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
            if header.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            bank = cls(
                tuple(json.loads(header["names"])), arrays["tokens"].astype(np.float32),
                arrays["image_tokens"].astype(np.float32), arrays["image_style"].astype(np.int64),
                arrays["anchor"], arrays["basis"], header["model"], int(header["vectors"]),
            )  # fmt: skip
        except SafetensorError:
            raise InputError(
                f"--subspace {path} is damaged or no style bank; no budget was spent. Make one with "
                "`sfumato style-bank`"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(
                f"--subspace {path} is no style bank ({reason}); no budget was spent. Make one with `sfumato "
                "style-bank`"
            ) from None
        bank._check_shapes(path)
        return bank

    def _check_shapes(self, path: Path) -> None:
        width, styles, images = self.anchor.size, len(self.names), self.image_style.size
        fits = (
            self.tokens.shape == (styles, width)
            and self.image_tokens.shape == (images, width)
            and self.image_style.shape == (images,)
            and bool(((self.image_style >= 0) & (self.image_style < styles)).all())
            and self.anchor.shape == (width,)
            and self.basis.ndim == 2
            and len(self.basis) == width
            and 1 <= self.basis.shape[1] <= width
            and self.vectors >= 1
            and width % self.vectors == 0
            and styles >= 2
            and images >= 2
            and all(np.isfinite(a).all() for a in (self.tokens, self.image_tokens, self.anchor, self.basis))
        )
        if not fits:
            raise InputError(
                f"--subspace {path} is damaged: its shapes do not fit together; no budget was spent. Make it "
                "again with `sfumato style-bank`"
            )


def embedded_bank() -> Path:
    """The file of the embedded model's bank."""
    return embedded_folder() / "styles.safetensors"


def principal_directions(tokens: np.ndarray, anchor: np.ndarray, count: int = DIRECTIONS) -> np.ndarray:
    """The `count` principal directions of tokens [S, D] about the anchor: float32 [D, k], k at most S."""
    _, _, rows = np.linalg.svd(tokens.astype(np.float64) - anchor, full_matrices=False)
    return rows[:count].T.astype(np.float32)
