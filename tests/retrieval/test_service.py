"""The HTTP service on a collection and a generator that only pretend."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from sfumato.errors import InputError, LedgerError
from sfumato.retrieval.gate import Limits
from sfumato.retrieval.service import create_app

sys.path.insert(0, str(Path(__file__).parent))
from fake_service import Condition, FakeCollection, FakeGenerator

PROGRAM = Path(__file__).with_name("fake_service.py")


@pytest.fixture
def collection(tmp_path):
    return FakeCollection(tmp_path / "index", planned=3)


def asked(app, *questions, **more):
    """Answers to questions, all under way at once."""

    async def all_of_them():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
            posts = (client.post("/v1/generate", json=question, **more) for question in questions)
            return await asyncio.gather(*posts)

    return asyncio.run(all_of_them())


def got(app, path):
    async def it():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1"
        ) as client:
            return await client.get(path)

    return asyncio.run(it())


def test_pictures_the_charge_and_the_public_figures(collection):
    generator = FakeGenerator()
    app = create_app(collection, generator)
    (answer,) = asked(app, {"prompt": "a portrait", "n": 2, "seed": 7})
    found = answer.json()
    assert answer.status_code == 200
    assert {key: found[key] for key in ("cached", "private", "seed")} == {
        "cached": False, "private": True, "seed": 7,
    }  # fmt: skip
    assert found["budget"] == collection.status() and found["budget"]["queries_left"] == 2
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in found["images"]]
    again = FakeGenerator().generate(collection.condition("a portrait").vector, 0.1, 2, seed=7)
    assert len(pictures) == 2 and all(map(np.array_equal, pictures, again))
    assert got(app, "/v1/budget").json() == collection.status()


def test_the_same_prompt_is_cached_and_gets_other_pictures_without_a_seed(collection):
    app = create_app(collection, FakeGenerator())
    first, second = (asked(app, {"prompt": "a portrait"})[0].json() for _ in range(2))
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["seed"] != second["seed"] and first["images"] != second["images"]
    assert collection.charges == ["a portrait"]


def test_the_charge_comes_before_the_drawing(collection):
    class Looks(FakeGenerator):
        def generate(self, vector, noise, n, *, seed):
            assert collection.charges == ["a portrait"]
            return super().generate(vector, noise, n, seed=seed)

    assert asked(create_app(collection, Looks()), {"prompt": "a portrait"})[0].status_code == 200


def test_a_spent_budget_refuses_and_falls_back_only_when_asked_to(collection):
    app = create_app(collection, FakeGenerator())
    assert all(asked(app, {"prompt": f"prompt {i}"})[0].status_code == 200 for i in range(3))
    (refused,) = asked(app, {"prompt": "one more"})
    assert refused.status_code == 429 and refused.json() == {
        "code": "budget_exhausted", "message": "all prompts of the budget are asked. Use a prompt asked before",
    }  # fmt: skip
    (public,) = asked(app, {"prompt": "one more", "fallback": True})
    assert public.status_code == 200 and (public.json()["private"], public.json()["cached"]) == (False, False)
    assert asked(app, {"prompt": "prompt 0"})[0].json()["cached"]
    assert len(collection.charges) == 3


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "a\x00b"}, "control characters"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a", "n": 0}, "n: "),
        ({"prompt": "a", "n": 5}, "n must be at most 4"),
        ({"prompt": "a", "n": 1.5}, "n: "),
        ({"prompt": "a", "n": True}, "n: "),
        ({"prompt": "a", "n": "2"}, "n: "),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 2**53}, "seed"),
        ({"prompt": "a", "fallback": 1}, "fallback"),
        ({"prompt": "a", "steps": 9}, "steps"),
        (["a"], "the body"),
    ],
)
def test_a_bad_question_is_refused_in_words_and_costs_nothing(collection, question, names):
    generator = FakeGenerator()
    (answer,) = asked(create_app(collection, generator, limits=Limits(images=4)), question)
    assert answer.status_code == 422 and answer.json()["code"] == "invalid"
    assert names in answer.json()["message"] and "no budget was spent" in answer.json()["message"]
    assert not collection.charges and not generator.calls


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 10_000, b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}'])
def test_what_is_no_json_is_refused(collection, body):
    async def post():
        transport = httpx.ASGITransport(app=create_app(collection, FakeGenerator()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            headers = {"Content-Type": "application/json"}
            return await client.post("/v1/generate", content=body, headers=headers)

    answer = asyncio.run(post())
    assert answer.status_code in (400, 422) and answer.json()["code"] == "invalid" and not collection.charges


class Talks:
    """A source whose exceptions hold what nobody may see."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def condition(self, prompt, *, fallback=False):
        raise self.error

    def status(self):
        raise self.error


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, OSError, TypeError])
def test_a_defect_says_nothing_to_the_asker_nor_to_the_log(kind, caplog, capfd):
    app = create_app(Talks(kind("record 17 of Alice")), FakeGenerator())
    (answer,) = asked(app, {"prompt": "a secret wish"})
    assert answer.status_code == 500 and answer.json() == {"code": "internal"}
    assert got(app, "/v1/budget").json() == {"code": "internal"}
    said = caplog.text + "".join(capfd.readouterr())
    assert kind.__name__ in said and "Alice" not in said and "wish" not in said


