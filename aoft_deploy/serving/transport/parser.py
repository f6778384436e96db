"""A request parser that ignores offers to switch to another protocol.

After the headers of a request with ``Upgrade`` or ``CONNECT``, httptools' parser (llhttp) stops
parsing HTTP whether or not the server accepts the offer: it skips the body and reads the next bytes
as a new request. This server accepts no offer, and answers such a request like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httptools

__all__ = ["Parser"]

HEAD = ("on_message_begin", "on_url", "on_header", "on_headers_complete")
CALLBACKS = (*HEAD, "on_body", "on_chunk_header", "on_message_complete")
FRAMING = (b"content-length", b"transfer-encoding")


class Parser(httptools.HttpRequestParser):
    """httptools' request parser, restricted to HTTP/1.1.

    Args:
        connection: The connection, whose ``parser`` and ``headers`` are used.
        callbacks: Object with the callbacks; None: the connection.
    """

    def __new__(cls, connection: Any, callbacks: Any = None) -> Parser:  # noqa: D102
        parser: Parser = super().__new__(cls)
        return parser

    def __init__(self, connection: Any, callbacks: Any = None) -> None:
        super().__init__(connection if callbacks is None else callbacks)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # to answer pipelined requests
        self._connection = connection

    @property
    def stopped(self) -> bool:
        """Whether the parser stopped at an offer, and reported the end of the message too early."""
        return bool(super().should_upgrade())

    def should_upgrade(self) -> bool:
        """Whether another protocol follows: never."""
        return False

    def feed_data(self, data: Any) -> None:
        """Parse bytes.

        Raises:
            httptools.HttpParserError: They are not HTTP.
        """
        parser = self
        while True:  # each of several pipelined requests may offer another protocol
            try:
                httptools.HttpRequestParser.feed_data(parser, data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
            parser = parser._continue()

    def _continue(self) -> Parser:
        """A new parser that is about to read the body, and knows only how the body ends."""
        connection = self._connection
        callbacks = _Callbacks(connection)
        connection.parser = parser = Parser(connection, callbacks)
        framing = [b"%s: %s\r\n" % field for field in connection.headers if field[0] in FRAMING]
        callbacks.skipped = HEAD
        head = b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n"
        httptools.HttpRequestParser.feed_data(parser, head)
        callbacks.skipped = ()
        return parser


class _Callbacks:
    """The callbacks of a connection, some of which can be switched off.

    Attributes:
        skipped: Names of the callbacks that are not called.
    """

    skipped: tuple[str, ...] = ()

    def __init__(self, connection: Any) -> None:
        for name in CALLBACKS:
            if hasattr(connection, name):
                setattr(self, name, self._skippable(name, getattr(connection, name)))

    def _skippable(self, name: str, callback: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if name not in self.skipped:
                callback(*args)

        return call
