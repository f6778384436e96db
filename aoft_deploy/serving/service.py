"""What one server is made of, and its life: starting, ready, draining."""

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
from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.repository.models import Models
from aoft_deploy.serving.settings import Settings
from aoft_deploy.serving.telemetry.observations import Observations
from aoft_deploy.serving.transport.bodies import Bodies

__all__ = ["Service"]

P = ParamSpec("P")
T = TypeVar("T")
LINGER_SECONDS = 0.2
"""How long a draining server still says no, before it leaves clients without an answer."""


class Service:
    """Models, counters, threads and limits of one server. Used in one event loop.

    Attributes:
        settings: As given.
        models: What is served.
        observations: What is counted.
        taken: Requests that came before the server drained and are not answered.
        bodies: Reads requests.
        deadlines: Of requests that are answered.
        state: Inference is answered where it is ``ready``.
        token: What changes of the repository need; None: they are refused.

    Args:
        settings: As the attribute.
        given: Artefacts by name, opened at the start.

    Raises:
        SettingError: There is nothing to serve, or the file of the token cannot be used.
    """

    def __init__(self, settings: Settings, given: Sequence[tuple[str, Path]]) -> None:
        self.settings = settings
        self.observations = Observations()
        self.taken = 0
        self.models = Models(settings, given, self.observations.batch)
        self.deadlines = Deadlines()
        self.bodies = Bodies(settings.max_body, settings.max_buffered, settings.body_timeout)
        self.state: Literal["starting", "ready", "draining"] = "starting"
        self.token = _token(settings.admin_token_file)
        self._pool = ThreadPoolExecutor(settings.decoders, "decode")
        self._aside = 0
        self._follower: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether requests are taken, every engine answers, and there is what should be."""
        return not self.unready

    @property
    def unready(self) -> str:
        """Why the server is not ready; empty where it is.

        With nothing to serve it is ready only if nothing failed: it waits for its first model.
        ``strict`` asks for a model, and for every one that was there at the start.
        """
        models = self.models
        if self.state != "ready":
            return self.state
        if any(artefact.batcher.stuck for artefact in models.artefacts.values()):
            return "stuck"
        if not models.any and (self.settings.strict or models.faulty):
            return "without a model"
        if self.settings.strict and models.failed:
            return "without a model that failed at the start"
        return ""

    async def start(self) -> None:
        """Open and warm up what was given.

        Raises:
            AoftError: Something cannot be served.
        """
        await self.models.open_given()
        if self.state == "starting":
            self.state = "ready"
            unready = self.unready
            if unready:
                log("not ready", reason=f"The server is {unready}.")
            else:
                log("ready", models=sorted(self.models.artefacts))
        if self.settings.follow:
            self._follower = asyncio.create_task(self.models.follow())

    async def drain(self) -> None:
        """Take no more requests, and wait for those that were taken."""
        self.state = "draining"
        log("draining", in_flight=self.taken)
        self.bodies.drain()
        loop = asyncio.get_running_loop()
        end = loop.time() + self.settings.grace
        await asyncio.sleep(min(LINGER_SECONDS, self.settings.grace))
        while self.taken and loop.time() < end:  # those who knock on are refused all the while
            await asyncio.sleep(0.02)
        if self._follower is not None:
            self._follower.cancel()
        self.models.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        log("drained", lost=self.taken)

    async def aside(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run in one of the threads for what would hold the event loop up.

        Raises:
            Refusal: 429: too many wait for them already.
        """
        if self._aside >= self.settings.queue:
            after = {"Retry-After": "1"}
            raise Refusal(429, "Too many requests wait: try again later.", headers=after)
        loop = asyncio.get_running_loop()
        self._aside += 1
        try:
            return await loop.run_in_executor(self._pool, partial(function, *args, **kwargs))
        finally:
            self._aside -= 1


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