def test_a_generator_that_fails_says_nothing_either(collection, caplog):
    class Fails:
        def generate(self, vector, noise, n, *, seed):
            raise InputError(f"cannot draw {vector}")

    (answer,) = asked(create_app(collection, Fails()), {"prompt": "a portrait"})
    assert (answer.status_code, answer.json()) == (500, {"code": "internal"})
    assert "cannot draw" not in caplog.text
    assert collection.charges == ["a portrait"]


def test_a_damaged_account_is_told_to_the_operator_only(caplog):
    app = create_app(Talks(LedgerError("/home/owner/ledger is damaged")), FakeGenerator())
    (answer,) = asked(app, {"prompt": "a portrait"})
    assert answer.status_code == 503 and answer.json()["code"] == "account"
    assert "/home" not in answer.text and "/home/owner/ledger is damaged" in caplog.text


def test_an_infinite_epsilon_is_null(collection):
    collection.status = lambda: {"epsilon": float("inf"), "delta": 0.0, "queries_left": None}
    budget = got(create_app(collection, FakeGenerator()), "/v1/budget").json()
    assert budget == {"epsilon": None, "delta": 0.0, "queries_left": None}


def test_32_requests_at_once_are_drawn_one_at_a_time_and_charged_once_a_prompt(tmp_path):
    collection, generator = FakeCollection(tmp_path / "index", planned=100), FakeGenerator(seconds=0.005)
    app = create_app(collection, generator)
    answers = asked(app, *({"prompt": f"prompt {i % 8}"} for i in range(32)))
    assert [answer.status_code for answer in answers] == [200] * 32
    assert generator.together == 1 and len(generator.calls) == 32
    assert sorted(collection.charges) == [f"prompt {i}" for i in range(8)]
    assert sum(not answer.json()["cached"] for answer in answers) == 8


def test_a_full_queue_is_said_and_not_charged_and_others_are_answered_meanwhile(collection):
    held, drawing = threading.Event(), threading.Event()

    class Waits(FakeGenerator):
        def generate(self, vector, noise, n, *, seed):
            drawing.set()
            assert held.wait(30)
            return super().generate(vector, noise, n, seed=seed)

    app = create_app(collection, Waits(), limits=Limits(waiting=2))

    async def all_of_it():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            def ask(prompt):
                return asyncio.create_task(client.post("/v1/generate", json={"prompt": prompt}))

            try:
                two = [ask("one"), ask("two")]
                await asyncio.to_thread(drawing.wait, 30)
                busy = await ask("three")
                meanwhile = (await client.get("/healthz")).json(), (await client.get("/v1/budget")).json()
            finally:
                held.set()
            done = [(await task).status_code for task in two]
            return busy, meanwhile, done, (await ask("one")).status_code

    busy, (health, budget), done, later = asyncio.run(all_of_it())
    assert busy.status_code == 503 and busy.json()["code"] == "busy" and int(busy.headers["retry-after"]) > 0
    assert health == {"status": "ok"} and budget["queries_planned"] == 3
    assert done == [200, 200] and later == 200 and collection.charges == ["one", "two"]


def test_conditions_pass_to_the_generator_as_they_are(collection):
    collection.condition = lambda prompt, fallback=False: Condition(np.ones(6, np.float32), 0.25, True, False)
    generator = FakeGenerator()
    assert asked(create_app(collection, generator), {"prompt": "a", "n": 3, "seed": 2**53 - 1})[0].is_success
    assert generator.calls == [(0.25, 3, 2**53 - 1)]
    assert json.dumps(collection.status())
