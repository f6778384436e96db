"""Export of a session's task as a merged ONNX model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import checkpoint_of
from aoft_deploy.artefacts.verification import Report
from aoft_deploy.checkpoints.backbone_source import BackboneSource

__all__ = ["ExportedTask", "export_task"]


@dataclass(frozen=True)
class ExportedTask:
    """An exported and verified task.

    Attributes:
        path: The ONNX file.
        manifest: Its manifest.
        size: Size of the ONNX file in bytes.
        report: Comparison with the unmerged model.
    """

    path: Path
    manifest: Path
    size: int
    report: Report


def export_task(session: Session, name: str, *, uint8: bool) -> ExportedTask:
    """Export a task's merged model with its manifest into the session's folder.

    Args:
        session: Session with the task.
        name: Name of the task.
        uint8: Whether the model takes pixels instead of normalised inputs.

    Raises:
        AoftError: The task has no checkpoint, it was removed in the meantime, or the exported
            model's answers differ.
    """
    from aoft_deploy.export.merged import export_merged

    folder = session.folder / "exports"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with session.using(name) as task:
            done = export_merged(
                checkpoint_of(task, name),
                folder / f"{name}.onnx",
                uint8=uint8,
                command=["aoft-export", "--merge", f"{name}.ckpt", *(["--uint8"] * uint8)],
                backbone=BackboneSource(weights=session.shared.weights),
            )
            return ExportedTask(done.path, done.manifest, done.size, done.report)
    finally:
        if session.ended:  # the session's folder was removed during the export
            shutil.rmtree(session.folder, ignore_errors=True)
