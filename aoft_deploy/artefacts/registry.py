"""Exporters by their names, and artefacts opened by the exporter that wrote them.

Exporters are found by the entry-point group ``aoft_deploy.exporters`` and never imported by name.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from aoft_deploy.artefacts.manifest import check_unchanged, unchanged
from aoft_deploy.artefacts.protocols import Engine, Exporter, FolderExporter
from aoft_deploy.errors import CheckpointError, UnknownNameError

if TYPE_CHECKING:
    pass

__all__ = ["exporter_names", "get_exporter", "load_artefact", "load_fleet"]


GROUP = "aoft_deploy.exporters"


def exporter_names() -> tuple[str, ...]:
    """Names of the installed exporters, sorted."""
    return tuple(sorted(entry.name for entry in entry_points(group=GROUP)))


def get_exporter(name: str) -> Exporter:
    """The exporter called ``name``.

    Raises:
        UnknownNameError: No installed exporter has that name.
    """
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return cast(Exporter, entry.load())
    raise UnknownNameError("exporter", name, exporter_names())


def load_artefact(
    path: Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> Engine:
    """An engine for an exported artefact: a file by its suffix, a folder by what it holds.

    Nothing falls back: what was asked for runs, or the error says what it lacks.

    Args:
        path: What aoft-export wrote.
        engine: Which runtime; None is the one that the artefact was verified with.
        threads: Threads within a batch on a CPU; None lets the runtime choose.
        device: ``cpu``, ``cuda``, ``cuda:1`` …; None is the engine's own choice.

    Raises:
        CheckpointError: No exporter writes such files or folders, or this one is damaged, not the
            one that the manifest beside it is of, or written while it is opened.
        UnknownNameError: The engine does not run such artefacts.
        SettingError: The engine cannot run this artefact, or not on that device.
        MissingExtraError: The runtime is not installed.
    """
    exporter = _exporter_of(path)
    if exporter is None:
        raise CheckpointError(
            f"{path} is no artefact of aoft-export: export a checkpoint with aoft-export --merge "
            "first."
        )
    if engine is not None and engine not in exporter.ENGINES:
        raise UnknownNameError(f"engine for {path.name}", engine, exporter.ENGINES)
    with unchanged(path):
        check_unchanged(path)
        return exporter.load(path, engine=engine, threads=threads, device=device)


def _exporter_of(path: Path) -> Exporter | None:
    """The exporter that writes such files or folders."""
    for entry in entry_points(group=GROUP):
        exporter = cast(Exporter, entry.load())
        marked = isinstance(exporter, FolderExporter) and isfile(path / exporter.MARKER)
        if path.suffix == exporter.SUFFIX or marked:
            return exporter
    return None


def load_fleet(path: Path, *, threads: int | None = None) -> Any:
    """A fleet whose caller has the tasks' tables.

    It has ``info``, ``tables`` and ``run(images, task, tables)``.

    Raises:
        CheckpointError: The artefact is no fleet, or of a kind whose tasks cannot change.
    """
    exporter: Any = _exporter_of(path)
    if not hasattr(exporter, "load_fleet"):
        raise CheckpointError(
            f"{path} is no fleet whose tasks can change: export one with aoft-export --fleet --to "
            "onnx or openvino."
        )
    with unchanged(path):
        check_unchanged(path)
        return exporter.load_fleet(path, threads=threads)
