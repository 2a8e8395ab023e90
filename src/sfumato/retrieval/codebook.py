"""A released codebook: noisy numbers and mean residuals of a private collection around public centres.

It answers prompts as an index does, from a file that may be handed to anybody: releasing it cost once, asking is free.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sfumato.encoders.text_image import TextImageEncoder, open_text_image_encoder
from sfumato.errors import InputError
from sfumato.retrieval.conditions import Condition, told_by
from sfumato.retrieval.prompts import checked_prompt

FORMAT = "sfumato-codebook/1"
FILE = "codebook.safetensors"


@dataclass(frozen=True)
class Codes:
    """What the mechanism released, and the public frame it stands in.

    centers: float [C, D], public. sums: float [C, k + 1], noisy sums of residuals and numbers. basis: [D, k] or None.
    residual_noise, count_noise: standard deviations of both. units: the public number of units.
    """

    centers: np.ndarray
    sums: np.ndarray
    basis: np.ndarray | None
    residual_noise: float
    count_noise: float
    units: float
    encoder: str
    encoder_identity: str

    def save(self, path: Path, certificate: dict[str, Any]) -> None:
        """Write it as safetensors with its certificate."""
        arrays = {"centers": self.centers, "sums": self.sums}
        if self.basis is not None:
            arrays["basis"] = self.basis
        header = {
            "format": FORMAT, "encoder": self.encoder, "encoder_identity": self.encoder_identity,
            "figures": json.dumps([self.residual_noise, self.count_noise, self.units]),
            "privacy": json.dumps(certificate),
        }  # fmt: skip
        save_file({k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()}, path, metadata=header)


class Codebook:
    """A codebook opened for asking; like `Collection`, without a budget."""

    def __init__(self, codes: Codes, encoder: TextImageEncoder, privacy: dict[str, Any]) -> None:
        self.codes, self.encoder, self._privacy = codes, encoder, privacy

    @classmethod
    def open(cls, folder: str | Path, *, encoder: str | None = None) -> Codebook:
        """The codebook in a release folder. InputError for anything else, and for another encoder."""
        path = Path(folder) / FILE
        try:
            with safe_open(path, framework="numpy") as held:
                header = held.metadata() or {}
                arrays = {name: held.get_tensor(name).astype(np.float64) for name in held.keys()}  # noqa: SIM118
            if header.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            residual_noise, count_noise, units = json.loads(header["figures"])
            codes = Codes(
                arrays["centers"], arrays["sums"], arrays.get("basis"), residual_noise, count_noise, units,
                header["encoder"], header["encoder_identity"],
            )  # fmt: skip
            privacy = json.loads(header["privacy"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is damaged or no codebook ({error}); no budget was spent. Make one with `sfumato "
                "retrieve codebook`"
            ) from None
        opened = open_text_image_encoder(encoder or codes.encoder)
        if opened.identity != codes.encoder_identity:
            raise InputError(
                f"{path} was made with another encoder (its hash is {codes.encoder_identity[:12]}…, this one's "
                f"{opened.identity[:12]}…); no budget was spent. Give the one it was made with"
            )
        return cls(codes, opened, privacy)

    def condition(self, prompt: str, *, fallback: bool = False) -> Condition:
        """What the generator is told: the mean over the codes nearest to the prompt, weighted by their noisy numbers.

        Post-processing of what was released: free. Raises InputError as `Collection.condition`; `fallback` changes
        nothing, as nothing runs out.
        """
        direction = self.encoder.texts([checked_prompt(prompt)])[0].astype(np.float64)
        codes = self.codes
        scores = codes.centers @ direction
        near = np.argsort(-scores)[: max(1, round(len(scores) / 8))]
        used = near[
            codes.sums[near, -1] > codes.count_noise
        ]  # codes that hold hardly more than noise are left out
        if not len(used):
            return Condition(codes.centers[near].mean(0).astype(np.float32), 0.0, False, True)
        center = np.average(codes.centers[used], axis=0, weights=np.maximum(codes.sums[used, -1], 1))
        summed = codes.sums[used].sum(0)
        many = np.sqrt(len(used))
        told = told_by(
            summed, center, codes.basis, codes.residual_noise * many, codes.count_noise * many,
            max(codes.units * len(used) / len(codes.centers), 1.0), cached=True,
        )  # fmt: skip
        return Condition(told.vector, told.noise, True, True)  # its weights are private, if nothing else is

    def status(self) -> dict[str, Any]:
        """Public figures: what it cost; asking is unlimited."""
        return {
            "mechanism": "codebook", "epsilon": self._privacy["epsilon"], "delta": self._privacy["delta"],
            "unit": self._privacy["unit"], "queries_asked": None, "queries_left": None, "queries_planned": None,
            "statement": self._privacy["statement"],
        }  # fmt: skip

    def certificate(self) -> dict[str, Any]:
        """privacy.json of the codebook."""
        return self._privacy
