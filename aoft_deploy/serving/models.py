"""Which models there are: merged ones and the tasks of fleets, opened, exchanged and let go.

A model is found by its name alone. What may be opened was named at the start or lies in the
repository's folder, found by listing it: no name that a client sends becomes a path.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from aoft_deploy.engines import TunedExporter, exporter_names, get_exporter
from aoft_deploy.errors import AoftError, CheckpointError, SettingError, UnknownNameError
from aoft_deploy.fleet import Fleet
from aoft_deploy.serving.artefacts import Artefact, open_artefact, signature
from aoft_deploy.serving.log import log
from aoft_deploy.serving.refusals import Refusal, shown
from aoft_deploy.serving.settings import Settings
from aoft_deploy.serving.threads import in_thread

__all__ = ["Model", "Models", "artefact_name"]

CHECKPOINT = ".ckpt"


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

    Args:
        settings: Of the server.
        given: Artefacts by name, opened at the start.
        observe: Told name, rows and seconds of every batch.

    Raises:
        SettingError: Two artefacts or none are given, or a name cannot stand in an address.
    """

    def __init__(
        self,
        settings: Settings,
        given: Sequence[tuple[str, Path]],
        observe: Callable[[str, int, float], object] | None = None,
    ) -> None:
        self._settings, self._observe = settings, observe
        self._given = dict(given)
        if len(self._given) < len(given):
            raise SettingError("Two artefacts have the same name: give NAME=PATH.")
        if not given and settings.repository is None:
            raise SettingError("There is nothing to serve: give an artefact or --repository.")
        for name in self._given:
            _check_name(name)
        self.artefacts: dict[str, Artefact] = {}
        self._added: dict[str, Path] = {}  # tasks of fleets, from checkpoints
        self._faults: dict[str, str] = {}
        self._marks: dict[str, object] = {}
        self._seen: dict[str, object] = {}
        self._lock = asyncio.Lock()

    async def open_given(self) -> None:
        """Open what was given, then what the repository holds.

        Raises:
            AoftError: Something given cannot be served; of the repository it is only logged.
        """
        for name, path in self._given.items():
            async with self._lock:
                await self._open(name, path)
        await self.look(settled=True)

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
            path = (await in_thread(self._sources)).get(name)
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

    async def index(self) -> list[dict[str, str]]:
        """Every model, whether it is ready, and why not; last failures too."""
        ready: set[str] = set()
        stuck: set[str] = set()
        for name, artefact in self.artefacts.items():
            fleet = artefact.fleet
            names = {name} if fleet is None else await in_thread(_names, fleet)
            (stuck if artefact.batcher.stuck else ready).update(names)
        return [
            {
                "name": name,
                "version": "1",
                "state": "READY" if name in ready else "UNAVAILABLE",
                "reason": self._faults.get(name, "the engine is stuck" if name in stuck else ""),
            }
            for name in sorted(ready | stuck | set(self._faults))
        ]

    async def look(self, *, settled: bool = False) -> None:
        """Take over what has changed in the files since the last look.

        Args:
            settled: Whether files are taken as they are; else once two looks found them the same.
        """
        sources = await in_thread(self._sources)
        marks = await in_thread(lambda: {name: signature(path) for name, path in sources.items()})
        gone = [n for n in self._marks if n not in sources or marks[n] is None]
        for name in gone:
            if name in self._given:
                continue  # what was given is served on without its file
            del self._marks[name]
            self._faults.pop(name, None)
            try:
                await self.unload(name)
                log("model removed", model=name)
            except Refusal:
                pass
        for name, mark in marks.items():
            if mark is None or mark == self._marks.get(name):
                continue
            if settled or self._seen.get(name) == mark:
                try:
                    await self.load(name)
                except Refusal:
                    pass  # logged, and told by the index
            self._seen[name] = mark

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
        self._marks[name] = await in_thread(signature, path)
        try:
            if path.suffix == CHECKPOINT:
                await self._add(name, path)
            else:
                await self._exchange(name, path)
        except AoftError as error:
            self._faults[name] = _told(error, path)
            log("model not loaded", model=name, reason=str(error))
            raise
        except Exception as error:  # a file of anybody's makes readers raise what they trip over
            fault = CheckpointError(f"{path} cannot be read ({type(error).__name__}).")
            self._faults[name] = _told(fault, path)
            log("model not loaded", model=name, reason=f"{fault} {error}")
            raise fault from error
        self._faults.pop(name, None)
        log("model loaded", model=name)

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

    def _sources(self) -> dict[str, Path]:
        """Everything that may be opened, by name; artefacts first, since checkpoints need them."""
        found = dict(self._given)
        folder = self._settings.repository
        if folder is not None and folder.is_dir():
            suffixes = _suffixes()
            entries = [p for p in folder.iterdir() if not p.name.startswith(".")]
            for path in sorted(entries, key=lambda p: (p.suffix == CHECKPOINT, p.name)):
                if path.suffix in suffixes and _is_name(path.stem) and _is_readable(path):
                    found.setdefault(path.stem, path)
        return found


def artefact_name(text: str) -> tuple[str, Path]:
    """Name and path of ``NAME=PATH``, or of a path alone."""
    name, equals, path = text.partition("=")
    if equals and "/" not in name and not Path(text).exists():
        return name, Path(path)
    return Path(text).stem, Path(text)


def _suffixes() -> set[str]:
    """Of files that may be served: those of engines that need no backbone, and checkpoints."""
    exporters = [get_exporter(name) for name in exporter_names()]
    merged = {e.SUFFIX for e in exporters if not isinstance(e, TunedExporter)}
    return merged - {".safetensors"} | {CHECKPOINT}


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[^/\\\0-\x1f\x7f]{1,200}", name) is not None and name not in (".", "..")


def _is_readable(path: Path) -> bool:
    """Whether it is a file or a folder, and no pipe, which nobody may ever write to."""
    return path.is_file() or path.is_dir()


def _check_name(name: str) -> None:
    if not _is_name(name):
        raise SettingError(f"A model cannot be called {name!r} in an address: rename it.")


def _told(error: AoftError, path: Path) -> str:
    """An error's sentence without where things lie on the host."""
    text = str(error).replace(str(path), path.name)
    text = re.sub(r"\[\w+Error\] : \d+ : \w+ : ", "", text)  # ONNX Runtime's own
    return re.sub(r"(?<![\w.])/[\w.\-/ ]*/(?=[\w.\-])", "", text)


def _names(fleet: Fleet) -> set[str]:
    return fleet.names


def _resident(artefact: Artefact) -> set[str]:
    """Names of its models, without those of a fleet's store."""
    return {artefact.name} if artefact.fleet is None else set(artefact.fleet.tasks)
