"""Which models there are: merged ones and the tasks of fleets, opened, exchanged and let go.

A model is found by its name alone. What may be opened was named at the start or lies in the
repository's folder, found by listing it: no name that a client sends becomes a path.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from aoft_deploy.artefacts.manifest import signature
from aoft_deploy.errors import AoftError, CheckpointError, SettingError, UnknownNameError
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.serving.log import log
from aoft_deploy.serving.protocol.refusals import Refusal, shown
from aoft_deploy.serving.repository.changes import Follower, Look
from aoft_deploy.serving.repository.opened_artefact import Artefact, open_artefact
from aoft_deploy.serving.repository.scan import CHECKPOINT, Sight, is_name, printable, seen
from aoft_deploy.serving.settings import Settings
from aoft_deploy.serving.threads import in_thread

__all__ = ["Model", "Models", "artefact_name"]


class Model(NamedTuple):
    """What a name means.

    Attributes:
        name: The name.
        artefact: What answers.
        task: Name of the fleet's task; empty for a merged model.
    """

    name: str
    artefact: Artefact
    task: str


class Models:
    """All models of a server. Methods are of one event loop; files are read in threads.

    Attributes:
        artefacts: Those that are open, by name.
        failed: Names that could not be served at the start, until they can or their files go.

    Args:
        settings: Of the server.
        given: Artefacts by name, opened at the start.
        observe: Told name, rows and seconds of every batch.
        clock: Seconds, for what is tried again.

    Raises:
        SettingError: Two artefacts or none are given, or a name cannot stand in an address.
    """

    def __init__(
        self,
        settings: Settings,
        given: Sequence[tuple[str, Path]],
        observe: Callable[[str, int, float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._observe, self._clock = settings, observe, clock
        self._given = dict(given)
        if len(self._given) < len(given):
            raise SettingError("Two artefacts have the same name: give NAME=PATH.")
        if not given and settings.repository is None:
            raise SettingError("There is nothing to serve: give an artefact or --repository.")
        for name in self._given:
            _check_name(name)
        self.artefacts: dict[str, Artefact] = {}
        self._added: dict[str, Path] = {}  # tasks of fleets, from checkpoints
        self.failed: set[str] = set()
        self._faults: dict[str, str] = {}  # of the last try to open
        self._unseen: Mapping[str, str] = {}  # what the last look could not look at
        self._told: Mapping[str, str] = {}  # what was logged of entries that are passed over
        self._follower = Follower(settings.follow)
        self._lock = asyncio.Lock()

    @property
    def any(self) -> bool:
        """Whether there is a model to ask."""
        return any(
            a.fleet is None or a.fleet.tasks or self._settings.store is not None
            for a in self.artefacts.values()
        )

    @property
    def faulty(self) -> bool:
        """Whether something that should be served could not be opened, or not be looked at."""
        return bool(self._faults or self._unseen)

    async def open_given(self) -> None:
        """Open what was given, then what the repository holds.

        Raises:
            SettingError: The repository is no folder, or one that cannot be read.
            AoftError: Something given cannot be served; of the repository it is only logged.
        """
        sight = await in_thread(self._sight)
        if sight.fault:
            raise SettingError(f"{sight.fault}: name another folder with --repository.")
        for name, path in self._given.items():
            async with self._lock:
                await self._open(name, path)
        await self.look(settled=True)
        self.failed = {*self._faults, *self._unseen}

    def find(self, name: str) -> Model:
        """What a name means now.

        Raises:
            Refusal: 404: there is no such model.
        """
        artefact = self.artefacts.get(name)
        if artefact is not None and artefact.fleet is None:
            return Model(name, artefact, "")
        for artefact in self.artefacts.values():
            if artefact.fleet is not None and name in artefact.fleet:
                return Model(name, artefact, name)
        raise Refusal(404, f"There is no model {shown(name)}.")

    def classes(self, model: Model) -> tuple[str, ...]:
        """Classes of a model, in the order of its logits; read from the store if it has left.

        Raises:
            AoftError: The task has gone, or the store cannot give it.
        """
        fleet = model.artefact.fleet
        return model.artefact.classes if fleet is None else fleet.classes(model.task)

    async def load(self, name: str) -> None:
        """Open a model, or exchange it for what its file holds now.

        Raises:
            Refusal: 404: there is no file for it; 400: it cannot be served, and what was there is
                kept.
        """
        async with self._lock:
            sight = await in_thread(self._sight)
            path = sight.paths.get(name)
            if name in sight.unseen:
                raise Refusal(400, f"{name} was not loaded: {sight.unseen[name]}")
            if path is None and sight.fault:
                raise Refusal(400, f"{name} was not loaded: the repository cannot be read.")
            if path is None:
                raise Refusal(404, f"There is no artefact for a model {shown(name)}.")
            try:
                await self._open(name, path)
            except AoftError as error:
                raise Refusal(400, f"{name} was not loaded: {self._faults[name]}") from error

    async def unload(self, name: str) -> None:
        """Let a model go; requests under way are still answered.

        Raises:
            Refusal: 404: there is no such model.
        """
        async with self._lock:
            await self._close(name)
            self._follower.closed(name)
            self.failed.discard(name)

    async def index(self) -> list[dict[str, str]]:
        """Every model, whether it is ready, and why not; last failures too."""
        ready: set[str] = set()
        stuck: set[str] = set()
        for name, artefact in self.artefacts.items():
            fleet = artefact.fleet
            names = {name} if fleet is None else await in_thread(_names, fleet)
            (stuck if artefact.batcher.stuck else ready).update(filter(is_name, names))
        faults = {**dict.fromkeys(stuck, "the engine is stuck"), **self._faults, **self._unseen}
        return [
            {
                "name": name,
                "version": "1",
                "state": "READY" if name in ready else "UNAVAILABLE",
                "reason": faults.get(name, ""),
            }
            for name in sorted(ready | faults.keys())
        ]

    async def look(self, *, settled: bool = False) -> None:
        """Take over what has changed in the files since the last look.

        Args:
            settled: Whether files are taken as they are; else once two looks found them the same.
        """
        sight = await in_thread(self._sight)
        self._tell(sight)
        self._unseen = sight.unseen
        look = Look(sight.marks, frozenset(sight.unseen), not sight.fault)
        changes = self._follower.looked(look, self._clock(), settled=settled)
        for name in changes.gone:
            if name in self._given:
                continue  # what was given is served on without its file
            self._faults.pop(name, None)
            self.failed.discard(name)
            try:
                async with self._lock:
                    await self._close(name)
                log("model removed", model=name)
            except Refusal:
                pass
        for name in changes.opened:
            try:
                await self.load(name)
            except Refusal:
                pass  # logged, and told by the index

    async def follow(self) -> None:
        """Look at the files again and again."""
        while True:
            await asyncio.sleep(self._settings.follow)
            try:
                await self.look()
            except Exception as error:
                log("following files failed", error=error)

    def close(self) -> None:
        """End all engines' threads when they are idle."""
        for artefact in self.artefacts.values():
            artefact.batcher.close()

    async def _open(self, name: str, path: Path) -> None:
        """Open and exchange; the caller has the lock."""
        try:
            self._follower.opening(name, await in_thread(signature, path))
            await in_thread(_check_readable, path)
            if path.suffix == CHECKPOINT:
                await self._add(name, path)
            else:
                await self._exchange(name, path)
        except FileNotFoundError as error:
            fault = CheckpointError(f"There is no file {path}.")
            self._fail(name, path, fault, fault)
            raise fault from error
        except AoftError as error:
            self._fail(name, path, error, error)
            raise
        except Exception as error:  # a file of anybody's makes readers raise what they trip over
            why = getattr(error, "strerror", None) or type(error).__name__
            fault = CheckpointError(f"{path} cannot be read ({why}).")
            self._fail(name, path, fault, error)
            raise fault from error
        self._faults.pop(name, None)
        self.failed.discard(name)
        self._follower.opened(name)
        log("model loaded", model=name)

    def _fail(self, name: str, path: Path, told: AoftError, error: Exception) -> None:
        """Remember why a model was not opened, and log it unless that was the last reason too."""
        before, self._faults[name] = self._faults.get(name), _told(told, path)
        self._follower.failed(name, self._clock())
        if self._faults[name] != before:
            reason = str(told) if error is told else f"{told} {error}"
            log("model not loaded", model=name, reason=printable(reason))

    def _tell(self, sight: Sight) -> None:
        """Log what is passed over or cannot be looked at, once for each reason."""
        told = {**sight.passed, **sight.unseen}
        if sight.fault:
            told = {**self._told, "": sight.fault}
        for entry, reason in told.items():
            if self._told.get(entry) != reason:
                event = "passed over" if entry in sight.passed else "cannot be looked at"
                log(event, entry=printable(entry), reason=printable(reason))
        self._told = told

    async def _exchange(self, name: str, path: Path) -> None:
        opened = await in_thread(open_artefact, name, path, self._settings, self._observe)
        if opened.fleet is not None:
            for task, checkpoint in self._added.items():
                await in_thread(opened.fleet.add, checkpoint, task, replace=True)
        names = _resident(opened)
        for task in names:
            _check_name(task)
        for other in self.artefacts.values():
            if other.name != name and names & _resident(other):
                raise SettingError(f"{path} has models of the same names as {other.path}.")
        old = self.artefacts.get(name)
        self.artefacts[name] = opened
        if old is not None:
            old.batcher.close()

    async def _add(self, name: str, path: Path) -> None:
        fleet = next((a.fleet for a in self.artefacts.values() if a.fleet is not None), None)
        if fleet is None:
            raise SettingError(f"{path} is a checkpoint, but no fleet is served that takes it.")
        if name in self.artefacts:
            raise SettingError(f"{path} has the name of another artefact: rename it.")
        await in_thread(fleet.add, path, name, replace=True)
        self._added[name] = path

    async def _close(self, name: str) -> None:
        artefact = self.artefacts.pop(name, None)
        if artefact is not None:
            artefact.batcher.close()
            return
        for artefact in self.artefacts.values():
            if artefact.fleet is not None:
                try:
                    await in_thread(artefact.fleet.remove, name)
                except UnknownNameError:
                    continue
                self._added.pop(name, None)
                return
        raise Refusal(404, f"There is no model {shown(name)}.")

    def _sight(self) -> Sight:
        """Everything that may be opened; artefacts first, since checkpoints need them."""
        return seen(self._given, self._settings.repository)


