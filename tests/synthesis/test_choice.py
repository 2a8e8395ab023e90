"""`sfumato select`: the better release is chosen, once, and paid for."""

import json

import numpy as np
import pytest

from sfumato.errors import BudgetError, InputError
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.synthesis.choice import select


def write_images(path, *, right, count=300, seed=0, labelled=True):
    """Bars at the place of the label; with `right` False labels say nothing."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = rng.integers(0, 60, (count, 8, 8), np.uint8)
    shown = labels if right else rng.integers(2, size=count)
    for image, place in zip(images, shown, strict=True):
        image[place * 4] = 255
    np.savez(path, images=images, **({"labels": labels} if labelled else {}))
    return str(path)


@pytest.fixture
def made(tmp_path):
    ledger = tmp_path / "held.ledger.db"
    Ledger.open(ledger, total=Budget(1.0, 0.0))
    options = {
        "releases": (
            write_images(tmp_path / "bad.npz", right=False, seed=1),
            write_images(tmp_path / "good.npz", right=True, seed=2),
        ),
        "by": write_images(tmp_path / "held.npz", right=True, seed=3),
        "epsilon": 0.5, "ledger": str(ledger), "out": str(tmp_path / "choice"), "steps": 60,
    }  # fmt: skip
    return options


def test_the_better_release_is_chosen_and_paid_for_once(made, tmp_path):
    choice = select(**made)
    assert choice.position == 1 and choice.release.endswith("good.npz")
    ledger = Ledger.open(made["ledger"])
    assert ledger.spent.epsilon == pytest.approx(0.5) and ledger.spent.delta == 0
    claim = json.loads((tmp_path / "choice" / "privacy.json").read_text())
    assert claim["epsilon"] == pytest.approx(0.5) and claim["epsilon_replace_one"] == pytest.approx(
        1.0, rel=1e-3
    )
    assert json.loads((tmp_path / "choice" / "selection.json").read_text())["chosen"] == choice.release
    head = ledger.head
    assert select(**made).release == choice.release
    assert Ledger.open(made["ledger"]).head == head
    assert not any(b"held.npz" in file.read_bytes() for file in (tmp_path / "choice").glob("*.json"))


def test_another_question_in_the_same_folder_is_refused(made):
    select(**made)
    head = Ledger.open(made["ledger"]).head
    with pytest.raises(InputError, match="holds another choice"):
        select(**{**made, "releases": made["releases"][::-1]})
    assert Ledger.open(made["ledger"]).head == head


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"epsilon": 0.0}, InputError, "--epsilon"),
        ({"epsilon": float("nan")}, InputError, "--epsilon"),
        ({"steps": 0}, InputError, "--steps"),
        ({"releases": ("one",)}, InputError, "two releases"),
        ({"epsilon": 2.0}, BudgetError, "no budget was spent"),
    ],
)
def test_bad_input_spends_nothing(made, change, error, says):
    with pytest.raises(error, match=says):
        select(**{**made, **change})
    assert Ledger.open(made["ledger"]).spent.epsilon == 0


@pytest.mark.parametrize("which", ["by", "release"])
def test_unlabelled_images_cannot_judge_or_be_judged(made, tmp_path, which):
    plain = write_images(tmp_path / "plain.npz", right=True, seed=4, labelled=False)
    change = {"by": plain} if which == "by" else {"releases": (made["releases"][0], plain)}
    with pytest.raises(InputError, match="without labels"):
        select(**{**made, **change})
    assert Ledger.open(made["ledger"]).reservations() == []
