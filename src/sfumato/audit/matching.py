"""The best matches of many images among many others: exact, in blocks, with bounded memory.

No privacy guarantee: what matches private images is for their owner's eyes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sfumato.audit.similarity import NOTHING_AUDITED, TILES, Extractor, Metric
from sfumato.encoders.encoder import device
from sfumato.errors import InputError
from sfumato.evaluation.features import cached_features
from sfumato.progress import Progress

FOR_FAISS = 1_000_000  # references
_COSTS = 4_000_000  # in one block: 16 MB
_NUMBERS = 16_000_000  # features in one block: 64 MB
_ENCODED = 256  # images encoded between two steps of the progress bar
_MOST_ROWS = 512  # queries in one block
_SLOW = 20_000_000_000  # products that take about a second: what takes less shows no progress
_NEAR = 1e-2  # squared distances below this share of the squared lengths are computed again, from differences

Rows = Callable[[Any], np.ndarray]  # features float32 [rows, D] of a slice or an array of rows


@dataclass(frozen=True, eq=False)
class Matches:
    """The k best references of each of N queries.

    similarity: float32 [N, k], descending. index: int64 [N, k], rows of the references, no row twice for a query;
    of equally similar references in a row the lower index comes first.
    """

    similarity: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)


def best_matches(
    queries: np.ndarray,
    references: np.ndarray,
    extractor: Extractor,
    *,
    k: int = 1,
    directory: Path | None = None,
) -> Matches:
    """The k references most similar to each query; images uint8 [N, H, W, C] and [M, H, W, C].

    The similarity of a query and a reference is the best over `extractor.variants` of the query (flips; for pixels
    also shifts by one pixel). Every reference is compared with every query. Float32: distances are right to about
    1e-4 of the contrast, and those of copies are exactly 0. Memory: features of both sets where they are compared by
    cosine (on disk with `directory`, a folder under `internal/`, where they are found again by the next call), blocks
    of 64 MB otherwise.

    InputError for empty sets, sets of different height, width or channels, fewer than k references, or features that
    are not finite.
    """
    check_image_sets(queries=queries, references=references)
    _check_count(k, len(references))
    if extractor.metric != "cosine":  # cheap features, many variants: made block by block
        variants: list[Rows] = [
            lambda rows, change=change: extractor(change(np.asarray(queries[rows])))
            for change in extractor.variants
        ]
        return _search(
            variants,
            lambda rows: extractor(references[rows]),
            (len(queries), len(references)),
            extractor.metric,
            k,
        )
    among = _features(references, extractor, directory, "references")
    changed = [
        _features(change(np.asarray(queries)), extractor, directory, "queries")
        for change in extractor.variants
    ]
    return _search(
        [each.__getitem__ for each in changed],
        among.__getitem__,
        (len(queries), len(references)),
        "cosine",
        k,
    )


def nearest(
    query_features: np.ndarray, reference_features: np.ndarray, *, metric: Metric, k: int = 1
) -> Matches:
    """The k references most similar to each query in feature space; float32 [N, D] and [M, D], see `Extractor`.

    They may be memory-mapped. Plain matrix products in float32, faiss above 10^6 references (tiles always by
    matrix products). InputError as for `best_matches`.
    """
    for name, features in (("queries", query_features), ("references", reference_features)):
        if features.ndim != 2 or not len(features) or not features.shape[1]:
            raise InputError(
                f"{name}: features {list(features.shape)} are not [N, D] with N and D at least 1; "
                f"{NOTHING_AUDITED}; give at least one image"
            )
    if query_features.shape[1] != reference_features.shape[1]:
        raise InputError(
            f"queries have {query_features.shape[1]} features, references {reference_features.shape[1]}; "
            f"{NOTHING_AUDITED}; compute both with the same extractor"
        )
    _check_count(k, len(reference_features))
    return _search(
        [query_features.__getitem__], reference_features.__getitem__,
        (len(query_features), len(reference_features)), metric, k,
    )  # fmt: skip


def pair_similarity(x: np.ndarray, y: np.ndarray, metric: Metric) -> np.ndarray:
    """Similarity of x[i] and y[i], from their differences: float32 [N] of float features [N, D]; no flips."""
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    if metric == "cosine":
        return np.einsum("nd,nd->n", _unit(x), _unit(y))
    apart = (x - y).reshape(len(x), TILES if metric == "tiles" else 1, -1)
    squared = np.einsum("ntd,ntd->nt", apart, apart).max(axis=1)
    return -squared / x.shape[1] if metric == "hamming" else -np.sqrt(squared)


def pairs_within(
    features: np.ndarray, others: np.ndarray, distance: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs (i, j), i < j, with |features[i] - others[j]| <= distance, to float32; int64 arrays, block by block.

    features, others: float [N, D], two views of the same N images (as they are, or one of them flipped).
    """
    count = len(features)
    for block in _blocks([features.__getitem__], others.__getitem__, (count, count), "euclidean", upper=True):
        left, right = np.nonzero(block.costs().cpu().numpy() <= distance**2)
        left, right = left + block.rows.start, right + block.columns.start
        ahead = left < right
        if ahead.any():
            yield left[ahead], right[ahead]


