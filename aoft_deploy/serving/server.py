"""The process: a socket, an event loop, and an end that loses no request.

After SIGTERM a request that was being answered is answered, for as long as ``grace``. Whoever
asks then, on an old connection or a new one, is told 503 and that the connection ends. When all
is answered, new connections are refused. Connections that were made before stay until
they were told, or until nothing came for a second; they end with the end of the stream, not with
a reset. A client whose request crosses with that end sees a closed connection without one byte
of an answer: the request was not taken, and may be sent again.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from aoft_deploy.errors import MissingExtraError, OutputError
from aoft_deploy.serving.batching.batcher import ENGINE
from aoft_deploy.serving.endpoints.application import Application
from aoft_deploy.serving.log import JsonHandler, background, flush, log
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.settings import Settings
from aoft_deploy.serving.threads import working
from aoft_deploy.serving.transport.connections import connections
from aoft_deploy.serving.transport.descriptors import ACCEPTED_AT_ONCE, connections_possible

__all__ = ["serve"]

BACKLOG = 2048
PAUSE_SECONDS = 0.1
"""For connections that are half made when the socket closes."""

QUIET_SECONDS = 1.0
"""A connection on which nothing came or went for so long is not in use."""

PART_SECONDS = 2.2
"""How long clients have to close their ends."""

IDLE_SECONDS = 1
"""Left to uvicorn after everything was answered, to close what stayed open."""


class _Server(uvicorn.Server):
    """uvicorn without its own way with signals.

    The event loop accepts as many connections at once as may wait, of which there may then be
    more than descriptors. So it is given a small number, and the socket the right one.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(BACKLOG)

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
    logging.getLogger().handlers = [JsonHandler()]
    for name in ("uvicorn.error", "python_multipart"):  # which warn of what clients do wrong
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with background():
            asyncio.run(_serve(settings, given))
    except BaseException:
        if _computing():
            atexit.register(os._exit, 1)  # after the fault was told
        raise
    if _computing():
        os._exit(0)


def _computing() -> bool:
    """Whether a runtime computes: if it returned while Python ends, the process would abort."""
    return working() or any(thread.name == ENGINE for thread in threading.enumerate())


async def _serve(settings: Settings, given: Sequence[tuple[str, Path]]) -> None:
    service = Service(settings, given)
    most = connections_possible(settings.max_connections)
    bound = _bound(settings)
    gc.freeze()  # what is there by now stays: collections need not look at it
    gc.set_threshold(10_000, 10, 10)
    try:
        http = connections(settings.http, most)
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
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]  # any number
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
        await _part(server)
    finally:
        server.should_exit = True
        await asyncio.wait({listening})
    log("ended")


async def _stop_listening(server: uvicorn.Server, bound: socket.socket) -> None:
    """Close the socket so that nobody who got through is reset.

    The system resets connections that wait to be accepted when a socket closes. So it begins no
    further ones, those that it has are accepted, and then the socket closes.
    """
    _begin_no_more(bound)
    await asyncio.sleep(PAUSE_SECONDS)
    late = []
    with contextlib.suppress(OSError):
        while True:
            late.append(bound.accept()[0])
    for listener in getattr(server, "servers", ()):
        listener.close()
    loop = asyncio.get_running_loop()
    for connection in late:
        with contextlib.suppress(OSError):  # it has gone again
            await loop.connect_accepted_socket(partial(_protocol, server), connection)


def _begin_no_more(bound: socket.socket) -> None:
    """Have Linux pass over packets that ask for a connection; they are sent again, and refused.

    What is half made comes through. Other systems do without.
    """
    option = getattr(socket, "SO_ATTACH_FILTER", 26)
    program = (
        (0x30, 0, 0, 13),  # load the flags of the TCP header
        (0x54, 0, 0, 0x12),  # keep SYN and ACK
        (0x15, 0, 1, 0x02),  # SYN alone?
        (0x06, 0, 0, 0),  # drop it
        (0x06, 0, 0, 0xFFFFFFFF),  # take all others
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            given = struct.pack("HP", len(program), ctypes.addressof(code))
            bound.setsockopt(socket.SOL_SOCKET, option, given)


async def _part(server: uvicorn.Server) -> None:
    """Let connections end by themselves; those that are not in use are ended."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PART_SECONDS
    connected: Any = server.server_state.connections
    while any(connection.idle for connection in connected) and loop.time() < end:
        for connection in list(connected):
            connection.part(loop.time() - QUIET_SECONDS)
        await asyncio.sleep(0.02)
    for connection in list(connected):
        if connection.idle:
            connection.transport.end()


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
        flush()
        os._exit(1)
    told.set()
