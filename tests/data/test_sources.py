from __future__ import annotations

import gzip
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sfumato.data import glyphs
from sfumato.data.digits import load_digits
from sfumato.data.sources import FASHION_LABELS, FASHION_MNIST, default_holdout, open_source
from sfumato.errors import InputError


def test_demo_digits() -> None:
    fit, held = open_source("demo:digits"), open_source("demo:digits-holdout")
    assert (len(fit.records), len(held.records)) == (4000, 1000)
    assert fit.label_names == held.label_names == tuple("0123456789")
    assert fit.fingerprint != held.fingerprint
    assert fit.fingerprint == open_source("demo:digits").fingerprint
    images, labels = load_digits()
    assert (fit.records[3999].read() == images[3999]).all()
    assert [record.label for record in fit.records] == [str(label) for label in labels]


def test_demo_glyphs_are_drawn_when_first_read(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, int]] = []

    def draw(**options: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        drawn.append(options)
        count = len(glyphs.class_names()) * options["per_class"]
        return (
            np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(28, 1).repeat(28, 2),
            np.array([]),
            (),
        )

    monkeypatch.setattr(glyphs, "PER_CLASS", 2)
    monkeypatch.setattr(glyphs, "render_glyphs", draw)
    source = open_source("demo:glyphs")
    assert source.label_names == glyphs.class_names()
    assert [record.label for record in source.records[:4]] == ["0", "0", "1", "1"]
    assert len(source.records) == 2 * len(glyphs.class_names())
    assert drawn == []
    assert [int(np.ravel(record.read())[0]) for record in source.records[3:5]] == [3, 4]
    assert drawn == [{"size": 28, "per_class": 2, "seed": 0}]


def fashion(folder: Path) -> None:
    folder.mkdir()
    for stem, count in (("train", 12), ("t10k", 5)):
        images = struct.pack(">BBBB3I", 0, 0, 8, 3, count, 28, 28) + bytes(count * 784)
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, count) + bytes(n % 10 for n in range(count))
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def test_fashion_mnist_from_a_folder(tmp_path: Path) -> None:
    fashion(tmp_path / "fm")
    train, test = (
        open_source(f"{name}:{tmp_path / 'fm'}") for name in ("fashion-mnist", "fashion-mnist-test")
    )
    assert (len(train.records), len(test.records)) == (12, 5)
    assert train.label_names == test.label_names == FASHION_LABELS
    assert train.records[9].label == "Ankle boot"
    with pytest.raises(
        InputError, match=r"apt install dataset-fashion-mnist, or give its folder as fashion-mnist:PATH"
    ):
        open_source(f"fashion-mnist:{tmp_path}")


@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="the Debian package is not installed")
def test_fashion_mnist_from_its_package() -> None:
    assert len(open_source("fashion-mnist").records) == 60_000
    assert len(open_source("fashion-mnist-test").records) == 10_000


def test_default_holdouts() -> None:
    assert default_holdout("demo:digits") == "demo:digits-holdout"
    assert default_holdout("fashion-mnist") == "fashion-mnist-test"
    assert default_holdout("fashion-mnist:/x:y") == "fashion-mnist-test:/x:y"
    for other in ("demo:digits-holdout", "demo:glyphs", "fashion-mnist-test", "photos", Path("demo")):
        assert default_holdout(other) is None


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("demo:digit", "did you mean demo:digits"),
        ("fashion_mnist", "did you mean fashion-mnist"),
        ("no such folder", "give a folder of images"),
        ("", "give a folder|holds no images"),
        ("demo:", "give a folder|did you"),
        ("/dev/null", "neither a folder nor a regular file"),
        ("a\0b", "does not exist|cannot be opened"),
        ("x" * 5000, "cannot be opened"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is_accepted(
    spec: str, hint: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=hint) as caught:
        open_source(spec)
    assert str(caught.value).count("no budget was spent") == 1
    assert "\n" not in str(caught.value)


def test_files_are_known_by_content(tmp_path: Path, png: Callable[..., bytes]) -> None:
    (tmp_path / "one.png").write_bytes(png(1))
    (tmp_path / "text.csv").write_text("a,b")
    for name in ("one.png", "text.csv"):
        with pytest.raises(InputError, match="holds no collection of images"):
            open_source(tmp_path / name)
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 3), np.uint8))
    assert open_source(str(tmp_path / "a.npz")).kind == "npz"


def write_collections(folder: Path, png: Callable[..., bytes]) -> list[Path]:
    images = np.arange(96, dtype=np.uint8).reshape(6, 4, 4)
    np.savez_compressed(folder / "a.npz", images=images, labels=np.arange(6))
    np.savez(folder / "b.npz", images=images)
    raw = struct.pack(">BBBB3I", 0, 0, 8, 3, 6, 4, 4) + images.tobytes()
    (folder / "c.idx").write_bytes(raw)
    (folder / "d.gz").write_bytes(gzip.compress(raw))
    with zipfile.ZipFile(folder / "e.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/1.png", png(1))
        archive.writestr("dog/2.png", png(2))
    cells = pa.array([{"bytes": png(value), "path": None} for value in range(6)])
    pq.write_table(pa.table({"image": cells, "label": list(range(6))}), folder / "f.parquet")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("which", range(6))
def test_damage_anywhere_ends_in_one_line(which: int, tmp_path: Path, png: Callable[..., bytes]) -> None:
    path = write_collections(tmp_path, png)[which]
    whole = path.read_bytes()
    rng = np.random.default_rng(which)
    refusals = 0
    for _ in range(150):
        raw = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, len(raw), size=rng.integers(1, 5)):
            raw[place] = rng.integers(256)
        path.write_bytes(raw)
        try:
            for record in open_source(path).records[:50]:
                record.read()
        except InputError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 10


def test_opening_images_imports_nothing_heavy() -> None:
    code = (
        "import sys, sfumato.data.images, sfumato.data.release; "
        "heavy = {'torch', 'pyarrow', 'datasets', 'scipy', 'matplotlib', 'pandas'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
