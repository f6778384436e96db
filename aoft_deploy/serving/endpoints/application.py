"""The ASGI application: routes, errors, metrics and the log of every request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from aoft_deploy.errors import AoftError
from aoft_deploy.serving.endpoints.catalogue import Catalogue
from aoft_deploy.serving.endpoints.inference import Inference
from aoft_deploy.serving.log import log
from aoft_deploy.serving.protocol.refusals import Refusal, error_body
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.transport.calls import Call
from aoft_deploy.serving.transport.inflow import Disconnected

__all__ = ["Application"]

CLIENT_CLOSED_REQUEST = 499
"""Status in metrics and log if the client disconnected before the answer."""

LINGER_SECONDS = 1.0
"""Maximum seconds that a client may continue to send a body after it was refused."""


class Application:
    """The ASGI application of a service.

    Attributes:
        service: The service.

    Args:
        service: As the attribute.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._router = Router(_routes(service), redirect_slashes=False, default=_not_found)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or a lifespan event."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"a scope of type {scope['type']} is not supported")
        service = self.service
        observations = service.observations
        call = Call(scope)
        scope["aoft.call"], scope["app"] = call, self
        status = 0

        async def reply(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"]
                headers.append((b"x-request-id", call.id.encode()))
                if service.state == "draining":
                    headers.append((b"connection", b"close"))
            await send(message)

        accepted = int(service.state != "draining")
        service.accepted += accepted
        observations.in_flight += 1
        try:
            call.check()
            await self._router(scope, receive, reply)
        except Disconnected:
            status = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            if status or service.state != "draining":
                status = CLIENT_CLOSED_REQUEST
                raise
            call.read = True  # there is no time left to read the rest of the body
            ended = Refusal(503, "The server has ended.", close=True)
            await self._refuse(ended, scope, receive, reply)
        except Exception as error:
            refusal = _refusal(error, call)
            if status == 0:
                await self._refuse(refusal, scope, receive, reply)
            status = refusal.status
            del refusal  # its traceback refers to this frame, and thereby to the request's body
        finally:
            service.accepted -= accepted
            observations.in_flight -= 1
            service.bodies.release(call.body)
            observations.requests.add(observations.label(call.model), str(status))
            if status >= 500 or service.settings.log_requests:
                log(
                    "request",
                    request=call.id,
                    method=scope["method"],
                    path=scope["path"][:200],
                    model=call.model,
                    status=status,
                    milliseconds=round(1e3 * (time.perf_counter() - call.start), 3),
                )

    async def _refuse(self, refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
        """Send an error, and read the rest of the request's body for a while.

        If a connection is closed while bytes arrive, it is reset and the answer is lost.
        """
        headers = {**refusal.headers, "content-type": "application/json"}
        if refusal.close:
            headers["connection"] = "close"
        content = error_body(refusal.message)
        headers["content-length"] = str(len(content))
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
        await send({"type": "http.response.body", "body": content, "more_body": True})
        if not scope["aoft.call"].read and refusal.status != 408:  # 408: no body is arriving
            try:
                async with asyncio.timeout(LINGER_SECONDS):
                    more = True
                    while more:
                        message = await receive()
                        more = message["type"] == "http.request" and message.get("more_body", False)
            except TimeoutError:
                pass
        await send({"type": "http.response.body"})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Start and drain the service for another ASGI server than this package's."""
        await receive()
        try:
            await self.service.start()
        except AoftError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.service.drain()
        await send({"type": "lifespan.shutdown.complete"})


class _AsgiEndpoint:
    """Wraps a method as an object, which Starlette calls as an ASGI application."""

    def __init__(self, endpoint: ASGIApp) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, send)


def _routes(service: Service) -> list[Route]:
    inference, catalogue = Inference(service), Catalogue(service)
    post, models = ["POST"], "/v2/models/{model}"
    versions = models + "/versions/{version}"
    return [
        Route(models + "/infer", _AsgiEndpoint(inference.infer), methods=post),
        Route(models + "/classify", _AsgiEndpoint(inference.classify), methods=post),
        Route("/v2/health/live", catalogue.live),
        Route("/v2/health/ready", catalogue.ready),
        Route("/v2", catalogue.server),
        Route("/v2/models/stats", catalogue.statistics),
        *(
            Route(prefix + suffix, endpoint)
            for prefix in (models, versions)
            for suffix, endpoint in (
                ("", catalogue.metadata),
                ("/ready", catalogue.model_ready),
                ("/config", catalogue.config),
                ("/stats", catalogue.statistics),
            )
        ),
        Route(versions + "/infer", _AsgiEndpoint(inference.infer), methods=post),
        Route(versions + "/classify", _AsgiEndpoint(inference.classify), methods=post),
        Route("/v2/repository/index", catalogue.index, methods=post),
        Route("/v2/repository/models/{model}/load", catalogue.load, methods=post),
        Route("/v2/repository/models/{model}/unload", catalogue.unload, methods=post),
        Route("/metrics", catalogue.metrics),
        Route("/openapi.json", catalogue.openapi),
        Route("/docs", catalogue.docs),
    ]


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise Refusal(404, "This URL does not exist.")


def _refusal(error: Exception, call: Call) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):  # raised by the router for a wrong method
        headers = dict(error.headers or {})
        return Refusal(error.status_code, f"{error.detail}.", headers=headers, close=True)
    log("request failed", request=call.id, error=error)
    return Refusal(500, "The server failed on this request.", close=True)