def artefact_name(text: str) -> tuple[str, Path]:
    """Name and path of ``NAME=PATH``, or of a path alone."""
    name, equals, path = text.partition("=")
    if equals and "/" not in name and not Path(text).exists():
        return name, Path(path)
    return Path(text).stem, Path(text)


def _check_name(name: str) -> None:
    if not is_name(name):
        raise SettingError(f"A model cannot be called {name!r} in an address: rename it.")


def _check_readable(path: Path) -> None:
    """Whether the system lets us read it: what a reader makes of a refusal is not the reason.

    Raises:
        OSError: It does not.
    """
    if path.is_file():
        path.open("rb").close()


def _told(error: AoftError, path: Path) -> str:
    """An error's sentence without where things lie on the host."""
    text = printable(str(error).replace(str(path), path.name))
    text = re.sub(r"\[\w+Error\] : \d+ : \w+ : ", "", text)  # ONNX Runtime's own
    return re.sub(r"(?<![\w.])/[\w.\-/ ]*/(?=[\w.\-])", "", text)


def _names(fleet: Fleet) -> set[str]:
    return fleet.names


def _resident(artefact: Artefact) -> set[str]:
    """Names of its models, without those of a fleet's store."""
    return {artefact.name} if artefact.fleet is None else set(artefact.fleet.tasks)
