"""Training runs, the benchmarks of the papers, and the analysis of trained weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoft_deploy._lazy import lazy_names

if TYPE_CHECKING:
    from aoft_deploy.training.analysis.quantities import analyse_file
    from aoft_deploy.training.run import Result, train
    from aoft_deploy.training.settings import RunOptions, TrainingSettings

__all__ = [
    "Result",
    "RunOptions",
    "TrainingSettings",
    "analyse_file",
    "train",
]

_HOMES = {
    "Result": "run",
    "RunOptions": "settings",
    "TrainingSettings": "settings",
    "analyse_file": "analysis.quantities",
    "train": "run",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
