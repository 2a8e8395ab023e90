"""Pictures for prompts: folders, batches, and what is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sfumato.cli.main import main
from sfumato.errors import BudgetError, InputError
from sfumato.retrieval.collection import Collection
from sfumato.retrieval.draw import ask, batch
from sfumato.retrieval.options import AskOptions, BatchOptions


def test_asking_writes_pictures_with_their_prompt_and_the_whole_price(made, tmp_path) -> None:
    index, out = made(), tmp_path / "q"
    said = ask(AskOptions(str(index), "a portrait", str(out), num_images=3))
    assert "3 pictures" in said[0] and "2 questions left" in said[0]
    rows = [json.loads(line) for line in (out / "images" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a portrait"] * 3
    assert all((out / "images" / row["file_name"]).is_file() for row in rows)
    assert 4.99 < json.loads((out / "privacy.json").read_text())["epsilon"] <= 5.0 * (1 + 1e-9)
    with pytest.raises(InputError, match="already holds something"):
        ask(AskOptions(str(index), "another", str(out)))
    again = ask(AskOptions(str(index), "a portrait", str(tmp_path / "q2"), num_images=1))
    assert "free" in again[0] or "public" in again[0]
    assert Collection.open(index).status()["queries_asked"] == 1


def test_a_batch_stops_cleanly_when_the_budget_is_spent_and_goes_on_after(made, tmp_path) -> None:
    index, prompts, out = made(), tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(f"portrait number {i}" for i in range(5)))
    options = BatchOptions(str(index), str(prompts), str(out), num_images=2)
    said = batch(options)
    assert said[0].startswith("3 of 5 prompts") and said[-1].startswith("stopped: all 3 questions")
    assert len(list((out / "images").glob("*.png"))) == 6
    first = {path.name: path.read_bytes() for path in (out / "images").glob("*.png")}
    again = batch(BatchOptions(**{**vars(options), "fallback": True}))
    assert again[0].startswith("5 of 5") and len(list((out / "images").glob("*.png"))) == 10
    assert {name: (out / "images" / name).read_bytes() for name in first} == first
    with pytest.raises(InputError, match="drawn with other options"):
        batch(BatchOptions(**{**vars(options), "seed": 1}))
    assert not list(out.rglob("*.partial"))


def test_a_killed_batch_draws_only_what_is_missing(made, tmp_path, monkeypatch) -> None:
    index, prompts, out = made(), tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("one\ntwo\nthree")
    options = BatchOptions(str(index), str(prompts), str(out), num_images=1)
    from sfumato.retrieval import draw

    drawn, honest = [], draw._drawn

    def counted(*arguments):
        drawn.append(1)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(draw, "_drawn", counted)
    with pytest.raises(KeyboardInterrupt):
        batch(options)
    batch(options)
    assert len(drawn) == 4 and Collection.open(index).status()["queries_asked"] == 3


def test_a_spent_budget_refuses_and_leaves_no_folder(made, tmp_path) -> None:
    index = made(queries=1)
    ask(AskOptions(str(index), "one", str(tmp_path / "a"), num_images=1))
    with pytest.raises(BudgetError):
        ask(AskOptions(str(index), "two", str(tmp_path / "b"), num_images=1))
    assert not (tmp_path / "b").exists()
    said = ask(AskOptions(str(index), "two", str(tmp_path / "b"), num_images=1, fallback=True))
    assert "the budget is spent: drawn without asking" in said[0]


def test_a_codebook_answers_too(made, tmp_path) -> None:
    index = made(epsilon=5.0)
    from sfumato.retrieval.codebook import Codebook
    from sfumato.retrieval.collection import open_source

    ledger = tmp_path / "mine.db"
    assert main(["ledger", "create", str(ledger), "--epsilon", "9", "--delta", "1e-5"]) == 0
    index = made("second", ledger=str(ledger))
    arguments = [
        "retrieve",
        "codebook",
        str(index),
        "--epsilon",
        "3",
        "--codes",
        "8",
        "--out",
        str(tmp_path / "code"),
    ]
    assert main(arguments) == 0
    release = tmp_path / "code" / "release"
    source = open_source(release)
    assert isinstance(source, Codebook) and source.status()["queries_left"] is None
    for prompt in ("a", "b", "c", "d", "e"):
        told = source.condition(prompt)
        assert told.vector.shape == (16,) and np.isfinite(told.vector).all()
    assert main(["retrieve", "ask", str(release), "a hat", "-n", "2", "--out", str(tmp_path / "q")]) == 0
    assert json.loads((tmp_path / "q" / "privacy.json").read_text())["epsilon"] <= 4 * (1 + 1e-9)
    with pytest.raises(InputError, match="made with another encoder"):
        open_source(release, encoder="other")
    (release / "codebook.safetensors").write_bytes(b"rubbish" * 30)
    with pytest.raises(InputError, match="damaged or no codebook"):
        open_source(release)


def test_the_command_line(made, tmp_path, capsys) -> None:
    index = made()
    assert main(["retrieve", "status", str(index)]) == 0
    assert "0 of 3 questions asked, 3 left (ball-filter)" in capsys.readouterr().out
    assert main(["retrieve", "ask", str(index), "a hat", "-n", "2", "--out", str(tmp_path / "q")]) == 0
    assert Image.open(next((tmp_path / "q" / "images").glob("*.png"))).size == (8, 8)
    capsys.readouterr()
    assert main(["retrieve", "ask", str(index), "", "--out", str(tmp_path / "q2")]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert main(["retrieve", "aks", str(index)]) == 2
    assert "Did you mean `sfumato retrieve ask`?" in capsys.readouterr().err
    assert main(["retrieve"]) == 2 and main(["retrieve", "--help"]) == 0
    assert main(["retrieve", "ask", str(index), "x", "-n", "0", "--out", str(tmp_path / "q3")]) == 2
