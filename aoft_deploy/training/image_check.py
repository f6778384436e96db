"""Reading every image before the first epoch, and leaving out those that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils.operations import gather_object

from aoft_deploy.data.splits import Splits, find_faults, named_faults
from aoft_deploy.errors import DataError
from aoft_deploy.training.reporting import Reporter
from aoft_deploy.training.settings import RunOptions

__all__ = ["find_unreadable", "leave_out"]

_PRINTED = 20  # faults that are printed in a line of their own


def find_unreadable(splits: Splits, options: RunOptions, reporter: Reporter) -> dict[str, str]:
    """Read every image, and report all that cannot be used.

    Under ``accelerate launch``, the processes share the files.

    Args:
        splits: The images. Those of ``val`` and ``test`` are always decoded, those of ``train``
            unless ``options.trust_images``.
        options: With ``skip_unreadable``, images may be unreadable.
        reporter: Shows the progress, and a line for each file that cannot be used.

    Returns:
        Path of each unreadable image, relative to ``splits.source``, with a sentence.

    Raises:
        DataError: Images cannot be used, and ``options.skip_unreadable`` is false; the first five
            are named.
    """
    processes: Any = PartialState()
    index, count = processes.process_index, processes.num_processes
    files = {part: images.files() for part, images in splits.parts().items()}
    own = {part: paths[index::count] for part, paths in files.items()}
    faults = []
    with reporter.counting("check images", sum(map(len, own.values()))) as tick:
        for part, paths in own.items():
            whole = part != "train" or not options.trust_images
            faults += find_faults(paths, whole=whole, tick=tick)
    if count > 1:
        faults = gather_object(faults)
    if len(faults) > 1 or options.skip_unreadable:
        reporter.say(*[fault for _, fault in faults[:_PRINTED]])
    if faults and not options.skip_unreadable:
        total = sum(map(len, files.values()))
        raise DataError(
            f"{len(faults):,} of {total:,} images cannot be used: {named_faults(faults)}; repair "
            "or remove them, or leave them out with `skip_unreadable=True`."
        )
    return {_relative(path, splits): fault for path, fault in faults}


def leave_out(splits: Splits, faults: Mapping[str, str]) -> Splits:
    """The data set without the images that ``find_unreadable`` returned.

    Raises:
        DataError: A part has no images left, or a class has none left in ``train``.
    """
    if not faults:
        return splits
    files = (path for images in splits.parts().values() for path in images.files())
    return splits.without([path for path in files if _relative(path, splits) in faults])


def _relative(path: Path, splits: Splits) -> str:
    return os.path.relpath(path, splits.source or ".")