def check_image_sets(**sets: np.ndarray) -> None:
    """InputError unless each, named by its keyword, is uint8 [N, H, W, 1 or 3] with N >= 1 and all are of one shape."""
    for name, images in sets.items():
        shape = list(np.shape(images))
        if len(shape) != 4 or shape[3] not in (1, 3) or images.dtype != np.uint8:
            raise InputError(
                f"{name}: {shape} of {images.dtype} are no images; {NOTHING_AUDITED}; give uint8 [N, H, W, 1 or 3]"
            )
        if not shape[0]:
            raise InputError(f"{name}: there are no images; {NOTHING_AUDITED}; give at least one")
    if len({images.shape[1:] for images in sets.values()}) > 1:
        said = ", ".join(f"{name} {list(images.shape[1:])}" for name, images in sets.items())
        raise InputError(
            f"images of different height, width or channels ({said}) cannot be compared; {NOTHING_AUDITED}; "
            "open all at one size and number of channels"
        )


def _search(
    variants: Sequence[Rows], references: Rows, counts: tuple[int, int], metric: Metric, k: int
) -> Matches:
    """The core of both searches: block by block the least cost over variants, then the k least of all blocks."""
    least = np.full((counts[0], k), np.inf, np.float32)
    index, spread = np.zeros((counts[0], k), np.int64), 0.0
    flat = counts[1] > FOR_FAISS and metric != "tiles"
    work = counts[0] * counts[1] * len(variants) * references(slice(0, 1)).shape[1]
    with Progress("matching", counts[0], "images") if work > _SLOW else nullcontext() as progress:
        for block in _blocks(variants, references, counts, metric):
            found, where = _least_by_faiss(block, metric, k) if flat else _least(block.costs(), k)
            rows, spread = block.rows, max(spread, float(np.square(block.among).sum(axis=1).mean()))
            found = np.concatenate([least[rows], found], axis=1)
            where = np.concatenate([index[rows], where + block.columns.start], axis=1)
            kept = np.argsort(found, axis=1, kind="stable")[:, :k]
            least[rows], index[rows] = (np.take_along_axis(each, kept, axis=1) for each in (found, where))
            if progress is not None and block.columns.stop == counts[1]:
                progress.advance(rows.stop - rows.start)
    return _finished(variants, references, least, index, metric, _NEAR * spread)


