"""The end of a server's connections, without resetting any that is in use."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
import struct
import sys
from functools import partial
from typing import Any

import uvicorn

__all__ = ["QUIET_SECONDS", "drop_new_connections", "end_connections", "stop_listening"]

HANDSHAKE_SECONDS = 0.1
"""Seconds for handshakes in progress before the socket closes."""

QUIET_SECONDS = 1.0
"""A connection without an event for this time is not in use."""

END_SECONDS = 2.2
"""Maximum seconds for clients to close their connections."""


async def stop_listening(server: uvicorn.Server, listening: socket.socket) -> None:
    """Close the listening socket after accepting every connection that is already established.

    When a socket closes, the system resets the connections that wait to be accepted. So new
    connections are dropped first, then the waiting ones are accepted, then the socket is closed.
    """
    drop_new_connections(listening)
    await asyncio.sleep(HANDSHAKE_SECONDS)
    late = []
    with contextlib.suppress(OSError):
        while True:
            late.append(listening.accept()[0])
    for listener in getattr(server, "servers", ()):
        listener.close()
    loop = asyncio.get_running_loop()
    for connection in late:
        with contextlib.suppress(OSError):  # the client has closed it again
            await loop.connect_accepted_socket(partial(_protocol, server), connection)


def drop_new_connections(listening: socket.socket) -> None:
    """Let Linux drop the packets that ask for a new connection. Does nothing on other systems.

    The client sends such a packet again, and is refused once the socket is closed. Handshakes in
    progress complete.
    """
    option = getattr(socket, "SO_ATTACH_FILTER", 26)
    program = (
        (0x30, 0, 0, 13),  # load the flags of the TCP header
        (0x54, 0, 0, 0x12),  # keep SYN and ACK
        (0x15, 0, 1, 0x02),  # SYN alone?
        (0x06, 0, 0, 0),  # then drop the packet
        (0x06, 0, 0, 0xFFFFFFFF),  # else accept it
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            value = struct.pack("HP", len(program), ctypes.addressof(code))
            listening.setsockopt(socket.SOL_SOCKET, option, value)


async def end_connections(server: uvicorn.Server) -> None:
    """Wait until clients have closed their connections; close those that are not in use."""
    loop = asyncio.get_running_loop()
    end = loop.time() + END_SECONDS
    connected: Any = server.server_state.connections
    while any(connection.idle for connection in connected) and loop.time() < end:
        for connection in list(connected):
            connection.close_if_quiet(loop.time() - QUIET_SECONDS)
        await asyncio.sleep(0.02)
    for connection in list(connected):
        if connection.idle:
            connection.transport.end()


def _protocol(server: uvicorn.Server) -> asyncio.Protocol:
    """Create a connection's protocol as uvicorn does."""
    make: Any = server.config.http_protocol_class
    protocol: asyncio.Protocol = make(
        config=server.config, server_state=server.server_state, app_state={}
    )
    return protocol
