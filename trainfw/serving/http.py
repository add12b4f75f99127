"""The server's HTTP: routes, limits, and clients that are slow, silent or gone."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.resources import files

import anyio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from trainfw.errors import UserError
from trainfw.serving.bodies import ApiError, ChatAsked, LoadAdapter, TextAsked, UnloadAdapter, parse
from trainfw.serving.choices import Choices
from trainfw.serving.requests import Unavailable
from trainfw.serving.service import Events, Service, sse

HEAD_SECONDS, BODY_SECONDS, WRITE_SECONDS, IDLE_SECONDS = 10.0, 30.0, 30.0, 5.0
"""Seconds that a client may take to send a request's head and its body, that it may read nothing of what is sent, and
that a connection stays open between requests."""
BODY_BYTES, CONNECTIONS = 1 << 20, 512
"""Largest body in bytes (or 16 for each token of a slot, if that is more), and most connections at once."""
FAILED = "the server has failed; its log says why"
_log = logging.getLogger("trainfw.serving")

Handler = Callable[[Request], Awaitable[Response]]


class Protocol(H11Protocol):
    """A connection that is closed where its client does not send what it began, or does not read."""

    _head: asyncio.TimerHandle | None = None
    _write: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_SECONDS, self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            _end(self._head)
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        _end(self._head)
        _end(self._write)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write = self._write or self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        _end(self._write)
        self._write = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()  # which waits for what is still to be sent
        self._write = self._write or self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def _late(self) -> None:
        self._head = None
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.transport.close()
            self._write = self._write or self.loop.call_later(WRITE_SECONDS, self.transport.abort)


def _end(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class EventResponse(Response):
    """A stream of events, which ends with its client."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, choices: Choices):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events, self._choices = events, choices
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._choices:
            await unless_gone(receive, partial(self._send, send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": sse(event), "more_body": True})
            last = sse("[DONE]")
        except ApiError as error:
            last = sse(error.body())
        except Exception:
            _log.exception("a stream")
            last = sse(ApiError(500, FAILED).body())
        await send({"type": "http.response.body", "body": last})


async def unless_gone(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Do some work, which is cancelled when the client goes away."""
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        await work()
        group.cancel_scope.cancel()


class Routes:
    """The routes of a service."""

    def __init__(self, service: Service, api_key: str | None, *, local: bool = False):
        """`local`: without a key, only who asks for this machine by its address or as localhost is answered."""
        self._service, self._key, self._local = service, api_key, local
        self._limit = max(BODY_BYTES, 16 * service.engine.length)
        self._page, policy = page(keyed=api_key is not None)
        self._page_headers = {
            "content-security-policy": policy,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }

    def application(self) -> Starlette:
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{name:path}", self._model),
            ("POST", "/v1/chat/completions", partial(self._complete, ChatAsked)),
            ("POST", "/v1/completions", partial(self._complete, TextAsked)),
            ("POST", "/v1/load_lora_adapter", self._load),
            ("POST", "/v1/unload_lora_adapter", self._unload),
            ("GET", "/metrics", self._metrics),
            ("GET", "/health", self._health),
            ("GET", "/", self._show),
        ]
        handlers = {404: self._unknown, 405: self._unknown}
        found = [Route(path, partial(self._guarded, path, do), methods=[method]) for method, path, do in routes]
        return Starlette(routes=found, exception_handlers=handlers)

    async def _guarded(self, route: str, do: Handler, request: Request) -> Response:
        """Answer a request: with what `do` returns, or with an error in OpenAI's form."""
        try:
            if route not in ("/", "/health"):
                self._authorise(request)
            response = await do(request)
        except ApiError as error:
            response = _error(error)
        except Unavailable as error:
            response = _error(ApiError(503, str(error)))
        except UserError as error:
            response = _error(ApiError(400, str(error)))
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            _log.exception("%s", route)
            response = _error(ApiError(500, FAILED))
        self._service.metrics.requests.labels(route, str(response.status_code)).inc()
        return response

    def _authorise(self, request: Request) -> None:
        if self._key is None:
            host = request.headers.get("host", "")
            if self._local and not re.fullmatch(r"(localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?", host):
                # A page of that name could have it mean this machine (DNS rebinding), and read the answers.
                raise ApiError(403, f"Host: {host[:80]!r} is no name of this machine; with TRAINFW_API_KEY any may be")
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # latin-1: as headers are read
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._key.encode())
        if kind.lower() != "bearer" or not right:
            raise ApiError(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        """Read a request's body. Raises ApiError for one that is too large, or not said to be JSON, and late ones."""
        # Another page's form, which browsers send unasked, is never JSON.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Content-Type: expected application/json")
        data, size = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size <= self._limit:
                        data += part
                    elif size > 16 * self._limit:  # before that, one who reads only once all is sent gets the answer
                        break
        except TimeoutError:
            raise ApiError(408, f"body: did not come within {BODY_SECONDS:g} seconds") from None
        if size > self._limit:
            raise ApiError(413, f"body: is larger than {self._limit:,} bytes")
        return bytes(data)

    async def _complete(self, kind: type[ChatAsked] | type[TextAsked], request: Request) -> Response:
        asked: ChatAsked | TextAsked = parse(kind, await self._body(request))
        answered: list[Response] = []

        async def work() -> None:
            choices = Choices(self._service.metrics)
            try:
                await self._service.begin(asked, choices)
                if asked.stream:
                    answered.append(EventResponse(self._service.events(asked, choices), choices))
                else:
                    with choices:
                        answered.append(JSONResponse(await self._service.answer(asked, choices)))
            except BaseException as error:
                with choices:  # frees what was begun
                    if not isinstance(error, ApiError):
                        raise
                    answered.append(_error(error))

        await unless_gone(request.receive, work)
        return answered[0] if answered else Response(status_code=499)

    async def _models(self, request: Request) -> Response:
        return JSONResponse(self._service.models())

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._service.model(request.path_params["name"]))

    async def _load(self, request: Request) -> Response:
        return PlainTextResponse(await self._service.load_adapter(parse(LoadAdapter, await self._body(request))))

    async def _unload(self, request: Request) -> Response:
        return PlainTextResponse(await self._service.unload_adapter(parse(UnloadAdapter, await self._body(request))))

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _health(self, request: Request) -> Response:
        failed = self._service.engine.failed
        return JSONResponse({"status": failed or "ok"}, status_code=503 if failed else 200)

    async def _show(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers=self._page_headers)

    async def _unknown(self, request: Request, error: Exception) -> Response:
        path = str(request.scope["path"])
        if path in ("/", "/health", "/metrics") or path.startswith("/v1/"):
            return _error(ApiError(getattr(error, "status_code", 404), f"{request.method} {path[:80]}: no such route"))
        return _error(ApiError(404, "no such route; OpenAI's begin with /v1"))


def _error(error: ApiError) -> Response:
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "5"}}
    if error.status in (408, 413):
        headers[error.status] = {"connection": "close"}
    return JSONResponse(error.body(), error.status, headers.get(error.status))


def page(*, keyed: bool) -> tuple[str, str]:
    """Return the page for a person, which asks for a key or not, and the policy by which it loads nothing else."""
    html = files("trainfw.serving").joinpath("page.html").read_text("utf-8")

    def digest(tag: str) -> str:
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    parts = {
        "default-src": "'none'", "script-src": digest("script"), "style-src": digest("style"), "connect-src": "'self'",
        "img-src": "data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip
    if keyed:
        html = html.replace('data-keyed="no"', 'data-keyed="yes"')
    return html, "; ".join(f"{name} {value}" for name, value in parts.items())
