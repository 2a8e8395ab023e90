"""The page of the service: what it is made of, and how it behaves in a real browser where there is one."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import socket
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from sfumato.retrieval.gate import Limits
from sfumato.retrieval.service import PAGE, create_app

sys.path.insert(0, str(Path(__file__).parent))
import browser
from fake_service import FakeCollection, FakeGenerator

needs_browser = pytest.mark.skipif(
    browser.executable() is None, reason="no chromium on the path, nor named by CHROMIUM"
)
TOKEN = "a-token-of-this-test"


def served_page(**options):
    async def it():
        app = create_app(None, None, **options)  # type: ignore[arg-type]
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://localhost"
        ) as client:
            return await client.get("/")

    return asyncio.run(it())


def test_the_page_is_whole_and_needs_nothing_from_elsewhere():
    page = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<(link|script)[^>]+(href|src)=\"(?!data:,)", page)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|\son[a-z]+=|\sstyle=", page)
    assert not re.search(r"localStorage|sessionStorage|document\.cookie", page)


def test_the_policy_allows_its_script_and_style_and_nothing_else():
    answer = served_page(limits=Limits(images=7))
    rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert (
        rules["default-src"]
        == rules["base-uri"]
        == rules["form-action"]
        == rules["frame-ancestors"]
        == "'none'"
    )
    assert (rules["connect-src"], rules["img-src"]) == ("'self'", "data:")
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert 'max="7"' in answer.text and "{{" not in answer.text
    assert answer.headers["content-type"].startswith("text/html")


@contextmanager
def running(app):
    """A server in a thread, and its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", loop="asyncio", http="h11"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture
def tab(tmp_path):
    with browser.opened(tmp_path / "profile") as tab:
        tab.look(width=1200)
        yield tab


def ask(tab, prompt, *, by="click"):
    tab.find("document.getElementById('prompt').value = ''")
    tab.click("#prompt")
    tab.type(prompt)
    if by == "click":
        tab.click("#go")
    else:
        tab.press("Enter")
    tab.wait(
        "!document.getElementById('go').hasAttribute('aria-disabled') && !/^Making/.test(says.textContent)"
    )
    return tab.find("says.textContent")


@needs_browser
def test_in_a_browser_prompts_become_pictures_and_the_meter_sinks(tab, tmp_path):
    collection, generator = FakeCollection(tmp_path / "index", planned=2), FakeGenerator()
    with running(create_app(collection, generator)) as url:
        tab.open(url)
        tab.wait("document.getElementById('left').textContent")
        assert tab.find("document.getElementById('left').textContent") == "2 of 2 new prompts left"
        assert tab.find("document.activeElement === document.body") and tab.find("says.textContent") == ""

        assert ask(tab, "<b>a portrait</b>").startswith("4 pictures made. Charged")
        assert tab.find("document.querySelector('#list h3').textContent") == "<b>a portrait</b>"
        shown = "[...document.querySelectorAll('#list img')]"
        tab.wait(f"{shown}.every(image => image.complete && image.naturalWidth === 32)")
        assert tab.find(f"{shown}.map(image => image.alt)") == [
            f"Picture {i} of 4: <b>a portrait</b>" for i in range(1, 5)
        ]
        assert tab.find("document.getElementById('left').textContent") == "1 of 2 new prompts left"
        assert tab.find("bar.style.width") == "50%"
        assert tab.find("meter.getAttribute('aria-valuenow')") == "1"

        assert "Free: this prompt was asked before" in ask(tab, "<b>a portrait</b>", by="Enter")
        assert "Charged" in ask(tab, "another portrait")
        assert ask(tab, "a third").startswith("The privacy budget is spent")
        assert tab.find("says.classList.contains('bad')")
        tab.click("#fallback")
        assert "Free: drawn without asking the collection" in ask(tab, "a third")
        assert tab.find("document.querySelectorAll('.answer').length") == 4
        assert collection.charges == ["<b>a portrait</b>", "another portrait"]
        # A refusal (429) is noted by the browser itself; the page's own script and policy raise nothing.
        assert all("429" in complaint for complaint in tab.complaints), tab.complaints
        assert all(address.startswith((url, "data:")) for address in tab.addresses)
        assert any(address == f"{url}v1/generate" for address in tab.addresses)


@needs_browser
def test_in_a_browser_what_cannot_be_asked_is_not_sent(tab, tmp_path):
    collection, generator = FakeCollection(tmp_path / "index", planned=2), FakeGenerator()
    with running(create_app(collection, generator, limits=Limits(images=5))) as url:
        tab.open(url)
        tab.wait("document.getElementById('left').textContent")
        assert ask(tab, "  ") == "Type a prompt first. Nothing was sent."
        field = "document.getElementById('prompt')"
        assert (
            tab.find(f"document.activeElement === {field} && {field}.getAttribute('aria-invalid')") == "true"
        )
        assert ask(tab, "a" * 1001) == "The prompt has 1,001 characters and may have 1,000. Nothing was sent."
        tab.find("document.getElementById('n').value = '6'")
        assert ask(tab, "a portrait") == "Ask for 1 to 5 pictures. Nothing was sent."
        assert tab.find("document.activeElement.id") == "n"
        assert not [address for address in tab.addresses if address.endswith("generate")]
        assert not collection.charges and not tab.complaints


@needs_browser
def test_in_a_browser_a_token_is_asked_for_and_told_apart(tab, tmp_path):
    collection = FakeCollection(tmp_path / "index", planned=2)
    with running(create_app(collection, FakeGenerator(), token=TOKEN)) as url:
        tab.open(url)
        tab.wait("document.activeElement.id === 'token'")
        assert tab.find("says.textContent") == "This service asks for an access token."
        assert tab.find("budget.hidden")
        tab.type("not-the-right-token")
        assert ask(tab, "a portrait") == "This token is not the right one. Nothing was charged."
        assert tab.find("document.activeElement.id") == "token" and not collection.charges
        tab.find("document.getElementById('token').value = ''")
        tab.type(TOKEN)
        assert ask(tab, "a portrait").startswith("4 pictures made.")
        assert not tab.find("budget.hidden")
        assert tab.find("sessionStorage.length + localStorage.length + document.cookie.length") == 0


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_in_a_browser_nothing_is_wider_than_the_window(tab, tmp_path, width):
    with running(create_app(FakeCollection(tmp_path / "index", planned=2), FakeGenerator())) as url:
        tab.look(width=width)
        tab.open(url)
        tab.wait("document.getElementById('left').textContent")
        assert ask(tab, "a" * 300).startswith("4 pictures")
        assert tab.find("document.documentElement.scrollWidth") <= width
        assert tab.find("document.querySelector('.pictures img').getBoundingClientRect().width") > 100
