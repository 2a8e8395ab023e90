"""The handle on private vectors: gives nothing away, keeps what is added, forgets what is deleted, survives others."""

from __future__ import annotations

import copy
import os
import pickle
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError, LedgerError
from sfumato.privacy.protected_vectors import GRID, ProtectedVectors, on_grid

D = 6


def unit_vectors(n: int, seed: int = 0, dimension: int = D) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(n, dimension))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def names(first: int, n: int) -> list[str]:
    return [f"r{i}" for i in range(first, first + n)]


def fill(private: ProtectedVectors, first: int, vectors: np.ndarray) -> None:
    mine = names(first, len(vectors))
    private.add(vectors, mine, mine)


def held(private: ProtectedVectors) -> list[list[float]]:
    """All living vectors by row, in steps."""
    with private._state.exclusive():
        private._refresh()
        return private._vectors(np.flatnonzero(private._alive)).tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index" / "protected"


@pytest.fixture
def private(folder: Path) -> ProtectedVectors:
    made = ProtectedVectors.create(folder, D)
    fill(made, 0, unit_vectors(5))
    return made


# --- what it gives away


@pytest.mark.parametrize(
    "reach",
    [
        len, iter, list, lambda p: p[0], lambda p: p[:2], lambda p: 1 in p, np.asarray, np.array, copy.copy,
        copy.deepcopy, pickle.dumps, lambda p: pickle.dumps(p, 0), lambda p: p.__getstate__(),
    ],
)  # fmt: skip
def test_it_refuses_to_be_looked_into(private, reach):
    with pytest.raises(TypeError, match="gives no access"):
        reach(private)


def test_what_it_shows_is_public(private):
    assert repr(private) == str(private) == f"ProtectedVectors(dimension={D})" and bool(private)
    assert not {name for name in vars(private) if not name.startswith("_")} - {"folder", "dimension"}


def test_only_the_owner_reads_the_files(folder, private):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in [*folder.glob("vectors-*"), folder / "state.db"]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


# --- what it holds


