"""What the server adds to Gradio's: example pictures, a sign of life, and a compressed page."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Additions"]

COMPRESSED = ("/", "/config")
"""Paths of the page, which Gradio sends uncompressed."""


class Additions:
    """Middleware that answers ``/aoft/alive`` and ``/aoft/example/N``, and compresses the page.

    Args:
        app: The application.
        examples: Example pictures as JPEG.
    """

    def __init__(self, app: ASGIApp, examples: Sequence[bytes]) -> None:
        self._app, self._compressed = app, GZipMiddleware(app)
        self._alive = {"start": secrets.token_hex(8)}  # tells pages that the server is another one
        self._examples = {f"/aoft/example/{n}": picture for n, picture in enumerate(examples)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path"] if scope["type"] == "http" else ""
        if path.startswith("/aoft/"):
            await self._answer(path, scope["method"])(scope, receive, send)
        elif path in COMPRESSED:
            await self._compressed(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _answer(self, path: str, method: str) -> Any:
        if method not in ("GET", "HEAD"):
            return Response(status_code=405)
        if path == "/aoft/alive":
            return JSONResponse(self._alive, headers={"Cache-Control": "no-store"})
        picture = self._examples.get(path)
        if picture is None:
            return Response(status_code=404)
        headers = {"Cache-Control": "max-age=600", "X-Content-Type-Options": "nosniff"}
        return Response(picture, media_type="image/jpeg", headers=headers)
