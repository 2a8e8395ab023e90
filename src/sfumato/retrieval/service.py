"""The application of `sfumato retrieve serve`: pictures of a private collection over HTTP, and a page.

`POST /v1/generate`, `GET /v1/budget`, `GET /healthz`, and the page at `/`. Nothing private leaves: an answer holds
pictures made from a condition that was charged for, and public figures. Prompts are never logged: they are the asker's.
Errors are JSON, {"code": word for programs, "message": words for people}; a defect is {"code": "internal"} and no more.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import io
import math
import re
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from sfumato.errors import BudgetError, InputError, SfumatoError
from sfumato.retrieval.gate import LOG, Gate, Limits, Refusal, check_token

PAGE = Path(__file__).with_name("page.html")


class Source(Protocol):
    """What answers prompts: a `Collection` or a `Codebook`."""

    def condition(self, prompt: str, *, fallback: bool = False) -> Any:
        """A `Condition`: vector, noise, private, cached. Charged for when it returns."""
        ...

    def status(self) -> dict[str, Any]:
        """Public figures only."""
        ...


class Generator(Protocol):
    """What makes pictures of a condition."""

    def generate(self, vector: np.ndarray, noise: float, n: int, *, seed: int) -> np.ndarray:
        """uint8 [n, side, side, 3]."""
        ...


class Question(BaseModel):
    """Body of `POST /v1/generate`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    prompt: str
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    fallback: bool = False


class Asking:
    """One thread that asks and one that draws: never two drawings at once, and the event loop is never held up.

    The source is only ever used by the first and the generator by the second, so neither needs a lock.
    """

    def __init__(self, source: Source, generator: Generator, limits: Limits) -> None:
        self.source, self.generator, self.limits = source, generator, limits
        self.inside = 0
        self._asking, self._drawing = ThreadPoolExecutor(1, "asking"), ThreadPoolExecutor(1, "drawing")

    async def generate(self, question: Question) -> dict[str, Any]:
        """Charge, then draw. Raises Refusal."""
        if question.n > self.limits.images:
            raise Refusal(422, "invalid", f"n must be at most {self.limits.images}; no budget was spent")
        if self.inside >= self.limits.waiting:
            words = "too many requests are waiting; no budget was spent. Ask again in a few seconds"
            raise Refusal(503, "busy", words, {"Retry-After": "5"})
        seed = secrets.randbits(32) if question.seed is None else question.seed
        self.inside += 1
        try:
            ask = functools.partial(self.source.condition, question.prompt, fallback=question.fallback)
            try:
                condition = await self._ask(ask)
            except InputError as error:
                raise Refusal(422, "invalid", str(error)) from None
            draw = functools.partial(_drawn, self.generator, condition, question.n, seed)
            images = await asyncio.get_running_loop().run_in_executor(self._drawing, draw)
            cached, private = bool(condition.cached), bool(condition.private)
            return {
                "images": images, "seed": seed, "cached": cached, "private": private,
                "budget": await self.budget(),
            }  # fmt: skip
        finally:
            self.inside -= 1

    async def budget(self) -> dict[str, Any]:
        """The source's public figures; what JSON cannot say (infinity) as null."""
        figures = await self._ask(self.source.status)
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in figures.items()
        }

    async def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._asking, call)
        except BudgetError as error:
            raise Refusal(429, "budget_exhausted", str(error)) from None
        except InputError:
            raise
        except SfumatoError as error:
            LOG.error("%s", error)
            words = (
                "the privacy account cannot be used now, so nothing was answered. The operator has to look"
            )
            raise Refusal(503, "account", words) from None

    def close(self) -> None:
        for pool in (self._asking, self._drawing):
            pool.shutdown(wait=False, cancel_futures=True)


def _drawn(generator: Generator, condition: Any, n: int, seed: int) -> list[str]:
    """n pictures as PNG files in base64."""
    images = []
    for pixels in generator.generate(condition.vector, condition.noise, n, seed=seed):
        file = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).save(file, "PNG")
        images.append(base64.b64encode(file.getvalue()).decode())
    return images


def create_app(
    source: Source,
    generator: Generator,
    *,
    token: str | None = None,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
) -> FastAPI:
    """The service as an ASGI application.

    host: what it will listen on. On a loopback address only requests that name one are answered, or a web page
    could reach it under a name of its own (DNS rebinding).

    Raises:
        InputError: a token that is no token.
    """
    check_token(token)
    limits = limits or Limits()
    asking = Asking(source, generator, limits)

    @contextlib.asynccontextmanager
    async def closing(_: FastAPI) -> AsyncIterator[None]:
        yield
        asking.close()

    # No generated documentation, which would load scripts from elsewhere, and no telemetry, which records bodies.
    silent: Any = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)
    app = FastAPI(
        title="sfumato retrieve", lifespan=closing, docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False, telemetry=silent,
    )  # fmt: skip
    page, policy = _page(limits)

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> str:
        return page

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/budget")
    async def budget() -> dict[str, Any]:
        return await asking.budget()

    @app.post("/v1/generate")
    async def generate(question: Question) -> dict[str, Any]:
        return await asking.generate(question)

    @app.exception_handler(Refusal)
    async def refused(_: Any, refusal: Refusal) -> JSONResponse:
        return refusal.response

    @app.exception_handler(RequestValidationError)
    async def misunderstood(_: Any, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str)) or "the body"
        message = f"{where}: {first['msg']}; no budget was spent"
        return JSONResponse({"code": "invalid", "message": message}, 422)

    @app.exception_handler(HTTPException)
    async def unknown(_: Any, error: HTTPException) -> JSONResponse:
        code = {400: "invalid", 404: "not_found", 405: "wrong_method"}.get(error.status_code, "refused")
        return JSONResponse({"code": code, "message": str(error.detail)}, error.status_code, error.headers)

    app.add_middleware(Gate, token=token, limits=limits, host=host, policy=policy)
    return app


def _page(limits: Limits) -> tuple[str, str]:
    """The page, and the Content-Security-Policy that lets exactly its own script and style run."""
    page = PAGE.read_text(encoding="utf-8").replace("{{images}}", str(limits.images))

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return page, (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
