"""Hosts, tokens, foreign web pages, long and slow bodies, and the headers of every answer."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.responses import JSONResponse

from sfumato.errors import InputError
from sfumato.retrieval import gate
from sfumato.retrieval.gate import Gate, Limits, check_token, is_loopback, read_token

TOKEN = "0123456789abcdef"


class Inside:
    """What stands behind the gate; remembers the bodies that came through."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope, receive, send):
        self.bodies.append((await receive())["body"])
        await JSONResponse({"in": True}, headers={"X-Own": "kept"})(scope, receive, send)


def gated(inside, **options):
    given = {"token": None, "limits": Limits(body=100), "host": "127.0.0.1", "policy": "default-src 'none'"}
    return Gate(inside, **{**given, **options})


def sent(app, path="/v1/generate", method="POST", base="http://localhost:8080", **request):
    async def it():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **request)

    return asyncio.run(it())


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        (f"Bearer {TOKEN}0", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (f"Basic {TOKEN}", 401),
        (TOKEN, 401),
        ("Bearer \u00e4\u00f6\u00fc".encode("latin-1"), 401),
    ],
)
def test_v1_needs_the_token(header, status):
    inside = Inside()
    headers = {} if header is None else {"Authorization": header}
    for method in ("GET", "POST"):
        answer = sent(gated(inside, token=TOKEN), method=method, json={}, headers=headers)
        assert answer.status_code == status
        if status == 401:
            assert answer.json()["code"] == "unauthorized" and answer.headers["www-authenticate"] == "Bearer"
    assert len(inside.bodies) == (2 if status == 200 else 0)


def test_page_and_health_need_no_token():
    app = gated(Inside(), token=TOKEN)
    assert [sent(app, path, "GET").status_code for path in ("/", "/healthz", "/v1/budget")] == [200, 200, 401]


@pytest.mark.parametrize(
    ("host", "given", "status"),
    [
        ("127.0.0.1", "localhost", 200),
        ("127.0.0.1", "LOCALHOST:8080", 200),
        ("127.0.0.1", "127.0.0.1:1", 200),
        ("127.0.0.1", "[::1]:8080", 200),
        ("127.0.0.7", "127.0.0.7:80", 200),
        ("::1", "[::1]", 200),
        ("127.0.0.1", "evil.example:8080", 421),
        ("127.0.0.1", "localhost.evil.example", 421),
        ("127.0.0.1", "localhost@evil.example", 421),
        ("127.0.0.1", "127.0.0.7", 421),
        ("127.0.0.1", "", 421),
        ("localhost", "evil.example", 421),
        ("0.0.0.0", "pictures.example", 200),
    ],
)
def test_a_loopback_service_answers_under_its_own_names_only(host, given, status):
    app = gated(Inside(), host=host, token=TOKEN)
    answer = sent(app, "/", "GET", headers={"Host": given})
    assert answer.status_code == status
    assert status == 200 or answer.json()["code"] == "wrong_host"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:9999", "http://localhost"]
)
def test_without_a_token_other_web_pages_may_not_ask(origin):
    inside = Inside()
    answer = sent(gated(inside), json={}, headers={"Origin": origin})
    assert (answer.status_code, answer.json()["code"]) == (403, "cross_origin") and not inside.bodies
    assert not any("access-control" in name for name in answer.headers)
    assert sent(gated(inside), json={}, headers={"Origin": "http://localhost:8080"}).status_code == 200


def test_a_question_is_json_by_its_type_or_a_web_form_could_ask():
    inside = Inside()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = sent(gated(inside), content=b"{}", headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["code"]) == (415, "not_json")
    assert not inside.bodies
    kind = "application/json; charset=utf-8"
    assert sent(gated(inside), content=b"{}", headers={"Content-Type": kind}).status_code == 200


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(("length", "status"), [(0, 200), (100, 200), (101, 413), (100_000, 413)])
@pytest.mark.parametrize("chunked", [False, True])
def test_long_bodies_are_refused_however_they_are_sent(length, status, chunked):
    async def chunks():
        for start in range(0, length, 60):
            yield b"a" * min(60, length - start)

    inside = Inside()
    content = chunks() if chunked else b"a" * length
    answer = sent(gated(inside), content=content, headers=JSON)
    assert answer.status_code == status
    assert inside.bodies == ([b"a" * length] if status == 200 else [])
    if status == 413:
        assert answer.json()["code"] == "too_large" and answer.headers["connection"] == "close"


def test_a_body_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(gate, "BYTES_THROWN_AWAY", 1000)
    read = []

    async def endless():
        while True:
            read.append(100)
            yield b"a" * 100

    assert sent(gated(Inside()), content=endless(), headers=JSON).status_code == 413
    assert sum(read) == 1100


def called(app, messages):
    """Statuses that the gate answers a raw ASGI connection with, whose messages end in silence."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": headers}
    left, out = list(messages), []

    async def receive():
        return left.pop(0) if left else await asyncio.Event().wait()

    async def send(message):
        out.append(message)

    asyncio.run(app(scope, receive, send))
    return [message["status"] for message in out if message["type"] == "http.response.start"]


def test_a_body_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(gate, "SECONDS_FOR_A_BODY", 0.01)
    inside = Inside()
    part = {"type": "http.request", "body": b"{", "more_body": True}
    assert called(gated(inside), [part]) == [408] and not inside.bodies


def test_a_connection_that_breaks_off_asks_nothing():
    inside = Inside()
    part = {"type": "http.request", "body": b"{}", "more_body": True}
    assert called(gated(inside), [part, {"type": "http.disconnect"}]) == [408] and not inside.bodies


def test_every_answer_has_the_headers():
    async def broken(scope, receive, send):
        raise RuntimeError

    expected = {
        "cache-control": "no-store", "content-security-policy": "default-src 'none'", "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff", "x-frame-options": "DENY", "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
    }  # fmt: skip
    for app, headers, status in (
        (gated(Inside()), {}, 200),
        (gated(Inside(), token=TOKEN), {}, 401),
        (gated(Inside()), {"Host": "evil.example"}, 421),
        (gated(broken), {}, 500),
    ):
        answer = sent(app, json={}, headers=headers)
        assert answer.status_code == status
        assert {name: answer.headers.get(name) for name in expected} == expected
    assert sent(gated(Inside()), json={}).headers["x-own"] == "kept"


def test_a_defect_after_the_answer_began_adds_nothing_to_it(caplog):
    async def half(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("a private value")

    part = {"type": "http.request", "body": b"{}", "more_body": False}
    assert called(gated(half), [part]) == [200]
    assert "defect: RuntimeError in test_gate.py" in caplog.text and "private" not in caplog.text


def test_tokens_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("SFUMATO_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("SFUMATO_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}-of-the-file\n")
    assert read_token(str(file)) == f"{TOKEN}-of-the-file"
    with pytest.raises(InputError, match=r"--token-file .*missing: No such file"):
        read_token(str(tmp_path / "missing"))
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="not a text file"):
        read_token(str(file))


@pytest.mark.parametrize("token", ["", "short", "a b" * 10, "\u00e4" * 20, "a" * 1025, "a" * 20 + "\n"])
def test_a_token_that_is_none_is_refused_without_being_shown(token):
    with pytest.raises(InputError, match="16 to 1,024 printable characters") as error:
        check_token(token)
    assert not token or token not in str(error.value)


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "Localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.2", "example.org", "", "localhost.example")))
