"""`sfumato synthesize --audit`: the release appears only if its audit passes, and nothing of the audit is in it."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from sfumato.audit import attacks, run
from sfumato.audit.options import AuditOptions
from sfumato.audit.side import SideSettings
from sfumato.synthesis import gate

LOOSE = "maximum_excess: 1\nmaximum_tpr_at_1_percent_fpr: 1\nminimum_holdout: 100\nmaximum_blind_auc: 1\n"
STRICT = "maximum_excess: 0\nmaximum_tpr_at_1_percent_fpr: 0.01\nminimum_holdout: 100\n"


@pytest.fixture
def quick(monkeypatch):
    """An audit of seconds: few images, few steps, pixels instead of an encoder."""
    few = SideSettings(
        synthetic_images=40, clusters=(3,), scales=(2.0,), pilot=5, steps=2, batch=8, cohesion=0.0
    )
    monkeypatch.setattr(attacks, "SideSettings", lambda: few)
    monkeypatch.setattr(run, "MEMBERS", 50)
    small = partial(AuditOptions, num_images=50, similarity="tiles", guidance_features="pixels")
    monkeypatch.setattr(gate, "AuditOptions", small)


@pytest.fixture
def command(data, tmp_path):
    """A run of dpdm with 200 images held out, and a policy file of the given text."""
    with np.load(data.private) as private:
        everything = private["images"]
    held = np.random.default_rng(5).integers(0, 60, (200, *everything.shape[1:]), np.uint8)
    for row, image in enumerate(held):
        (image if row < 100 else image.T)[0] = 255
    np.savez(tmp_path / "held200.npz", images=held, labels=np.repeat([0, 1], 100))

    def with_policy(text, *more):
        (tmp_path / "policy.yaml").write_text(text)
        return (
            "synthesize", data.private, "--method", "dpdm", "--epsilon", 2, "--public-size", 160, "--num-images", 60,
            "--holdout", tmp_path / "held200.npz", "--out", tmp_path / "run", "--audit",
            "--audit-policy", tmp_path / "policy.yaml", *more,
        )  # fmt: skip

    return with_policy


def test_a_failed_audit_leaves_no_release_and_a_passed_one_says_so(tiny, quick, command, tmp_path, capsys):
    out = tmp_path / "run"
    status = tiny(*command(STRICT))
    said = capsys.readouterr()
    assert status in (3, 4) and "Nothing was released" in said.err and "report.html" in said.err
    assert not (out / "release").exists() and not (out / "release.partial").exists()
    result = json.loads((out / "internal/audit/audit.json").read_text())
    assert result["verdict"] in ("fail", "undecided") and result["epsilon_claimed"]["epsilon"] <= 2
    spent = (out / "internal/ledger.db").read_bytes()

    assert tiny(*command(STRICT)) == status  # the same command asks the same audit again
    capsys.readouterr()

    assert tiny(*command(LOOSE)) == 0
    assert (out / "internal/ledger.db").read_bytes() == spent
    card = (out / "release/README.md").read_text()
    assert gate.SAID in card and gate.SAID in (out / "release/report.html").read_text()
    released = [path for path in (out / "release").rglob("*") if path.is_file()]
    for path in released:
        content = path.read_bytes()
        assert b"audit.json" not in content and b"policy.yaml" not in content, path
    assert tiny(*command(LOOSE)) == 0  # complete: nothing is done again


def test_what_is_audited_is_what_is_released(tiny, quick, command, tmp_path):
    assert tiny(*command(LOOSE)) == 0
    out = tmp_path / "run"
    with np.load(out / "internal/audit/target/images.npz") as audited:
        images = audited["images"]
    assert len(images) == 60 == len(list((out / "release/images").rglob("*.png")))
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "sfumato.json"):
        audited, released = (
            folder / name for folder in (out / "internal/audit/target/model", out / "release/model")
        )
        assert audited.read_bytes() == released.read_bytes()
    result = json.loads((out / "internal/audit/audit.json").read_text())
    assert {"released", "random", "side"} <= set(result["attacks"])
    assert result["attacks"]["released"]["num_images"] == 60


def test_without_audit_the_card_does_not_speak_of_one(tiny, command, tmp_path):
    arguments = command(LOOSE)
    assert tiny(*arguments[: arguments.index("--audit")]) == 0
    assert gate.SAID not in (tmp_path / "run/release/README.md").read_text()


def test_a_release_that_is_complete_is_not_called_audited_afterwards(tiny, command, tmp_path, capsys):
    arguments = command(STRICT)
    assert tiny(*arguments[: arguments.index("--audit")]) == 0
    before = (tmp_path / "run/config.yaml").read_bytes()
    capsys.readouterr()
    assert tiny(*arguments) == 2
    assert "was not audited" in capsys.readouterr().err
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_a_complete_release_does_not_pass_another_policy_unseen(tiny, quick, command, tmp_path, capsys):
    assert tiny(*command(LOOSE)) == 0
    (tmp_path / "strict.yaml").write_text(STRICT)
    capsys.readouterr()
    assert tiny(*command(LOOSE)[:-1], tmp_path / "strict.yaml") == 2
    assert "audited with other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: [*a[: a.index("--holdout")], *a[a.index("--holdout") + 2 :]], "Give --holdout"),
        (lambda a: [x for x in a if x != "--audit"], "--audit-policy is for --audit"),
        (lambda a: [*a[:-1], "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_the_gate_cannot_work_with_is_refused_before_anything_is_spent(
    tiny, command, tmp_path, capsys, change, says
):
    assert tiny(*change(list(command(LOOSE)))) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run/internal/ledger.db").exists()
