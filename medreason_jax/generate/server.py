"""An OpenAI-compatible HTTP server of one model.

The event loop checks requests and writes answers; the engine's thread does the rest. A client that
leaves cancels its request. After `drain` new requests get 503 and the running ones are finished.
"""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from medreason_jax.data.chat import ChatTokenizer
from medreason_jax.generate.answering import Answer, Limits, plan
from medreason_jax.generate.engine_thread import CutOff, Driver, Unfit
from medreason_jax.generate.protocol import (
    ChatRequest,
    CompletionRequest,
    Refusal,
    read_request,
)
from medreason_jax.generate.replies import CHAT, TEXT, make_head
from medreason_jax.generate.text_stream import TokenTexts

BODY_SECONDS = 60.0  # for a client to send its request
STALLED_SECONDS = 120.0  # for a client to take a part of its answer
LONGEST_RETRY_AFTER = 60
JSON_TYPE = "application/json"
LEFT = 499  # of an answer that nobody gets
Result = TypeVar("Result")


class Service:
    """One model behind the endpoints; lives on one event loop."""

    def __init__(
        self,
        name: str,
        tokenizer: ChatTokenizer,
        driver: Driver,
        limits: Limits,
        api_key: str | None = None,
    ):
        self.name, self.tokenizer, self.driver, self.limits = name, tokenizer, driver, limits
        self.draining = False
        self.cut_off: int | None = None  # answers, when it was told to end now
        self.stop: Callable[[], None] = lambda: None  # ends the HTTP server
        self._api_key = None if api_key is None else api_key.encode()
        self._texts = TokenTexts(tokenizer)
        self._seconds = 1.0  # that answers took lately
        self._created = int(time.time())
        driver.when_idle = self._when_idle
        driver.when_failed = self._when_failed

    def app(self) -> Starlette:
        """The HTTP application."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._told(self._chat), methods=["POST"]),
                Route("/v1/completions", self._told(self._completions), methods=["POST"]),
                Route("/v1/models", self._told(self._models)),
                Route("/health", self._health),
            ],
            exception_handlers={HTTPException: _http_error, Exception: _server_error},
        )

    # --- life -----------------------------------------------------------------------------------

    def drain(self) -> None:
        """Finish what is running and end; asked for again, end now."""
        if self.draining:
            self.cut_off = self.driver.cut_off("the server was told to end")
        self.draining = True
        if self.cut_off is not None or self.driver.used == 0:
            self.stop()

    def _when_idle(self) -> None:
        if self.draining:
            self.stop()

    def _when_failed(self) -> None:
        self.stop()

    # --- endpoints ------------------------------------------------------------------------------

    async def _chat(self, http: HttpRequest) -> Response:
        asked = read_request(ChatRequest, await self._body(http))
        return await self._answer(http, asked)

    async def _completions(self, http: HttpRequest) -> Response:
        asked = read_request(CompletionRequest, await self._body(http))
        return await self._answer(http, asked)

    async def _models(self, _: HttpRequest) -> Response:
        model = {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "medreason",
            "max_model_len": self.limits.length,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, _: HttpRequest) -> Response:
        failed = self.driver.failure is not None
        status = "failed" if failed else "draining" if self.draining else "ok"
        facts = {"used": self.driver.used, "capacity": self.driver.capacity}
        body = {"status": status, "model": self.name, **facts}
        return JSONResponse(body, status_code=200 if status == "ok" else 503)

    async def _answer(self, http: HttpRequest, asked: ChatRequest | CompletionRequest) -> Response:
        if asked.model != self.name:
            message = f"model={asked.model!r:.80} is not served here; the model is {self.name!r}"
            raise Refusal(404, message, param="model", code="model_not_found")
        work = await asyncio.to_thread(plan, asked, self.tokenizer, self.limits)
        mailbox = self._admit(work.requests, work.to_score)
        shape = CHAT if isinstance(asked, ChatRequest) else TEXT
        head = make_head(shape, uuid.uuid4().hex, self.name)
        answer = Answer(work, head, self._texts, self.driver, mailbox)
        if asked.stream:
            options = asked.stream_options
            chunks = answer.chunks(options is not None and options.include_usage)
            return EventStream(events(chunks), self._closing(answer))
        close = self._closing(answer)
        try:
            body = await unless_gone(http.receive, answer.whole())
        finally:
            close()
        return Response(status_code=LEFT) if body is None else JSONResponse(body)

    def _admit(self, requests, texts):
        """The mailbox of an answer, or the reason why it cannot be made now."""
        if self.draining:
            message = "the server is ending; ask another"
            raise Refusal(503, message, kind="server_error", headers={"Connection": "close"})
        mailbox = self.driver.open(requests, texts)
        if mailbox is None:
            wait = min(max(1, round(self._seconds)), LONGEST_RETRY_AFTER)
            raise Refusal(
                429,
                f"all {self.limits.pieces} places are taken; try again in {wait} s",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )
        return mailbox

    def _closing(self, answer: Answer) -> Callable[[], None]:
        """Closes the answer, and notes how long it took."""
        start = time.monotonic()

        def close() -> None:
            self._seconds += 0.1 * (time.monotonic() - start - self._seconds)
            answer.close()

        return close

    # --- before a request is read ---------------------------------------------------------------

    def _told(self, handler: Callable[[HttpRequest], Awaitable[Response]]):
        """The handler behind the key; what it refuses is told in OpenAI's shape."""

        async def endpoint(http: HttpRequest) -> Response:
            try:
                self._check_key(http)
                return await handler(http)
            except Refusal as refusal:
                return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)
            except Unfit as error:
                return JSONResponse(Refusal(400, str(error)).body, 400)
            except CutOff as error:
                body = Refusal(500, str(error), kind="server_error").body
                return JSONResponse(body, 500)
            except ClientDisconnect:
                return Response(status_code=LEFT)

        return endpoint

    def _check_key(self, http: HttpRequest) -> None:
        if self._api_key is None:
            return
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), self._api_key)
        if scheme.lower() != "bearer" or not is_right:
            raise Refusal(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, http: HttpRequest) -> bytes:
        """The request's body. Of one that is too long the rest is read and forgotten, up to a
        multiple: a client that is still sending would not see the answer."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON_TYPE:
            raise Refusal(415, f"Content-Type is {kind!r:.80}; it should be {JSON_TYPE}")
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in http.stream():
                    size += len(part)
                    if size > 16 * self.limits.body:
                        break
                    if size <= self.limits.body:
                        body += part
        except TimeoutError:
            raise Refusal(408, f"the request did not come within {BODY_SECONDS:g} s") from None
        if size > self.limits.body:
            message = f"the request is longer than {self.limits.body} bytes, this server's limit"
            raise Refusal(413, message, code="request_too_large", headers={"Connection": "close"})
        return bytes(body)


class EventStream:
    """A response of server-sent events, which ends when the client leaves or takes nothing."""

    def __init__(self, parts: AsyncIterator[bytes], close: Callable[[], None]):
        self._parts, self._close = parts, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._write(send))
        finally:
            self._close()

    async def _write(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for part in self._parts:
                async with asyncio.timeout(STALLED_SECONDS):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await asyncio.sleep(0)  # so that a lost connection is known before the next part
        except TimeoutError:
            return  # an answer without an end: the connection is closed
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Server-sent events; a failure on the way is the last one."""

    def event(value: Any) -> bytes:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()

    try:
        async for chunk in chunks:
            yield event(chunk)
    except (CutOff, Unfit) as error:
        yield event(Refusal(500, str(error), kind="server_error").body)
        return
    yield b"data: [DONE]\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The work's result; None when the client has left before, and the work was cancelled."""

    async def wait_until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, gone = asyncio.create_task(work), asyncio.create_task(wait_until_gone())
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        doing.cancel()
        gone.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


def _http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = Refusal(error.status_code, error.detail).body
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _server_error(_: HttpRequest, error: Exception) -> Response:
    body = Refusal(500, "the server had an error", kind="server_error").body
    return JSONResponse(body, status_code=500)
