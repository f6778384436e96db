"""Find exporters by name, and load artefacts with the exporter that wrote them.

Exporters are found through the entry-point group ``aoft_deploy.exporters``.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, cast

from aoft_deploy.artefacts.engine import Engine, EngineOptions, FleetEngine
from aoft_deploy.artefacts.manifest import check_unchanged, unchanged
from aoft_deploy.errors import ArtefactError, UnknownNameError
from aoft_deploy.path_kinds import GIVE, described, missing

if TYPE_CHECKING:
    from aoft_deploy.artefacts.exporter import Exporter

__all__ = [
    "exporter_names",
    "exporters",
    "exporters_of",
    "get_exporter",
    "load_artefact",
    "load_fleet",
]

GROUP = "aoft_deploy.exporters"


def exporter_names() -> tuple[str, ...]:
    """Names of the installed exporters, sorted."""
    return tuple(sorted(entry.name for entry in entry_points(group=GROUP)))


def exporters() -> Iterator[Exporter]:
    """The installed exporters."""
    for entry in entry_points(group=GROUP):
        yield cast("Exporter", entry.load())


def get_exporter(name: str) -> Exporter:
    """The exporter called ``name``.

    Raises:
        UnknownNameError: No installed exporter has that name.
    """
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return cast("Exporter", entry.load())
    raise UnknownNameError("exporter", name, exporter_names())


def exporters_of(path: Path) -> Iterator[Exporter]:
    """The exporters whose artefacts look like ``path``, by its suffix or the files in it.

    The first of them loads it. The others are imported only if they are asked for.
    """
    return (exporter for exporter in exporters() if exporter.owns(path))


def load_artefact(path: Path, options: EngineOptions = EngineOptions()) -> Engine:
    """Load an exported artefact.

    Args:
        path: The artefact.
        options: Runtime, threads, device and lanes.

    Raises:
        ArtefactError: The path is not an artefact, or it is damaged, was changed after its manifest
            was written, or changes while it is loaded.
        UnknownNameError: The runtime in ``options`` cannot run this kind of artefact.
        SettingError: The engine cannot run this artefact, or not on this device.
        MissingExtraError: The runtime is not installed.
    """
    exporter = next(exporters_of(path), None)
    if exporter is None:
        raise ArtefactError(_no_artefact(path))
    if options.engine is not None and options.engine not in exporter.engines:
        raise UnknownNameError(f"engine for {path.name}", options.engine, exporter.engines)
    with unchanged(path):
        check_unchanged(path, exporter.stated_digest)
        return exporter.load(path, options)


def _no_artefact(path: Path) -> str:
    if not path.exists():
        return missing(path)
    reason = described(path, "artefact") or f"is no artefact of aoft-export: {GIVE['artefact']}"
    return f"{path} {reason}."


def load_fleet(path: Path, options: EngineOptions = EngineOptions()) -> FleetEngine:
    """Load a fleet whose tasks can change: it takes the tables of its tasks as arguments.

    Args:
        path: The artefact.
        options: Threads, device and lanes; ``engine`` must be None.

    Raises:
        ArtefactError: The artefact is not a fleet, or its tasks cannot change.
        SettingError: The engine cannot run it on this device.
        MissingExtraError: The runtime is not installed.
    """
    for exporter in exporters_of(path):
        if exporter.fleet is not None and exporter.fleet.load is not None:
            with unchanged(path):
                check_unchanged(path, exporter.stated_digest)
                return exporter.fleet.load(path, options)
    able = sorted(e.name for e in exporters() if e.fleet is not None and e.fleet.load is not None)
    raise ArtefactError(
        f"{path} is no fleet whose tasks can change: export the checkpoints as a fleet with "
        f"`to` {' or '.join(able)}."
    )
