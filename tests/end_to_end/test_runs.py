"""Whole runs: what is in the release, what it costs, that stock tools read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sfumato.privacy.ledger import Ledger

VERIFIER = Path(__file__).parents[2] / "benchmarks" / "verify_privacy_json.py"


def certificate(out):
    return json.loads((out / "release" / "privacy.json").read_text())


def verified(out, tiny, capsys):
    """The certificate holds for `sfumato ledger verify`, and for dp-accounting alone."""
    assert tiny("ledger", "verify", out / "release") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("holds:")
    done = subprocess.run([sys.executable, VERIFIER, out / "release"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def as_folder(npz, folder, *, metadata=None, class_folders=True):
    """The images of an npz as PNG files in class folders, or flat with metadata rows."""
    with np.load(npz) as held:
        images, labels = held["images"], held["labels"]
    rows = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"{'ab'[label]}/{number}.png" if class_folders else f"{number}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
        if metadata is not None:
            rows.append(json.dumps({"file_name": name} | metadata(number, label)))
    if rows:
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def complete(data, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = (
        "synthesize", data.private, "--public", data.public, "--holdout", data.holdout, "--epsilon", 2,
        "--num-images", 12, "--seed", 7123, "--out", out,
    )  # fmt: skip
    assert tiny(*arguments) == 0
    return out, arguments, capsys.readouterr()


def test_a_whole_run(complete, data, tiny, tmp_path, capsys):
    out, arguments, said = complete
    lines = said.out.splitlines()
    assert lines[0].startswith("This release is (ε = 2, δ = 1e-06)")
    assert "real data (ceiling)" in said.out and "selected public images (floor)" in said.out
    assert f"release: {out}/release" in lines and f"report:  {out}/release/report.html" in lines

    # What it cost: the count, and all the rest, are two reservations whose sums are the totals.
    claim = certificate(out)
    assert [part["label"] for part in claim["reservations"]] == ["count", "synthesize"]
    assert claim["epsilon"] == pytest.approx(sum(part["epsilon"] for part in claim["reservations"]))
    assert claim["delta"] == pytest.approx(sum(part["delta"] for part in claim["reservations"]))
    assert 0.95 * 2 < claim["epsilon"] <= 2 * (1 + 1e-9) and claim["delta"] == 1e-6
    mechanisms = [e["mechanism"] for part in claim["reservations"] for e in part["events"]]
    assert mechanisms == ["count", "semantic_histogram", "dp_sgd"]
    verified(out, tiny, capsys)
    ledger = Ledger.open(out / "internal" / "ledger.db")
    assert ledger.spent.epsilon == pytest.approx(claim["epsilon"]) and ledger.verify(claim["ledger"]["head"])
    assert [each.status for each in ledger.reservations()] == ["settled", "settled"]

    # What stock tools make of it.
    import torch
    from datasets import load_dataset
    from diffusers import UNet2DModel

    from sfumato import Generator

    network = UNet2DModel.from_pretrained(out / "release" / "model")
    assert network.config.sample_size == 8
    images, labels = Generator.from_pretrained(out / "release" / "model").generate(4, seed=1)
    assert (
        images.shape == (4, 8, 8, 1)
        and labels.tolist() == [0, 0, 1, 1]
        and torch.is_tensor(network.dtype) is False
    )
    rows = load_dataset(
        "imagefolder", data_dir=str(out / "release" / "images"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert len(rows) == 12 and sorted(set(rows["label"])) == ["0", "1"]

    # What is there, and what is not.
    assert sorted(p.name for p in (out / "release").iterdir()) == [
        "README.md", "images", "model", "privacy.json", "report.html",
    ]  # fmt: skip
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["epsilon"] == 2 and config["seed"] == 7123
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in metrics] == ["semantic query", "public training", "DP-SGD", "generation"]
    assert [row["stage"] for row in metrics if "seconds" in row] == ["public training", "generation"]
    secret = [str(data.folder), "secretname", str(tmp_path), "7123", "internal/", "160"]
    for file in (out / "release").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not file.is_symlink() and "internal" not in file.parts[len(out.parts) :]
            found = [
                word
                for word in secret[: 5 if file.suffix == ".safetensors" else None]
                if word.encode() in content
            ]
            if file.suffix in (".png", ".safetensors"):
                found = [word for word in found if not word.isdigit()]
            if file.name == "report.html":
                found = [word for word in found if word != "160"]  # sizes of pictures
            assert not found, (file, found)
    assert "not for release" in (out / "internal" / "report.html").read_text().lower()

    # The same command again does nothing.
    before = {p: p.stat().st_mtime_ns for p in (out / "release").rglob("*")}
    assert tiny(*arguments) == 0
    said = capsys.readouterr()
    assert "this run is complete; nothing was done and no budget was spent" in said.err
    assert said.out.splitlines()[0].startswith("This release is (ε = 2")
    assert before == {p: p.stat().st_mtime_ns for p in (out / "release").rglob("*")}
    assert Ledger.open(out / "internal" / "ledger.db").head == ledger.head

    # Other options do not fit into this folder; another holdout does, and costs nothing.
    assert tiny(*arguments, "--epsilon", 4) == 2
    assert "holds a run with --epsilon 2.0, not 4.0; no budget was spent" in capsys.readouterr().err
    assert tiny(*arguments, "--holdout", data.private) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (out / "release").rglob("*")}
    assert Ledger.open(out / "internal" / "ledger.db").head == ledger.head


def test_a_folder_of_images_with_a_declared_size(data, tiny, tmp_path, capsys):
    private = as_folder(data.private, tmp_path / "scans")
    out = tmp_path / "run"
    arguments = ("synthesize", private, "--public", data.public, "--epsilon", 2, "--num-images", 6)
    assert tiny(*arguments, "--public-size", 160, "--out", out) == 0
    claim = certificate(out)
    assert [part["label"] for part in claim["reservations"]] == ["synthesize"]
    assert claim["public_size"] == 160 and claim["delta"] < 160**-1.1
    verified(out, tiny, capsys)
    names = {row["label"] for row in map(json.loads, (out / "release/images/metadata.jsonl").open())}
    assert names == {"a", "b"}


def test_images_without_labels(data, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert tiny("synthesize", data.unlabelled, "--public", data.public, "--epsilon", 2, "--num-images", 6,
                "--holdout", data.holdout, "--out", out) == 0  # fmt: skip
    verified(out, tiny, capsys)
    assert len(list((out / "release" / "images").glob("*.png"))) == 6
    rows = [json.loads(line) for line in (out / "release/images/metadata.jsonl").open()]
    assert all(list(row) == ["file_name"] for row in rows)
    assert json.loads((out / "internal/evaluation.json").read_text())["accuracy"] == []


def test_dpdm_needs_no_public_images(data, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        tiny("synthesize", data.private, "--method", "dpdm", "--epsilon", 2, "--num-images", 6, "--out", out)
        == 0
    )
    claim = certificate(out)
    assert [e["mechanism"] for e in claim["reservations"][1]["events"]][-1] == "dp_sgd"
    assert claim["epsilon"] <= 2 * (1 + 1e-9)
    verified(out, tiny, capsys)


@pytest.mark.parametrize(
    ("method", "asked", "says"),
    [
        (
            "privimage+feta",
            ["semantic_histogram", "mean_images", "dp_sgd"],
            "query chose and noisy mean images",
        ),
        ("feta", ["mean_images", "dp_sgd"], None),
        ("pdp", ["dp_sgd"], "trained on public images: the"),
        ("random-selection", ["dp_sgd"], "trained on public images: the"),
        ("pe", ["nearest_neighbour_histogram"], "the difference is what the votes bought"),
    ],
)
def test_the_baselines_run_from_the_same_command_line(data, tiny, tmp_path, capsys, method, asked, says):
    out = tmp_path / "run"
    public = () if method == "feta" else ("--public", data.public, "--robust", 0.1)
    command = ("synthesize", data.private, *public, "--method", method, "--epsilon", 2, "--num-images", 6,
               "--holdout", data.holdout, "--public-size", 160, "--out", out)  # fmt: skip
    assert tiny(*command) == 0
    claim = certificate(out)
    assert [event["mechanism"] for event in claim["reservations"][0]["events"]] == asked
    assert 1.9 < claim["epsilon"] <= 2 * (1 + 1e-9)
    verified(out, tiny, capsys)
    page = " ".join((out / "release" / "report.html").read_text(encoding="utf-8").split())
    assert ("Beside them" in page) == (says is not None) and (says is None or says in page)
    assert ("has learnt nothing from the sensitive images" in page) == (method == "pe")
    # Again: nothing is done and nothing is spent.
    spent = Ledger.open(out / "internal" / "ledger.db").head
    assert tiny(*command) == 0 and Ledger.open(out / "internal" / "ledger.db").head == spent


def test_public_only_costs_nothing(data, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ("synthesize", data.private, "--public", data.public, "--method", "public-only", "--epsilon", 2,
                 "--num-images", 6, "--out", out)  # fmt: skip
    assert tiny(*arguments) == 0
    claim = certificate(out)
    assert (
        claim["epsilon"] == 0
        and claim["reservations"] == []
        and "public_size" not in {name for name, value in claim.items() if value is not None}
    )
    assert (
        capsys.readouterr().out.splitlines()[0] == claim["statement"]
        and "without the private images" in claim["statement"].lower()
    )
    assert Ledger.open(out / "internal" / "ledger.db").reservations() == []
    assert tiny("ledger", "verify", out / "release") == 0


def test_groups_are_the_unit(data, tiny, tmp_path, capsys):
    metadata = lambda number, label: {"label": "ab"[label], "group_id": f"patient-{number // 4}"}  # noqa: E731
    private = as_folder(data.private, tmp_path / "scans", metadata=metadata, class_folders=False)
    ledger = tmp_path / "scans.ledger.db"
    assert tiny("ledger", "create", ledger, "--epsilon", 10, "--delta", 1e-4) == 0
    out = tmp_path / "run"
    assert tiny("synthesize", private, "--public", data.public, "--unit", "group", "--public-size", 40, "--delta",
                1e-5, "--epsilon", 2, "--num-images", 6, "--ledger", ledger, "--out", out) == 0  # fmt: skip
    claim = certificate(out)
    assert claim["unit"] == "group" and claim["public_size"] == 40
    assert Ledger.open(ledger).spent.epsilon == pytest.approx(claim["epsilon"])
    assert not (out / "internal" / "ledger.db").exists()
    for file in (out / "release").rglob("*"):
        assert not file.is_file() or b"patient-" not in file.read_bytes()
    verified(out, tiny, capsys)


def test_a_dry_run_opens_no_private_image(data, tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert tiny("synthesize", tmp_path / "not-there", "--public", data.public, "--epsilon", 2, "--dry-run",
                "--out", out) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "DP-SGD: 6 steps" in said and "1,000 units (--public-size), 4 labels" in said
    assert "no budget was spent" in said and not out.exists()
    assert (
        tiny("synthesize", "demo:digits", "--public", "demo:glyphs", "--epsilon", 2, "--size", 8, "--dry-run")
        == 0
    )
    assert "about 1000 units a step" in (said := capsys.readouterr().out) and "assumed" not in said
