"""The state that all requests of a server share, from starting through ready to draining."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from aoft_deploy.errors import SettingError
from aoft_deploy.serving.deadlines import Deadlines
from aoft_deploy.serving.log import log
from aoft_deploy.serving.protocol.refusals import QUEUE_FULL, Refusal
from aoft_deploy.serving.repository.models import Models
from aoft_deploy.serving.repository.repository import Repository
from aoft_deploy.serving.settings import Settings
from aoft_deploy.serving.telemetry.observations import Observations
from aoft_deploy.serving.transport.bodies import Bodies

__all__ = ["Service"]

P = ParamSpec("P")
T = TypeVar("T")
REFUSE_SECONDS = 0.2
"""Minimum seconds that a draining server keeps refusing new requests before it ends."""


class Service:
    """Models, metrics, threads and limits of one server. Used in one event loop.

    Attributes:
        settings: The server's settings.
        models: The open models.
        repository: The files that models are opened from.
        observations: Metrics and statistics.
        accepted: Number of requests that arrived before draining and are not answered yet.
        bodies: Reads request bodies.
        deadlines: Deadlines of requests.
        state: Inference requests are accepted in the state ``ready`` only.
        token: Token for loading and unloading models; None: both are refused.

    Args:
        settings: As the attribute.
        given: Names and paths of the artefacts to open at the start.

    Raises:
        SettingError: There is nothing to serve, or the token's file cannot be used.
    """

    def __init__(self, settings: Settings, given: Sequence[tuple[str, Path]]) -> None:
        self.settings = settings
        self.observations = Observations()
        self.accepted = 0
        self.models = Models(settings, self.observations.batch)
        self.repository = Repository(settings, given, self.models)
        self.deadlines = Deadlines()
        self.bodies = Bodies(settings.max_body, settings.max_buffered, settings.body_timeout)
        self.state: Literal["starting", "ready", "draining"] = "starting"
        self.token = _token(settings.admin_token_file)
        self._pool = ThreadPoolExecutor(settings.decoders, "decode")
        self._in_pool = 0
        self._follower: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether the server accepts requests and has all the models that it should have."""
        return not self.unready

    @property
    def unready(self) -> str:
        """Why the server is not ready; empty if it is.

        A server without models is ready if none failed to open: it waits for its first model. With
        ``strict`` there must be a model, and each that failed at the start must be open now.
        """
        models, repository = self.models, self.repository
        if self.state != "ready":
            return self.state
        if any(artefact.batcher.stuck for artefact in models.artefacts.values()):
            return "stuck"
        if models.empty and (self.settings.strict or repository.faulty):
            return "without a model"
        if self.settings.strict and repository.failed:
            return "without a model that failed at the start"
        return ""

    async def start(self) -> None:
        """Open and warm up the artefacts that were given and those of the repository.

        Raises:
            AoftError: An artefact that was given cannot be served.
        """
        await self.repository.open_given()
        if self.state == "starting":
            self.state = "ready"
            unready = self.unready
            if unready:
                log("not ready", reason=f"The server is {unready}.")
            else:
                models = self.models
                log("ready", models=sorted(models.artefacts), devices=models.devices)
        if self.settings.follow:
            self._follower = asyncio.create_task(self.repository.follow())

    async def drain(self) -> None:
        """Refuse new requests, and wait for the accepted ones to be answered."""
        self.state = "draining"
        log("draining", in_flight=self.accepted)
        self.bodies.drain()
        loop = asyncio.get_running_loop()
        end = loop.time() + self.settings.grace
        await asyncio.sleep(min(REFUSE_SECONDS, self.settings.grace))
        while self.accepted and loop.time() < end:
            await asyncio.sleep(0.02)
        if self._follower is not None:
            self._follower.cancel()
        self.models.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        log("drained", lost=self.accepted)

    async def in_pool(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that would block the event loop in the pool of decoder threads.

        Raises:
            Refusal: 429: too many calls are waiting.
        """
        if self._in_pool >= self.settings.queue:
            raise Refusal(429, QUEUE_FULL, retry_after=1)
        loop = asyncio.get_running_loop()
        self._in_pool += 1
        try:
            return await loop.run_in_executor(self._pool, partial(function, *args, **kwargs))
        finally:
            self._in_pool -= 1


def _token(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise SettingError(f"{path} cannot be read ({error.strerror}).") from error
    if len(token) < 16:
        raise SettingError(f"{path} holds a token of {len(token)} bytes: use 16 or more.")
    return token
