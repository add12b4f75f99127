"""A server of one model: its socket, its engine, and how it stops."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal, TypedDict, Unpack

import jax
import uvicorn

from trainfw import backends
from trainfw.data import Progress
from trainfw.errors import UserError
from trainfw.paths import path_text
from trainfw.program import KeptAs
from trainfw.serving.http import CONNECTIONS, IDLE_SECONDS, Protocol, Routes
from trainfw.serving.load import load_engine
from trainfw.serving.requests import Engine
from trainfw.serving.service import Service
from trainfw.weights import prompt_form

LEAVE_SECONDS = 5.0
"""Seconds that a server takes at most to leave, once its requests have had theirs."""
KEY = "TRAINFW_API_KEY"
"""Variable of the environment that holds the API key."""


class EngineOptions(TypedDict, total=False):
    """Options of `load_engine` beside the model and its adapters."""

    slots: int
    length: int
    chunk: int
    places: int | None
    rank: int
    weights: KeptAs | None
    compute_dtype: Literal["float32", "bfloat16"]
    cache: Literal["float32", "bfloat16", "int8"] | None
    layout: Mapping[str, int] | None
    devices: Sequence[jax.Device] | None
    queue: int
    progress: Progress | None


_TICKS_A_MINUTE = 600


class HttpServer(uvicorn.Server):
    """A service on a socket, run by this thread (`run_until_stopped`) or by another (`start` and `close`)."""

    def __init__(self, service: Service, sock: socket.socket, *, api_key: str | None = None, drain_seconds: float = 30):
        self.engine: Engine = service.engine
        self._socket, self._drain, self._open = sock, drain_seconds, api_key is None
        self._closing: threading.Thread | None = None
        self._thread: threading.Thread | None = None
        self.stopped_by: int | None = None
        """Signal that stopped it."""
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # who sends what is no HTTP gets 400, and no line
        super().__init__(
            uvicorn.Config(
                Routes(service, api_key, local=is_local(sock.getsockname()[0])).application(),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=int(IDLE_SECONDS),
                timeout_graceful_shutdown=int(drain_seconds + LEAVE_SECONDS),
            )
        )

    @property
    def is_open(self) -> bool:
        """Flag: anybody who reaches this machine may use it, for no key is asked for."""
        return self._open and not is_local(self._socket.getsockname()[0])

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def run_until_stopped(self) -> None:
        """Serve until a first signal, and for as long as it takes to end what has begun, but `drain_seconds` at most.

        A second signal ends the process at once.
        """
        try:
            self.run(sockets=[self._socket])
        finally:
            self.engine.close(0.0)

    async def on_tick(self, counter: int) -> bool:
        """Hand back freed memory every minute, which glibc keeps in the arena of every thread that read a long text."""
        if counter % _TICKS_A_MINUTE == 0:
            backends.release_freed_memory()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.stopped_by = sig
        self.stop()

    def stop(self) -> None:
        """Take no more connections and requests. What has begun may end."""
        self.should_exit = True
        self._closing = threading.Thread(target=self.engine.close, args=(self._drain,), daemon=True)
        self._closing.start()

    def start(self) -> None:
        """Serve from another thread; returns once connections are taken."""
        self._socket.listen()
        self._thread = threading.Thread(target=self.run_until_stopped, name="trainfw http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and wait until it has."""
        self.stop()
        if self._thread is not None:
            self._thread.join()


def is_local(address: str) -> bool:
    """Tell whether an IP address can be reached from this machine alone."""
    return ipaddress.ip_address(address).is_loopback


def bind(host: str, port: int) -> socket.socket:
    """Take a port, 0 for any that is free. Raises UserError."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise UserError(f"{host}:{port}: cannot be served: {getattr(error, 'strerror', None) or error}") from None
    return sock


def serve(
    model: str | os.PathLike[str],
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    adapter_dirs: Sequence[str | os.PathLike[str]] = (),
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    drain_seconds: float = 30.0,
    ready: Callable[[HttpServer, Service], None] | None = None,
    **options: Unpack[EngineOptions],
) -> int | None:
    """Serve a model over HTTP, as OpenAI's clients ask, until a signal; returns the signal.

    Args:
        model: a Hugging Face directory, a GGUF file, `package:NAME`, or a run.
        adapters: adapters of this model by name, under which they are asked for.
        adapter_dirs: directories from which adapters may be loaded over HTTP.
        name: name of the model itself (default: the last part of its path).
        api_key: what clients have to send (default: `TRAINFW_API_KEY` of the environment; none if that is empty).
        drain_seconds: time that requests have to end after SIGTERM.
        ready: called once all is loaded and connections are taken, before the first is answered.
        options: options of `load_engine`, such as `slots` and `length`.

    Raises UserError for what cannot be loaded, and a port that is taken.
    """
    path, given = path_text(model), {key: path_text(at) for key, at in (adapters or {}).items()}
    name = name or path.removeprefix("package:").rstrip("/").rpartition("/")[2] or path
    if name in given:
        raise UserError(f"adapter {name}: is the name of the model itself")
    dirs = [Path(one) for one in adapter_dirs]
    for one in dirs:
        if not one.is_dir():
            raise UserError(f"{one}: expected a directory, from which adapters may be loaded")
    with bind(host, port) as sock:
        engine, tokenizer = load_engine(path, adapters=given, **options)
        try:
            forms = {key: prompt_form(at) for key, at in [(None, path), *given.items()]}
            service = Service(engine, tokenizer, name, forms, dirs)
            key = os.environ.get(KEY) if api_key is None else api_key
            server = HttpServer(service, sock, api_key=key or None, drain_seconds=drain_seconds)
            sock.listen()  # who connects from here on waits, and is not refused
            if ready is not None:
                ready(server, service)
            server.run_until_stopped()
        finally:
            engine.close(0.0)
    return server.stopped_by
