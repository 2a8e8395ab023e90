"""Best matches against plain loops for every metric; variants, blocks, faiss, copies, duplicates, cache, bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfumato.audit import matching
from sfumato.audit.matching import Matches, best_matches, nearest, pair_similarity, pairs_within
from sfumato.audit.similarity import (
    FLIPS,
    FLIPS_AND_SHIFTS,
    TILES,
    Extractor,
    FeatureExtractor,
    Variant,
    open_extractor,
)
from sfumato.data.images import OwnerArray
from sfumato.errors import InputError

FEW = {"_COSTS": 4000, "_NUMBERS": 30_000, "_MOST_ROWS": 11}


def noise(count: int, seed: int, height: int = 11, width: int = 9, channels: int = 1) -> np.ndarray:
    shape = (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def projection(metric: str = "cosine", name: str = "means") -> FeatureExtractor:
    def features(images: np.ndarray) -> np.ndarray:
        weights = np.random.default_rng(0).normal(size=(np.prod(images.shape[1:]), 20))
        return (images.reshape(len(images), -1) / 255 - 0.5) @ weights

    return FeatureExtractor(name, "0" * 64, "", metric, FLIPS, features)  # type: ignore[arg-type]


def by_loops(queries: np.ndarray, references: np.ndarray, extractor: Extractor) -> np.ndarray:
    """All similarities [N, M] in float64, the best over variants."""
    y = extractor(references)
    return np.max(
        [similarities(extractor(change(queries)), y, extractor.metric) for change in extractor.variants], 0
    )


def similarities(x: np.ndarray, y: np.ndarray, metric: str) -> np.ndarray:
    """[N, M] in float64 of features, row by row."""
    rows = []
    y = np.asarray(y, np.float64)
    for row in np.asarray(x, np.float64):
        if metric == "cosine":
            rows.append(y @ row / np.linalg.norm(y, axis=1) / np.linalg.norm(row))
        elif metric == "tiles":
            rows.append(-np.sqrt(((y - row) ** 2).reshape(len(y), TILES, -1).sum(2).max(1)))
        elif metric == "hamming":
            rows.append(-(y != row).mean(1))
        else:
            rows.append(-np.sqrt(((y - row) ** 2).sum(1)))
    return np.stack(rows)


def agrees(found: Matches, expected: np.ndarray, k: int) -> None:
    assert found.similarity.dtype == np.float32 and found.index.dtype == np.int64
    assert found.similarity.shape == found.index.shape == (len(expected), k) == (len(found), k)
    np.testing.assert_allclose(found.similarity, np.sort(expected, axis=1)[:, ::-1][:, :k], atol=2e-6)
    np.testing.assert_allclose(found.similarity, np.take_along_axis(expected, found.index, axis=1), atol=2e-6)
    assert all(len(set(row)) == k for row in found.index.tolist())
    assert (np.diff(found.similarity, axis=1) <= 0).all()


EXTRACTORS = {name: open_extractor(name) for name in ("pixels", "tiles", "phash")} | {"cosine": projection()}


@pytest.mark.parametrize("blocks", [{}, FEW], ids=["whole", "blocks"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", EXTRACTORS)
def test_best_matches_are_those_of_plain_loops(
    name: str, k: int, blocks: dict, monkeypatch: pytest.MonkeyPatch
):
    for constant, value in blocks.items():
        monkeypatch.setattr(matching, constant, value)
    queries, references = noise(23, 1), noise(57, 2)
    queries[3], queries[4] = references[50], references[51][:, ::-1]
    references[20] = references[50]  # a reference twice: two references
    extractor = EXTRACTORS[name]
    agrees(best_matches(queries, references, extractor, k=k), by_loops(queries, references, extractor), k)


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "tiles", "hamming"])
@pytest.mark.parametrize("k", [1, 4])
def test_nearest_features_are_those_of_plain_loops(metric: str, k: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(count, 48)).astype(np.float32) for count in (31, 64))
    if metric == "cosine":
        x, y = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, y))
    if metric == "hamming":
        x, y = ((each > 0).astype(np.float32) for each in (x, y))
    expected = similarities(x, y, metric)
    agrees(nearest(x, y, metric=metric, k=k), expected, k)  # type: ignore[arg-type]
    monkeypatch.setattr(matching, "FOR_FAISS", 10)
    monkeypatch.setattr(matching, "_COSTS", 500)
    agrees(nearest(x, y, metric=metric, k=k), expected, k)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pixels", "phash", "cosine"])
def test_faiss_finds_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    queries, references = noise(20, 1), noise(60, 2)
    expected = by_loops(queries, references, EXTRACTORS[name])
    used = []
    real = matching._least_by_faiss
    monkeypatch.setattr(matching, "_least_by_faiss", lambda *a: used.append(1) or real(*a))
    monkeypatch.setattr(matching, "FOR_FAISS", 59)
    monkeypatch.setattr(matching, "_COSTS", 1000)
    for k in (1, 7, 60):
        agrees(best_matches(queries, references, EXTRACTORS[name], k=k), expected, k)
    assert len(used) > 10


def test_copies_are_at_distance_0_whatever_the_rest():
    """Bright or dark, flipped or shifted, among many that are far or nearly the same."""
    rng = np.random.default_rng(0)
    for level in (0, 128, 250):
        references = np.clip(level + rng.integers(-3, 4, (100, 12, 12, 3)), 0, 255).astype(np.uint8)
        references[:50] = rng.integers(0, 256, (50, 12, 12, 3))
        for name in ("pixels", "tiles"):
            for change in (Variant(), Variant(flip=True)):
                found = best_matches(change(references), references, open_extractor(name))
                assert (found.similarity == 0).all()
                assert np.array_equal(references[found.index[:, 0]], references)


def test_a_shifted_query_is_found():
    big = noise(40, 1, 20, 20)
    references = big[:, 2:-2, 2:-2]
    queries = big[:, 1:-3, 3:-1]  # shifted by one pixel both ways, with true pixels at the edge
    found = best_matches(queries, references, open_extractor("pixels"))
    assert np.array_equal(found.index[:, 0], np.arange(40))
    unshifted = FeatureExtractor("p", "", "", "euclidean", (Variant(),), open_extractor("pixels"))
    strict = best_matches(queries, references, unshifted)
    assert found.similarity.mean() > -0.2 > -0.3 > strict.similarity.mean()


def test_no_variant_is_worse_than_without():
    assert len(FLIPS_AND_SHIFTS) == 18
    queries, references = noise(30, 1), noise(40, 2)
    alone = FeatureExtractor("p", "", "", "euclidean", (Variant(),), open_extractor("pixels"))
    most = best_matches(queries, references, open_extractor("pixels")).similarity
    assert (most >= best_matches(queries, references, alone).similarity).all()


def test_all_references_can_be_asked_for():
    queries, references = noise(5, 1), noise(9, 2)
    found = best_matches(queries, references, open_extractor("pixels"), k=9)
    assert np.array_equal(np.sort(found.index, axis=1), np.tile(np.arange(9), (5, 1)))


def test_no_block_is_larger_than_promised(monkeypatch: pytest.MonkeyPatch):
    sizes = []
    real = matching._Block.costs
    monkeypatch.setattr(matching._Block, "costs", lambda self: sizes.append(self) or real(self))
    for constant, value in FEW.items():
        monkeypatch.setattr(matching, constant, value)
    best_matches(noise(30, 1), noise(100, 2), open_extractor("tiles"))
    assert len(sizes) > 9
    for block in sizes:
        rows, dimension = block.queries[0].shape
        assert rows * len(block.among) <= 4000 and len(block.queries) * rows * dimension <= 30_000


def test_features_are_kept_and_found_again(tmp_path: Path):
    calls = []
    extractor = projection()
    counted = FeatureExtractor(
        "means", "0" * 64, "", "cosine", FLIPS, lambda x: calls.append(len(x)) or extractor.function(x)
    )
    queries, references = noise(6, 1).view(OwnerArray), noise(30, 2).view(OwnerArray)
    first = best_matches(queries, references, counted, k=2, directory=tmp_path)
    assert sum(calls) == 2 * 6 + 30
    again = best_matches(queries, references, counted, k=2, directory=tmp_path)
    assert sum(calls) == 2 * 6 + 30
    assert np.array_equal(first.index, again.index) and np.array_equal(first.similarity, again.similarity)
    plain = best_matches(queries, references, extractor, k=2)
    assert np.array_equal(first.index, plain.index)
    other = FeatureExtractor("means", "1" * 64, "", "cosine", FLIPS, extractor.function)
    best_matches(queries, references, other, directory=tmp_path)  # its features lie beside the others
    assert len(list((tmp_path / "means").iterdir())) == 6


def test_pairs_within_a_distance_are_all_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(matching, "_COSTS", 300)
    monkeypatch.setattr(matching, "_MOST_ROWS", 13)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 90, 4)).astype(np.float32)
    found = {pair for left, right in pairs_within(x, y, 1.0) for pair in zip(left, right, strict=True)}
    apart = np.linalg.norm(x[:, None] - y, axis=2)
    expected = {(i, j) for i in range(90) for j in range(i + 1, 90) if apart[i, j] <= 1}
    assert found == expected and len(expected) > 50


def test_similarities_of_pairs_by_hand():
    x, y = np.array([[3.0, 4.0]]), np.array([[0.0, 8.0]])
    assert pair_similarity(x, y, "cosine") == pytest.approx(0.8)
    assert pair_similarity(x, y, "euclidean") == pytest.approx(-5)
    assert pair_similarity(x > 3, y > 3, "hamming") == 0 and pair_similarity(x > 2, y > 2, "hamming") == -0.5
    tiles = np.zeros((1, TILES * 2))
    tiles[0, 2:6] = 3, 4, 6, 8
    assert pair_similarity(tiles, 0 * tiles, "tiles") == pytest.approx(-10)


@pytest.mark.parametrize(
    ("queries", "references", "k", "match"),
    [
        (noise(0, 1), noise(3, 1), 1, "queries: there are no images"),
        (noise(3, 1), noise(0, 1), 1, "references: there are no images"),
        (noise(3, 1), noise(3, 1, 10), 1, r"queries \[11, 9, 1\], references \[10, 9, 1\]"),
        (noise(3, 1), noise(3, 1, channels=3), 1, "different height, width or channels"),
        (noise(3, 1), noise(3, 1), 4, "4 matches among 3 images.*choose 1 to 3"),
        (noise(3, 1), noise(3, 1), 0, "0 matches among 3 images"),
        (noise(3, 1)[..., 0], noise(3, 1), 1, "are no images"),
        (noise(3, 1) / 255, noise(3, 1), 1, "of float64 are no images"),
        (noise(3, 1, channels=2), noise(3, 1, channels=2), 1, "are no images"),
    ],
)
@pytest.mark.parametrize("name", ["pixels", "cosine"])
def test_what_cannot_be_compared_is_one_line(queries, references, k, match, name):
    with pytest.raises(InputError, match=match) as caught:
        best_matches(queries, references, EXTRACTORS[name], k=k)
    assert "nothing was audited" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_features_are_one_line():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    bad = x.copy()
    bad[5, 1] = np.nan
    with pytest.raises(InputError, match="references: the features of image 6 hold NaN or infinity"):
        nearest(x, bad, metric="euclidean")
    bad[5, 1] = np.inf
    with pytest.raises(InputError, match="queries: the features of image 6 hold NaN"):
        nearest(bad, x, metric="cosine")
    with pytest.raises(InputError, match="queries have 3 features, references 2"):
        nearest(x, x[:, :2], metric="cosine")
    with pytest.raises(InputError, match="9 matches among 8 images"):
        nearest(x, x, metric="cosine", k=9)
    with pytest.raises(InputError, match=r"queries: features \[0, 3\] are not"):
        nearest(x[:0], x, metric="cosine")
    broken = FeatureExtractor(
        "broken", "", "", "euclidean", FLIPS, lambda images: np.full((len(images), 2), np.inf)
    )
    with pytest.raises(InputError, match="extractor 'broken' gives a number that is not finite"):
        best_matches(noise(3, 1), noise(3, 2), broken)
