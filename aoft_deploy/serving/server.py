"""The process: a socket, an event loop, and an end that loses no request that was accepted."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from aoft_deploy.errors import MissingExtraError, OutputError
from aoft_deploy.serving.application import Application
from aoft_deploy.serving.batcher import ENGINE
from aoft_deploy.serving.connections import connections
from aoft_deploy.serving.log import JsonHandler, log
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.settings import Settings
from aoft_deploy.serving.threads import working

__all__ = ["serve"]

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
PAUSE_SECONDS = 0.1
"""For what is on its way when the socket closes."""

IDLE_SECONDS = 1
"""Left to uvicorn after everything was answered, to close what stayed open."""


class _Server(uvicorn.Server):
    """uvicorn without its own way with signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings, given: Sequence[tuple[str, Path]]) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once.

    Args:
        settings: What can be set.
        given: Artefacts by name.

    Raises:
        AoftError: Something that was given cannot be served.
        OutputError: The address cannot be had.
        MissingExtraError: The HTTP parser is not installed.
    """
    quiet = logging.getLogger("uvicorn.error")
    quiet.handlers, quiet.propagate = [JsonHandler()], False
    quiet.setLevel(logging.ERROR)
    asyncio.run(_serve(settings, given))
    if working() or any(thread.name == ENGINE for thread in threading.enumerate()):
        # A runtime that returned to Python while that ends would abort the process.
        sys.stderr.flush()
        os._exit(0)


async def _serve(settings: Settings, given: Sequence[tuple[str, Path]]) -> None:
    service = Service(settings, given)
    bound = _bound(settings)
    gc.freeze()  # what is there by now stays: collections need not look at it
    gc.set_threshold(10_000, 10, 10)
    try:
        http = connections(settings.http, settings.max_connections)
    except ImportError as error:
        raise MissingExtraError(settings.http, "serve") from error
    config = uvicorn.Config(
        Application(service),
        http=http,
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=IDLE_SECONDS,
    )
    server = _Server(config)
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _signalled, told)
    host, port = bound.getsockname()[:2]
    log("listening", host=host, port=port)
    listening = asyncio.create_task(server.serve([bound]))
    starting = asyncio.create_task(service.start())
    end = asyncio.create_task(told.wait())
    try:
        await asyncio.wait({starting, end}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await asyncio.wait({listening, end}, return_when=asyncio.FIRST_COMPLETED)
        else:
            starting.cancel()
        await service.drain()
        await _stop_listening(server, bound)
    finally:
        server.should_exit = True
        await asyncio.wait({listening})
    log("ended")


async def _stop_listening(server: uvicorn.Server, bound: socket.socket) -> None:
    """Close the socket so that nobody who got through is reset.

    The system resets connections that wait to be accepted when a socket closes. So they are
    accepted in the same breath, and told that the server drains.
    """
    late = []
    with contextlib.suppress(BlockingIOError):
        while True:
            late.append(bound.accept()[0])
    for listener in getattr(server, "servers", ()):
        listener.close()
    loop = asyncio.get_running_loop()
    for connection in late:
        await loop.connect_accepted_socket(partial(_protocol, server), connection)
    await asyncio.sleep(PAUSE_SECONDS)


def _protocol(server: uvicorn.Server) -> asyncio.Protocol:
    """As uvicorn makes one for each connection."""
    make: Any = server.config.http_protocol_class
    protocol: asyncio.Protocol = make(
        config=server.config, server_state=server.server_state, app_state={}
    )
    return protocol


def _bound(settings: Settings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # who connects before the event loop runs waits
    except OSError as error:
        where = f"{settings.host}, port {settings.port}"
        raise OutputError(f"Cannot listen on {where}: {error.strerror or error}.") from error
    return bound


def _signalled(told: asyncio.Event) -> None:
    if told.is_set():
        log("ended by a second signal")
        sys.stderr.flush()
        os._exit(1)
    told.set()
