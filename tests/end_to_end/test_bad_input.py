"""What cannot be done ends in one line: the file or option, what it cost (nothing), how to go on."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from sfumato.privacy.ledger import Ledger


@pytest.fixture
def scans(tmp_path):
    """A folder of two class folders with twelve small images each."""
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "scans" / label).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 255, (9, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "scans" / label / f"{number}.png")
    return tmp_path / "scans"


@pytest.fixture
def refused(data, tiny, tmp_path, capsys):
    """Run, expect the refusal, return its line; nothing was charged, and the folder stays free."""

    def call(private, *more, public=data.public, out=tmp_path / "run", status=2):
        capsys.readouterr()
        arguments = ["synthesize", private, "--epsilon", 2, "--out", out, *more]
        assert tiny(*arguments, *(["--public", public] if public else [])) == status
        lines = [
            line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading images")
        ]
        assert len(lines) == 1 and lines[0].startswith("sfumato: error: "), lines
        assert not (out / "config.yaml").exists() and not (out / "release").exists()
        assert not (out / "internal" / "ledger.db").exists()
        return lines[0].removeprefix("sfumato: error: ")

    return call


def png(width, height):
    """A well-formed PNG header that promises width x height pixels, and next to no data."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def truncated(folder):
    whole = (folder / "a" / "0.png").read_bytes()
    return whole[: len(whole) // 2]


BAD_FILES = {
    "zero-byte": lambda folder: b"",
    "truncated": truncated,
    "corrupt": lambda folder: b"\x89PNG\r\n\x1a\n" + bytes(range(200)),
    "not an image": lambda folder: b"#!/bin/sh\necho no picture\n",
    "a bomb": lambda folder: png(60_000, 60_000),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_an_unreadable_private_file(kind, scans, refused):
    (scans / "b" / "bad.png").write_bytes(BAD_FILES[kind](scans))
    line = refused(scans)
    assert "b/bad.png" in line and "no budget was spent" in line and "--skip-unreadable" in line


def test_going_on_without_unreadable_files(data, scans, tiny, tmp_path, capsys):
    (scans / "b" / "bad.png").write_bytes(b"")
    out = tmp_path / "run"
    assert tiny("synthesize", scans, "--public", data.public, "--method", "public-only", "--epsilon", 2,
                "--num-images", 4, "--holdout", scans, "--skip-unreadable", "--out", out) == 2  # fmt: skip
    assert "bad.png" in capsys.readouterr().err  # a holdout has to be readable
    with np.load(data.holdout) as held:
        np.savez(tmp_path / "other.npz", **held)
    arguments = ("synthesize", scans, "--public", data.public, "--epsilon", 2, "--num-images", 4, "--public-size", 24,
                 "--skip-unreadable", "--out", out)  # fmt: skip
    assert tiny(*arguments, "--holdout", tmp_path / "other.npz") == 2
    assert "labels that the private images lack: 0, 1; no budget was spent" in capsys.readouterr().err
    assert tiny(*arguments) == 0
    said = capsys.readouterr()
    assert "left out 1 unreadable file(s)" in said.err
    skipped = json.loads((out / "internal" / "skipped.json").read_text())
    assert skipped["not_for_release"] and "bad.png" in json.dumps(skipped)
    for file in (out / "release").rglob("*"):
        assert not file.is_file() or b"bad.png" not in file.read_bytes()


def test_nothing_there(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in (line := refused(tmp_path / "empty")) and "no budget was spent" in line
    assert "missing" in (line := refused(tmp_path / "missing")) and "no budget was spent" in line
    (tmp_path / "text.npz").write_text("no archive")
    assert "text.npz" in (line := refused(tmp_path / "text.npz")) and "no budget was spent" in line


def test_one_image_alone(refused, tmp_path):
    (tmp_path / "one" / "a").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "one" / "a" / "1.png")
    line = refused(tmp_path / "one", "--public-size", 1)
    assert "cannot hide one in so few" in line and "no budget was spent" in line


def test_a_label_with_one_image_is_fine(data, scans, tiny, tmp_path):
    for number in range(1, 12):
        (scans / "b" / f"{number}.png").unlink()
    out = tmp_path / "run"
    assert tiny("synthesize", scans, "--public", data.public, "--epsilon", 2, "--public-size", 13, "--num-images", 4,
                "--out", out) == 0  # fmt: skip
    assert {p.name for p in (out / "release" / "images").iterdir()} == {"a", "b", "metadata.jsonl"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"file_name": "b/3.png", "label": ', "metadata.jsonl"),
        ('["b/3.png"]', "metadata.jsonl"),
        ('{"label": "b"}', "file_name"),
        ('{"file_name": "b/none.png", "label": "b"}', "none.png"),
        ('{"file_name": "../outside.png", "label": "b"}', "outside.png"),
        ('{"file_name": "a/0.png", "label": "a"}', "0.png"),
    ],
)
def test_a_wrong_row_of_metadata(scans, refused, row, says):
    rows = [
        json.dumps({"file_name": f"{label}/{n}.png", "label": label}) for label in "ab" for n in range(12)
    ]
    (scans / "metadata.jsonl").write_text("\n".join([*rows, row]) + "\n")
    line = refused(scans)
    assert says in line and "no budget was spent" in line


def test_a_group_for_every_image(scans, refused):
    rows = [
        json.dumps({"file_name": f"a/{n}.png", "group_id": "p"} if n else {"file_name": "a/0.png"})
        for n in range(12)
    ]
    (scans / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    for label in (scans / "b").iterdir():
        label.unlink()
    (scans / "b").rmdir()
    line = refused(scans, "--unit", "group")
    assert "group_id" in line and "no budget was spent" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(scans, refused):
    (scans / "a" / "0.png").chmod(0)
    assert "a/0.png" in (line := refused(scans)) and "no budget was spent" in line


def test_a_loop_of_links(scans, refused, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(tmp_path / "loop2")
    (tmp_path / "loop2").symlink_to(loop)
    assert "loop" in (line := refused(loop)) and "no budget was spent" in line


def test_the_same_images_as_private_and_public(data, scans, refused, tmp_path):
    (tmp_path / "link").symlink_to(scans)
    for public in (scans, tmp_path / "link", scans / ".." / "scans"):
        line = refused(scans, public=public)
        assert "same" in line and "no budget was spent" in line
    assert "same" in refused(data.private, public=data.private)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--epsilon", "0"], "--epsilon 0"),
        (["--epsilon", "-3"], "--epsilon -3"),
        (["--delta", "1"], "--delta 1"),
        (["--delta", "0.02", "--public-size", "24"], None),
        (["--delta", "0.05", "--public-size", "24"], "--delta 0.05 is too large for 24 units"),
        (["--time-budget", "2m3"], "--time-budget"),
        (["--size", "100000"], "--size"),
        (["--ledger", "nowhere/x.ledger.db"], "x.ledger.db"),
    ],
)
def test_options_that_cannot_be(more, says, scans, refused):
    if says is not None:
        line = refused(scans, *more)
        assert says in line and ("no budget was spent" in line or "ledger create" in line)


def test_a_large_delta_is_warned_of(data, scans, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert tiny("synthesize", scans, "--method", "dpdm", "--epsilon", 2, "--delta", 0.035, "--public-size", 24,
                "--num-images", 4, "--out", out) == 0  # fmt: skip
    assert "note: delta 0.035 is large for 24 units" in capsys.readouterr().err
    assert "is large for 24 units" in (out / "release" / "README.md").read_text()


def test_too_little_time_names_what_was_asked_for(data, scans, refused, tmp_path):
    from dataclasses import replace

    from sfumato.synthesis import presets

    # Not monkeypatch: it is undone after the tiny preset is, and would leave that to the tests that follow.
    with mock.patch.dict(presets.PRESETS, demo=replace(presets.PRESETS["demo"], time_bound=True)):
        line = refused(scans, "--time-budget", "4s", "--public-size", 24)
    assert line.startswith("--time-budget 4s is too short:") and "no budget was spent" in line


def test_more_than_the_ledger_has_left(data, scans, tiny, tmp_path, capsys):
    account, out = tmp_path / "scans.ledger.db", tmp_path / "run"
    assert tiny("ledger", "create", account, "--epsilon", 3, "--delta", 1e-5) == 0
    run = ("synthesize", scans, "--method", "dpdm", "--num-images", 4, "--ledger", account, "--delta", 2e-6)
    assert tiny(*run, "--epsilon", 2, "--out", tmp_path / "first", "--public-size", 24) == 0
    spent = Ledger.open(account).spent.epsilon
    capsys.readouterr()
    assert tiny(*run, "--epsilon", 2, "--out", out) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--epsilon 2 is more than" in line and "no budget was spent" in line and "ledger show" in line
    assert tiny(*run, "--epsilon", 0.5, "--delta", 0.001, "--out", out) == 2
    assert "--delta 0.001 is more than" in capsys.readouterr().err
    assert Ledger.open(account).spent.epsilon == spent  # not even a count was bought
    assert (
        tiny(*run, "--epsilon", 0.9, "--out", out, "--public-size", 24) == 0
    )  # in the same folder, with other options
    assert Ledger.open(account).spent.epsilon <= 3
    claim = json.loads((out / "release" / "privacy.json").read_text())
    assert claim["epsilon"] <= 0.9 * (1 + 1e-9) and claim["budget"]["epsilon"] == 0.9


def test_a_run_folder_where_a_file_is(scans, tiny, tmp_path, capsys):
    Path(tmp_path / "file").write_text("mine")
    assert (
        tiny("synthesize", scans, "--method", "dpdm", "--epsilon", 2, "--out", tmp_path / "file" / "run") == 2
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sfumato: error:") and "file" in line


def test_several_processes_at_once_are_refused(scans, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(scans)
    assert "runs as one process" in line and "no budget was spent" in line
