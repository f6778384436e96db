"""What is exported: the checkpoint of a task, or a tuned model in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.file_format import checkpoint_file
from aoft_deploy.checkpoints.names import unique_task_names
from aoft_deploy.errors import SettingError

if TYPE_CHECKING:
    from aoft_deploy.checkpoints.checkpoint import Checkpoint
    from aoft_deploy.checkpoints.shared_backbone import SharedBackbone
    from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["Source", "named_tasks", "source_of"]


class Source(NamedTuple):
    """A tuned task to export.

    Attributes:
        path: Its checkpoint: of a model in memory, the file that ``save`` writes.
        model: The model in memory; None for a checkpoint.
    """

    path: Path
    model: TunedModel | None = None

    def open(
        self, backbone: BackboneSource, shared: SharedBackbone | None = None
    ) -> tuple[TunedModel, Checkpoint]:
        """The tuned model in evaluation mode on the CPU, and its checkpoint.

        Args:
            backbone: Where the backbone of a checkpoint comes from.
            shared: As for ``open_checkpoint``.

        Raises:
            AoftError: The checkpoint cannot be used.
        """
        from aoft_deploy.checkpoints.checkpoint import read_checkpoint
        from aoft_deploy.checkpoints.opening import open_checkpoint

        if self.model is None:
            return open_checkpoint(self.path, backbone, shared)
        return copy.deepcopy(self.model).cpu().eval(), read_checkpoint(self.path)


@contextmanager
def source_of(task: str | Path | TunedModel) -> Iterator[Source]:
    """Context manager: the source for a task. A model in memory has its file until the end.

    Raises:
        AoftError: The model cannot be saved.
    """
    if isinstance(task, str | Path):
        yield Source(checkpoint_file(task))
        return

    from aoft_deploy.checkpoints.checkpoint import save  # imports torch

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        save(task, path)
        yield Source(path, task)


def named_tasks(
    tasks: Sequence[str | Path] | Mapping[str, str | Path | TunedModel],
) -> Mapping[str, str | Path | TunedModel]:
    """Tasks by their names; a checkpoint has its file's or folder's.

    Raises:
        SettingError: A model in memory has no name, or two tasks have the same.
    """
    if isinstance(tasks, Mapping):
        return tasks
    if not all(isinstance(task, str | Path) for task in tasks):
        raise SettingError(
            "A model in memory has no task name: give `checkpoints` as a dict from task names to "
            "models or checkpoints."
        )
    paths = [Path(task) for task in tasks]
    return dict(zip(unique_task_names(paths), paths, strict=True))
