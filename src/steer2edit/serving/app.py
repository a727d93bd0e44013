"""The OpenAI-compatible endpoint: chat completions, streamed or whole, and the list of models."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..errors import Steer2EditError
from ..progress import say
from .catalogue import Catalogue, UnknownName
from .requests import ApiError, ChatRequest, parsed
from .worker import Closed, Done, Event, Failed, Full, Piece, Question, Ticket, TooLong, Worker

# The largest body of a request that is read.
BODY = 4 * 2**20


def build_app(worker: Worker, catalogue: Catalogue, *, key: str | None = None, hosts: Sequence[str] = ()) -> FastAPI:
    """The server as an ASGI application.

    Args:
        key: the token that clients must send; None asks for none.
        hosts: the names under which it may be addressed, so that no web page reaches it under a name of its own;
            none is all.
    """
    # The documentation pages of FastAPI load scripts from elsewhere.
    app = FastAPI(title="steer2edit", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, key=key, hosts=tuple(hosts))
    started = int(time.time())

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _refused(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return _refused(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def our_error(request: Request, error: Exception) -> Response:
        return _refused(api_error_of(error))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **worker.counts()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, started) for name in catalogue.names()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        await to_thread.run_sync(_intervention, catalogue, name)
        return _model(name, started)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parsed(await _body(request))
        questions = await to_thread.run_sync(_questions, worker, catalogue, asked)
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        try:
            tickets = worker.ask([(q, _listener(events, i)) for i, q in enumerate(questions)])
        except Steer2EditError as error:
            raise api_error_of(error) from None
        answer = _Answer(asked, questions, events, tickets)
        if asked.stream:
            return _Stream(answer.chunks(), tickets)
        with _cancelled_at_the_end(tickets):
            return await _unless_gone(request, answer.whole())

    return app


class Guard:
    """Lets nobody in who addresses the server by a strange name, or has no token."""

    def __init__(self, app: Any, key: str | None, hosts: Sequence[str]):
        self.app, self.key, self.hosts = app, key, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (error := self._error(Request(scope))):
            await _refused(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _error(self, request: Request) -> ApiError | None:
        if self.hosts and request.url.hostname not in self.hosts:
            return ApiError(400, "this server is not addressed by that name", code="invalid_host")
        if self.key is None or request.url.path == "/health":
            return None
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(_sent(token), self.key.encode()):
            return None
        return ApiError(401, "a wrong API key, or none", code="invalid_api_key")


def _sent(token: str) -> bytes:
    return token.strip().encode("latin-1")  # as headers are decoded


def _refused(error: ApiError) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body(), error.status, headers)


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "steer2edit"}


def api_error_of(error: Exception) -> ApiError:
    """An exception as clients see it; of a bug of ours they get no details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownName):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, TooLong):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, Full):
        return ApiError(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, Closed):
        return ApiError(503, str(error), kind="server_error", code="closed")
    if isinstance(error, Steer2EditError):
        return ApiError(400, str(error))
    say(f"  a request failed: {error!r}")
    return ApiError(500, "the server made a mistake", kind="server_error")


def _intervention(catalogue: Catalogue, name: str) -> Any:
    try:
        return catalogue.intervention(name)
    except Steer2EditError as error:
        raise api_error_of(error) from None


def _questions(worker: Worker, catalogue: Catalogue, asked: ChatRequest) -> list[Question]:
    """One for each answer that is asked for; run in a thread, since tokenizing takes a while."""
    intervention = _intervention(catalogue, asked.model)
    messages = [message.plain() for message in asked.messages]
    try:
        ids = worker.encode(messages)
    except Exception as error:  # Jinja's, of a template that wants other roles
        raise ApiError(400, f"the model's chat template refuses the messages: {error}", param="messages") from None
    stops, sampling = asked.stops(), asked.sampling()
    return [Question(ids, intervention, asked.tokens(), sampling, seed, stops) for seed in asked.seeds()]


def _listener(events: asyncio.Queue[tuple[int, Event]], i: int) -> Callable[[Event], None]:
    loop = asyncio.get_running_loop()

    def on_event(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, (i, event))

    return on_event


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY:
            raise ApiError(413, f"the body has more than {BODY} bytes")
    return bytes(body)


@contextlib.contextmanager
def _cancelled_at_the_end(tickets: Sequence[Ticket]) -> Any:
    try:
        yield
    finally:
        for ticket in tickets:
            ticket.cancel()


async def _unless_gone(request: Request, work: Any) -> Any:
    """Awaits the work, and stops it if the client goes."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else Response(status_code=499)
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Stream(StreamingResponse):
    """Server-sent events; however it ends, the rows of its answers become free."""

    def __init__(self, content: AsyncIterator[str], tickets: Sequence[Ticket]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._tickets = tickets

    async def __call__(self, *arguments: Any) -> None:
        with _cancelled_at_the_end(self._tickets):
            await super().__call__(*arguments)


class _Answer:
    """The answer to one request, from its events."""

    def __init__(
        self,
        asked: ChatRequest,
        questions: Sequence[Question],
        events: asyncio.Queue[tuple[int, Event]],
        tickets: Sequence[Ticket],
    ):
        self.asked, self.questions, self.events, self.tickets = asked, questions, events, tickets
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
        self.answer_tokens = 0

    async def _until_done(self) -> AsyncIterator[tuple[int, Piece | Done]]:
        left = len(self.questions)
        while left:
            i, event = await self.events.get()
            if isinstance(event, Failed):
                raise api_error_of(event.error)
            if isinstance(event, Done):
                left -= 1
                self.answer_tokens += event.tokens
            yield i, event

    async def whole(self) -> Response:
        choices: list[dict[str, Any]] = [{} for _ in self.questions]
        async for i, event in self._until_done():
            if isinstance(event, Done):
                message = {"role": "assistant", "content": event.answer.text}
                choices[i] = {"index": i, "message": message, "logprobs": None, "finish_reason": _reason(event)}
        body = {**self.head, "object": "chat.completion", "choices": choices, "usage": self._usage()}
        return JSONResponse(body)

    async def chunks(self) -> AsyncIterator[str]:
        for i in range(len(self.questions)):
            yield self._chunk(i, {"role": "assistant", "content": ""})
        try:
            async for i, event in self._until_done():
                if isinstance(event, Piece):
                    yield self._chunk(i, {"content": event.text})
                else:
                    yield self._chunk(i, {}, _reason(event))
        except ApiError as error:
            yield _line(error.body())
            return
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            yield _line({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _chunk(self, i: int, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _line({**self.head, "object": "chat.completion.chunk", "choices": [choice]})

    def _usage(self) -> dict[str, int]:
        prompt = len(self.questions[0].ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.answer_tokens,
            "total_tokens": prompt + self.answer_tokens,
        }


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _reason(done: Done) -> str:
    return "stop" if done.answer.ended else "length"