def _least(costs: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    if k == 1:
        found, where = costs.min(dim=1, keepdim=True)
    else:
        found, where = costs.topk(min(k, costs.shape[1]), largest=False)
    return found.cpu().numpy(), where.cpu().numpy()


def _least_by_faiss(block: _Block, metric: Metric, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k least of each row among the k least of each variant; the others of a reference found twice cost inf."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    index: Any = faiss.IndexFlat(block.among.shape[1], kind)
    index.add(block.among)
    results = [index.search(each, min(k, len(block.among))) for each in block.queries]
    found = np.concatenate([-values if metric == "cosine" else values for values, _ in results], axis=1)
    where = np.concatenate([rows for _, rows in results], axis=1)
    order = np.lexsort((found, where), axis=1)
    found, where = (np.take_along_axis(each, order, axis=1) for each in (found, where))
    found[:, 1:][where[:, 1:] == where[:, :-1]] = np.inf
    return found, where


@dataclass(frozen=True, eq=False)
class _Block:
    """Features of some queries, one array [rows, D] for each variant, and of some references [columns, D]."""

    rows: slice
    columns: slice
    queries: list[np.ndarray]
    among: np.ndarray
    metric: Metric

    def costs(self) -> Tensor:
        """[rows, columns]: minus the cosine, or the squared distance (of the worst tile, or in bits); the least
        over the variants. One matrix product each: (-2x, |x|², 1)·(y, 1, |y|²) = |x - y|²."""
        if self.metric == "cosine":
            right = _parted(self.among, 1)[0].T
            return _extreme((_parted(each, 1)[0] @ right for each in self.queries), torch.maximum).neg_()
        parts = TILES if self.metric == "tiles" else 1
        y = _parted(self.among, parts)
        right = torch.cat([y, torch.ones_like(y[..., :1]), (y * y).sum(-1, keepdim=True)], -1).transpose(1, 2)

        def squared(query: np.ndarray) -> Tensor:
            x = _parted(query, parts)
            left = torch.cat([-2 * x, (x * x).sum(-1, keepdim=True), torch.ones_like(x[..., :1])], -1)
            return _extreme((left[part] @ right[part] for part in range(parts)), torch.maximum)

        return _extreme((squared(query) for query in self.queries), torch.minimum).clamp_(min=0)


def _extreme(matrices: Iterable[Tensor], of_two: Callable[..., Tensor]) -> Tensor:
    """Elementwise maximum or minimum, in the place of the first."""
    remaining = iter(matrices)
    result = next(remaining)
    for matrix in remaining:
        of_two(result, matrix, out=result)
    return result


def _blocks(
    variants: Sequence[Rows], references: Rows, counts: tuple[int, int], metric: Metric, upper: bool = False
) -> Iterator[_Block]:
    """All queries by all references; `upper`: only the blocks that reach above the diagonal."""
    dimension = references(slice(0, 1)).shape[1]
    high = max(1, min(_MOST_ROWS, _NUMBERS // (len(variants) * dimension)))
    wide = max(1, min(_COSTS // high, _NUMBERS // dimension))
    shift = np.zeros(dimension, np.float32)
    if metric in ("euclidean", "tiles"):  # small numbers, small rounding
        shift = _read(references, slice(0, min(wide, counts[1])), "references").mean(axis=0)
    for top in range(0, counts[0], high):
        rows = slice(top, min(top + high, counts[0]))
        queries = [_read(each, rows, "queries") - shift for each in variants]
        for left in range(top - top % wide if upper else 0, counts[1], wide):
            columns = slice(left, min(left + wide, counts[1]))
            yield _Block(rows, columns, queries, _read(references, columns, "references") - shift, metric)


def _finished(
    variants: Sequence[Rows],
    references: Rows,
    least: np.ndarray,
    index: np.ndarray,
    metric: Metric,
    small: float,
) -> Matches:
    """Similarities from costs; where a squared distance is at most `small`, from differences: its rounding is a
    large part of it."""
    if metric == "cosine":
        similarity = np.clip(-least, -1, 1)
    elif metric == "hamming":
        similarity = -np.round(least) / references(slice(0, 1)).shape[1]
    else:
        similarity = -np.sqrt(least)
        left, column = np.nonzero(least <= small)
        step = max(1, _NUMBERS // references(slice(0, 1)).shape[1])
        for start in range(0, len(left), step):
            here = left[start : start + step], column[start : start + step]
            y = references(index[here])
            each = [pair_similarity(variant(here[0]), y, metric) for variant in variants]
            similarity[here] = np.max(each, axis=0)
    similarity = similarity.astype(np.float32)
    order = np.lexsort((index, -similarity), axis=1)
    return Matches(np.take_along_axis(similarity, order, axis=1), np.take_along_axis(index, order, axis=1))


def _parted(features: np.ndarray, parts: int) -> Tensor:
    """[parts, rows, D / parts], where networks run."""
    return torch.from_numpy(features).to(device()).unflatten(1, (parts, -1)).transpose(0, 1)


def _read(rows: Rows, which: slice, name: str) -> np.ndarray:
    """float32 [rows, D], all finite, contiguous."""
    features = np.ascontiguousarray(rows(which), np.float32)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{name}: the features of image {which.start + int(np.argmin(finite)) + 1} hold NaN or infinity; "
            f"{NOTHING_AUDITED}; compute them again"
        )
    return features


def _features(images: np.ndarray, extractor: Extractor, directory: Path | None, name: str) -> np.ndarray:
    """Features of all images, from `directory` when an earlier call left them there."""
    if directory is None:
        parts: list[np.ndarray] = []
        with Progress(f"{name}: {extractor.name}", len(images), "images") as progress:
            for start in range(0, len(images), _ENCODED):
                parts.append(np.asarray(extractor(images[start : start + _ENCODED])))
                progress.advance(len(parts[-1]))
        return np.concatenate(parts)
    digest = hashlib.sha256(f"{extractor.identity} {images.shape}".encode())
    for start in range(0, len(images), _ENCODED):
        digest.update(np.ascontiguousarray(images[start : start + _ENCODED]).tobytes())
    found = cached_features(
        images, cast(Any, extractor), directory=directory, content=digest.hexdigest(), description=name
    )
    return np.asarray(found)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _check_count(k: int, references: int) -> None:
    if not 1 <= k <= references:
        raise InputError(
            f"{k} matches among {references} images; {NOTHING_AUDITED}; choose 1 to {references}, or give more images"
        )