def test_what_was_added_is_held_in_steps_of_the_grid(folder, private):
    fill(private, 5, unit_vectors(3, 1))
    wanted = np.rint(np.concatenate([unit_vectors(5), unit_vectors(3, 1)]).astype(np.float64) * 2**22)
    assert held(private) == held(ProtectedVectors(folder, D)) == wanted.tolist()
    assert private._unit_of.tolist() == list(range(8))
    assert [(first, block.tolist()) for first, block in private._blocks(2)] == [
        (0, unit_vectors(5)[:2].tolist()), (2, unit_vectors(5)[2:4].tolist()), (4, unit_vectors(5)[4:].tolist()),
        (5, unit_vectors(3, 1)[:2].tolist()), (7, unit_vectors(3, 1)[2:].tolist()),
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 40), st.integers(0, 2**32), st.floats(-3, 3))
def test_inner_products_on_the_grid_are_exact_in_any_order(dimension, rows, seed, tilt):
    """Also of vectors that lie close to each other, where products add up most."""
    drawn = unit_vectors(rows + 2, seed, dimension) + 10**tilt * 1.37
    steps = on_grid(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    exact = [int(a) * int(b) for a, b in zip(steps[0], steps[-1], strict=True)]
    assert (steps @ steps[-1])[0] == (steps @ steps[-3:].T)[0, -1] == steps[0] @ steps[-1] == sum(exact)
    assert (steps[0] ** 2).sum() == sum(int(a) ** 2 for a in steps[0]) <= (GRID * 1.01) ** 2


WRONG = {
    "another size": unit_vectors(2, dimension=D + 1),
    "one vector": unit_vectors(2)[0],
    "none": np.zeros((0, D)),
    "zero": np.zeros((2, D)),
    "long": unit_vectors(2) * 1.01,
    "short": unit_vectors(2) * 0.99,
    "not a number": np.where(np.arange(D) == 1, np.nan, unit_vectors(2)),
    "infinite": np.where(np.arange(D) == 1, np.inf, unit_vectors(2)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_vectors_that_are_no_unit_vectors_are_refused_and_leave_nothing(folder, private, kind):
    before = sorted((p.name, p.read_bytes()) for p in folder.iterdir())
    with pytest.raises(InputError, match="no budget was spent"):
        fill(private, 5, WRONG[kind])
    assert sorted((p.name, p.read_bytes()) for p in folder.iterdir()) == before


def test_each_vector_needs_an_id_of_its_own_and_a_unit(private):
    before = held(private)
    for ids, units in (
        (["x"], ["x", "y"]), (["x", "y"], ["x"]), (["x", "x"], ["x", "y"]), (["x", "r0"], ["x", "y"]),
    ):  # fmt: skip
        with pytest.raises(InputError, match="no budget was spent"):
            private.add(unit_vectors(2), ids, units)
        assert held(private) == before
    fill(private, 5, unit_vectors(2, 3))
    assert held(private)[5:] == on_grid(unit_vectors(2, 3)).tolist()


# --- deleting


def test_a_deleted_vector_is_gone_from_the_disk_and_its_answers_with_it(folder, private):
    fill(private, 5, unit_vectors(3, 1))
    private._state.keep("k", np.ones(3))
    private.delete(["r6", "r0"])
    assert private._state.answer("k") is None
    first, second = (np.fromfile(p, np.float32).reshape(-1, D) for p in sorted(folder.glob("vectors-*")))
    assert not first[0].any() and not second[1].any()
    assert first[1:].tolist() == unit_vectors(5)[1:].tolist()
    assert second[[0, 2]].tolist() == unit_vectors(3, 1)[[0, 2]].tolist()
    assert held(private) == held(ProtectedVectors(folder, D)) and len(held(private)) == 6
    with pytest.raises(InputError, match="nothing was deleted"):
        private.delete(["r1", "r0"])
    assert len(held(private)) == 6


def test_killed_while_deleting_no_vector_is_left_and_the_same_call_again_is_enough(
    folder, private, monkeypatch
):
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(private._state), "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            private.delete(["r0"])
    assert not np.fromfile(next(folder.glob("vectors-*")), np.float32)[:D].any()
    again = ProtectedVectors(folder, D)
    again.delete(["r0"])
    assert held(again) == held(ProtectedVectors(folder, D)) == held(private) and len(held(again)) == 4


def test_whatever_is_added_and_deleted_what_is_left_is_held(folder):
    """Random sequences by two handles on one folder, in which segments lose all their records and come again."""
    for seed in range(6):
        rng, place = np.random.default_rng(seed), folder / str(seed)
        ProtectedVectors.create(place, D)
        handles = [ProtectedVectors(place, D) for _ in range(2)]
        model: dict[str, list[float]] = {}
        for step in range(14):
            private = handles[int(rng.integers(2))]
            if model and rng.random() < 0.5:
                gone = list(model)[-int(rng.integers(1, len(model) + 1)) :]
                private.delete(gone)
                for name in gone:
                    del model[name]
            else:
                vectors = unit_vectors(int(rng.integers(1, 9)), 99 * seed + step)
                mine = [f"{step}-{i}" for i in range(len(vectors))]
                private.add(vectors, mine, mine)
                model |= dict(zip(mine, on_grid(vectors).tolist(), strict=True))
            for private in (*handles, ProtectedVectors(place, D)):
                assert held(private) == list(model.values())


def test_another_handles_records_are_neither_overwritten_nor_left_behind(folder, private):
    other = ProtectedVectors(folder, D)
    fill(other, 5, unit_vectors(2, 1))
    fill(private, 7, unit_vectors(3, 2))  # whose idea of the end was older
    wanted = on_grid(np.concatenate([unit_vectors(5), unit_vectors(2, 1), unit_vectors(3, 2)])).tolist()
    assert held(private) == held(other) == wanted
    fill(other, 10, unit_vectors(2, 4))
    private.delete(["r11"])
    assert not np.fromfile(folder / f"vectors-{10:012d}.f32", np.float32).reshape(-1, D)[1].any()


def test_a_memory_map_of_files_that_were_replaced_is_not_read_again(folder, private):
    other = ProtectedVectors(folder, D)
    stale = other._segments[0][1]
    private.delete(names(0, 5))
    assert held(other) == []
    fill(private, 0, unit_vectors(1, 7))
    assert stale.shape == (5, D) and not stale.any()  # of the old file, and no bus error
    assert held(other) == on_grid(unit_vectors(1, 7)).tolist()


# --- interruptions and damage


@pytest.mark.parametrize("left", [0, 1, 4 * D - 1, 4 * D, 4 * D * 3, 4 * D * 3 + 5])
@pytest.mark.parametrize("there", [0, 5])
def test_what_an_interrupted_add_left_is_harmless(folder, left, there):
    private = ProtectedVectors.create(folder, D)
    if there:
        fill(private, 0, unit_vectors(there))
    (folder / f"vectors-{there:012d}.f32").write_bytes(os.urandom(left))
    for opened in (private, ProtectedVectors(folder, D)):
        assert len(held(opened)) == there
    fill(ProtectedVectors(folder, D), there, unit_vectors(2, 1))
    assert held(private)[there:] == on_grid(unit_vectors(2, 1)).tolist()


def test_an_add_that_dies_before_the_state_knows_of_it_adds_nothing(folder, private, monkeypatch):
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(private._state), "add", die)
        with pytest.raises(KeyboardInterrupt):
            fill(private, 5, unit_vectors(4, 1))
    assert len(held(private)) == len(held(ProtectedVectors(folder, D))) == 5
    fill(private, 5, unit_vectors(2, 2))
    assert held(private)[5:] == on_grid(unit_vectors(2, 2)).tolist()


def test_segments_that_are_lost_cut_or_too_long_are_refused(folder, private):
    fill(private, 5, unit_vectors(3, 1))
    fill(private, 8, unit_vectors(3, 2))
    for number, harm in enumerate(
        (
            lambda p: p.unlink(), lambda p: os.truncate(p, 4 * D + 1), lambda p: os.truncate(p, 4 * D),
            lambda p: p.write_bytes(p.read_bytes() + bytes(4 * D)),
        )
    ):  # fmt: skip
        for path in sorted(folder.glob("vectors-*"))[:-1]:
            whole = path.read_bytes()
            harm(path)
            with pytest.raises(LedgerError, match="nothing was released"):
                ProtectedVectors(folder, D)
            path.write_bytes(whole)
        assert len(held(ProtectedVectors(folder, D))) == 11, number
    os.truncate(sorted(folder.glob("vectors-*"))[-1], 4 * D * 2)
    with pytest.raises(LedgerError, match="nothing was released"):
        ProtectedVectors(folder, D)


# --- from images


def images(n: int, unit: str = "image") -> Any:
    pixels = np.random.default_rng(1).integers(0, 256, (n + 1, 2, 2, 3), dtype=np.uint8)[:n]
    records = [SimpleNamespace(where=f"{i}.png", group="odd" if i % 2 else "even") for i in range(n + 1)]
    source = SimpleNamespace(records=records)
    return SimpleNamespace(_images=pixels, _source=source, _rows=np.arange(1, n + 1), unit=unit)


def honest(pixels: np.ndarray) -> np.ndarray:
    """Each image by itself."""
    flat = pixels.reshape(len(pixels), -1)[:, :D].astype(np.float64) + 1
    return flat / np.sqrt(np.square(flat).sum(1, keepdims=True))


def test_images_are_encoded_in_batches_of_one_size_and_named_by_their_files(folder, capfd):
    private, shapes = ProtectedVectors.create(folder, D), []

    def encode(pixels: np.ndarray) -> np.ndarray:
        shapes.append(pixels.shape)
        return honest(pixels)

    given_images = images(70)
    private.add_images(given_images, encode)
    assert held(private) == on_grid(honest(given_images._images).astype(np.float32)).tolist()
    assert len(set(shapes)) == 1
    private.delete(["1.png", "70.png"])
    with pytest.raises(InputError, match=r"'0\.png'"):
        private.delete(["0.png"])
    assert "70" not in "".join(capfd.readouterr())  # how many there are is private


@pytest.mark.parametrize(("unit", "wanted"), [("image", [0, 1, 2, 3, 4]), ("group", [0, 1, 0, 1, 0])])
def test_units_are_what_was_declared(folder, unit, wanted):
    private = ProtectedVectors.create(folder, D)
    private.add_images(images(5, unit), honest)
    assert private._unit_of.tolist() == wanted


def last_bit(pixels: np.ndarray) -> np.ndarray:
    """What a network does whose kernels are chosen by the size of the batch, or that sums in the batch's order."""
    sums = np.add.accumulate(pixels.reshape(len(pixels), -1).astype(np.float64).sum(1))
    return honest(pixels) * (1 + 1e-6 * np.sin(sums))[:, None]


def centred(pixels: np.ndarray) -> np.ndarray:
    found = honest(pixels) - honest(pixels).mean(0) * (len(pixels) > 1)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


@pytest.mark.parametrize("encode", [honest, last_bit, centred])
def test_one_image_less_leaves_every_other_vector_as_it_is(tmp_path, encode):
    kept = []
    for number, gone in enumerate((None, 0, 3, 69)):
        private, some = ProtectedVectors.create(tmp_path / str(number), D), images(70)
        if gone is not None:
            some._images, some._rows = np.delete(some._images, gone, 0), np.delete(some._rows, gone)
        private.add_images(some, encode)
        kept.append(np.array(held(private)) if gone is None else np.insert(held(private), gone, np.nan, 0))
    for less, gone in zip(kept[1:], (0, 3, 69), strict=True):
        others = np.arange(70) != gone
        assert less[others].tolist() == kept[0][others].tolist()


def test_an_encoder_that_is_never_the_same_is_refused(folder):
    private, rng = ProtectedVectors.create(folder, D), np.random.default_rng(0)
    with pytest.raises(InputError, match="no budget was spent"):
        private.add_images(
            images(3), lambda pixels: honest(pixels) + rng.normal(size=(len(pixels), D)) * 1e-5
        )
    assert held(private) == []
