"""The files that models are opened from, and which of them failed to open.

Only artefacts that were given at the start, or that a listing of the repository's folder shows, can
be opened.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aoft_deploy.artefacts.manifest import signature
from aoft_deploy.errors import AoftError, CheckpointError, SettingError
from aoft_deploy.serving.log import log
from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.repository.changes import ChangeTracker, Observation
from aoft_deploy.serving.repository.models import Models
from aoft_deploy.serving.repository.names import check_name, is_name, printable, without_paths
from aoft_deploy.serving.repository.scan import CHECKPOINT, Scan, check_readable, scan
from aoft_deploy.serving.settings import Settings
from aoft_deploy.serving.threads import in_thread
from aoft_deploy.texts import shortened

__all__ = ["Repository"]


class Repository:
    """Loads and unloads models, on request and when files change. Used in one event loop.

    Attributes:
        failed: Names that failed to open at the start, until they are opened or their files are
            removed.

    Args:
        settings: The server's settings.
        given: Names and paths of the artefacts to open at the start.
        models: The open models.
        clock: Returns the time in seconds, for retries.

    Raises:
        SettingError: No artefact or two of the same name are given, or a name cannot be part of a
            URL.
    """

    def __init__(
        self,
        settings: Settings,
        given: Sequence[tuple[str, Path]],
        models: Models,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._models, self._clock = settings, models, clock
        self._given = dict(given)
        if len(self._given) < len(given):
            raise SettingError("Two artefacts have the same name: give NAME=PATH.")
        if not given and settings.repository is None:
            raise SettingError("There is nothing to serve: give an artefact or a `repository`.")
        for name in self._given:
            check_name(name)
        self.failed: set[str] = set()
        self._faults: dict[str, str] = {}  # why the last attempt to open a model failed
        self._unreadable: Mapping[str, str] = {}  # of the last scan
        self._logged: Mapping[str, str] = {}  # reasons that were logged, by entry
        self._tracker = ChangeTracker(settings.follow)
        self._lock = asyncio.Lock()

    @property
    def faulty(self) -> bool:
        """Whether a model could not be opened, or its files could not be examined."""
        return bool(self._faults or self._unreadable)

    async def open_given(self) -> None:
        """Open the artefacts that were given, then those of the folder.

        Raises:
            SettingError: The folder does not exist or cannot be read.
            AoftError: An artefact that was given cannot be served. For the folder's, this is only
                logged.
        """
        found = await in_thread(self._scan)
        if found.fault:
            raise SettingError(f"{found.fault}: give another `repository`.")
        for name, path in self._given.items():
            async with self._lock:
                await self._open(name, path)
        await self.update(settled=True)
        self.failed = {*self._faults, *self._unreadable}

    async def load(self, name: str) -> None:
        """Open a model, or reload it from its file.

        Raises:
            Refusal: 404: it has no file; 400: it cannot be served, and an open one of this name is
                kept.
        """
        async with self._lock:
            found = await in_thread(self._scan)
            path = found.paths.get(name)
            if name in found.unreadable:
                raise Refusal(400, f"{name} was not loaded: {found.unreadable[name]}")
            if path is None and found.fault:
                raise Refusal(400, f"{name} was not loaded: the repository cannot be read.")
            if path is None:
                raise Refusal(404, f"There is no artefact for a model {shortened(name)}.")
            try:
                await self._open(name, path)
            except AoftError as error:
                raise Refusal(400, f"{name} was not loaded: {self._faults[name]}") from error

    async def unload(self, name: str) -> None:
        """Remove a model; requests in progress are still answered.

        Raises:
            Refusal: 404: there is no such model.
        """
        async with self._lock:
            await self._models.remove(name)
            self._tracker.closed(name)
            self.failed.discard(name)

    async def index(self) -> list[dict[str, str]]:
        """All models, whether they are ready, and why not; includes models that failed to open."""
        ready: set[str] = set()
        stuck: set[str] = set()
        for artefact in list(self._models.artefacts.values()):
            names = await self._models.names(artefact)
            (stuck if artefact.batcher.stuck else ready).update(filter(is_name, names))
        faults = {**dict.fromkeys(stuck, "the engine is stuck"), **self._faults, **self._unreadable}
        return [
            {
                "name": name,
                "version": "1",
                "state": "READY" if name in ready else "UNAVAILABLE",
                "reason": faults.get(name, ""),
            }
            for name in sorted(ready | faults.keys())
        ]

    async def update(self, *, settled: bool = False) -> None:
        """Apply the changes of the files since the last call.

        Args:
            settled: Whether to open files at once; otherwise two scans must find them the same.
        """
        found = await in_thread(self._scan)
        self._log_skipped(found)
        self._unreadable = found.unreadable
        observation = Observation(found.marks, frozenset(found.unreadable), not found.fault)
        changes = self._tracker.observe(observation, self._clock(), settled=settled)
        for name in changes.gone:
            if name in self._given:
                continue  # an artefact that was given is served even without its file
            self._faults.pop(name, None)
            self.failed.discard(name)
            try:
                async with self._lock:
                    await self._models.remove(name)
                log("model removed", model=name)
            except Refusal:
                pass
        for name in changes.opened:
            try:
                await self.load(name)
            except Refusal:
                pass  # logged, and shown by the index

    async def follow(self) -> None:
        """Apply changes of the files periodically, forever."""
        while True:
            await asyncio.sleep(self._settings.follow)
            try:
                await self.update()
            except Exception as error:
                log("following files failed", error=error)

    async def _open(self, name: str, path: Path) -> None:
        """Open a model; the caller holds the lock."""
        try:
            self._tracker.opening(name, await in_thread(signature, path))
            await in_thread(check_readable, path)
            if path.suffix == CHECKPOINT:
                await self._models.add_task(name, path)
            else:
                await self._models.open(name, path)
        except FileNotFoundError as error:
            fault = CheckpointError(f"There is no file {path}.")
            self._fail(name, path, fault, fault)
            raise fault from error
        except AoftError as error:
            self._fail(name, path, error, error)
            raise
        except Exception as error:  # a malformed file may make its reader raise anything
            reason = getattr(error, "strerror", None) or type(error).__name__
            fault = CheckpointError(f"{path} cannot be read ({reason}).")
            self._fail(name, path, fault, error)
            raise fault from error
        self._faults.pop(name, None)
        self.failed.discard(name)
        self._tracker.opened(name)
        log("model loaded", model=name)

    def _fail(self, name: str, path: Path, fault: AoftError, error: Exception) -> None:
        """Record why a model was not opened; log it unless the last attempt failed the same way."""
        before, self._faults[name] = self._faults.get(name), without_paths(str(fault), path)
        self._tracker.failed(name, self._clock())
        if self._faults[name] != before:
            reason = str(fault) if error is fault else f"{fault} {error}"
            log("model not loaded", model=name, reason=printable(reason))

    def _log_skipped(self, found: Scan) -> None:
        """Log entries that are skipped or cannot be examined, once for each reason."""
        reasons = {**found.skipped, **found.unreadable}
        if found.fault:
            reasons = {**self._logged, "": found.fault}
        for entry, reason in reasons.items():
            if self._logged.get(entry) != reason:
                event = "skipped" if entry in found.skipped else "cannot be examined"
                log(event, entry=printable(entry), reason=printable(reason))
        self._logged = reasons

    def _scan(self) -> Scan:
        return scan(self._given, self._settings.repository)
