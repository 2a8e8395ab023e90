from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.data.images import OwnerImages, OwnerOnly, ProtectedImages
from sfumato.data.release import InternalWriter, ReleaseWriter, refuse_private
from sfumato.data.sources import open_source
from sfumato.errors import InputError

PICTURES = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(12) % 4
NAMES = ["T-shirt/top", "test", "cat", "9"]


@pytest.fixture
def loads(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], object]:
    """Load an imagefolder with `datasets`, offline, in a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    place = tmp_path_factory.mktemp("hf")
    return lambda folder: datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(place))


def released(out: Path, **options: object) -> Path:
    writer = ReleaseWriter(out)
    settings: dict = {"images": PICTURES, "labels": LABELS, "label_names": NAMES, **options}
    writer.images(**settings)
    return writer.complete()


def test_images_load_as_an_imagefolder_with_labels(tmp_path: Path, loads) -> None:
    table = loads(released(tmp_path / "run") / "images")
    assert list(table) == ["train"], "a label named 'test' must not become a split"
    assert sorted(table["train"].features) == ["image", "label"]
    found = sorted((row["label"], np.asarray(row["image"]).tobytes()) for row in table["train"])
    assert found == sorted(
        (NAMES[label], picture.tobytes()) for label, picture in zip(LABELS, PICTURES, strict=True)
    )


def test_unlabelled_grey_images_load_too(tmp_path: Path, loads) -> None:
    folder = released(tmp_path / "run", images=PICTURES[..., :1], labels=None) / "images"
    assert sorted(path.name for path in folder.iterdir())[:2] == ["000001.png", "000002.png"]
    table = loads(folder)["train"]
    assert list(table.features) == ["image"]
    assert sorted(np.asarray(row["image"]).tobytes() for row in table) == sorted(
        p[..., 0].tobytes() for p in PICTURES
    )


def test_a_release_can_be_opened_as_a_source(tmp_path: Path) -> None:
    source = open_source(released(tmp_path / "run") / "images")
    assert source.label_names == tuple(sorted(NAMES))
    assert [record.label for record in source.records] == [NAMES[label] for label in LABELS]
    with pytest.raises(InputError, match=r"has its metadata\.jsonl in 'images'.*give that folder"):
        open_source(tmp_path / "run" / "release")


def test_names_and_files_carry_nothing_but_pixels(tmp_path: Path) -> None:
    folder = released(tmp_path / "run") / "images"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert files == sorted(
        f"{['T-shirt_top', 'label_0001', 'cat', '9'][n % 4]}/{n + 1:06d}.png" for n in range(12)
    )
    for path in folder.rglob("*.png"):
        raw = path.read_bytes()
        kinds, place = [], 8
        while place < len(raw):
            length = int.from_bytes(raw[place : place + 4], "big")
            kinds.append(raw[place + 4 : place + 8])
            place += 12 + length
        assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}
        assert Image.open(path).info == {}


@pytest.mark.parametrize(
    "name", ["..", ".", "", "/", "a/../..", "_x", ".hidden", "con\0", "train", "my test 1", "é" * 300]
)
def test_no_label_leaves_its_folder(name: str, tmp_path: Path, loads) -> None:
    folder = released(tmp_path / "run", labels=np.zeros(12, int), label_names=[name]) / "images"
    assert {path.parent.parent for path in folder.rglob("*.png")} == {folder}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert set(loads(folder)["train"]["label"]) == {name}


def test_labels_that_differ_only_in_what_a_folder_cannot_show(tmp_path: Path) -> None:
    folder = released(tmp_path / "run", label_names=["a/b", "a:b", "Cat", "cat"]) / "images"
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 4
    assert len(list(folder.rglob("*.png"))) == 12


def test_wrong_images_are_refused(tmp_path: Path) -> None:
    writer = ReleaseWriter(tmp_path)
    for images, labels in [
        (PICTURES / 255, LABELS),
        (PICTURES[0], None),
        (PICTURES[..., :2], None),
        (PICTURES, LABELS[:3]),
        (PICTURES, LABELS + 1),
        (PICTURES, LABELS - 1),
    ]:
        with pytest.raises(ValueError):
            writer.images(images, labels, NAMES)


def test_nothing_is_there_until_complete_and_then_everything(tmp_path: Path) -> None:
    writer = ReleaseWriter(tmp_path / "run")
    writer.images(PICTURES, None, ())
    writer.json("privacy.json", {"epsilon": np.float64(8), "counts": np.arange(2), "name": "Zoë"})
    writer.text("README.md", "a card\n")
    (writer.directory("model") / "config.json").write_text("{}")
    assert not (tmp_path / "run/release").exists()
    final = writer.complete()
    assert final == tmp_path / "run/release"
    assert sorted(path.name for path in final.iterdir()) == ["README.md", "images", "model", "privacy.json"]
    assert json.loads((final / "privacy.json").read_text("utf-8")) == {
        "epsilon": 8.0,
        "counts": [0, 1],
        "name": "Zoë",
    }
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["release"]


def test_an_earlier_release_stays_until_the_next_is_complete(tmp_path: Path) -> None:
    ReleaseWriter(tmp_path).text("old.txt", "old")
    writer = ReleaseWriter(tmp_path)
    assert list((tmp_path / "release.partial").iterdir()) == [], "what was half-written is gone"
    writer.text("first.txt", "1")
    writer.complete()
    again = ReleaseWriter(tmp_path)
    again.text("second.txt", "2")
    assert [path.name for path in (tmp_path / "release").iterdir()] == ["first.txt"]
    again.complete()
    assert [path.name for path in (tmp_path / "release").iterdir()] == ["second.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


@pytest.mark.parametrize("killed_at", [1, 2])
def test_killed_while_replacing_one_release_is_whole(killed_at: int, tmp_path: Path, monkeypatch) -> None:
    first = ReleaseWriter(tmp_path)
    first.text("a.txt", "first")
    first.complete()
    second = ReleaseWriter(tmp_path)
    second.text("a.txt", "second")
    rename, calls = os.rename, []

    def die(*paths: object) -> None:
        calls.append(paths)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        rename(*paths)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", die)
        second.complete()
    ReleaseWriter(tmp_path)
    assert (tmp_path / "release/a.txt").read_text() == "first"


def fail(code: int) -> Callable[..., None]:
    def failing(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return failing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("where", ["write_bytes", "write_text", "mkdir", "rename"])
def test_a_full_disk_loses_nothing(code: int, where: str, tmp_path: Path, monkeypatch) -> None:
    first = ReleaseWriter(tmp_path)
    first.text("a.txt", "first")
    first.complete()
    writer = ReleaseWriter(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(InputError) as caught:
        patch.setattr(os if where == "rename" else Path, where, fail(code))
        writer.images(PICTURES, LABELS, NAMES)
        writer.complete()
    message = str(caught.value)
    assert ("the disk is full" in message) == (code != errno.EACCES)
    assert "spends no budget" in message
    assert "run the command again" in message
    assert "\n" not in message
    assert (tmp_path / "release/a.txt").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


@dataclass
class Facts:
    numbers: list[object]


class Plain:
    def __init__(self, value: object) -> None:
        self.value = value


def nests(value: object) -> list[object]:
    array = np.empty(2, object)
    array[1] = value
    return [
        value,
        [1, value],
        (value,),
        {"a": {"b": [value]}},
        Facts([value]),
        Plain(Facts([value])),
        {"x": Plain([value])},
        array,
    ]


def test_what_is_for_the_owner_is_found_wherever_it_hides(make_folder, tmp_path: Path) -> None:
    root = make_folder({"a.png": 1, "b.png": 2})
    owner = OwnerImages(root, size=4, channels=1)
    protected = ProtectedImages(root, ledger=None, size=4, channels=1)
    writer = ReleaseWriter(tmp_path / "run")
    for secret in (owner, OwnerOnly(0.93), protected, protected.skipped, owner.images.mean(axis=0)):
        for hidden in nests(secret):
            with pytest.raises(InputError, match="without a guarantee; nothing was released"):
                writer.json("a.json", hidden)
            with pytest.raises(InputError, match="without a guarantee"):
                refuse_private(hidden, "x")
    for pictures in (owner.images, owner.images[:1], np.asarray(owner.images), owner.images[::-1] // 2):
        with pytest.raises(InputError, match="'images' holds OwnerArray"):
            writer.images(pictures, None, ())
    with pytest.raises(InputError):
        writer.text("a.md", OwnerOnly("text"))  # type: ignore[arg-type]
    writer.json("a.json", {"fine": [1, "a", None, 2.5]})
    assert [path.name for path in writer.complete().iterdir()] == ["a.json"]


def test_a_structure_that_holds_itself_ends() -> None:
    loop: list[object] = []
    loop.append(loop)
    refuse_private(loop, "x")


@pytest.mark.parametrize(
    "name", ["internal/a.json", "../a.json", "a/../../b", "/tmp/a.json", "", "model/internal/x"]
)
def test_names_that_lead_elsewhere(name: str, tmp_path: Path) -> None:
    writer = ReleaseWriter(tmp_path / "run")
    for write in (
        lambda: writer.json(name, 1),
        lambda: writer.text(name, "x"),
        lambda: writer.directory(name),
    ):
        with pytest.raises(InputError):
            write()
    with pytest.raises(InputError, match="not for release"):
        ReleaseWriter(tmp_path / "run" / "internal")


@pytest.mark.parametrize("bad", ["weights.pt", "internal/log.txt", "link", "a.PKL", "pixels.npy"])
def test_what_others_put_into_a_folder_is_looked_through(bad: str, tmp_path: Path) -> None:
    writer = ReleaseWriter(tmp_path / "run")
    place = writer.directory("model") / bad
    place.parent.mkdir(exist_ok=True)
    if bad == "link":
        place.symlink_to(tmp_path)
    else:
        place.write_text("x")
    with pytest.raises(InputError, match="nothing was released"):
        writer.complete()
    assert list((tmp_path / "run").iterdir()) == []


def test_internal_files_say_so(tmp_path: Path, monkeypatch) -> None:
    writer = InternalWriter(tmp_path / "run")
    one = writer.json(
        "evaluation/accuracy.json", {"accuracy": OwnerOnly(np.float32(0.5)), "not_for_release": False}
    )
    two = writer.json("list.json", OwnerOnly([1, 2]))
    three = writer.text("report.html", OwnerOnly("<html></html>"))
    assert json.loads(one.read_text()) == {"not_for_release": True, "accuracy": 0.5}
    assert json.loads(two.read_text()) == {"not_for_release": True, "value": [1, 2]}
    assert three.read_text().startswith("<!-- not for release -->\n<html>")
    assert writer.text("log.txt", "x").read_text() == "not for release\nx"
    assert (writer.directory("audit") / "..").resolve() == (tmp_path / "run/internal").resolve()
    assert all(path.is_relative_to(tmp_path / "run/internal") for path in (one, two, three))
    assert (tmp_path / "run/internal/NOT_FOR_RELEASE.txt").exists()
    for name in ("../release/a.json", "/tmp/a", ""):
        with pytest.raises(InputError):
            writer.json(name, 1)
    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    with pytest.raises(InputError, match="the disk is full"):
        writer.json("list.json", [3])
    assert json.loads(two.read_text())["value"] == [1, 2], "what was there is unharmed"
    assert not list((tmp_path / "run/internal").glob("*.partial"))
