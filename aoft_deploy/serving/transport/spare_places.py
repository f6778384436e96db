"""Connections above the limit, which answer only ``/v2/health``.

Health checks can thereby distinguish a full server from a dead one. The newest connections have the
spare places; the oldest of them is ended when another one arrives.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from aoft_deploy.serving.protocol.refusals import error_body

__all__ = ["FULL", "health_only"]

FULL = "Too many connections."


async def health_only(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Let the application answer a health check; refuse other requests. Then end the connection."""

    async def reply(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"connection", b"close")]
        await send(message)

    if scope["path"].startswith("/v2/health/"):
        await app(scope, receive, reply)
        return
    content = error_body(FULL)
    headers = [
        (b"content-type", b"application/json"),
        (b"retry-after", b"1"),
        (b"content-length", b"%d" % len(content)),
    ]
    await reply({"type": "http.response.start", "status": 503, "headers": headers})
    await reply({"type": "http.response.body", "body": content})
