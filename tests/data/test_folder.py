from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.data.decoding import UnreadableImage
from sfumato.data.records import Source
from sfumato.data.sources import open_source
from sfumato.errors import InputError


def names(source: Source) -> list[str]:
    return [record.where for record in source.records]


def labels(source: Source) -> list[str | None]:
    return [record.label for record in source.records]


def refused(spec: object, problem: str) -> str:
    with pytest.raises(InputError, match=problem) as caught:
        open_source(spec)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert message.count("no budget was spent") == 1
    return message


def test_class_folders_become_sorted_labels(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"dog/1.png": 1, "cat/deep/2.PNG": 2, "cat/1.JPeG": 3})
    (root / "bird").mkdir()
    source = open_source(root)
    assert source.label_names == ("bird", "cat", "dog"), "an empty class folder declares its label too"
    assert names(source) == ["cat/1.JPeG", "cat/deep/2.PNG", "dog/1.png"]
    assert labels(source) == ["cat", "cat", "dog"]
    assert isinstance(source.records[0].read(), bytes)
    assert source.kind == "folder"
    assert "photos" not in source.description


def test_one_label_with_one_image(make_folder: Callable[..., Path]) -> None:
    source = open_source(make_folder({"cat/1.png": 1}))
    assert (source.label_names, len(source.records)) == (("cat",), 1)


def test_plain_files_are_unlabelled_and_other_files_ignored(make_folder: Callable[..., Path]) -> None:
    junk = {
        ".DS_Store": b"x",
        "Thumbs.db": b"x",
        "notes.txt": b"x",
        ".hidden.png": b"x",
        ".git/a.png": b"x",
        "__MACOSX/a.png": b"x",
        "LICENSE": b"x",
        "a.json": b"{}",
    }
    source = open_source(make_folder({"a.png": 1, "b.webp": 2, **junk}))
    assert source.label_names is None
    assert names(source) == ["a.png", "b.webp"]


def test_pictures_of_formats_not_read_are_reported_not_dropped(make_folder: Callable[..., Path]) -> None:
    assert names(open_source(make_folder({"a.png": 1, "b.heic": b"x", "c.svg": b"<svg/>"}))) == [
        "a.png",
        "b.heic",
        "c.svg",
    ]


def test_an_empty_folder_or_one_without_images(make_folder: Callable[..., Path]) -> None:
    assert "put png" in refused(make_folder({}), "holds no images")
    refused(make_folder({"a.txt": b"x", "cat/b.txt": b"x"}), "holds no images")


def test_images_inside_and_outside_class_folders(make_folder: Callable[..., Path]) -> None:
    refused(make_folder({"cat/1.png": 1, "stray.png": 1}), "stray.png")


def test_splits_are_not_taken_for_classes(make_folder: Callable[..., Path]) -> None:
    refused(make_folder({"train/cat/1.png": 1, "Test/cat/1.png": 1}), "splits")
    assert open_source(make_folder({"test/1.png": 1, "cat/1.png": 2}, name="other")).label_names == (
        "cat",
        "test",
    )


def test_metadata_gives_labels_groups_and_captions(make_folder: Callable[..., Path]) -> None:
    rows = [
        {"file_name": "b/1.png", "label": "two", "group_id": 7, "caption": "a b"},
        {"file_name": "./a.png", "label": "one", "group_id": "x"},
    ]
    source = open_source(make_folder({"a.png": 1, "b/1.png": 2}, rows))
    assert source.label_names == ("one", "two")
    assert [(r.where, r.label, r.group, r.caption) for r in source.records] == [
        ("b/1.png", "two", "7", "a b"),
        ("a.png", "one", "x", None),
    ]


def test_integer_labels_sort_by_value(make_folder: Callable[..., Path]) -> None:
    rows = [{"file_name": f"{n}.png", "label": n} for n in (10, 9, 2)]
    source = open_source(make_folder({"10.png": 1, "9.png": 1, "2.png": 1}, rows))
    assert source.label_names == ("2", "9", "10")
    assert labels(source) == ["10", "9", "2"]


