"""Fine-tuned Vision Transformers from training to production."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aoft_deploy.checkpoints.opening import load, save
    from aoft_deploy.data.preprocessing import Preprocessing
    from aoft_deploy.export.merged import export_merged
    from aoft_deploy.tuning.backbones.backbone import create_backbone
    from aoft_deploy.tuning.tuned_model import TunedModel, attach, merge
    from aoft_deploy.tuning.updates.orthogonal import approximately_orthogonal

__all__ = [
    "Preprocessing",
    "TunedModel",
    "approximately_orthogonal",
    "attach",
    "create_backbone",
    "export_merged",
    "load",
    "merge",
    "save",
]

_HOMES = {
    "Preprocessing": "data.preprocessing",
    "TunedModel": "tuning.tuned_model",
    "approximately_orthogonal": "tuning.updates.orthogonal",
    "attach": "tuning.tuned_model",
    "create_backbone": "tuning.backbones.backbone",
    "export_merged": "export.merged",
    "load": "checkpoints.opening",
    "merge": "tuning.tuned_model",
    "save": "checkpoints.opening",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the commands start without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'aoft_deploy' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"aoft_deploy.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
