"""Making an index, adding to it, deleting from it, releasing a codebook."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest

from sfumato.errors import BudgetError, InputError
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.report.certificate import verify_certificate
from sfumato.retrieval import build
from sfumato.retrieval.build import add, build_index, default_delta, delete, read_prompts, release_codebook
from sfumato.retrieval.collection import Collection
from sfumato.retrieval.options import AddOptions, CodebookOptions, DeleteOptions, IndexOptions
from tests.retrieval.conftest import pictures
from tests.retrieval.frame import SIDE, clustered, public_side, unit


def test_an_index_is_closed_to_others_and_the_same_command_is_done(made, tmp_path) -> None:
    index = made()
    assert stat.S_IMODE(index.stat().st_mode) == 0o700
    assert stat.S_IMODE((index / "internal" / "vectors" / "state.db").stat().st_mode) == 0o600
    spent = Ledger.open(index / "internal" / "ledger.db").spent
    options = IndexOptions(
        str(tmp_path / "private"), 5.0, str(index), queries=3, public_size=60, size=SIDE, share=0.1
    )
    assert "nothing was done" in build_index(options)[0]
    assert Ledger.open(index / "internal" / "ledger.db").spent == spent
    with pytest.raises(InputError, match="other options"):
        build_index(IndexOptions(**{**vars(options), "epsilon": 6.0}))


def test_the_whole_is_looked_over_first_and_the_parts_cost_what_was_asked(made) -> None:
    index = made(public_size=None, epsilon=40.0)
    collection = Collection.open(index)
    assert abs(collection.plan.units - 60) < 40
    held = collection.reservation.ledger.reservations()
    assert [(each.label, each.status) for each in held] == [("overview", "settled"), ("retrieve", "open")]
    assert held[0].epsilon == pytest.approx(0.2 * 40, rel=1e-3) and held[0].delta == pytest.approx(2e-7)
    collection.condition("a portrait")
    claim = collection.certificate()
    assert verify_certificate(claim).ok
    assert len(claim["reservations"]) == 2 and claim["epsilon"] <= 40 * (1 + 1e-9) and claim["delta"] <= 1e-6


def test_top_k_buys_a_count_and_nothing_else(made) -> None:
    collection = Collection.open(made(public_size=None, epsilon=40.0, mechanism="topk"))
    assert [each.label for each in collection.reservation.ledger.reservations()] == ["count", "retrieve"]
    assert np.abs(collection.public.vectors - public_side().vectors).max() < 1e-3
    declared = Collection.open(made("declared", mechanism="topk"))
    assert [each.label for each in declared.reservation.ledger.reservations()] == ["retrieve"]


def test_a_collection_of_another_kind_is_found_by_its_mean_and_spread(encoder, tmp_path) -> None:
    rng, far = np.random.default_rng(0), np.eye(16)[3]
    vectors = unit(0.2 * clustered(20_000, 4) + 1.5 * far + 0.02 * rng.normal(size=(20_000, 16)))
    np.savez(tmp_path / "p.npz", vectors=vectors, ids=np.arange(20_000).astype(str))
    build_index(
        IndexOptions(str(tmp_path / "p.npz"), 8.0, str(tmp_path / "index"), queries=20, public_size=20_000)
    )
    collection = Collection.open(tmp_path / "index")
    before = public_side().vectors
    for moved, own, true in (
        (collection.public.mean(), before.mean(0), vectors.mean(0)),
        (np.cov(collection.public.vectors.T), np.cov(before.T), np.cov(vectors.T)),
    ):
        assert np.linalg.norm(moved - true) < 0.3 * np.linalg.norm(own - true)
    inside = []
    for text in (f"prompt {i}" for i in range(10)):
        direction = collection.encoder.texts([text])[0].astype(np.float64)
        ball = collection.public.ball(direction, collection.plan.public_count(collection.public))
        inside.append((vectors @ direction >= ball.threshold).sum())
        assert np.linalg.norm(collection.condition(text).vector - vectors.mean(0)) < 0.5
    assert 0.3 < np.median(inside) / collection.plan.expected < 3


def killed_the_second_time(honest):
    calls = []

    def planned(*arguments):
        calls.append(1)
        if len(calls) == 2:  # after the overview was charged
            raise KeyboardInterrupt
        return honest(*arguments)

    return planned


def test_an_interrupted_index_goes_on_on_the_same_reservation(made, monkeypatch, tmp_path) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sfumato.privacy.protected_vectors.ProtectedVectors.add", killed)
        with pytest.raises(KeyboardInterrupt):
            made()
    with monkeypatch.context() as patch:
        patch.setattr(build, "_planned", killed_the_second_time(build._planned))
        with pytest.raises(KeyboardInterrupt):
            made()
    with pytest.raises(InputError, match=r"is no index.*run that command again"):
        Collection.open(tmp_path / "index")
    index = made()
    assert len(Ledger.open(index / "internal" / "ledger.db").reservations()) == 2
    assert not Collection.open(index).condition("a portrait").cached


def test_a_ledger_with_too_little_left_is_refused_before_anything(made, tmp_path) -> None:
    Ledger.open(tmp_path / "mine.db", total=Budget(1.0, 1e-6))
    with pytest.raises(BudgetError, match="--epsilon 5 is more than"):
        made(ledger=str(tmp_path / "mine.db"))
    index = made("second", ledger=str(tmp_path / "mine.db"), epsilon=1.0)
    assert Collection.open(index).facts.ledger == str(tmp_path / "mine.db")
    with pytest.raises(InputError, match="there is no ledger"):
        made("third", ledger=str(tmp_path / "none.db"))


def test_groups_are_units(encoder, tmp_path) -> None:
    private = pictures(tmp_path / "private", 40)
    rows = [{"file_name": f"{i:04d}.png", "group_id": f"owner {i % 10}"} for i in range(40)]
    (private / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    build_index(
        IndexOptions(
            str(private),
            5.0,
            str(tmp_path / "index"),
            queries=5,
            unit="group",
            public_size=10,
            size=SIDE,
            share=0.5,
        )
    )
    collection = Collection.open(tmp_path / "index")
    assert len(np.unique(collection.private._unit_of)) == 10
    collection.condition("a portrait")
    assert collection.certificate()["unit"] == "group"
    for owner, units in (("owner 3", 10), ("owner new", 11)):  # all of one owner, known before or not
        more = pictures(tmp_path / owner, 2, seed=units, first=100 * units)
        rows = [{"file_name": path.name, "group_id": owner} for path in sorted(more.glob("*.png"))]
        (more / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        add(AddOptions(str(tmp_path / "index"), str(more)))
        assert len(np.unique(Collection.open(tmp_path / "index").private._unit_of)) == units


def test_vectors_made_elsewhere_are_taken_when_they_fit(encoder, tmp_path) -> None:
    vectors = clustered(80, 4)
    path = tmp_path / "private.npz"

    def made_of(name: str, **arrays: np.ndarray) -> Collection:
        np.savez(path, **arrays)
        build_index(IndexOptions(str(path), 5.0, str(tmp_path / name), queries=5, public_size=80, share=0.1))
        return Collection.open(tmp_path / name)

    ids = np.array([f"image-{i}" for i in range(80)])
    made_of("good", vectors=vectors, ids=ids).condition("a portrait")
    for name, arrays, said in (
        ("long", {"vectors": 2 * vectors, "ids": ids}, r"has length 2, not 1"),
        ("twice", {"vectors": vectors, "ids": np.array(["same"] * 80)}, "'same' comes twice"),
        ("wide", {"vectors": clustered(80, 4)[:, :8], "ids": ids}, "holds vectors of 16 numbers"),
        ("none", {"vectors": vectors}, "holds no vectors that can be read"),
        ("few", {"vectors": vectors, "ids": ids[:5]}, "does not give each vector one id"),
    ):
        with pytest.raises(InputError, match=said):
            made_of(name, **arrays)


def test_records_come_and_go(made, tmp_path) -> None:
    index = made()
    collection = Collection.open(index)
    collection.condition("a portrait")
    more = pictures(tmp_path / "more", 5, seed=9, first=100)
    assert "added" in add(AddOptions(str(index), str(more)))[0]
    with pytest.raises(InputError, match="in the index already"):
        add(AddOptions(str(index), str(more)))
    assert Collection.open(index).condition("a portrait").cached
    delete(DeleteOptions(str(index), ("0003.png", "0104.png")))
    again = Collection.open(index)
    assert int(again.private._alive.sum()) == 63
    assert not again.condition("a portrait").cached
    with pytest.raises(InputError, match=r"no record '0003\.png'"):
        delete(DeleteOptions(str(index), ("0004.png", "0003.png")))
    assert int(Collection.open(index).private._alive.sum()) == 63


def test_a_codebook_is_released_once_and_asked_for_ever(made, tmp_path) -> None:
    Ledger.open(tmp_path / "mine.db", total=Budget(8.0, 3e-6))
    index = made(ledger=str(tmp_path / "mine.db"))
    options = CodebookOptions(str(index), 2.0, str(tmp_path / "code"), codes=8)
    said = release_codebook(options)
    spent = Ledger.open(tmp_path / "mine.db").spent
    assert "nothing was done" in release_codebook(options)[0]
    assert Ledger.open(tmp_path / "mine.db").spent == spent
    release = tmp_path / "code" / "release"
    assert str(release) in said[1] and {p.name for p in release.iterdir()} == {
        "codebook.safetensors", "privacy.json", "README.md",
    }  # fmt: skip
    claim = json.loads((release / "privacy.json").read_text())
    assert verify_certificate(claim).ok and len(claim["reservations"]) == 2
    assert (
        2.0 < claim["epsilon"] <= 3 * (1 + 1e-9)
    )  # the overview, which the number of codes follows from, too
    with pytest.raises(BudgetError, match="codebook would cost"):
        release_codebook(CodebookOptions(str(index), 5.0, str(tmp_path / "more"), codes=8))


def test_a_dry_run_reads_nothing_and_spends_nothing(encoder, tmp_path) -> None:
    lines = build_index(
        IndexOptions("/nowhere", 5.0, str(tmp_path / "index"), public_size=1000, dry_run=True, queries=50)
    )
    assert any("participations" in line for line in lines) and lines[-1] == "Nothing was spent."
    assert not (tmp_path / "index").exists()


def test_another_encoder_needs_public_images(encoder, tmp_path) -> None:
    private = pictures(tmp_path / "private", 60)
    options = IndexOptions(
        str(private), 5.0, str(tmp_path / "index"), encoder="other", public_size=60, queries=5, size=SIDE
    )
    with pytest.raises(InputError, match="--encoder other needs --public"):
        build_index(options)
    public = pictures(tmp_path / "public", 80, seed=5)
    build_index(IndexOptions(**{**vars(options), "public": str(public)}))
    assert len(Collection.open(tmp_path / "index").public.vectors) == 80
    with pytest.raises(InputError, match="the same, or one holds the other"):
        build_index(IndexOptions(**{**vars(options), "public": str(private), "out": str(tmp_path / "again")}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epsilon": 0.0}, "--epsilon must be above 0"),
        ({"queries": 0}, "--queries must be above 0"),
        ({"delta": 2.0}, "--delta must lie between"),
        ({"neighbours": 5}, "--neighbours belongs to --mechanism topk"),
        ({"mechanism": "topk", "share": 0.1}, "--share belongs to the ball"),
        ({"mechanism": "topk", "neighbours": 0}, "--neighbours must be at least 1"),
        ({"mechanism": "topk", "interpolation": 2.0}, "--interpolation"),
        ({"dry_run": True}, "--dry-run needs --public-size"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(given, said) -> None:
    with pytest.raises(InputError, match=said):
        IndexOptions(**{"private": "x", "epsilon": 1.0, "out": "y", **given}).check()


def test_k_beyond_the_collection_is_refused_before_a_charge(encoder, tmp_path) -> None:
    private = pictures(tmp_path / "private", 60)
    with pytest.raises(InputError, match="--neighbours 100 is more than the collection's 60 units"):
        build_index(
            IndexOptions(
                str(private),
                5.0,
                str(tmp_path / "index"),
                mechanism="topk",
                neighbours=100,
                public_size=60,
                queries=5,
            )
        )
    assert not (tmp_path / "index" / "internal" / "ledger.db").exists()


def test_prompts_of_a_file_are_read_once_each_and_errors_name_the_line(tmp_path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a hat\n\n a  hat \nglasses\n")
    assert read_prompts(path, "PROMPTS") == ["a hat", "glasses"]
    path.write_text("a hat\na\x00b\n")
    with pytest.raises(InputError, match="line 2: the prompt holds a control character"):
        read_prompts(path, "PROMPTS")
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(path, "PROMPTS")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(path, "PROMPTS")


def test_delta_is_well_below_one_over_n() -> None:
    assert default_delta(None) == 1e-6 and default_delta(1000) == 1e-6
    assert default_delta(10**8) < 1e-9
