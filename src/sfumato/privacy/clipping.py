"""Sums of clipped per-unit gradients: the only statistic of the data that DP-SGD looks at.

Formal guarantee. Each unit (one image, or one group's images) contributes a vector of Euclidean length at
most `clip_norm` to `ClippedSum`. Under *add or remove one unit* the sum therefore moves by at most
clip_norm, under *replace one unit* by at most twice that; `add_noise(noise_multiplier)` turns it into a
Gaussian mechanism with standard deviation noise_multiplier * clip_norm per coordinate (DP-SGD, arXiv
1607.00133, algorithm 1; averaging over the unit's K noise levels before clipping is arXiv 2210.09929,
section 4).

Floating point. Norms are taken, in float64 across layers, of the very tensors that are summed, and the
target length is short of `clip_norm` by one part in 10^5, more than the rounding of float32 products and of
norms, which are taken over pieces of `NORM_PIECE` values because a float32 norm of millions can be short by
1 %. The sum over units is rounded in float32: one unit more moves that rounding by about 10^-7 of the sum's
own length, that is of up to clip_norm times the batch. The noise is a float64 Gaussian added once; this is not
an exact discrete mechanism.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.privacy.budget import ADD_OR_REMOVE_ONE, REPLACE_ONE, Relation
from sfumato.privacy.per_unit import (
    Engine,
    RowLoss,
    Rows,
    check_engine,
    per_unit_gradients,
    rows_shape,
    trainable,
    units_at_once,
)

ROUNDING_MARGIN = 1e-5
NORM_PIECE = 1024  # values whose squares are added in float32; rounding stays below 2e-6


class NoiseStream(Protocol):
    """What `add_noise` needs of `SecureStream`."""

    def gaussian(self, shape: Any) -> np.ndarray:
        """Standard normal float64 values from the operating system's randomness."""
        ...


class ClippedSum:
    """A sum of vectors, one per unit, each no longer than `clip_norm`; unreadable until noise is added.

    `values`: {name: tensor}; together they are one flat vector. Only `add_noise` lets anything out.
    """

    __slots__ = ("__weakref__", "_released", "_values", "clip_norm")

    def __init__(self, values: Mapping[str, Tensor], clip_norm: float) -> None:
        if not 0 < clip_norm < float("inf"):
            raise ValueError(f"clip_norm must be positive and finite, not {clip_norm}")
        self._values, self._released = dict(values), False
        self.clip_norm = float(clip_norm)

    def sensitivity(self, relation: Relation = ADD_OR_REMOVE_ONE) -> float:
        """Largest Euclidean change of the sum between neighbours: clip_norm, twice that for replace one."""
        return {ADD_OR_REMOVE_ONE: self.clip_norm, REPLACE_ONE: 2 * self.clip_norm}[Relation(relation)]

    def add_noise(self, noise_multiplier: float, stream: NoiseStream) -> dict[str, Tensor]:
        """The sum plus N(0, (noise_multiplier * clip_norm)^2) in every coordinate, float32; empties this.

        Satisfies the guarantee of `GaussianDpEvent(noise_multiplier)` for *add or remove one unit*. May be
        called once: a second answer about the same sum would be a second mechanism.
        """
        if not 0 < noise_multiplier < float("inf"):
            raise ValueError(f"noise_multiplier must be positive and finite, not {noise_multiplier}")
        if self._released:
            raise ValueError("this sum has been released already; form a new one, with a new event")
        values, self._values, self._released = self._values, {}, True
        scale = noise_multiplier * self.sensitivity(ADD_OR_REMOVE_ONE)
        return {name: _noised(value, scale, stream) for name, value in values.items()}

    def _add(self, other: ClippedSum) -> ClippedSum:
        """The sum over both sets of units, which must be disjoint."""
        if other.clip_norm != self.clip_norm or self._released or other._released:
            raise ValueError("only unreleased sums clipped to the same length can be added")
        return ClippedSum({name: v + other._values[name] for name, v in self._values.items()}, self.clip_norm)

    def __repr__(self) -> str:
        return f"ClippedSum(clip_norm={self.clip_norm})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a clipped sum is exact private data; it cannot be copied or stored")


