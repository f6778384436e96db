"""httptools' parser, which stays with HTTP/1.1 whatever a client offers.

llhttp leaves HTTP after the headers of a request with ``Upgrade`` or ``CONNECT``, whether or not
the server agrees: it passes over the body, and what is fed to it next it reads as a new request.
This server never agrees. A request that offers another protocol is answered as if it had not.
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
    """A request parser.

    Args:
        connection: Whose callbacks are called, and whose ``parser`` and ``headers`` are used.
        callbacks: Object with the callbacks where it is another.
    """

    def __new__(cls, connection: Any, callbacks: Any = None) -> Parser:  # noqa: D102
        parser: Parser = super().__new__(cls)
        return parser

    def __init__(self, connection: Any, callbacks: Any = None) -> None:
        super().__init__(connection if callbacks is None else callbacks)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # to answer pipelined requests
        self._connection = connection

    @property
    def left(self) -> bool:
        """Whether this parser left HTTP; its end of the message is none."""
        return bool(super().should_upgrade())

    def should_upgrade(self) -> bool:
        """Whether another protocol follows: never."""
        return False

    def feed_data(self, data: Any) -> None:
        """Parse bytes.

        Raises:
            httptools.HttpParserError: They are no HTTP.
        """
        parser = self
        while True:  # each of many pipelined requests may offer another protocol
            try:
                httptools.HttpRequestParser.feed_data(parser, data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
            parser = parser._stay()

    def _stay(self) -> Parser:
        """A new parser, which stands before the body and knows only where that ends."""
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
    """Callbacks of a connection, some of which are not called.

    Attributes:
        skipped: Their names.
    """

    skipped: tuple[str, ...] = ()

    def __init__(self, connection: Any) -> None:
        for name in CALLBACKS:
            if hasattr(connection, name):
                setattr(self, name, self._passing(name, getattr(connection, name)))

    def _passing(self, name: str, callback: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if name not in self.skipped:
                callback(*args)

        return call
