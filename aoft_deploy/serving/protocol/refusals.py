"""The exception for a request that is answered with an error."""

from __future__ import annotations

import orjson

from aoft_deploy.texts import shortened

__all__ = [
    "ENGINE_STUCK",
    "OUT_OF_TIME",
    "QUEUE_FULL",
    "Refusal",
    "error_body",
    "unknown_model",
]

# Messages that several modules use.
ENGINE_STUCK = "The model does not answer: try another replica."
OUT_OF_TIME = "The time for this request is up."
QUEUE_FULL = "Too many requests wait: try again later."


class Refusal(Exception):
    """An HTTP error for the client.

    Attributes:
        status: HTTP status, 400 or above.
        message: One sentence for the client, without details of the host.
        headers: Additional headers.
        close: Whether the connection ends after the answer, because part of the request was not
            read.

    Args:
        status: As the attribute.
        message: As the attribute.
        headers: As the attribute.
        retry_after: Seconds for the header ``Retry-After``; None leaves it out.
        close: As the attribute.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        headers: dict[str, str] | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.close = status, message, close
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)


def unknown_model(name: str) -> Refusal:
    """The refusal for a model that does not exist."""
    return Refusal(404, f"There is no model {shortened(name)}.")


def error_body(message: str) -> bytes:
    """The protocol's JSON for an error."""
    return orjson.dumps({"error": message})
