"""The merged models of a race: exported once for each skill and kept until the session ends."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import Task, checkpoint_of
from aoft_deploy.checkpoints.backbone_source import BackboneSource

__all__ = ["merged_models"]


def merged_models(session: Session, names: Sequence[str]) -> Iterator[Path]:
    """The merged ONNX model of each skill, exported if it is missing.

    The visitor's own skills have theirs in the session's folder. Those of the skills that the demo
    started with are shared by all sessions. Models of skills that are not raced are deleted; only
    one race runs at a time.

    Args:
        session: The visitor's session.
        names: Names of the skills, which have checkpoints.

    Yields:
        Path of each model, in order.

    Raises:
        AoftError: A skill was removed, or the exported model's answers differ.
    """
    paths = [model_path(session, session.task(name)) for name in names]
    for folder in {session.folder / "race", session.shared.folder / "race"}:
        for file in folder.glob("*"):
            if not any(file.name.startswith(path.name) for path in paths):
                file.unlink(missing_ok=True)
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            _export(session, name, path)
        yield path


def model_path(session: Session, task: Task) -> Path:
    """Where the merged model of a task is kept."""
    folder = session.shared.folder if task.origin == "initial" else session.folder
    return folder / "race" / f"{hashlib.sha256(task.key.encode()).hexdigest()[:24]}.onnx"


def _export(session: Session, name: str, path: Path) -> None:
    from aoft_deploy.export.merged import export_merged

    try:
        export_merged(
            checkpoint_of(session.task(name), name),
            path,
            backbone=BackboneSource(weights=session.shared.weights),
            overwrite=True,
        )
    finally:
        if session.ended:  # the session's folder was removed during the export
            shutil.rmtree(session.folder, ignore_errors=True)
