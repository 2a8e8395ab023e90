"""`sfumato retrieve serve`: the service on a port, in one process or in several that share one ledger."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import InputError, SfumatoError

try:
    import uvicorn

    from sfumato.retrieval.gate import TOKEN_VARIABLE, Limits, check_token, in_url, is_loopback
    from sfumato.retrieval.service import create_app
except ModuleNotFoundError as missing:
    if missing.name not in ("fastapi", "pydantic", "starlette", "uvicorn"):
        raise
    raise InputError(
        "the service needs the 'fastapi' and 'uvicorn' libraries; no budget was spent. Type: pip install "
        "'sfumato[serve]'"
    ) from None

if TYPE_CHECKING:
    from fastapi import FastAPI

SECONDS_TO_FINISH = 10
"""For requests under way when the service is told to stop."""
CANNOT_START = 3
"""Exit status of a worker that could not open the collection."""


def serve(
    folder: str | Path,
    *,
    generator: str = "portraits",
    encoder: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    workers: int = 1,
    token: str | None = None,
    limits: Limits | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Answer until SIGINT or SIGTERM; requests under way are finished first, for up to ten seconds.

    Several workers are processes that each open `folder` for themselves and share its ledger. `ready` is called with
    the address once the collection and the generator could be opened. Port 0 takes a free one. Main thread only.

    Raises:
        InputError: a host that others can reach without a token, a port in use, a worker that could not start, and
        what opening the collection or the generator raises.
    """
    if workers < 1:
        raise InputError(f"--workers {workers}: there must be at least 1; nothing was served")
    check_token(token)
    if token is None and not is_loopback(host):
        raise InputError(
            f"--host {host} can be reached from other machines, and there is no token; nothing was served. Give "
            f"--token-file, or set {TOKEN_VARIABLE}, or leave out --host"
        )
    with _listening(host, port) as listener:
        build = functools.partial(
            _open, str(folder), encoder, generator, token=token, limits=limits or Limits(), host=host
        )
        app = build()
        say = functools.partial(ready, f"http://{in_url(host)}:{listener.getsockname()[1]}/")
        if workers == 1:
            _run(app, listener, say)
        else:
            del app  # it showed that everything opens
            _supervise(build, listener, workers, say)


def _open(
    folder: str, encoder: str | None, generator: str, *, token: str | None, limits: Limits, host: str
) -> FastAPI:
    from sfumato.retrieval.collection import open_source
    from sfumato.retrieval.generator import open_generator

    source = open_source(folder, encoder=encoder)
    drawing = open_generator(generator, source.encoder)
    return create_app(source, drawing, token=token, limits=limits, host=host)


def _run(app: FastAPI, listener: socket.socket, say: Callable[[], None] = lambda: None) -> None:
    """Answer until a signal. uvicorn raises it once more at its end; by then there is nothing left to stop."""
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, server_header=False, proxy_headers=False,
        ws="none", http="h11", loop="asyncio", limit_concurrency=1000, timeout_graceful_shutdown=SECONDS_TO_FINISH,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with _on_signals(lambda *_: setattr(server, "should_exit", True)):
        say()
        server.run(sockets=[listener])


def _supervise(
    build: Callable[[], FastAPI], listener: socket.socket, workers: int, say: Callable[[], None]
) -> None:
    """Keep `workers` processes running until a signal; one that dies of something else is replaced."""
    spawn = multiprocessing.get_context("spawn")

    def started() -> SpawnProcess:
        process = spawn.Process(target=_work, args=(build, listener))
        # Ctrl-C reaches all processes at once; a worker inherits that it waits, until `_work` ignores it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return process

    resource_tracker.ensure_running()  # or the first start would, and it unblocks what `started` blocks
    asked_to_stop: list[int] = []
    with _on_signals(lambda kind, _: asked_to_stop.append(kind)):
        say()
        running: list[SpawnProcess] = []
        try:
            running += [started() for _ in range(workers)]
            while not asked_to_stop:
                wait([process.sentinel for process in running], timeout=0.2)
                for dead in [process for process in running if not process.is_alive()]:
                    if asked_to_stop:
                        break
                    if dead.exitcode == CANNOT_START:
                        raise InputError("a worker could not start, so all were stopped; its reason is above")
                    print("sfumato: a worker died and is replaced", file=sys.stderr)
                    time.sleep(1)  # not in a frenzy, should it die again
                    running[running.index(dead)] = started()
        finally:
            for process in running:
                process.terminate()
            until = time.monotonic() + 2 * SECONDS_TO_FINISH
            for process in running:
                process.join(max(0.0, until - time.monotonic()))
                process.kill()
                process.join()


def _work(build: Callable[[], FastAPI], listener: socket.socket) -> None:
    """One worker process. The parent tells it to stop, or stops it by being gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent passes Ctrl-C on as SIGTERM
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_outlived, daemon=True).start()
    try:
        app = build()
    except SfumatoError as error:
        print(f"sfumato: error: {error}", file=sys.stderr)
        raise SystemExit(CANNOT_START) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(CANNOT_START) from None
    _run(app, listener)


def _outlived() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket of `host`, first of all: opening a collection takes longer than finding a port in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        option, value = ("--host", host) if isinstance(error, socket.gaierror) else ("--port", port)
        why = getattr(error, "strerror", None) or "not a port"
        raise InputError(
            f"{option} {value}: {why.lower()}; nothing was served. Give another {option}"
        ) from None
    with listener:
        yield listener


@contextlib.contextmanager
def _on_signals(handler: Callable[..., None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` meanwhile."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, handler) for kind in kinds]
    try:
        yield
    finally:
        for kind, old in zip(kinds, before, strict=True):
            signal.signal(kind, old)
