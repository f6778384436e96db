"""The open models: merged models and the tasks of fleets, found by name.

A name from a client never becomes a path.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from aoft_deploy.classes import Classes
from aoft_deploy.errors import SettingError, UnknownNameError
from aoft_deploy.fleet.replicas import FleetReplicas
from aoft_deploy.serving.protocol.messages import VERSION
from aoft_deploy.serving.protocol.refusals import Refusal, unknown_model
from aoft_deploy.serving.repository.names import check_name
from aoft_deploy.serving.repository.opened_artefact import Artefact, open_artefact
from aoft_deploy.serving.settings import Settings
from aoft_deploy.serving.threads import in_thread
from aoft_deploy.texts import shortened

__all__ = ["Model", "Models"]


class Model(NamedTuple):
    """A model of a name.

    Attributes:
        name: The name.
        artefact: The artefact that answers its requests.
        task: Name of the fleet's task; empty for a merged model.
    """

    name: str
    artefact: Artefact
    task: str


class Models:
    """All open models of a server. Used in one event loop; files are read in threads.

    Attributes:
        artefacts: The open artefacts by name.

    Args:
        settings: The server's settings.
        observe: Called with the artefact's name, rows and seconds of every batch.
    """

    def __init__(
        self,
        settings: Settings,
        observe: Callable[[str, int, float], object] | None = None,
    ) -> None:
        self._settings, self._observe = settings, observe
        self.artefacts: dict[str, Artefact] = {}
        self._added: dict[str, Path] = {}  # checkpoints that were added to fleets, by task

    @property
    def empty(self) -> bool:
        """Whether there is no model that could answer a request."""
        return not any(
            a.fleet is None or a.fleet.tasks or self._settings.store is not None
            for a in self.artefacts.values()
        )

    @property
    def devices(self) -> list[str]:
        """Names of the devices that run models."""
        return sorted({device for a in self.artefacts.values() for device in a.devices})

    def find(self, name: str, version: str = VERSION) -> Model:
        """The model that has this name now.

        Raises:
            Refusal: 404: there is no such model or version.
        """
        if version != VERSION:
            raise Refusal(404, f"There is no version {shortened(version)}.")
        artefact = self.artefacts.get(name)
        if artefact is not None and artefact.fleet is None:
            return Model(name, artefact, "")
        for artefact in self.artefacts.values():
            if artefact.fleet is not None and name in artefact.fleet:
                return Model(name, artefact, name)
        raise unknown_model(name)

    def classes(self, model: Model) -> Classes:
        """Classes of a model in the order of its logits; read from the store if necessary.

        Raises:
            AoftError: The task was removed, or the store cannot read it.
        """
        fleet = model.artefact.fleet
        return model.artefact.classes if fleet is None else fleet.classes(model.task)

    async def names(self, artefact: Artefact) -> set[str]:
        """Names of the models of an artefact, including those of its store."""
        fleet = artefact.fleet
        return {artefact.name} if fleet is None else await in_thread(_all_names, fleet)

    async def open(self, name: str, path: Path) -> None:
        """Open an artefact; it replaces the open one of this name.

        Raises:
            AoftError: It cannot be served.
        """
        opened = await in_thread(open_artefact, name, path, self._settings, self._observe)
        if opened.fleet is not None:
            for task, checkpoint in self._added.items():
                await in_thread(opened.fleet.add, checkpoint, task)
        names = _resident(opened)
        for task in names:
            check_name(task)
        for other in self.artefacts.values():
            if other.name != name and names & _resident(other):
                raise SettingError(f"{path} has models of the same names as {other.path}.")
        previous = self.artefacts.get(name)
        self.artefacts[name] = opened
        if previous is not None:
            previous.batcher.close()

    async def add_task(self, name: str, path: Path) -> None:
        """Add a checkpoint's task to the fleet; it replaces the task of this name.

        Raises:
            AoftError: There is no fleet, or the checkpoint does not fit it.
        """
        fleet = next((a.fleet for a in self.artefacts.values() if a.fleet is not None), None)
        if fleet is None:
            raise SettingError(
                f"{path} is a checkpoint, but no fleet is served that takes it: export it first: "
                f"aoft-export --merge {path}."
            )
        if name in self.artefacts:
            raise SettingError(f"{path} has the name of another artefact: rename it.")
        await in_thread(fleet.add, path, name)
        self._added[name] = path

    async def remove(self, name: str) -> None:
        """Remove an artefact or a fleet's task; requests in progress are still answered.

        Raises:
            Refusal: 404: there is no such model.
        """
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
        raise unknown_model(name)

    def close(self) -> None:
        """End the engines' threads once their queues are empty."""
        for artefact in self.artefacts.values():
            artefact.batcher.close()


def _all_names(fleet: FleetReplicas) -> set[str]:
    return fleet.names


def _resident(artefact: Artefact) -> set[str]:
    """Names of the models of an artefact, without those of its store."""
    return {artefact.name} if artefact.fleet is None else set(artefact.fleet.tasks)
