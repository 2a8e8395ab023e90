"""Where results are written: `release/` is safe to hand to anybody, `internal/` is not."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from sfumato.data.cache import sync_directory
from sfumato.data.files import write_whole
from sfumato.data.images import OwnerArray, OwnerOnly, ProtectedImages
from sfumato.errors import InputError
from sfumato.progress import Progress

NOT_FOR_RELEASE = "not for release"
_PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".npy")
# `datasets` takes such words in a folder's name for a split, and ignores names that start with . or _.
_SPLIT_WORD = re.compile(
    r"(^|[-._ 0-9])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)($|[-._ 0-9])", re.I
)


class ReleaseWriter:
    """Writes `out/release` so that it is either complete or not there.

    Everything goes to `out/release.partial` first, and `complete()` puts it in place of an earlier release.
    What was made for the owner's eyes only, and the protected handle itself, are refused with `InputError`
    wherever they hide in what is given. A full disk ends in `InputError`, the partial folder is removed, and
    an earlier release stays as it is.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        if "internal" in self.out.parts[-1:]:
            raise InputError(
                f"a release cannot be written under '{self.out}': it is {NOT_FOR_RELEASE}; give another --out"
            )
        self.final = self.out / "release"
        self._partial = self.out / "release.partial"
        self._replaced = self.out / "release.replaced"
        with self._writing():
            self.out.mkdir(parents=True, exist_ok=True)
            # Killed between the two renames of complete(): the earlier release goes back.
            if self._replaced.exists() and not self.final.exists():
                os.rename(self._replaced, self.final)
            for leftover in (self._replaced, self._partial):
                shutil.rmtree(leftover, ignore_errors=True)
            self._partial.mkdir()

    def images(
        self, images: np.ndarray, labels: Sequence[int] | np.ndarray | None, label_names: Sequence[str]
    ) -> None:
        """Write images (uint8 [N, H, W, 1|3]) as PNG under `images/`, with `images/metadata.jsonl`.

        labels: index into label_names for each image, or None; with labels there is one folder for each.
        Names are running numbers; the files carry pixels and nothing else. Loads with
        `datasets.load_dataset("imagefolder", data_dir=".../images")`, labels in the column "label".
        """
        refuse_private([images, labels, label_names], "images")
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(f"images must be uint8 [N, H, W, 1 or 3], not {images.dtype} {images.shape}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels for {len(images)} images")
        folders = folder_names(label_names) if labels is not None else [""]
        digits = max(6, len(str(len(images))))
        with self._writing(), Progress("writing images", total=len(images), unit="images") as progress:
            for folder in folders:
                (self._partial / "images" / folder).mkdir(parents=True, exist_ok=True)
            rows = []
            for number, pixels in enumerate(images):
                row: dict[str, str] = {"file_name": f"{number + 1:0{digits}d}.png"}
                if labels is not None:
                    label = int(labels[number])
                    if not 0 <= label < len(label_names):
                        raise ValueError(f"label {label} has no name")
                    row = {
                        "file_name": f"{folders[label]}/{row['file_name']}",
                        "label": str(label_names[label]),
                    }
                raw = io.BytesIO()
                Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(raw, "PNG")
                (self._partial / "images" / row["file_name"]).write_bytes(raw.getvalue())
                rows.append(json.dumps(row, ensure_ascii=False))
                progress.advance()
            (self._partial / "images" / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    def json(self, name: str, obj: Any) -> None:
        """Write `obj` as JSON (no NaN; numpy numbers and arrays as plain ones) to the file `name`."""
        refuse_private(obj, name)
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
        with self._writing():
            self._place(name).write_text(text, encoding="utf-8")

    def text(self, name: str, text: str) -> None:
        """Write a text to the file `name`."""
        refuse_private(text, name)
        with self._writing():
            self._place(name).write_text(text, encoding="utf-8")

    def file(self, name: str) -> Path:
        """Where somebody else may write a file (a token), in the release's folder or one that is made here."""
        with self._writing():
            return self._place(name)

    def directory(self, name: str) -> Path:
        """Make a folder for somebody else to write into (a model); looked through again by `complete()`."""
        with self._writing():
            place = self._place(name)
            place.mkdir(exist_ok=True)
        return place

    def complete(self) -> Path:
        """Put the release in place, in one step where there was none before, and return its path.

        An earlier release is moved aside and deleted only when the new one stands; whatever the moment of a
        crash, one of the two is whole, and the next `ReleaseWriter` puts it where it belongs.
        """
        for path in self._partial.rglob("*"):
            inside = path.relative_to(self._partial)
            if path.is_symlink() or "internal" in inside.parts or path.suffix.lower() in _PICKLED:
                self.abandon()
                raise InputError(
                    f"'{inside}' may not be in a release (a link, a pickle or something internal); "
                    "nothing was released; remove what writes it and run the command again"
                )
        with self._writing():
            if hasattr(os, "sync"):
                os.sync()  # one call: syncing ten thousand small files one by one takes minutes
            if self.final.exists():
                os.rename(self.final, self._replaced)
            try:
                os.rename(self._partial, self.final)
            except OSError:
                if self._replaced.exists():
                    os.rename(self._replaced, self.final)
                raise
            sync_directory(self.out)
        shutil.rmtree(self._replaced, ignore_errors=True)
        return self.final

    def abandon(self) -> None:
        """Remove what was written so far; an earlier release stays."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _place(self, name: str) -> Path:
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts or "internal" in path.parts or not path.parts:
            raise InputError(
                f"'{name}' may not be in a release: it is {NOT_FOR_RELEASE}; nothing was released"
            )
        place = self._partial / path
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abandon()
            raise _cannot_write(self.out, "the release", error) from None


class InternalWriter:
    """Writes under `out/internal` what only the owner may see; every file says so."""

    def __init__(self, out: str | Path) -> None:
        self.path = Path(out) / "internal"
        self._write("NOT_FOR_RELEASE.txt", "This folder was made from private images without a guarantee.\n")

    def json(self, name: str, obj: Any) -> Path:
        """Write an object (also one wrapped in `OwnerOnly`) as JSON with "not_for_release": true."""
        content = _unwrapped(obj)
        content = content if isinstance(content, dict) else {"value": content}
        text = json.dumps(
            {"not_for_release": True, **content} | {"not_for_release": True},
            indent=2,
            ensure_ascii=False,
            default=_plain,
        )
        return self._write(name, text + "\n")

    def text(self, name: str, text: str | OwnerOnly[str]) -> Path:
        """Write a text (also one wrapped in `OwnerOnly`) below a line that says it is not for release."""
        mark = f"<!-- {NOT_FOR_RELEASE} -->" if PurePath(name).suffix in (".html", ".md") else NOT_FOR_RELEASE
        return self._write(name, f"{mark}\n{_unwrapped(text)}")

    def directory(self, name: str) -> Path:
        """Make a folder under `internal/`."""
        place = self._place(name)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(self.path, "internal results", error) from None
        return place

    def _place(self, name: str) -> Path:
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise InputError(f"'{name}' is not a name under '{self.path}'; give a plain file name")
        return self.path / path

    def _write(self, name: str, text: str) -> Path:
        place = self._place(name)
        try:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(place, text.encode())
        except OSError as error:
            raise _cannot_write(self.path, "internal results", error) from None
        return place


def refuse_private(value: Any, name: str) -> None:
    """Raise `InputError` when `value` is, or holds at any depth, what only the owner may see.

    Looked through: containers, dataclasses, attributes of objects, what arrays are views of."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if item is None or isinstance(item, (str, bytes, int, float, Path)) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (ProtectedImages, OwnerArray)) or getattr(item, "for_owner_only", False) is True:
            raise InputError(
                f"'{name}' holds {type(item).__name__}, made from private images without a guarantee; "
                "nothing was released; write it with InternalWriter"
            )
        if isinstance(item, Mapping):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, np.ndarray):
            waiting += [item.base] if item.dtype != object else [item.base, *item.ravel().tolist()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += item
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            waiting += [getattr(item, field.name) for field in dataclasses.fields(item)]
        elif hasattr(item, "__dict__") and not isinstance(item, type) and not callable(item):
            waiting += vars(item).values()


def folder_names(label_names: Sequence[str]) -> list[str]:
    """A folder for each label: its own name where every system and `datasets` allow it, else a number."""
    plain = [re.sub(r"[^\w .+-]", "_", str(name), flags=re.ASCII).strip(" .")[:80] for name in label_names]
    lowered = [name.lower() for name in plain]
    return [
        f"label_{number:04d}"
        if not name or name.startswith("_") or _SPLIT_WORD.search(name) or lowered.count(name.lower()) > 1
        else name
        for number, name in enumerate(plain)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _unwrapped(value: Any) -> Any:
    if isinstance(value, OwnerOnly):
        return _unwrapped(value.value)
    if isinstance(value, Mapping):
        return {key: _unwrapped(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_unwrapped(inner) for inner in value]
    return value


def _cannot_write(out: Path, what: str, error: OSError) -> InputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    problem = "the disk is full" if full else str(error.strerror or error)
    return InputError(
        f"{what} cannot be written under '{out}': {problem}; writing spends no budget and what was there "
        f"before is unharmed; {'free some space' if full else 'allow writing'} and run the command again"
    )
