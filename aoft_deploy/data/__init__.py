"""Images and labelled splits, read from files or drawn, as arrays. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoft_deploy._lazy import lazy_names

if TYPE_CHECKING:
    from aoft_deploy.data.folder import load_folder
    from aoft_deploy.data.images import read_image
    from aoft_deploy.data.preprocessing import Preprocessing
    from aoft_deploy.data.sources import load_data
    from aoft_deploy.data.splits import ImageList, Splits
    from aoft_deploy.data.synthetic import load_task, task_names

__all__ = [
    "ImageList",
    "Preprocessing",
    "Splits",
    "load_data",
    "load_folder",
    "load_task",
    "read_image",
    "task_names",
]

_HOMES = {
    "ImageList": "splits",
    "Preprocessing": "preprocessing",
    "Splits": "splits",
    "load_data": "sources",
    "load_folder": "folder",
    "load_task": "synthetic",
    "read_image": "images",
    "task_names": "synthetic",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
