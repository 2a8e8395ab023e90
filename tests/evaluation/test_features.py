from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from sfumato.data.images import OwnerArray
from sfumato.data.release import InternalWriter, ReleaseWriter
from sfumato.encoders.encoder import NotFinite
from sfumato.encoders.pixels import Pixels
from sfumato.errors import InputError
from sfumato.evaluation import features as module
from sfumato.evaluation.features import cached_features

CONTENT = "0123456789abcdef" * 4


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Counting(Pixels):
    """Pixels that count the images they saw, and die or give NaN at a chosen one."""

    def __init__(self, identity: str = "a" * 64, die_at: int = -1, nan_at: int = -1) -> None:
        self.identity, self.seen, self.die_at, self.nan_at = identity, 0, die_at, nan_at

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if 0 <= self.die_at <= self.seen:
            raise Killed
        values = super().__call__(images)
        if self.seen <= self.nan_at < self.seen + len(images):
            values[self.nan_at - self.seen, 1] = np.nan
        self.seen += len(images)
        return values


def pictures(count: int = 50, size: int = 4, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def cached(images, directory: Path, encoder=None, batch: int = 8) -> np.ndarray:
    return cached_features(
        images, encoder or Counting(), directory=directory, content=CONTENT, description="test", batch=batch
    )


@pytest.fixture(autouse=True)
def save_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SAVE_EVERY", 1)


def test_features_are_computed_once_and_mapped(tmp_path: Path) -> None:
    images, encoder = pictures(), Counting()
    first = cached(images, tmp_path, encoder)
    np.testing.assert_array_equal(first, Pixels()(images))
    assert first.dtype == np.float32 and first.shape == (50, 16) and isinstance(first, np.memmap)
    again = cached(images, tmp_path, encoder, batch=13)
    np.testing.assert_array_equal(again, first)
    assert encoder.seen == 50
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
    about = json.loads((tmp_path / "pixels" / CONTENT[:16] / "about.json").read_text())
    expected = {
        "encoder": "pixels", "identity": "a" * 64, "content": CONTENT, "rows": 50, "dimension": 16, "done": 50,
    }  # fmt: skip
    assert {key: about[key] for key in expected} == expected


def test_a_complete_cache_is_read_where_nothing_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached(pictures(), tmp_path)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "FileLock", forbidden)
    monkeypatch.setattr(Path, "mkdir", forbidden)
    np.testing.assert_array_equal(cached(pictures(), tmp_path), first)


@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("where", ["fsync", "replace", "encoder"])
def test_work_goes_on_whatever_the_moment_it_was_stopped(
    where: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, left = pictures(20), [call]

    def dying(original):
        def step(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(*args, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(module, "_SAVE_EVERY", 2 * 64)
        if where != "encoder":
            patch.setattr(os, where, dying(getattr(os, where)))
        encoder = Counting(die_at=3 * call - 3 if where == "encoder" else -1)
        try:
            cached(images, tmp_path, encoder, batch=3)
        except Killed:
            pass
        else:
            assert encoder.die_at < 0 and left[0] > 0  # there are not so many such calls
    place = tmp_path / "pixels" / CONTENT[:16]
    kept = json.loads((place / "about.json").read_text())["done"] if (place / "about.json").exists() else 0
    with open(place / "features.f32", "ab") as stream:  # rows begun and never counted
        stream.write(b"\xff" * 37)
    encoder = Counting()
    np.testing.assert_array_equal(cached(images, tmp_path, encoder, batch=3), Pixels()(images))
    assert encoder.seen == 20 - kept
    if kept < 20:
        assert (place / "features.f32").stat().st_size == 20 * 64


CHILD = """
import sys, time
import numpy as np
from pathlib import Path
from sfumato.encoders.pixels import Pixels
from sfumato.evaluation import features
features._SAVE_EVERY = 1
class Slow(Pixels):
    identity = "a" * 64
    def __call__(self, images):
        time.sleep(0.02)
        return super().__call__(images)
images = np.load(sys.argv[1], allow_pickle=False)
features.cached_features(images, Slow(), directory=Path(sys.argv[2]), content=sys.argv[3], description="x", batch=2)
"""


def test_sigkill(tmp_path: Path) -> None:
    images = pictures(400)
    np.save(tmp_path / "images.npy", images)
    about = tmp_path / "cache" / "pixels" / CONTENT[:16] / "about.json"
    arguments = [sys.executable, "-c", CHILD, str(tmp_path / "images.npy"), str(tmp_path / "cache"), CONTENT]
    child = subprocess.Popen(arguments)
    try:
        deadline = time.monotonic() + 300
        while not about.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(InputError, match="another process"):
            cached(images, tmp_path / "cache")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = json.loads(about.read_text())["done"]
    assert 0 < done < 400
    encoder = Counting()
    np.testing.assert_array_equal(cached(images, tmp_path / "cache", encoder), Pixels()(images))
    assert encoder.seen == 400 - done


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    cached(pictures(), tmp_path)
    with pytest.raises(
        InputError, match=rf"{CONTENT[:16]}' was made by another 'pixels'.*no budget.*delete.*--out"
    ):
        cached(pictures(), tmp_path, Counting(identity="b" * 64))


def test_also_when_it_was_not_finished(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        cached(pictures(), tmp_path, Counting(die_at=16))
    with pytest.raises(InputError, match="was made by another 'pixels'"):
        cached(pictures(), tmp_path, Counting(identity="b" * 64))
    with pytest.raises(InputError, match="of other images"):
        cached(pictures()[::-1], tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:-1],
        lambda x: np.concatenate([x, x[:1]]),
        lambda x: x[::-1],
        lambda x: x[:, :3],
        lambda x: x ^ 1,
    ],
    ids=["fewer", "more", "another order", "another size", "other pixels"],
)
def test_other_images_under_the_same_name_are_refused(change, tmp_path: Path) -> None:
    cached(pictures(), tmp_path)
    with pytest.raises(InputError, match="holds features of other images"):
        cached(change(pictures()), tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda place: (place / "features.f32").write_bytes(b"short"),
        lambda place: (place / "features.f32").unlink(),
        lambda place: (place / "about.json").write_text("{"),
        lambda place: (place / "about.json").write_text("[]"),
        lambda place: (place / "about.json").write_text("{}"),
    ],
)
def test_a_damaged_cache_is_refused(spoil, tmp_path: Path) -> None:
    cached(pictures(), tmp_path)
    spoil(tmp_path / "pixels" / CONTENT[:16])
    with pytest.raises(InputError, match="is damaged; no budget was spent; delete that folder"):
        cached(pictures(), tmp_path)
    shutil.rmtree(tmp_path / "pixels")
    cached(pictures(), tmp_path)


@pytest.mark.parametrize("nan_at", [0, 21, 49])
def test_nan_names_image_and_encoder_and_is_not_kept(nan_at: int, tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=rf"encoder 'pixels' .* not finite for image {nan_at + 1};"):
        cached(pictures(), tmp_path, Counting(nan_at=nan_at))
    found = cached(pictures(), tmp_path)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, Pixels()(pictures()))


