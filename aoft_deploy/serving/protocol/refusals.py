"""A request that gets no answer: one exception with its HTTP status and its sentence."""

from __future__ import annotations

__all__ = ["Refusal", "shown"]


class Refusal(Exception):
    """What is answered instead, as ``{"error": message}``.

    Attributes:
        status: HTTP status, 400 or above.
        message: One sentence for the client, which tells nothing about the host.
        headers: Further headers, such as ``Retry-After``.
        close: Whether the connection ends after it, because part of the request was not read.

    Args:
        status: As the attribute.
        message: As the attribute.
        headers: As the attribute.
        close: As the attribute.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        headers: dict[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers, self.close = headers or {}, close


def shown(value: object) -> str:
    """What a client sent, in a sentence to it: 60 characters at most, nothing unprintable."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
