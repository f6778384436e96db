"""The class of a server's HTTP/1.1 connections, based on uvicorn's.

uvicorn waits forever for a request's first bytes, accepts heads of any size with httptools, and
answers violations of HTTP in plain text. :mod:`~aoft_deploy.serving.transport.limited_connection`
adds limits and JSON errors for both parsers, and
:mod:`~aoft_deploy.serving.transport.httptools_connection` adds what httptools lacks.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aoft_deploy.errors import optional_imports
from aoft_deploy.serving.transport.limited_connection import LimitedConnection

__all__ = ["connection_class"]


def connection_class(http: str, most: int) -> type[asyncio.Protocol]:
    """Create the class of a server's connections.

    Args:
        http: The parser, ``h11`` or ``httptools``.
        most: Maximum number of connections.

    Raises:
        MissingExtraError: The parser is not installed.
    """
    members: dict[str, Any] = {"most": most, "spare": {}}
    if http == "h11":
        with optional_imports():
            from uvicorn.protocols.http.h11_impl import H11Protocol

        bases: tuple[type[Any], ...] = LimitedConnection, H11Protocol
    else:
        with optional_imports():
            from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

            from aoft_deploy.serving.transport.httptools_connection import HttptoolsConnection
            from aoft_deploy.serving.transport.parser import Parser

        bases = HttptoolsConnection, HttpToolsProtocol, asyncio.BufferedProtocol
        members["parsing"] = Parser
    return type("Connection", bases, members)