def test_nan_found_by_the_encoder_itself_keeps_the_position(tmp_path: Path) -> None:
    class Careful(Counting):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            if self.seen == 16:
                raise NotFinite("pixels", 3)
            return super().__call__(images)

    with pytest.raises(NotFinite, match="for image 20;"):
        cached(pictures(), tmp_path, Careful())


def test_vectors_of_changing_length_are_refused(tmp_path: Path) -> None:
    class Growing(Counting):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            return super().__call__(images)[:, : 10 + (self.seen > 16)]

    with pytest.raises(InputError, match="one vector of one length"):
        cached(pictures(), tmp_path, Growing())


def test_private_features_stay_out_of_releases(tmp_path: Path) -> None:
    for _ in range(2):  # computed, then from the cache
        found = cached(pictures().view(OwnerArray), tmp_path / "internal")
        assert isinstance(found, OwnerArray) and not found.flags.writeable
        with pytest.raises(InputError, match="nothing was released"):
            ReleaseWriter(tmp_path / "out").json("features.json", {"x": found[:2]})
    InternalWriter(tmp_path / "out").json("features.json", {"x": found[:2]})
    assert not isinstance(cached(pictures(), tmp_path / "internal"), OwnerArray)


def test_a_mapped_private_set_stays_private(tmp_path: Path) -> None:
    pictures().tofile(tmp_path / "x.u8")
    mapped = np.memmap(tmp_path / "x.u8", np.uint8, "r", shape=(50, 4, 4, 1))
    assert isinstance(cached(mapped.view(OwnerArray), tmp_path), OwnerArray)
    assert not isinstance(cached(mapped, tmp_path), OwnerArray)


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    class Many:
        """200,000 images that exist only when looked at."""

        def __len__(self) -> int:
            return 200_000

        def __getitem__(self, rows: slice) -> np.ndarray:
            start, stop, _ = rows.indices(len(self))
            return np.broadcast_to(
                (np.arange(start, stop) % 256).astype(np.uint8)[:, None, None, None], (stop - start, 4, 4, 1)
            )

    module._SAVE_EVERY = 1_000_000  # put back by the fixture
    tracemalloc.start()
    found = cached(Many(), tmp_path, batch=2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (200_000, 16) and found.nbytes == 12_800_000
    assert peak < 3_000_000
    assert found[199_999, 0] == np.float32((199_999 % 256) / np.float32(127.5) - 1)


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="test: there are no images"):
        cached(pictures()[:0], tmp_path)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 3000))
        with pytest.raises(InputError, match=r"disk is full.*free some space"):
            cached(pictures(), tmp_path)

    original, left = os.fsync, [4]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"disk is full.*what was computed is kept"):
            cached(pictures(), tmp_path)
    encoder = Counting()
    cached(pictures(), tmp_path, encoder)
    assert encoder.seen < 50


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot be kept under .*; allow writing there"):
        cached(pictures(), tmp_path / "file")


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path) -> None:
    place = tmp_path / "pixels" / CONTENT[:16]
    place.mkdir(parents=True)
    with FileLock(place / ".lock"), pytest.raises(InputError, match="another process"):
        cached(pictures(), tmp_path)
    cached(pictures(), tmp_path)
