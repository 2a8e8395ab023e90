"""PrivImage from Python: what is charged and certified, resuming, refusals before any cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sfumato.data.images import ProtectedImages, PublicImages
from sfumato.errors import BudgetError, InputError, LedgerError
from sfumato.machine import Defaults
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.synthesis import privimage
from sfumato.synthesis.planner import Speeds
from sfumato.synthesis.presets import PRESETS
from sfumato.synthesis.privimage import PrivImage

TINY = replace(
    PRESETS["demo"], size=8, query_steps=10, public_steps=4, public_batch=16, sampler_steps=2, enough_steps=3,
    noise_levels=1, means_per_label=0, num_images=None, time_bound=False,
)  # fmt: skip
BUDGET = Budget(2.0, 1e-5)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(privimage, "best_defaults", lambda: Defaults(1, "cpu", "float32", "fast", ""))
    monkeypatch.setattr(privimage, "measure_speeds", lambda *_, **__: Speeds(5000, 5000, 5000))


def npz(path, classes, count, seed, labelled=True):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 60, (count, 8, 8), np.uint8)
    images[np.arange(count), labels] = 255
    np.savez(path, images=images, **({"labels": labels} if labelled else {}))
    return path


@pytest.fixture
def made(tmp_path):
    """(private, public, ledger) of two labels and four public classes; the number of units is not declared."""
    ledger = Ledger.open(tmp_path / "l.db", total=Budget(3.0, 1e-4))
    common = {"size": 8, "channels": 1, "cache_dir": tmp_path / "cache"}
    private = ProtectedImages(npz(tmp_path / "a.npz", 2, 300, 0), ledger=ledger, **common)
    public = PublicImages(npz(tmp_path / "b.npz", 4, 120, 1), **common)
    return private, public, ledger


def model(tmp_path, **more):
    return PrivImage(
        **{"budget": BUDGET, "preset": TINY, "num_images": 4, "work_dir": tmp_path / "work", **more}
    )


def test_everything_is_charged_once_however_often_it_is_prepared(made, tmp_path):
    private, public, ledger = made
    fitted = model(tmp_path)
    plan = fitted.prepare(private, public)
    assert fitted.prepare(private, public) == plan
    fitted.fit(private, public)
    assert [each.label for each in fitted.reservations] == ["count", "synthesize"]
    assert [each.id for each in fitted.reservations] == [each.id for each in ledger.reservations()]
    assert ledger.spent.epsilon == pytest.approx(sum(each.epsilon for each in fitted.reservations))
    assert 0.95 * 2 < ledger.spent.epsilon <= 2 * (1 + 1e-9)
    assert ledger.spent.delta == 1e-5 and fitted.reservations[0].delta == 0
    assert fitted.reservations[1].begun("dp_sgd") == 3

    # Again, from what is kept: nothing more is charged, the generator is the same.
    head = ledger.head
    again = model(tmp_path).fit(private, public)
    assert ledger.head == head
    assert np.array_equal(again.generate(4, seed=3)[0], fitted.generate(4, seed=3)[0])
    assert [stage.name for stage in again.stages] == [stage.name for stage in fitted.stages]
    assert again.selection == fitted.selection


def test_a_run_that_dies_in_dp_sgd_pays_for_each_step_once(made, tmp_path, monkeypatch):
    private, public, ledger = made
    right, calls = privimage.dp_sgd, []

    def dying(net, data, plan, reservation, **more):
        calls.append(1)
        if len(calls) == 1:
            reservation.begin("dp_sgd", plan.event, 2)
            raise KeyboardInterrupt
        return right(net, data, plan, reservation, **more)

    monkeypatch.setattr(privimage, "dp_sgd", dying)
    with pytest.raises(KeyboardInterrupt):
        model(tmp_path).fit(private, public)
    spent = ledger.spent.epsilon
    fitted = model(tmp_path).fit(private, public)
    assert ledger.spent.epsilon == spent and len(ledger.reservations()) == 2
    assert fitted.reservations[1].begun("dp_sgd") == 3 and fitted.reservations[1].status == "settled"


def test_public_only_charges_nothing_and_opens_no_private_pixel(made, tmp_path):
    private, public, ledger = made
    head = ledger.head
    private._images = private._units = None  # any use of them would fail
    fitted = model(tmp_path, method="public-only").fit(private, public)
    assert ledger.head == head and fitted.reservations == []
    images, labels = fitted.generate(4)
    assert images.shape == (4, 8, 8, 1) and labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("method", "mechanisms", "classes"),
    [
        ("privimage", ["semantic_histogram", "dp_sgd"], 4),
        ("privimage+feta", ["semantic_histogram", "mean_images", "dp_sgd"], 4),
        ("dpdm", ["dp_sgd"], None),
        ("feta", ["mean_images", "dp_sgd"], None),
        ("pdp", ["dp_sgd"], 4),
        ("random-selection", ["dp_sgd"], 2),
    ],
)
def test_each_method_asks_what_it_says_and_spends_what_it_was_given(
    made, tmp_path, method, mechanisms, classes
):
    private, public, ledger = made
    private.public_size = 300
    preset = replace(TINY, means_steps=2, classes_per_label=2 if "privimage" in method else 1)
    fitted = model(tmp_path, method=method, preset=preset).fit(private, public)
    assert [planned.mechanism for planned in fitted.reservations[0].planned] == mechanisms
    assert 0.95 * 2 < ledger.spent.epsilon <= 2 * (1 + 1e-9)
    if classes is None:
        assert fitted.selected is None and fitted.public_generator is None
    else:
        assert fitted.selected is not None and len(fitted.selected.images) == 30 * classes
    assert fitted.generate(4)[0].shape == (4, 8, 8, 1)


def test_private_evolution_releases_the_images_that_were_voted_for(made, tmp_path):
    private, public, ledger = made
    private.public_size = 300
    preset = replace(TINY, votes=3, population=8, votes_encoder="pixels", sampler_steps=4)
    fitted = model(tmp_path, method="pe", preset=preset).fit(private, public)
    [reservation] = fitted.reservations
    assert [(p.mechanism, p.count) for p in reservation.planned] == [("nearest_neighbour_histogram", 3)]
    assert reservation.begun("nearest_neighbour_histogram") == 3
    assert 0.95 * 2 < ledger.spent.epsilon <= 2 * (1 + 1e-9)
    images, labels = fitted.generate(4)
    assert images.shape == (4, 8, 8, 1) and labels.tolist() == [0, 0, 1, 1]
    assert fitted.generate(2, labels=[1, 0])[0].tolist() == images[[2, 0]].tolist()
    with pytest.raises(InputError, match="ask for fewer"):
        fitted.generate(6)
    assert any("has learnt nothing from the sensitive images" in warning for warning in fitted.warnings)

    # Again, from what is kept: the same images, nothing more is charged.
    head = ledger.head
    assert np.array_equal(
        model(tmp_path, method="pe", preset=preset).fit(private, public).generate(4)[0], images
    )
    assert ledger.head == head


def test_a_model_that_another_account_paid_for_is_not_gone_on_from(made, tmp_path):
    """Answers and run.json deleted, another ledger put in place: the start model still rests on the first."""
    private, public, _ = made
    private.public_size = 300
    preset = replace(TINY, means_per_label=1, means_steps=2)
    model(tmp_path, preset=preset).fit(private, public)
    work = tmp_path / "work"
    for name in ("run.json", "mean_images.npy", "semantic_histogram.npy", "dp_sgd.safetensors"):
        (work / name).unlink(missing_ok=True)
    (work / "private").rename(tmp_path / "gone")
    private.ledger = other = Ledger.open(tmp_path / "other.db", total=Budget(3.0, 1e-4))
    with pytest.raises(LedgerError, match="another reservation"):
        model(tmp_path, preset=preset).fit(private, public)
    assert all(each.begun("dp_sgd") == 0 for each in other.reservations())


def test_counted_work_does_not_hang_on_the_machine(made, tmp_path, monkeypatch):
    private, public, _ = made
    private.public_size = 300

    def never(*_, **__):
        pytest.fail("the machine was measured")

    monkeypatch.setattr(privimage, "measure_speeds", never)
    speeds = Speeds(100, 100, 100)
    fitted = model(
        tmp_path, preset=replace(TINY, time_bound=True), seconds=60, num_images=20, speeds=speeds
    ).prepare(private, public)
    assert fitted.public_seconds is None and fitted.public_steps > 10


def test_mean_images_are_a_part_of_the_same_reservation(made, tmp_path):
    private, public, ledger = made
    fitted = model(tmp_path, preset=replace(TINY, means_per_label=2, means_steps=2)).fit(private, public)
    mechanisms = [planned.mechanism for planned in fitted.reservations[1].planned]
    assert mechanisms == ["semantic_histogram", "mean_images", "dp_sgd"]
    assert fitted.means is not None and fitted.means.shape == (2, 2, 8, 8, 1)
    assert ledger.spent.epsilon <= 2 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("method", "public", "says"),
    [
        ("privimage", None, "needs public images"),
        ("public-only", None, "needs public images"),
        ("magic", None, "unknown method"),
        ("privimage", "unlabelled", "need a label each"),
        ("privimage", "private", "are the same"),
        ("privimage", "one class", "at least as many public classes"),
    ],
)
def test_what_cannot_work_is_refused_before_it_costs(made, tmp_path, method, public, says):
    private, _, ledger = made
    common = {"size": 8, "channels": 1, "cache_dir": tmp_path / "cache"}
    private.public_size = 300
    chosen = {
        None: lambda: None,
        "unlabelled": lambda: PublicImages(npz(tmp_path / "u.npz", 4, 40, 1, labelled=False), **common),
        "private": lambda: PublicImages(tmp_path / "a.npz", **common),
        "one class": lambda: PublicImages(npz(tmp_path / "c.npz", 1, 40, 1), **common),
    }[public]()
    with pytest.raises(InputError, match=says):
        model(tmp_path, method=method).fit(private, chosen)
    assert ledger.reservations() == []


def test_more_than_the_ledger_has_is_refused(made, tmp_path):
    private, public, ledger = made
    private.public_size = 300
    with pytest.raises(BudgetError, match="no budget was spent"):
        model(tmp_path, budget=Budget(4.0, 1e-5)).fit(private, public)
    assert ledger.spent.epsilon == 0


def test_before_fitting_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(InputError, match="has not been fitted"):
        model(tmp_path).generate(3)


def test_votes_whose_answers_were_lost_are_said(made, tmp_path, monkeypatch):
    private, public, _ = made
    preset = replace(TINY, votes=3, population=8, votes_encoder="pixels")
    whole = privimage.evolve
    monkeypatch.setattr(
        privimage, "evolve", lambda *given, **more: replace(whole(*given, **more), iterations_applied=2)
    )
    fitted = model(tmp_path, method="pe", preset=preset).fit(private, public)
    assert any(warning.startswith("1 of 3 votes") for warning in fitted.warnings)
