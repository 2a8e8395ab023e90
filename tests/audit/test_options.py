from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.audit.options import AuditOptions
from sfumato.errors import InputError


def options(**given) -> AuditOptions:
    return AuditOptions(**({"target": "images.npz", "train": "train.npz"} | given))


def test_the_defaults_try_everything():
    asked = options()
    asked.check()
    assert asked.chosen == ("random", "side", "carlini", "membership")
    assert asked.folder == Path("runs/images-audit")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"num_images": 0}, "--num-images 0"),
        ({"num_images": 49}, "--num-images 49"),
        ({"num_images": 10**7}, "--num-images"),
        ({"size": 3}, "--size 3"),
        ({"seed": -1}, "--seed -1"),
        ({"attacks": ""}, "--attacks"),
        ({"attacks": "random,telepathy"}, "telepathy is none of"),
        ({"similarity": "efficientnet-lite0"}, "Choose two different ones"),
    ],
)
def test_what_can_never_work_is_refused_by_name(given, named):
    with pytest.raises(InputError, match=named) as refusal:
        options(**given).check()
    assert "nothing was audited" in str(refusal.value) and "\n" not in str(refusal.value)


def test_attacks_keep_their_order_and_the_extractors_may_agree_without_side():
    asked = options(attacks="membership, random", similarity="efficientnet-lite0")
    asked.check()
    assert asked.chosen == ("random", "membership")


def test_results_never_go_into_a_release(tmp_path):
    (tmp_path / "release" / "images").mkdir(parents=True)
    (tmp_path / "release" / "privacy.json").write_text("{}")
    with pytest.raises(InputError, match="lies inside the release"):
        options(out=str(tmp_path / "release" / "audit")).check()


def test_a_run_is_audited_in_its_own_folder(tmp_path):
    (tmp_path / "release" / "images").mkdir(parents=True)
    (tmp_path / "release" / "privacy.json").write_text("{}")
    (tmp_path / "internal").mkdir()
    assert options(target=str(tmp_path)).folder == tmp_path
