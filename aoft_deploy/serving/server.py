"""The server's process: a socket, an event loop, and a shutdown that loses no request.

After SIGTERM, requests in progress are answered, for up to ``grace`` seconds. New requests, on old
and on new connections, are answered with 503 and ``Connection: close``. When everything is
answered, new connections are refused. Existing connections stay until an answer closes them or
they are quiet for a second. They end with the end of the stream, not with a reset. If a client
sends a request at that moment, its connection closes without a byte of an answer: the request was
not processed, and can be sent again.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from aoft_deploy.errors import OutputError
from aoft_deploy.serving.batching.worker import ENGINE
from aoft_deploy.serving.endpoints.application import Application
from aoft_deploy.serving.log import JsonHandler, background, flush, log
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.settings import Settings
from aoft_deploy.serving.threads import any_running
from aoft_deploy.serving.transport.connections import connection_class
from aoft_deploy.serving.transport.descriptors import ACCEPTED_AT_ONCE, connections_possible
from aoft_deploy.serving.transport.shutdown import end_connections, stop_listening

__all__ = ["serve"]

BACKLOG = 2048

IDLE_SECONDS = 1
"""Seconds that uvicorn waits for the connections that are still open at the end."""


def serve(settings: Settings, given: Sequence[tuple[str, Path]]) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once.

    Args:
        settings: The server's settings.
        given: Names and paths of the artefacts to open at the start.

    Raises:
        AoftError: An artefact that was given cannot be served.
        OutputError: The address cannot be used.
        MissingExtraError: The HTTP parser is not installed.
    """
    logging.getLogger().handlers = [JsonHandler()]
    for name in ("uvicorn.error", "python_multipart"):  # they warn about the errors of clients
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with background():
            asyncio.run(_serve(settings, given))
    except BaseException:
        if _engine_running():
            atexit.register(os._exit, 1)  # runs after the error was printed
        raise
    if _engine_running():
        os._exit(0)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, and with two different backlogs.

    asyncio uses the backlog also as the number of connections that it accepts in one turn, which
    could then be more than there are descriptors. So uvicorn gets a small backlog, and the socket
    gets the real one.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(settings: Settings, given: Sequence[tuple[str, Path]]) -> None:
    service = Service(settings, given)
    most = connections_possible(settings.max_connections)
    bound = _bind(settings)
    gc.freeze()  # collections skip the objects that exist now and stay
    gc.set_threshold(10_000, 10, 10)
    server = _Server(_uvicorn_config(service, most))
    signalled = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_signal, signalled)
    host, port = bound.getsockname()[:2]
    log("listening", host=host, port=port)
    listening = asyncio.create_task(server.serve([bound]))
    starting = asyncio.create_task(service.start())
    end = asyncio.create_task(signalled.wait())
    try:
        await asyncio.wait({starting, end}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await asyncio.wait({listening, end}, return_when=asyncio.FIRST_COMPLETED)
        else:
            starting.cancel()
        await service.drain()
        await stop_listening(server, bound)
        await end_connections(server)
    finally:
        server.should_exit = True
        await asyncio.wait({listening})
    log("ended")


def _uvicorn_config(service: Service, most: int) -> uvicorn.Config:
    settings = service.settings
    return uvicorn.Config(
        Application(service),
        http=connection_class(settings.http, most),
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]  # floats work too
        timeout_graceful_shutdown=IDLE_SECONDS,
    )


def _bind(settings: Settings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # clients that connect before the event loop runs are queued
    except OSError as error:
        where = f"{settings.host}, port {settings.port}"
        raise OutputError(f"Cannot listen on {where}: {error.strerror or error}.") from error
    return bound


def _on_signal(signalled: asyncio.Event) -> None:
    if signalled.is_set():
        log("ended by a second signal")
        flush()
        os._exit(1)
    signalled.set()


def _engine_running() -> bool:
    """Whether a runtime is computing; the process would abort if it returned while Python ends."""
    return any_running() or any(thread.name == ENGINE for thread in threading.enumerate())
