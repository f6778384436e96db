"""Export of a task from the page."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from aoft_demo.tasks.shared_fleet import checkpoint_of
from aoft_demo.tasks.visitors import Visitor

if TYPE_CHECKING:
    from aoft_deploy.export.merged import Exported

__all__ = ["export_task"]


def export_task(visitor: Visitor, name: str, *, uint8: bool) -> Exported:
    """A task's merged model with its manifest, among the visitor's files.

    Raises:
        AoftError: The task has no checkpoint, it was removed meanwhile, or its answers would
            differ.
    """
    from aoft_deploy.export.merged import export_merged

    folder = visitor.folder / "exports"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with visitor.using(name) as task:
            return export_merged(
                checkpoint_of(task, name),
                folder / f"{name}.onnx",
                uint8=uint8,
                weights=visitor.stage.weights,
                command=["aoft-export", "--merge", f"{name}.ckpt", *(["--uint8"] * uint8)],
            )
    finally:
        if visitor.gone:  # its folder was removed while we wrote into it
            shutil.rmtree(visitor.folder, ignore_errors=True)
