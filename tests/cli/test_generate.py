"""`sfumato generate` on a tiny untrained generator."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.cli.main import main
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.networks import unet
from sfumato.diffusion.sampling import Sampler


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    for name, labels in (("labelled", ("cat", "dog")), ("plain", ("all",))):
        network = unet("tiny", size=(8, 8), channels=1, num_labels=len(labels))
        model = folder / name / "release" / "model"
        model.mkdir(parents=True)
        Generator(network, labels, sampler=Sampler(steps=2)).save_pretrained(model)
    return folder


def pixels(folder):
    return {
        str(file.relative_to(folder)): np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))
    }


def test_images_land_in_their_labels_folder(run_folder, tmp_path, capsys):
    out = tmp_path / "more"
    assert main(["generate", str(run_folder / "labelled"), "--num-images", "4", "--out", str(out)]) == 0
    images = pixels(out)
    assert sorted({name.split("/")[0] for name in images}) == ["cat", "dog"] and len(images) == 4
    assert all(image.shape == (8, 8) and image.dtype == np.uint8 for image in images.values())
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert {(row["file_name"].split("/")[0], row["label"]) for row in rows} == {
        ("cat", "cat"),
        ("dog", "dog"),
    }
    assert "no budget was spent" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial"))


def test_one_label_only_and_the_seed_decides(run_folder, tmp_path):
    command = ["generate", str(run_folder / "labelled" / "release"), "--num-images", "3", "--label", "dog"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main([*command, "--seed", seed, "--out", str(tmp_path / name)]) == 0
    a, b, c = (pixels(tmp_path / name) for name in "abc")
    assert {name.split("/")[0] for name in a} == {"dog"} and len(a) == 3
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(not np.array_equal(a[name], c[name]) for name in a)


def test_without_labels_there_are_no_folders(run_folder, tmp_path):
    out = tmp_path / "plain"
    assert main(["generate", str(run_folder / "plain"), "--num-images", "2", "--out", str(out)]) == 0
    assert all("/" not in name for name in pixels(out)) and len(pixels(out)) == 2


def test_guidance_is_passed_on(run_folder, tmp_path):
    command = ["generate", str(run_folder / "labelled"), "--num-images", "2", "--out"]
    assert main([*command, str(tmp_path / "a"), "--guidance", "1"]) == 0
    assert main([*command, str(tmp_path / "b"), "--guidance", "9"]) == 0
    a, b = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert any(not np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--num-images", "0"], "--num-images 0"),
        (["--guidance", "-1"], "--guidance -1"),
        (["--label", "cow"], "cat, dog"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(run_folder, tmp_path, capsys, change, says):
    command = ["generate", str(run_folder / "labelled"), "--out", str(tmp_path / "out"), *change]
    if "--num-images" not in change:
        command += ["--num-images", "2"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("sfumato: error:") and says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(run_folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["generate", str(run_folder / "plain"), "--num-images", "2", "--out", str(tmp_path)]) == 2
    assert "already holds something" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_no_model_there(tmp_path, capsys):
    assert main(["generate", str(tmp_path / "none"), "--num-images", "2", "--out", str(tmp_path / "o")]) == 2
    assert "none" in capsys.readouterr().err
