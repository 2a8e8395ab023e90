from __future__ import annotations

import gzip
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sfumato.data.decoding import UnreadableImage
from sfumato.data.sources import open_source
from sfumato.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
GREY = IMAGES[..., 0].copy()


def refused(spec: Path, problem: str) -> str:
    with pytest.raises(InputError, match=problem) as caught:
        source = open_source(spec)
        [record.read() for record in source.records]
    message = str(caught.value)
    assert message.count("no budget was spent") == 1
    assert "\n" not in message
    assert not isinstance(caught.value, UnreadableImage), (
        "such a file is damaged as a whole and must not be skipped"
    )
    return message


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("images", [IMAGES, GREY, IMAGES.astype(np.uint16) * 257, IMAGES.astype(">u2")])
def test_npz(save, images: np.ndarray, tmp_path: Path) -> None:
    save(tmp_path / "a.npz", images=images, labels=np.array([10, 9, 2, 2, 9, 10, 2]))
    source = open_source(tmp_path / "a.npz")
    assert source.label_names == ("2", "9", "10")
    assert [record.label for record in source.records] == ["10", "9", "2", "2", "9", "10", "2"]
    for order in (range(7), [3, 1, 6, 0]):
        for row in order:
            assert (source.records[row].read() == images[row]).all()
    assert [record.where for record in source.records[:2]] == ["image 1", "image 2"]


def test_npz_without_labels_with_text_labels_and_with_a_column_of_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=GREY)
    assert open_source(tmp_path / "a.npz").label_names is None
    np.savez(tmp_path / "b.npz", images=GREY, labels=np.array(list("bababab")))
    assert open_source(tmp_path / "b.npz").label_names == ("a", "b")
    np.savez(tmp_path / "c.npz", images=GREY, labels=np.zeros((7, 1), np.uint8))
    assert open_source(tmp_path / "c.npz").label_names == ("0",)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"x": GREY}, r"no array named 'images' \(it has x\)"),
        ({"images": GREY / 255}, "of type float64"),
        ({"images": GREY.astype(np.int32)}, "of type int32"),
        ({"images": GREY[0]}, r"of shape \['N', 4\]"),
        ({"images": np.zeros((7, 3, 28, 28), np.uint8)}, "of shape"),
        ({"images": GREY[:0]}, "holds no images"),
        ({"images": np.array([GREY[0], None], object)}, "Python objects"),
        ({"images": GREY, "labels": np.array([1, None, 2, 2, 2, 2, 2], object)}, "Python objects"),
        ({"images": GREY, "labels": np.zeros(6, int)}, "not one for each image"),
        ({"images": GREY, "labels": np.zeros((7, 2), int)}, "not one for each image"),
        ({"images": GREY, "labels": np.zeros(7)}, "not one for each image"),
        ({"images": np.asfortranarray(GREY)}, "Fortran order"),
    ],
)
def test_an_npz_of_another_kind_is_refused(
    arrays: dict[str, np.ndarray], problem: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    refused(tmp_path / "a.npz", problem)


def test_a_pickle_in_an_npz_is_never_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "a.npz", images=np.array([Trap()], object))
    refused(tmp_path / "a.npz", "never unpickled")
    assert not (tmp_path / "ran").exists()


def npy(shape: tuple[int, ...], body: bytes) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def test_an_npz_that_declares_more_than_it_holds(tmp_path: Path) -> None:
    for number, raw in enumerate(
        [npy((10**9, 28, 28), bytes(784)), npy((2, 4, 4), bytes(16)), npy((1, 4, 4), bytes(32))]
    ):
        path = tmp_path / f"{number}.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", raw)
        refused(path, "declares another size")


def test_a_damaged_npz(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=IMAGES)
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    (tmp_path / "cut.npz").write_bytes(raw[:-30])
    refused(tmp_path / "cut.npz", r"not a readable \.npz")
    (tmp_path / "text.npz").write_bytes(b"hello")
    refused(tmp_path / "text.npz", r"not a readable \.npz")
    raw[len(raw) // 2] ^= 255
    (tmp_path / "bad.npz").write_bytes(raw)
    refused(tmp_path / "bad.npz", "damaged|not a readable")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("labels_zipped", [False, True])
def test_idx_finds_its_labels_beside_it(zipped: bool, labels_zipped: bool, tmp_path: Path) -> None:
    labels = np.array([3, 1, 3, 0, 1, 1, 3], np.uint8)
    pack, pack_labels = (gzip.compress if z else bytes for z in (zipped, labels_zipped))
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * zipped)
    path.write_bytes(pack(idx(GREY)))
    (tmp_path / ("train-labels-idx1-ubyte" + ".gz" * labels_zipped)).write_bytes(pack_labels(idx(labels)))
    source = open_source(path)
    assert source.label_names == ("0", "1", "3")
    assert [record.label for record in source.records] == [str(label) for label in labels]
    for row in [*range(7), 2, 5]:
        assert (source.records[row].read() == GREY[row]).all()


def test_idx_without_labels(tmp_path: Path) -> None:
    (tmp_path / "pictures.idx").write_bytes(idx(IMAGES))
    source = open_source(tmp_path / "pictures.idx")
    assert source.label_names is None
    assert (source.records[3].read() == IMAGES[3]).all()


def test_bad_idx_files(tmp_path: Path) -> None:
    whole = idx(GREY)
    for name, raw, problem in [
        ("cut", whole[:-1], "declares another size"),
        ("more", whole + b"x", "declares another size"),
        ("header", whole[:7], "no idx file"),
        ("empty.idx", b"", "no idx file"),
        ("floats", whole[:2] + b"\x0d" + whole[3:], "no idx file"),
        ("flat", idx(GREY.ravel()), "images of shape"),
        ("none", idx(GREY[:0]), "holds no images"),
        ("cut.gz", gzip.compress(whole)[:-20], "cut short|damaged"),
        ("short.gz", gzip.compress(whole[:-3]), "cut short at image 7"),
        (
            "huge.gz",
            gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 1000, 1000)),
            "declares another size",
        ),
        ("text.gz", gzip.compress(b"hello"), "no idx file"),
    ]:
        (tmp_path / name).write_bytes(raw)
        refused(tmp_path / name, problem)


def test_idx_with_another_number_of_labels(tmp_path: Path) -> None:
    (tmp_path / "a-images-idx3-ubyte").write_bytes(idx(GREY))
    (tmp_path / "a-labels-idx1-ubyte").write_bytes(idx(np.zeros(6, np.uint8)))
    message = refused(
        tmp_path / "a-images-idx3-ubyte", "has not as many images as 'a-labels-idx1-ubyte' has labels"
    )
    assert "6" not in message.replace(str(tmp_path), "")
    assert "7" not in message.replace(str(tmp_path), "")


def test_a_million_records_cost_no_million_objects(tmp_path: Path) -> None:
    (tmp_path / "many.idx").write_bytes(idx(np.zeros((1_000_000, 1, 2), np.uint8)))
    tracemalloc.start()
    source = open_source(tmp_path / "many.idx")
    assert len(source.records) == 1_000_000
    source.records[999_999].read()
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_the_fingerprint_follows_the_labels_too(tmp_path: Path) -> None:
    (tmp_path / "a-images-idx3-ubyte").write_bytes(idx(GREY))
    before = open_source(tmp_path / "a-images-idx3-ubyte").fingerprint
    (tmp_path / "a-labels-idx1-ubyte").write_bytes(idx(np.zeros(7, np.uint8)))
    assert open_source(tmp_path / "a-images-idx3-ubyte").fingerprint != before
