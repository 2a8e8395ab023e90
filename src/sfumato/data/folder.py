"""Folders of image files and zip archives of one: class folders, `metadata.jsonl`, or plain files."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from sfumato.data.decoding import MAX_FILE_BYTES, UnreadableImage
from sfumato.data.records import Record, Source, bad_source, file_stamp, fingerprint, names_of, printable
from sfumato.errors import InputError

METADATA = "metadata.jsonl"
READABLE = frozenset(("png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "tif", "tiff", "bmp"))
# Picture formats that are not read: reported instead of silently left out of the collection.
OTHER_PICTURES = frozenset(
    (
        "avif",
        "dcm",
        "dds",
        "dib",
        "eps",
        "exr",
        "heic",
        "heif",
        "icns",
        "ico",
        "jp2",
        "j2k",
        "nii",
        "pbm",
        "pcx",
        "pgm",
        "pnm",
        "ppm",
        "psd",
        "svg",
        "tga",
        "xcf",
    )
)
SPLITS = frozenset(
    ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation")
)
_ACCEPTED = "put png, jpg, webp, gif, tif or bmp files into it"


@dataclass(frozen=True, repr=False)
class _Tree:
    spec: str
    kind: str
    files: list[str]  # every visible file, '/'-separated, sorted
    folders: list[str]  # visible folders at the top, sorted
    read: Callable[[str], bytes]


def open_folder(spec: str, root: Path) -> Source:
    """A folder of images; links to files are followed, links to folders too but each folder is entered once.

    With `metadata.jsonl` at the top (one JSON object a line: `file_name`, optional `label`, `group_id`,
    `caption`) only that file gives labels. Without it, each folder at the top is a label, also when it holds
    no image, and images without folders are unlabelled. Hidden files and files that are not pictures are
    ignored.
    """
    root = root.resolve()
    files, folders = _walk(spec, root)
    tree = _Tree(spec, "folder", files, folders, partial(_read_file, root))
    records, label_names = _layout(tree)
    stamps = (f"{name}|{_stamp(root / name)}" for name in files if _is_picture(name) or name == METADATA)
    return Source(
        spec, "folder", records, label_names, fingerprint(["folder", str(root), *folders, *stamps]),
        "a folder of images", root,
    )  # fmt: skip


def open_zip(spec: str, path: Path) -> Source:
    """A zip archive of such a folder, read in place: nothing is extracted to disk.

    When everything lies in one folder at the top of the archive, that folder is the collection.
    """
    try:
        archive = zipfile.ZipFile(path)
        members = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise bad_source(spec, f"is not a readable zip archive ({error})", "make the archive anew") from None
    if any(member.flag_bits & 1 for member in members):
        raise bad_source(spec, "is encrypted", "unpack it yourself and give the folder")
    by_name: dict[str, zipfile.ZipInfo] = {}
    folders: set[str] = set()
    for member in members:
        name = member.filename.rstrip("/")
        if _leaves(name):
            where = printable(member.filename)
            raise bad_source(spec, f"has a member '{where}' that points outside the archive", "make it anew")
        if _is_hidden(name):
            continue
        if member.is_dir():
            folders.add(name)
        elif name in by_name:
            raise bad_source(spec, f"holds '{printable(name)}' twice", "make the archive anew")
        else:
            by_name[name] = member
    folders.update(str(parent) for name in by_name for parent in PurePosixPath(name).parents)
    folders.discard(".")
    tops = {name.split("/")[0] for name in [*by_name, *folders]}
    if len(tops) == 1 and not tops & by_name.keys():
        prefix = tops.pop() + "/"
        by_name = {name.removeprefix(prefix): member for name, member in by_name.items()}
        folders = {name.removeprefix(prefix) for name in folders if name.startswith(prefix)}
    tree = _Tree(
        spec, "zip", sorted(by_name), sorted(name for name in folders if "/" not in name),
        lambda name: _read_member(archive, by_name[name], name),
    )  # fmt: skip
    records, label_names = _layout(tree)
    stamp = fingerprint(["zip", file_stamp(path)])
    return Source(spec, "zip", records, label_names, stamp, "a zip archive of images", path.resolve())


def _layout(tree: _Tree) -> tuple[list[Record], tuple[str, ...] | None]:
    if METADATA in tree.files:
        return _from_metadata(tree)
    for name in tree.files:
        base = name.rsplit("/", 1)[-1]
        if base == METADATA:
            inner = printable(name.rsplit("/", 1)[0])
            raise bad_source(
                tree.spec, f"has its {METADATA} in '{inner}', not at the top", "give that folder"
            )
        if base in ("metadata.csv", "metadata.parquet"):
            raise bad_source(tree.spec, f"has a {base}, which is not read", f"write it as {METADATA}")
    pictures = [name for name in tree.files if _is_picture(name)]
    if not pictures:
        raise bad_source(tree.spec, "holds no images", _ACCEPTED)
    labelled = ["/" in name for name in pictures]
    if not any(labelled):
        return [_record(tree, name) for name in pictures], None
    if not all(labelled):
        stray = printable(pictures[labelled.index(False)])
        raise bad_source(
            tree.spec, f"has images in class folders and also outside them ('{stray}')",
            "move every image into a class folder, or none",
        )  # fmt: skip
    if all(name.lower() in SPLITS for name in tree.folders):
        split = tree.folders[-1]
        raise bad_source(
            tree.spec, f"holds splits ({', '.join(tree.folders)}), not classes", f"give one, as '{split}'"
        )
    names = names_of(printable(name) for name in tree.folders)
    return [_record(tree, name, label=printable(name.split("/", 1)[0])) for name in pictures], names


def _record(
    tree: _Tree, name: str, label: str | None = None, group: str | None = None, caption: str | None = None
) -> Record:
    return Record(printable(name), label, group, caption, partial(tree.read, name))


def _from_metadata(tree: _Tree) -> tuple[list[Record], tuple[str, ...] | None]:
    present = set(tree.files)
    labels: list[str | int | None] = []
    records: list[Record] = []
    line_of: dict[str, int] = {}
    for line, row in _rows(tree):
        name = _file_name(tree, line, row)
        if name in line_of:
            raise _bad_row(tree, line, f"names '{printable(name)}' again (first in line {line_of[name]})")
        if name not in present:
            raise _bad_row(tree, line, f"names '{printable(name)}', which is not in the {tree.kind}")
        line_of[name] = line
        label = _field(tree, line, row, "label", (str, int))
        group = _field(tree, line, row, "group_id", (str, int))
        caption = _field(tree, line, row, "caption", (str,))
        if labels and (type(label) is not type(labels[0])):
            raise _bad_row(
                tree, line, "has a label of another kind than line 1 (text, integer or none for all)"
            )
        labels.append(label)
        records.append(
            _record(
                tree,
                name,
                None if label is None else str(label),
                None if group is None else str(group),
                None if caption is None else str(caption),
            )
        )
    for name in tree.files:
        if _is_picture(name) and name not in line_of:
            raise bad_source(
                tree.spec,
                f"holds '{printable(name)}', which {METADATA} does not name",
                "add its row or move it away",
            )
    if not records:
        raise bad_source(tree.spec, f"has an empty {METADATA} and no images", _ACCEPTED)
    known = [label for label in labels if label is not None]
    return records, names_of(known) if known else None


def _rows(tree: _Tree) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        content = tree.read(METADATA)
    except UnreadableImage as error:
        raise bad_source(tree.spec, f"has a {METADATA} that {error.reason}", "repair it") from None
    for line, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError):
            raise _bad_row(tree, line, "is not JSON in UTF-8") from None
        if not isinstance(row, dict):
            raise _bad_row(tree, line, "is not a JSON object")
        yield line, row


def _file_name(tree: _Tree, line: int, row: dict[str, object]) -> str:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise _bad_row(tree, line, "has no file_name")
    if _leaves(name):
        raise _bad_row(tree, line, f"names '{printable(name)}', which lies outside the {tree.kind}")
    return str(PurePosixPath(name))


def _field(
    tree: _Tree, line: int, row: dict[str, object], key: str, kinds: tuple[type, ...]
) -> str | int | None:
    value = row.get(key)
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
        return value  # type: ignore[return-value]
    raise _bad_row(
        tree,
        line,
        f"has a {key} that is not {'text or an integer' if int in kinds else 'text'}",
    )


def _bad_row(tree: _Tree, line: int, problem: str) -> InputError:
    return bad_source(tree.spec, f"{METADATA} line {line} {problem}", "correct that line")


def _is_picture(name: str) -> bool:
    extension = name.rsplit("/", 1)[-1].rpartition(".")[2].lower()
    return extension in READABLE or extension in OTHER_PICTURES


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _leaves(name: str) -> bool:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return (
        posix.is_absolute() or bool(windows.drive or windows.root) or ".." in (*posix.parts, *windows.parts)
    )


def _walk(spec: str, root: Path) -> tuple[list[str], list[str]]:
    files: list[str] = []
    folders: list[str] = []
    entered: set[str] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop(0)
        real = os.path.realpath(root / folder)
        if real in entered:
            continue
        entered.add(real)
        if folder and "/" not in folder:
            folders.append(folder)
        try:
            with os.scandir(root / folder) as entries:
                found = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            where = f"'{printable(folder)}' in it" if folder else "it"
            raise bad_source(
                spec,
                f"cannot be read: {where} cannot be listed ({error.strerror})",
                "allow reading it or move it away",
            ) from None
        for entry in found:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if _is_hidden(entry.name):
                continue
            (waiting if os.path.isdir(entry.path) else files).append(name)
    return sorted(files), sorted(folders)


def _stamp(path: Path) -> str:
    try:
        status = os.stat(path)
    except OSError as error:
        return f"unreadable {error.errno}"
    return f"{status.st_size}|{status.st_mtime_ns}"


def _read_file(root: Path, name: str) -> bytes:
    path, where = root / name, printable(name)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(where, "is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise UnreadableImage(where, f"is larger than {MAX_FILE_BYTES // 1_000_000} MB")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(where, f"cannot be opened ({error.strerror})") from None


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> bytes:
    where = printable(name)
    if member.file_size > MAX_FILE_BYTES:
        raise UnreadableImage(where, f"is larger than {MAX_FILE_BYTES // 1_000_000} MB")
    try:
        with archive.open(member) as stream:
            return stream.read(MAX_FILE_BYTES + 1)
    except MemoryError:
        raise
    except Exception:  # zipfile lets through what zlib, lzma and bz2 raise on damaged members
        raise UnreadableImage(where, "is damaged inside the archive") from None
