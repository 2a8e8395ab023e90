"""Neighbours, balls and directions of public vectors."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.retrieval.public_side import PublicSide
from tests.retrieval.frame import DIMENSION, clustered, public_side


def test_neighbours_are_the_nearest_in_order() -> None:
    public = public_side()
    direction = clustered(1, 9)[0]
    found = public.neighbours(direction, 20)
    assert found.tolist() == np.argsort(-(public.vectors @ direction), kind="stable")[:20].tolist()
    assert len(public.neighbours(direction, 10_000)) == len(public.vectors)


def test_a_ball_holds_as_many_public_vectors_as_asked_and_is_measured_from_their_mean() -> None:
    public = public_side()
    ball = public.ball(clustered(1, 9)[0], 25, np.zeros(DIMENSION))
    inside = public.vectors.astype(np.float64) @ ball.direction >= ball.threshold - 1e-9
    assert inside.sum() == 25
    np.testing.assert_allclose(ball.center, public.vectors[inside].mean(0), atol=1e-6)


def test_a_ball_moves_with_the_collection() -> None:
    public, shift = public_side(), np.random.default_rng(4).normal(size=DIMENSION)
    direction = clustered(1, 9)[0]
    still, moved = public.ball(direction, 25, np.zeros(DIMENSION)), public.ball(direction, 25, shift)
    np.testing.assert_allclose(moved.center - still.center, shift, atol=1e-9)
    inside = (public.vectors + shift) @ moved.direction >= moved.threshold - 1e-9
    assert inside.sum() == 25


def test_principal_directions_are_orthonormal_and_ordered() -> None:
    public = public_side()
    basis = public.basis(4)
    assert basis is not None and basis.shape == (DIMENSION, 4)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
    spread = np.var(public.vectors @ public.directions, axis=0)
    assert (np.diff(spread) <= 1e-6).all()
    assert public.basis(DIMENSION) is None
    share = public.directions_for(0.9)
    held = spread[:share].sum() / np.var(public.vectors, axis=0).sum()
    assert held >= 0.9 > spread[: share - 1].sum() / np.var(public.vectors, axis=0).sum()


def test_what_is_saved_is_loaded(tmp_path) -> None:
    public = public_side()
    public.save(tmp_path / "p.safetensors")
    back = PublicSide.load(tmp_path / "p.safetensors")
    np.testing.assert_allclose(back.vectors, public.vectors, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(back.vectors, axis=1), 1, atol=1e-6)
    assert back.encoder == public.encoder and np.array_equal(back.directions, public.directions)


@pytest.mark.parametrize("content", [b"", b"not a file of tensors" * 10])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content) -> None:
    path = tmp_path / "public.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"public\.safetensors is damaged.*no budget was spent"):
        PublicSide.load(path)
    with pytest.raises(InputError, match="damaged"):
        PublicSide.load(tmp_path / "none.safetensors")


def test_too_few_public_images_are_refused() -> None:
    with pytest.raises(InputError, match="--public at least 50"):
        public_side(20)
