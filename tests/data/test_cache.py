from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sfumato.data import cache
from sfumato.data.cache import Cached, cached_pixels, default_cache_directory
from sfumato.data.records import LazyRecords, Record, Source
from sfumato.data.sources import open_source
from sfumato.errors import InputError


def cached(spec: object, directory: Path, **options: object) -> Cached:
    settings: dict = {"size": (4, 4), "channels": 1, **options}
    return cached_pixels(open_source(spec), directory=directory, **settings)  # type: ignore[arg-type]


def values(found: Cached) -> list[int]:
    assert (found.images == found.images[:, :1, :1]).all()
    return found.images[:, 0, 0, 0].tolist()


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    original = cache._decode
    monkeypatch.setattr(
        cache, "_decode", lambda r, raw, shape: (seen.append(r.where), original(r, raw, shape))[1]
    )
    return seen


def test_everything_a_source_says_is_kept(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {"file_name": "c.png", "label": "x", "group_id": "p", "caption": "sea"},
        {"file_name": "a.png", "label": "y", "group_id": "q"},
        {"file_name": "b.png", "label": "x", "group_id": "p"},
        {"file_name": "d.png", "label": "x"},
    ]
    root = make_folder({"a.png": 1, "b.png": 2, "c.png": 3, "d.png": 4}, rows)
    for _ in range(2):
        found = cached(root, tmp_path / "cache")
        assert isinstance(found.images, np.memmap)
        assert (found.images.dtype, found.images.shape) == (np.uint8, (4, 4, 4, 1))
        assert not found.images.flags.writeable
        assert values(found) == [3, 1, 2, 4]
        assert found.labels.tolist() == [0, 1, 0, 0]
        assert found.labels.dtype == found.groups.dtype == np.int64
        assert found.label_names == ("x", "y")
        assert found.groups.tolist() == [0, 1, 0, -1]
        assert found.captions == ["sea", "", "", ""]
        assert found.skipped == []


def test_unlabelled(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    found = cached(make_folder({"a.png": 1, "b.png": 2}), tmp_path / "cache")
    assert (found.labels.tolist(), found.label_names, found.groups.tolist(), found.captions) == (
        [-1, -1],
        None,
        [-1, -1],
        None,
    )


def test_decoded_once_until_something_changes(make_folder, png, tmp_path: Path, monkeypatch) -> None:
    seen = count_decoding(monkeypatch)
    root = make_folder({"a.png": 1, "b.png": 2})
    for _ in range(3):
        assert values(cached(root, tmp_path / "cache")) == [1, 2]
    assert len(seen) == 2
    assert cached(root, tmp_path / "cache", size=(2, 3), channels=3).images.shape == (2, 2, 3, 3)
    assert len(seen) == 4
    (root / "b.png").write_bytes(png(7))
    os.utime(root / "b.png", ns=(1, 1))
    assert values(cached(root, tmp_path / "cache")) == [1, 7]
    (root / "a.png").unlink()
    assert values(cached(root, tmp_path / "cache")) == [7]


def test_only_its_owner_may_look(make_folder: Callable[..., Path], own_cache: Path) -> None:
    assert default_cache_directory() == own_cache
    cached(make_folder({"a.png": 1}), own_cache)
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in own_cache.iterdir())


def test_an_unreadable_image_stops_and_says_how_to_go_on(make_folder, png, tmp_path: Path) -> None:
    root = make_folder({"a.png": 1, "cat of jane/b.png": 0}, name="p")
    (root / "a.png").rename(root / "cat of jane" / "a.png")
    for content, problem in [
        (b"", "is empty (0 bytes)"),
        (b"hello", "is not an image"),
        (png(1, 64)[:60], "is damaged or cut short"),
    ]:
        (root / "cat of jane" / "b.png").write_bytes(content)
        with pytest.raises(InputError) as caught:
            cached(root, tmp_path / "cache")
        message = str(caught.value)
        assert message.startswith(f"'cat of jane/b.png' {problem}")
        assert "no budget was spent" in message
        assert "--skip-unreadable" in message
        assert "\n" not in message
        assert list((tmp_path / "cache").iterdir()) == [], "nothing half-done stays"


def test_skipping_lists_what_was_left_out(make_folder, png, tmp_path: Path, monkeypatch) -> None:
    root = make_folder({"a.png": 1, "b.png": b"", "c.png": 3, "d.png": b"x"})
    found = cached(root, tmp_path / "cache", skip_unreadable=True)
    assert values(found) == [1, 3]
    assert [line.split(" ")[0] for line in found.skipped] == ["'b.png'", "'d.png'"]
    with pytest.raises(InputError, match=r"'b\.png' is empty"):
        cached(root, tmp_path / "cache")
    assert values(cached(root, tmp_path / "cache", skip_unreadable=True)) == [1, 3]


def test_a_permission_given_later_is_noticed(make_folder, tmp_path: Path, monkeypatch) -> None:
    root = make_folder({"a.png": 1, "b.png": 2})
    original = Path.read_bytes

    def read(self: Path) -> bytes:
        if self.name == "b.png":
            raise PermissionError(13, "Permission denied")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        assert values(cached(root, tmp_path / "cache", skip_unreadable=True)) == [1]
        assert values(cached(root, tmp_path / "cache", skip_unreadable=True)) == [1]
    assert values(cached(root, tmp_path / "cache", skip_unreadable=True)) == [1, 2]


