"""The model and the style bank that are shipped: whole, small, described, and made for each other."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sfumato.cli.main import main
from sfumato.personalization.plan import embedded_plan
from sfumato.personalization.style_bank import StyleBank, embedded_bank
from sfumato.personalization.text_to_image import TextToImage, embedded_folder
from sfumato.privacy.budget import Budget

LARGEST = 15e6  # bytes of the model; the bank comes beside it


@pytest.fixture(scope="module")
def model():
    return TextToImage.open("portraits")


def test_it_is_small_whole_and_holds_no_pickle():
    files = [path for path in embedded_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path != embedded_bank()) <= LARGEST
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".txt"}
    assert (
        json.loads((embedded_folder() / "model_index.json").read_text())["_class_name"]
        == "StableDiffusionPipeline"
    )


def test_its_card_names_every_source_and_no_protected_style_is_among_the_public_ones():
    card = (embedded_folder() / "README.md").read_text()
    bank = StyleBank.load(embedded_bank())
    styles = {name.split()[-1] for name in bank.names}
    assert len(styles) >= 10 and all(style in card for style in styles)
    assert not any(style.startswith(("notionists", "croodles")) for style in styles)
    assert "CC0 1.0" in card and "CC BY 4.0" in card


def test_the_bank_was_made_for_this_model(model):
    bank = StyleBank.load(embedded_bank())
    bank.check(model.fingerprint, model.dimension, model.vectors, "the embedded style bank")
    basis = bank.directions(None)
    assert np.allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-9)
    assert 0 < np.sqrt(bank.spread(basis, bank.radius(basis)).sum()) <= bank.radius(basis)


def test_a_public_style_explains_its_own_pictures_best(model):
    """The votes find the anchor's own style: the bank's tokens mean something under this model."""
    from sfumato.personalization.export import draw
    from sfumato.personalization.style_votes import style_votes
    from sfumato.personalization.text_to_image import open_pipeline

    bank = StyleBank.load(embedded_bank())
    pictures = draw(open_pipeline("portraits"), ["a portrait in the style of thumbs"] * 4, steps=10)
    best = style_votes(model, bank, draws=4)(pictures).argmax(1)
    assert sum(bank.names[i].split()[-1] == "thumbs" for i in best) >= 3


def test_the_plan_says_when_images_are_too_few():
    few, many = (" ".join(embedded_plan("dpagg-ti", Budget(1.0, 1e-5), units)) for units in (5, 500))
    assert "NOT ENOUGH" in few and "NOT ENOUGH" not in many


def test_the_default_command_runs(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "drawings").mkdir()
    for number in range(20):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
            tmp_path / "drawings" / f"{number}.png"
        )
    words = [
        "personalize",
        str(tmp_path / "drawings"),
        "--epsilon",
        "8",
        "--token",
        "<mine>",
        "--public-size",
        "20",
    ]
    assert main([*words, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert "differentially private" in capsys.readouterr().out
    release = tmp_path / "run" / "release"
    assert main(["render", "portraits", "--token-file", str(release), "--prompt", "a portrait in the style of <mine>",
                 "-n", "2", "--steps", "2", "--out", str(tmp_path / "drawn")]) == 0  # fmt: skip
    assert main(["ledger", "verify", str(release)]) == 0
