"""A whole audit on tiny sets: verdicts, what is written where, resuming, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sfumato.audit import attacks, run
from sfumato.audit.canaries import plant
from sfumato.audit.options import AuditOptions
from sfumato.audit.run import audit
from sfumato.audit.side import SideSettings
from sfumato.cli.audit import table
from sfumato.cli.main import main
from sfumato.data.images import OwnerOnly
from sfumato.data.release import ReleaseWriter, refuse_private
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.networks import unet
from sfumato.diffusion.sampling import Sampler
from sfumato.errors import InputError

SIDE = 8


def pictures(count: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1))
    return np.repeat(np.repeat(coarse, SIDE // 4, axis=1), SIDE // 4, axis=2).astype(np.uint8)


def noisy(images: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 4, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with train.npz and held.npz (two labels each)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few = SideSettings(
        synthetic_images=60, clusters=(4,), scales=(2.0, 4.0), pilot=10, steps=4, batch=16, cohesion=0.1
    )
    monkeypatch.setattr(attacks, "SideSettings", lambda: few)
    monkeypatch.setattr(run, "MEMBERS", 60)
    for name, count, seed in (("train", 300, 1), ("held", 300, 2)):
        labels = np.array(["a", "b"])[np.arange(count) % 2]
        np.savez(f"{name}.npz", images=pictures(count, seed), labels=labels)
    return tmp_path


@pytest.fixture
def model(place):
    torch.manual_seed(0)
    network = unet("tiny", size=(SIDE, SIDE), channels=1, num_labels=2)
    Generator(network, ("a", "b"), sampler=Sampler(steps=3)).save_pretrained(place / "model")
    return "model"


def options(target: str, **given) -> AuditOptions:
    fixed = {"train": "train.npz", "holdout": "held.npz", "out": "out"}
    return AuditOptions(target=target, **(fixed | given))


def images(name: str, *parts: np.ndarray) -> str:
    np.savez(f"{name}.npz", images=np.concatenate(parts))
    return f"{name}.npz"


def test_copies_among_generated_images_fail_the_policy(place):
    spec = images("made", noisy(pictures(300, 1)[:150], 3), pictures(150, 4))
    done = audit(options(spec))
    result = done.result.value
    assert (result["verdict"], done.exit_status) == ("fail", 3)
    assert result["attacks"]["released"]["ams"] == pytest.approx(0.5, abs=0.03)
    assert result["attacks"]["released"]["ci"][0] > 0.3
    skipped = {each["attack"]: each["why"] for each in result["skipped"]}
    assert set(skipped) == {"side", "conditioned", "membership", "cliques"}
    assert "needs the model" in skipped["side"] and "needs the model" in result["side"]["skipped"]
    assert result["target"]["images"] == 300 and result["epsilon_lower_bound"] is None


def test_fresh_images_do_not_fail(place):
    done = audit(options(images("made", pictures(1500, 5)), policy=None))
    assert done.exit_status == 0, done.result.value["reasons"]


def test_everything_is_for_the_owner_and_lies_under_internal(place):
    done = audit(options(images("made", pictures(100, 5))))
    assert isinstance(done.result, OwnerOnly)
    with pytest.raises(InputError, match="without a guarantee"):
        refuse_private(done.result, "audit.json")
    assert {path.name for path in (place / "out").iterdir()} == {"internal"}
    written = json.loads((place / "out/internal/audit/audit.json").read_text())
    assert written.pop("not_for_release") is True and written == json.loads(json.dumps(done.result.value))
    for name in ("report.html", "report-redacted.html"):
        page = (place / "out/internal/audit" / name).read_text()
        assert page.startswith("<!-- not for release -->") and result_says(done) in page


def result_says(done) -> str:
    return {"pass": "PASS", "fail": "FAIL", "undecided": "UNDECIDED"}[done.result.value["verdict"]]


def test_the_redacted_page_has_no_private_picture(place):
    audit(options(images("made", noisy(pictures(300, 1)[:150], 3))))
    full, redacted = (
        (place / "out/internal/audit" / name).read_text() for name in ("report.html", "report-redacted.html")
    )
    assert "data:image" in full and "data:image" not in redacted
    assert "train.npz" not in redacted and "held.npz" not in redacted


def test_a_model_gets_every_attack_and_the_same_command_draws_nothing_again(model, monkeypatch):
    asked = options(model, num_images=60, similarity="tiles", guidance_features="pixels")
    first = audit(asked).result.value
    assert set(first["attacks"]) >= {
        "random",
        "side",
        "side-shuffled",
        "conditioned",
        "carlini",
        "gu",
        "cliques",
    }
    assert set(first["membership"]) == {"loss", "secmi", "pia", "sima"}
    assert first["side"]["kept"] >= 2 and len(first["side"]["pilot"]) == 2 and not first["skipped"]
    assert table(first)
    monkeypatch.setattr("sfumato.audit.target.GeneratorModel.sample", refused)
    monkeypatch.setattr(run, "MEMBERSHIP", dict.fromkeys(run.MEMBERSHIP, refused))
    again = audit(asked).result.value
    assert again["attacks"] == first["attacks"] and again["membership"] == first["membership"]


def test_adapters_can_take_the_classifier_s_place(model):
    asked = options(
        model, num_images=50, attacks="side", similarity="tiles", guidance_features="pixels", surrogate="lora"
    )
    result = audit(asked).result.value
    assert {"side", "side-shuffled", "conditioned"} <= set(result["attacks"]) and result["side"]["kept"] >= 2


def refused(*_, **__):
    raise AssertionError("drawn or computed again")


@pytest.mark.parametrize(("without", "known"), [((), True), (("train",), False), (("held",), False)])
def test_membership_asks_about_both_sides_in_one_way(model, place, monkeypatch, without, known):
    for name in without:
        with np.load(f"{name}.npz") as file:
            np.savez(f"{name}.npz", images=file["images"])
    asked = []

    def score(_, images, labels, *, seed):
        asked.append(labels is not None)
        return np.random.default_rng(len(asked)).normal(size=len(images))

    monkeypatch.setattr(run, "MEMBERSHIP", {"loss": score})
    audit(options(model, num_images=60, attacks="membership"))
    assert asked == [known, known]


def test_another_seed_draws_anew(model, place):
    for seed in (0, 0, 1):
        audit(options(model, num_images=60, attacks="random", seed=seed))
    drawn = [np.load(path)["images"] for path in (place / "out/internal/audit/work").glob("random-*/*.npz")]
    assert len(drawn) == 2 and (drawn[0] != drawn[1]).any()


def test_a_constant_generator_has_no_surrogate_and_no_verdict(model, monkeypatch):
    def constant(self, num_images, **_):
        return np.full((num_images, SIDE, SIDE, 1), 128, np.uint8), np.arange(num_images) % 2

    monkeypatch.setattr("sfumato.audit.target.GeneratorModel.sample", constant)
    result = audit(options(model, num_images=60, similarity="tiles", guidance_features="pixels")).result.value
    assert any("no usable surrogate condition" in each["why"] for each in result["skipped"])
    assert "side" not in result["attacks"] and result["attacks"]["random"]["filtered"] == 60
    assert result["verdict"] == "undecided" and "blank" in " ".join(result["reasons"])


def test_duplicates_count_once_and_overlaps_leave_both_sets(place):
    np.savez("twice.npz", images=np.concatenate([pictures(300, 1), pictures(300, 1), pictures(20, 2)]))
    result = audit(options(images("made", pictures(100, 5)), train="twice.npz")).result.value
    assert result["train"]["images"] == 620 and result["train"]["groups"] == 320
    assert result["holdout"] | {"description": ""} == {
        "description": "", "images": 280, "given": 300, "removed_overlap": 20
    }  # fmt: skip


def test_repeating_pictures_that_are_in_both_sets_does_not_pass(place):
    common = pictures(20, 9)
    np.savez("train20.npz", images=np.concatenate([pictures(300, 1), *[common] * 5]))
    np.savez("held20.npz", images=np.concatenate([pictures(300, 2), common]))
    sets = {"train": "train20.npz", "holdout": "held20.npz", "attacks": "random"}
    made = np.concatenate([noisy(np.repeat(common, 75, axis=0), 3), pictures(500, 4)])
    done = audit(options(images("made", made), **sets))
    result = done.result.value
    assert result["attacks"]["released"]["shared"] >= 1500 and result["attacks"]["released"]["matches"] < 150
    assert done.exit_status == 4 and "in --train and in --holdout" in result["sentence"]
    fresh = audit(options(images("fresh", pictures(1500, 5)), **sets | {"out": "other"}))
    assert fresh.exit_status == 0 and fresh.result.value["attacks"]["released"]["shared"] < 15


def test_a_holdout_of_another_kind_withholds_the_verdict(place):
    np.savez("bright.npz", images=np.clip(pictures(300, 2).astype(int) + 60, 0, 255).astype(np.uint8))
    done = audit(options(images("made", noisy(pictures(300, 1), 3)), holdout="bright.npz"))
    assert done.exit_status == 4 and "told apart without the model" in done.result.value["sentence"]


def test_a_threshold_that_would_not_see_copies_lets_nothing_pass(place):
    black = np.isin(np.arange(SIDE), (0, SIDE - 2, SIDE - 1))[:, None]
    train, other = (np.where(black, 0, pictures(300, seed)).astype(np.uint8) for seed in (1, 2))
    np.savez("framed.npz", images=train)
    np.savez("shifted.npz", images=np.concatenate([np.roll(train[::30], 1, axis=2), other[10:]]))
    done = audit(options(images("made", train), train="framed.npz", holdout="shifted.npz"))
    result = done.result.value
    assert done.exit_status == 4 and "copies could pass unseen" in result["sentence"], result["reasons"]
    assert {"carlini", "gu"} <= {each["attack"] for each in result["skipped"]}


def test_a_small_holdout_decides_nothing_but_is_reported(place):
    np.savez("few.npz", images=pictures(60, 2))
    done = audit(options(images("made", noisy(pictures(300, 1), 3)), holdout="few.npz"))
    result = done.result.value
    assert done.exit_status == 4 and result["attacks"] == {} and result["threshold"] is None
    assert any("60 held-out images" in each["why"] for each in result["skipped"])


def test_canaries_bound_epsilon_and_contradict_a_false_claim(place):
    plant("train.npz", count=200, out="planted", kind="pattern")
    sealed = np.load("planted/sealed.npz")["images"]
    coins = [each["included"] for each in json.loads((place / "planted/sealed.json").read_text())["canaries"]]
    writer = ReleaseWriter(place / "run")
    writer.images(noisy(sealed[np.array(coins)], 7), None, ("all",))
    claim = {
        "format": "sfumato-privacy/1",
        "unit": "image",
        "relation": "add_or_remove_one",
        "epsilon": 1.0,
        "delta": 1e-5,
    }
    writer.json("privacy.json", claim)
    writer.complete()
    done = audit(options("run", train="planted/train", canaries="planted/sealed.json"))
    bound = done.result.value["epsilon_lower_bound"]
    assert bound["epsilon"] > 1 and bound["canaries"] == 200 and bound["epsilon"] <= bound["cap"]
    assert done.exit_status == 3 and "epsilon" in done.result.value["sentence"]
    assert done.result.value["train"]["images"] == 300 + sum(coins)
    np.savez("few.npz", images=pictures(60, 2))  # canaries need no held-out images
    few = audit(options("run", train="planted/train", canaries="planted/sealed.json", holdout="few.npz"))
    assert few.exit_status == 3 and few.result.value["epsilon_lower_bound"]["epsilon"] == bound["epsilon"]


def test_an_edited_seal_and_another_training_set_are_refused(place):
    plant("train.npz", count=100, out="planted", kind="own")
    spec = images("made", pictures(100, 5))
    with pytest.raises(InputError, match="not the folder that the canaries were planted in"):
        audit(options(spec, canaries="planted/sealed.json"))
    seal = place / "planted/sealed.json"
    seal.write_text(seal.read_text().replace('"included": true', '"included": false', 1))
    with pytest.raises(InputError, match="hash does not match"):
        audit(options(spec, train="planted/train", canaries="planted/sealed.json"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"holdout": None}, "--holdout is missing"),
        ({"holdout": "train.npz"}, "hold the same images"),
        ({"train": "nowhere"}, "nowhere.*does not exist"),
        ({"policy": "nowhere.yaml"}, "nowhere.yaml"),
        ({"canaries": "nowhere.json"}, "nowhere.json"),
        ({"target": "nowhere"}, "nowhere"),
        ({"num_images": 0}, "--num-images 0"),
        ({"target": "pickled"}, "pickle"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(place, capsys, given, named):
    (place / "pickled").mkdir()
    (place / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    asked = {
        "target": images("made", pictures(60, 5)),
        "train": "train.npz",
        "holdout": "held.npz",
        "out": "out",
    } | given
    arguments = [asked.pop("target")]
    for name, value in asked.items():
        arguments += [] if value is None else ["--" + name.replace("_", "-"), str(value)]
    import re

    assert main(["audit", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert re.search(named, said[-1]) and said[-1].startswith("sfumato: error:")


def test_the_command_prints_the_verdict_last(place, capsys):
    spec = images("made", noisy(pictures(300, 1), 3))
    status = main(["audit", spec, "--train", "train.npz", "--holdout", "held.npz", "--out", "out"])
    said = capsys.readouterr().out
    assert status == 3 and "FAIL: " in said and "Nothing in it is differentially private" in said
    assert "released" in said and "report.html" in said