def test_all_unreadable(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no image that can be read \(first: 'a.png' is empty"):
        cached(make_folder({"a.png": b"", "b.png": b""}), tmp_path / "cache", skip_unreadable=True)


def test_a_damaged_array_file_is_not_skippable(tmp_path: Path) -> None:
    np.savez_compressed(
        tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8)
    )
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[len(raw) // 2] ^= 255
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(InputError, match="damaged"):
        cached(tmp_path / "a.npz", tmp_path / "cache", skip_unreadable=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(code: int, make_folder, tmp_path: Path, monkeypatch) -> None:
    one, two = make_folder({"a.png": 1}), make_folder({"a.png": 2}, name="two")
    cached(one, tmp_path / "cache")
    before = sorted(path.name for path in (tmp_path / "cache").rglob("*"))

    def full(stream: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_sync", full)
        with pytest.raises(InputError, match="is full; no budget was spent; free some space") as caught:
            cached(two, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*")) == before
    assert values(cached(one, tmp_path / "cache")) == [1]
    assert values(cached(two, tmp_path / "cache")) == [2]


def test_too_little_space_is_said_before_decoding(make_folder, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    seen = count_decoding(monkeypatch)
    with pytest.raises(InputError, match="is full"):
        cached(make_folder({"a.png": 1}), tmp_path / "cache")
    assert seen == []


def test_a_cache_that_cannot_be_written(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot hold the decoded images"):
        cached(make_folder({"a.png": 1}), tmp_path / "cache")


@pytest.mark.parametrize("name", ["images.u8", "labels.npy", "groups.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_a_damaged_cache_is_built_anew(name: str, damage: str, make_folder, tmp_path: Path) -> None:
    root = make_folder({"cat/a.png": 1, "dog/b.png": 2})
    cached(root, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else b"garbage")
    found = cached(root, tmp_path / "cache")
    assert (values(found), found.labels.tolist()) == ([1, 2], [0, 1])


BUILD = """
import os, signal, sys
from pathlib import Path
from sfumato.data import cache, sources
if sys.argv[3] == "killed":
    original, seen = cache._decode, []
    def decode(record, raw, shape):
        seen.append(1)
        if len(seen) == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(record, raw, shape)
    cache._decode = decode
source = sources.open_source(sys.argv[1])
found = cache.cached_pixels(source, size=(4, 4), channels=1, directory=Path(sys.argv[2]))
print(found.images[:, 0, 0, 0].tolist(), found.content)
"""


def build(spec: Path, directory: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(spec), str(directory), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_half_way_it_starts_again_and_leaves_nothing(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", images=np.arange(200, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    )
    killed = build(tmp_path / "a.npz", tmp_path / "cache", "killed")
    killed.communicate()
    assert killed.returncode == -9
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert values(cached(tmp_path / "a.npz", tmp_path / "cache")) == list(range(200))
    (left,) = (tmp_path / "cache").iterdir()
    assert not left.name.startswith(".")


def test_two_processes_at_once_agree(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", images=np.arange(200, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    )
    running = [build(tmp_path / "a.npz", tmp_path / "cache", "whole") for _ in range(3)]
    answers = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert answers[0][0].startswith(str(list(range(200))))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_one_who_comes_second_uses_what_is_there(make_folder, tmp_path: Path, monkeypatch) -> None:
    root = make_folder({"a.png": 1})
    original = cache._build

    def slow(partial: Path, *rest: object) -> None:
        monkeypatch.setattr(cache, "_build", original)
        cached(root, tmp_path / "cache")  # somebody else is faster
        original(partial, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "_build", slow)
    assert values(cached(root, tmp_path / "cache")) == [1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def source_of(pictures: list[np.ndarray], name: str = "x") -> Source:
    def make(index: int) -> Record:
        return Record(f"image {index + 1}", None, None, None, lambda: pictures[index])

    return Source(name, "npz", LazyRecords(len(pictures), make), None, name, "pictures")


def test_the_content_digest_knows_pictures_not_order_or_names(tmp_path: Path) -> None:
    pictures = [np.full((4, 4), value, np.uint8) for value in (1, 2, 3, 3)]

    def content(chosen: list[np.ndarray], name: str) -> str:
        return cached_pixels(source_of(chosen, name), size=(4, 4), channels=1, directory=tmp_path).content

    assert content(pictures, "a") == content(pictures[::-1], "b")
    assert content(pictures, "a") != content(pictures[:3], "c")
    assert content(pictures[:2], "d") != content([pictures[0], pictures[0]], "e")


def test_memory_does_not_grow_with_the_collection(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        picture = np.zeros((100, 100), np.uint8)
        records = LazyRecords(count, lambda i: Record(str(i), None, None, None, picture.copy))
        source = Source(str(count), "npz", records, None, str(count), "pictures")
        tracemalloc.start()
        found = cached_pixels(source, size=(100, 100), channels=1, directory=tmp_path)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(found.images) == count
        return used

    assert peak(2000) < peak(200) + 2_000_000, "1,800 more pictures are 18 MB"


def test_progress_tells_no_count(make_folder, tmp_path: Path, capsys) -> None:
    cached(make_folder({f"{n}.png": n for n in range(37)}), tmp_path / "cache")
    shown = capsys.readouterr()
    assert "100/100 %" in shown.err
    assert "37" not in shown.err + shown.out
