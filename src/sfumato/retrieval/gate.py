"""Who may come in to the service, and how much they may bring: hosts, tokens, web pages from elsewhere, long bodies.

It also sees to it that a defect in what it stands around says nothing: neither to the asker nor to the log.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfumato.errors import InputError

LOG = logging.getLogger("sfumato.retrieval")
TOKEN_VARIABLE = "SFUMATO_TOKEN"
SECONDS_FOR_A_BODY = 10.0
BYTES_THROWN_AWAY = 4 * 2**20


@dataclass(frozen=True)
class Limits:
    """What one asker may ask for.

    images: most pictures of one request. waiting: requests in a worker at once, drawn or waiting; further ones are
    sent away with 503. body: bytes of a request.
    """

    images: int = 16
    waiting: int = 64
    body: int = 16 * 1024


class Refusal(Exception):
    """An answer other than 200: status, code and message, and headers of its own."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.response = JSONResponse({"code": code, "message": message}, status, headers)


class Gate:
    """Around the application: who may come in, how much they may bring, and that no defect talks."""

    def __init__(self, app: ASGIApp, *, token: str | None, limits: Limits, host: str, policy: str) -> None:
        self.app, self.limits = app, limits
        self.token = None if token is None else token.encode()
        self.hosts = {"localhost", "127.0.0.1", "[::1]", in_url(host)} if is_loopback(host) else None
        headers = {
            "Cache-Control": "no-store", "Content-Security-Policy": policy, "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
        }  # fmt: skip
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun = False

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message["headers"], *self.headers]}
            await send(message)

        try:
            try:
                self._check(scope)
                await self.app(scope, await self._body(receive), guarded)
            except Refusal as refusal:
                await refusal.response(scope, receive, guarded)
        except Exception as error:
            # Where, and of which type: the text of an exception may hold a prompt or a private value.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            LOG.error(
                "defect: %s in %s, line %s", type(error).__name__, Path(frame.filename).name, frame.lineno
            )
            if not begun:
                await JSONResponse({"code": "internal"}, 500)(scope, receive, guarded)

    def _check(self, scope: Scope) -> None:
        """Raises Refusal for a stranger: wrong Host, no token, or a web page from elsewhere."""
        given = dict(scope["headers"])
        host = given.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and re.sub(r":\d+$", "", host) not in self.hosts:
            raise Refusal(421, "wrong_host", "this service answers under localhost only")
        if not scope["path"].startswith("/v1/"):
            return
        if self.token is not None:
            scheme, _, secret = given.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(secret.strip(), self.token):
                words = "a token is needed: send the header Authorization: Bearer TOKEN"
                raise Refusal(401, "unauthorized", words, {"WWW-Authenticate": "Bearer"})
        origin = given.get(b"origin", b"").decode("latin-1").lower()
        if self.token is None and origin and origin.partition("://")[2] != host:
            raise Refusal(403, "cross_origin", "another web site may not ask; no budget was spent")
        kind = given.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            words = "send the question as Content-Type: application/json; no budget was spent"
            raise Refusal(415, "not_json", words)

    async def _body(self, receive: Receive) -> Receive:
        """The body, read to its end and given again by the `receive` returned; a longer one than allowed is not kept.

        It is still read, up to `BYTES_THROWN_AWAY`: a client that is cut off while sending sees no answer.
        """
        body, length = bytearray(), 0
        try:
            async with asyncio.timeout(SECONDS_FOR_A_BODY):
                while length <= BYTES_THROWN_AWAY:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(408, "too_slow", "the request broke off; no budget was spent")
                    length += len(message.get("body", b""))
                    if length <= self.limits.body:
                        body += message.get("body", b"")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            words = "the request did not arrive in time; no budget was spent"
            raise Refusal(408, "too_slow", words, {"Connection": "close"}) from None
        if length > self.limits.body:
            words = (
                f"a request may be {self.limits.body:,} bytes long; no budget was spent. Use a shorter prompt"
            )
            raise Refusal(413, "too_large", words, {"Connection": "close"})
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again


def read_token(file: str | None) -> str | None:
    """The token of a file, or else of the environment variable SFUMATO_TOKEN, or else None.

    Raises:
        InputError: the file cannot be read, or holds no token.
    """
    if file is None:
        token = os.environ.get(TOKEN_VARIABLE)
    else:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not a text file"
            raise InputError(
                f"--token-file {file}: {why}; nothing was served. Give a file with the token in it"
            ) from None
    check_token(token)
    return token


def check_token(token: str | None) -> None:
    """Raises InputError for a token that is too short or cannot stand in a header; None is no token."""
    if token is not None and not re.fullmatch(r"[!-~]{16,1024}", token):
        raise InputError(
            "the token must be 16 to 1,024 printable characters without spaces; nothing was served. Make one with: "
            'python -c "import secrets; print(secrets.token_urlsafe())"'
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host.lower()
