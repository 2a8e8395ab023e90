"""The service on a real port: signals, workers, and what is refused before anything is opened."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from sfumato.errors import InputError
from sfumato.retrieval import serving
from sfumato.retrieval.serving import serve

sys.path.insert(0, str(Path(__file__).parent))
from fake_service import FakeCollection, FakeGenerator

PROGRAM = Path(__file__).with_name("fake_service.py")


@pytest.fixture
def collection(tmp_path):
    return FakeCollection(tmp_path / "index", planned=3)


@contextlib.contextmanager
def running(
    folder: Path, workers: int = 1, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program on a free port, and its address."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), "0", str(workers)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_real_server_answers_and_stops_cleanly(collection, kind):
    token = "a-token-of-this-test"
    with running(collection.folder, SFUMATO_TOKEN=token) as (process, url):
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.get("healthz").json() == {"status": "ok"}
            assert client.get("v1/budget").status_code == 401
            question, allowed = {"prompt": "a secret wish", "n": 2}, {"Authorization": f"Bearer {token}"}
            answer = client.post("v1/generate", json=question, headers=allowed)
            assert answer.status_code == 200 and len(answer.json()["images"]) == 2
            assert "server" not in answer.headers

            def chunks():
                yield b'{"prompt": "'
                yield from (b"a" * 1000 for _ in range(40))

            json_headers = {**allowed, "Content-Type": "application/json"}
            assert client.post("v1/generate", content=chunks(), headers=json_headers).status_code == 413
        process.send_signal(kind)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out == "stopped\n" and err == ""


def test_workers_are_processes_on_one_account(tmp_path):
    collection = FakeCollection(tmp_path / "index", planned=6)
    with running(collection.folder, workers=2, FAKE_SECONDS="0.02") as (process, url):

        def ask(i):  # a connection each, so that both workers get some
            return httpx.post(f"{url}v1/generate", json={"prompt": f"prompt {i % 8}"}, timeout=60).status_code

        with ThreadPoolExecutor(32) as pool:
            statuses = list(pool.map(ask, range(32)))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped" in out and err == ""
    assert len(collection.charges) == len(set(collection.charges)) == 6
    assert set(statuses) == {200, 429} and statuses.count(200) == 24


def test_serve_opens_a_folder_and_says_where_it_listens(collection, monkeypatch):
    said, opened = [], []
    fake = types.ModuleType("fake")
    fake.open_source = lambda folder, encoder=None: opened.append((folder, encoder)) or collection
    fake.open_generator = lambda spec, encoder: opened.append((spec, encoder)) or FakeGenerator()
    monkeypatch.setitem(sys.modules, "sfumato.retrieval.collection", fake)
    monkeypatch.setitem(sys.modules, "sfumato.retrieval.generator", fake)
    monkeypatch.setattr(serving.uvicorn.Server, "run", lambda self, sockets: None)
    before = signal.getsignal(signal.SIGTERM)
    serve("folder", generator="mine", encoder="theirs", port=0, ready=said.append)
    assert opened == [("folder", "theirs"), ("mine", "an encoder")]
    assert said[0].startswith("http://127.0.0.1:") and signal.getsignal(signal.SIGTERM) is before


def test_serve_refuses_before_it_opens_anything(tmp_path):
    with pytest.raises(InputError, match=r"--host 0\.0\.0\.0 can be reached .* --token-file"):
        serve(tmp_path, host="0.0.0.0")
    with pytest.raises(InputError, match="--workers 0"):
        serve(tmp_path, workers=0)
    with pytest.raises(InputError, match="16 to 1,024 printable"):
        serve(tmp_path, token="short")
    with pytest.raises(InputError, match="--port 99999: not a port"):
        serve(tmp_path, port=99999)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            InputError, match=rf"^--port {port}: address already in use[^\n]*Give another --port$"
        ):
            serve(tmp_path, port=port)


def test_workers_that_cannot_open_end_the_service(capfd):
    """The parent could open everything a moment ago; a worker cannot any more."""
    build = functools.partial(serving.create_app, None, None, token="short")
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(InputError, match="a worker could not start"),
    ):
        serving._supervise(build, listener, 1, lambda: None)
    assert "sfumato: error: the token must be" in capfd.readouterr().err


def test_workers_do_not_outlive_the_process_that_started_them(collection):
    with running(collection.folder, workers=2) as (process, url):
        assert httpx.get(f"{url}healthz", timeout=60).status_code == 200
        process.kill()
        process.wait()
        until = time.monotonic() + 60
        with pytest.raises(httpx.ConnectError):
            while time.monotonic() < until:
                with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError):
                    httpx.get(f"{url}healthz", timeout=60)
                time.sleep(0.05)


def test_a_worker_that_dies_is_replaced(collection):
    with running(collection.folder, workers=2) as (process, url):
        assert httpx.get(f"{url}healthz", timeout=60).status_code == 200
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("this system does not list the children of a process")
        of_it = [pid for pid in map(int, children.read_text().split()) if b"spawn_main" in cmdline(pid)]
        assert len(of_it) == 2
        os.kill(of_it[0], signal.SIGKILL)
        assert (
            process.stderr is not None
            and process.stderr.readline() == "sfumato: a worker died and is replaced\n"
        )
        assert httpx.get(f"{url}healthz", timeout=60).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize(("whole_group", "seconds"), [(False, 0.0), (True, 0.0), (True, 0.15), (True, 0.4)])
def test_a_service_that_is_still_starting_stops_too(collection, whole_group, seconds):
    """Ctrl-C reaches the workers as well, at different points of their imports."""
    with running(collection.folder, workers=2) as (process, _):
        time.sleep(seconds)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "stopped\n", "")