def _noised(value: Tensor, scale: float, stream: NoiseStream) -> Tensor:
    noise = torch.from_numpy(np.asarray(stream.gaussian(tuple(value.shape)), dtype=np.float64))
    return (value.detach().to("cpu", torch.float64) + scale * noise).to(torch.float32).to(value.device)


def clipped_gradient_sum(
    net: nn.Module,
    row_loss: RowLoss,
    rows: Rows,
    *,
    clip_norm: float,
    engine: Engine = "fast",
    physical_batch: int | None = None,
) -> ClippedSum:
    """Sum over units of clip(gradient of the unit's mean loss over its K rows), all trainable parameters.

    `rows`: tensors [U, K, ...]; U may be 0, then the sum is exactly zero. `row_loss(call, flat)` receives
    the network (or a stand-in called the same way) and the rows flattened to [U*K, ...], and returns one
    loss per row [U*K]; rows must not influence each other. `physical_batch`: units processed at once; by
    default as memory allows. It changes speed and rounding only. A unit whose gradient is not finite
    contributes zero, silently.

    Sensitivity of the result: clip_norm (add or remove one unit). Raises InputError for malformed rows.
    """
    check_engine(engine)
    units, _ = rows_shape(rows)
    total = _zeros(net)
    if units:
        step = physical_batch or units_at_once(net, row_loss, rows)
        step = -(-units // -(-units // step))  # equal parts instead of a small last one
        for start in range(0, units, step):
            block = {name: value[start : start + step] for name, value in rows.items()}
            _add_clipped(total, per_unit_gradients(net, row_loss, block, engine), clip_norm)
    return ClippedSum(total, clip_norm)


def empty_gradient_sum(net: nn.Module, clip_norm: float) -> ClippedSum:
    """The sum over no units: zeros in the shapes of the trainable parameters. It gets noise too."""
    return ClippedSum(_zeros(net), clip_norm)


def _zeros(net: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trainable(net).items()}


def clipped_vector_sum(vectors: Tensor, clip_norm: float) -> ClippedSum:
    """The same for ready-made vectors [U, ...], one per unit, under the name "value"."""
    total = {"value": torch.zeros_like(vectors[0] if len(vectors) else vectors.sum(0), dtype=torch.float32)}
    if len(vectors):
        _add_clipped(total, {"value": vectors}, clip_norm)
    return ClippedSum(total, clip_norm)


def _add_clipped(total: dict[str, Tensor], gradients: dict[str, Tensor], clip_norm: float) -> None:
    """total += sum over units of factor[u] * gradients[u]; the tensors measured are the tensors summed."""
    norms = unit_norms(gradients)
    usable = norms.isfinite()
    factors = (clip_norm * (1 - ROUNDING_MARGIN) / norms.clamp_min(1e-300)).clamp_max(1.0)
    factors = torch.where(usable, factors, 0.0).to(torch.float32)
    poisoned = not bool(usable.all())
    for name, gradient in gradients.items():
        if poisoned:  # 0 * inf is not 0
            gradient = torch.where(usable.view(-1, *[1] * (gradient.dim() - 1)), gradient, 0.0)
        total[name] += torch.tensordot(factors, gradient.float(), dims=1)


def unit_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm of each unit's whole gradient, float64 [U]. Private: for use in `privacy`."""
    return torch.stack([_squared_norms(g.flatten(1).float()) for g in gradients.values()]).sum(0).sqrt()


def _squared_norms(values: Tensor) -> Tensor:
    """Squared length of each row of [U, n], float64 [U]."""
    whole = values.shape[1] // NORM_PIECE * NORM_PIECE
    pieces = (values[:, :whole].unflatten(1, (-1, NORM_PIECE)), values[:, whole:].unsqueeze(1))
    return sum(torch.linalg.vector_norm(piece, dim=2).double().square().sum(1) for piece in pieces)  # type: ignore