def test_metadata_without_labels_makes_no_folder_name_public(make_folder: Callable[..., Path]) -> None:
    source = open_source(
        make_folder({"jane doe/1.png": 1}, [{"file_name": "jane doe/1.png", "group_id": "p1"}])
    )
    assert source.label_names is None
    assert labels(source) == [None]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{not json", "line 2 is not JSON"),
        ("[1, 2]", "line 2 is not a JSON object"),
        ("[" * 100_000, "line 2 is not JSON"),
        ({"label": "x"}, "line 2 has no file_name"),
        ({"file_name": 7}, "line 2 has no file_name"),
        ({"file_name": "gone.png", "label": "x"}, "line 2 names 'gone.png', which is not in the folder"),
        ({"file_name": "a.png", "label": "x"}, r"line 2 names 'a.png' again \(first in line 1\)"),
        ({"file_name": "./a.png", "label": "x"}, "line 2 names 'a.png' again"),
        ({"file_name": "../a.png", "label": "x"}, r"line 2 names '\.\./a.png', which lies outside"),
        ({"file_name": "b/../../a.png", "label": "x"}, "lies outside"),
        ({"file_name": "/etc/passwd", "label": "x"}, "lies outside"),
        ({"file_name": "C:\\a.png", "label": "x"}, "lies outside"),
        ({"file_name": "..\\a.png", "label": "x"}, "outside"),
        ({"file_name": "b.png"}, "line 2 has a label of another kind"),
        ({"file_name": "b.png", "label": 3}, "line 2 has a label of another kind"),
        ({"file_name": "b.png", "label": True}, "line 2 has a label that is not text or an integer"),
        ({"file_name": "b.png", "label": 1.5}, "line 2 has a label that is not text or an integer"),
        ({"file_name": "b.png", "label": "x", "group_id": [1]}, "line 2 has a group_id"),
        ({"file_name": "b.png", "label": "x", "caption": 3}, "line 2 has a caption that is not text"),
    ],
)
def test_a_bad_row_is_named_by_its_line(row: object, problem: str, make_folder: Callable[..., Path]) -> None:
    root = make_folder({"a.png": 1, "b.png": 2}, [{"file_name": "a.png", "label": "x"}, row])
    refused(root, problem)


def test_metadata_that_is_not_text(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"a.png": 1, "metadata.jsonl": b'{"file_name": "a.png"}\n\xff\xfe\n'})
    refused(root, "line 2 is not JSON in UTF-8")


def test_metadata_that_cannot_be_opened(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"a.png": 1})
    (root / "metadata.jsonl").symlink_to(root / "gone")
    refused(root, r"has a metadata\.jsonl that cannot be opened")


def test_blank_lines_and_a_byte_order_mark_are_harmless(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"a.png": 1, "metadata.jsonl": b'\xef\xbb\xbf\n{"file_name": "a.png"}\r\n\n'})
    assert names(open_source(root)) == ["a.png"]


def test_a_file_without_a_row(make_folder: Callable[..., Path]) -> None:
    refused(
        make_folder({"a.png": 1, "b.png": 1}, [{"file_name": "a.png"}]),
        "'b.png', which metadata.jsonl does not name",
    )


def test_metadata_elsewhere_or_of_another_kind_is_not_silently_dropped(
    make_folder: Callable[..., Path],
) -> None:
    refused(make_folder({"images/a.png": 1, "images/metadata.jsonl": b"{}"}), "not at the top")
    refused(
        make_folder({"a.png": 1, "metadata.csv": b"file_name\n"}, name="csv"),
        "metadata.csv, which is not read",
    )


def test_links_to_files_work_and_loops_end(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = make_folder({"cat/1.png": 1, "dog/1.png": 2})
    outside = make_folder({"x.png": 3}, name="elsewhere")
    (root / "cat" / "link.png").symlink_to(outside / "x.png")
    (root / "cat" / "up").symlink_to(root)
    (root / "again").symlink_to(root / "cat")
    (root / "cat" / "self.png").symlink_to(root / "cat" / "self.png")
    source = open_source(root)
    assert source.label_names == ("cat", "dog")
    assert names(source) == ["cat/1.png", "cat/link.png", "cat/self.png", "dog/1.png"]
    assert source.records[1].read() == (outside / "x.png").read_bytes()
    with pytest.raises(UnreadableImage, match=r"'cat/self\.png' cannot be opened"):
        source.records[2].read()


def test_a_broken_link_and_a_pipe_are_unreadable_and_do_not_hang(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"a.png": 1})
    (root / "b.png").symlink_to(root / "gone.png")
    os.mkfifo(root / "c.png")
    records = open_source(root).records
    with pytest.raises(UnreadableImage, match=r"'b\.png' cannot be opened"):
        records[1].read()
    with pytest.raises(UnreadableImage, match=r"'c\.png' is not a regular file"):
        records[2].read()


def test_files_and_folders_without_permission(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder({"cat/1.png": 1})
    record = open_source(root).records[0]

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # root may read everything, so the refusal is played
        patch.setattr(Path, "read_bytes", denied)
        with pytest.raises(UnreadableImage, match=r"'cat/1\.png' cannot be opened \(Permission denied\)"):
            record.read()
    monkeypatch.setattr(os, "scandir", denied)
    refused(root, "Permission denied")


def test_a_huge_file_is_not_read(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"a.png": 1})
    os.truncate(root / "a.png", 300_000_000)
    with pytest.raises(UnreadableImage, match="larger than 256 MB"):
        open_source(root).records[0].read()


