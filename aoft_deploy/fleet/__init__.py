"""Many tasks on one graph, in memory and on disk, added and removed at runtime. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoft_deploy._lazy import lazy_names

if TYPE_CHECKING:
    from aoft_deploy.fleet.checkpoint_folder import CheckpointFolder
    from aoft_deploy.fleet.fleet import Fleet
    from aoft_deploy.fleet.packed_tasks import PackedTasks, pack
    from aoft_deploy.fleet.store import TaskStore

__all__ = [
    "CheckpointFolder",
    "Fleet",
    "PackedTasks",
    "TaskStore",
    "pack",
]

_HOMES = {
    "CheckpointFolder": "checkpoint_folder",
    "Fleet": "fleet",
    "PackedTasks": "packed_tasks",
    "TaskStore": "store",
    "pack": "packed_tasks",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