def test_the_fingerprint_notices_every_change(
    make_folder: Callable[..., Path], png: Callable[..., bytes]
) -> None:
    root = make_folder({"cat/1.png": 1, "dog/2.png": 2, "notes.txt": b"x"})
    seen = [open_source(root).fingerprint]
    assert open_source(str(root) + "/").fingerprint == seen[0]
    link = root.with_name("link")
    link.symlink_to(root)
    assert open_source(link).fingerprint == seen[0], "the same folder by another name"
    (root / "notes.txt").write_text("other")
    assert open_source(root).fingerprint == seen[0]
    for change in (
        lambda: os.utime(root / "cat/1.png", ns=(1, 1)),
        lambda: (root / "cat/3.png").write_bytes(png(3)),
        lambda: (root / "cat/3.png").rename(root / "dog/3.png"),
        lambda: (root / "bird").mkdir(),
    ):
        change()
        seen.append(open_source(root).fingerprint)
    assert len(set(seen)) == len(seen)
    assert open_source(make_folder({"cat/1.png": 1}, name="copy")).fingerprint not in seen


def test_control_characters_in_names_stay_on_one_line(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"cat/a\nb.png": b"", "cat/\udcff.png": 1})
    assert names(open_source(root)) == ["cat/a\\nb.png", "cat/\\udcff.png"]


def make_zip(path: Path, members: dict[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:  # type: ignore[arg-type]
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_zip_is_read_like_the_folder_in_it(tmp_path: Path, png: Callable[..., bytes]) -> None:
    members = {
        "cat/1.png": png(1),
        "dog/1.PNG": png(2),
        "__MACOSX/cat/1.png": b"x",
        "dog/.DS_Store": b"x",
        "bird/": b"",
    }
    source = open_source(make_zip(tmp_path / "a.zip", members, compression=zipfile.ZIP_DEFLATED))
    assert source.label_names == ("bird", "cat", "dog")
    assert names(source) == ["cat/1.png", "dog/1.PNG"]
    assert source.records[1].read() == png(2)
    wrapped = {f"patients/{name}": raw for name, raw in members.items()}
    again = open_source(make_zip(tmp_path / "b.zip", wrapped))
    assert (again.label_names, names(again)) == (source.label_names, names(source))
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "b.zip"}, "nothing was extracted"


def test_a_zip_with_metadata(tmp_path: Path, png: Callable[..., bytes]) -> None:
    rows = b'{"file_name": "x/1.png", "label": 3, "group_id": "g"}\n'
    source = open_source(make_zip(tmp_path / "a.zip", {"top/x/1.png": png(1), "top/metadata.jsonl": rows}))
    assert [(r.where, r.label, r.group) for r in source.records] == [("x/1.png", "3", "g")]


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png", "C:/evil.png"]
)
def test_a_member_outside_the_archive_is_refused_and_written_nowhere(name: str, tmp_path: Path, png) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    refused(make_zip(inside / "a.zip", {name: png(1)}), "outside the archive")
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.zip"]


def test_damaged_encrypted_and_lying_archives(tmp_path: Path, png: Callable[..., bytes]) -> None:
    path = make_zip(tmp_path / "a.zip", {"cat/1.png": png(1), "cat/2.png": png(2)})
    raw = bytearray(path.read_bytes())
    (tmp_path / "cut.zip").write_bytes(raw[: len(raw) // 2])
    refused(tmp_path / "cut.zip", "not a readable zip archive")
    (tmp_path / "empty.zip").write_bytes(b"")
    refused(tmp_path / "empty.zip", "not a readable zip archive")
    bad = bytearray(raw)
    bad[raw.index(png(1)) + 20] ^= 255
    (tmp_path / "bad.zip").write_bytes(bad)
    with pytest.raises(UnreadableImage, match=r"'1\.png' is damaged inside the archive"):
        open_source(tmp_path / "bad.zip").records[0].read()
    locked = bytearray(raw)
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    refused(tmp_path / "locked.zip", "is encrypted")
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive,
    ):
        archive.writestr("1.png", png(1))
        archive.writestr("1.png", png(2))
    refused(tmp_path / "twice.zip", r"holds '1\.png' twice")
    refused(make_zip(tmp_path / "none.zip", {"a.txt": b"x"}), "holds no images")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as stream:
        for _ in range(257):
            stream.write(bytes(1_000_000))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(UnreadableImage, match="larger than 256 MB"):
        open_source(path).records[0].read()


def test_wrong_extension_is_fine_when_the_content_is_an_image(make_folder: Callable[..., Path]) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 9, np.uint8)).save(stream, "BMP")
    source = open_source(make_folder({"a.jpg": stream.getvalue()}))
    assert names(source) == ["a.jpg"]
    assert stat.S_ISREG(os.stat(Path(source.spec) / "a.jpg").st_mode)
