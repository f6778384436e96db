"""Fine-tuned Vision Transformers from training to production."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aoft_deploy.backbone import create_backbone
    from aoft_deploy.checkpoint import load, save
    from aoft_deploy.export import export_merged
    from aoft_deploy.orthogonal import approximately_orthogonal
    from aoft_deploy.preprocessing import Preprocessing
    from aoft_deploy.tuned import TunedModel, attach, merge

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
    "Preprocessing": "preprocessing",
    "TunedModel": "tuned",
    "approximately_orthogonal": "orthogonal",
    "attach": "tuned",
    "create_backbone": "backbone",
    "export_merged": "export",
    "load": "checkpoint",
    "merge": "tuned",
    "save": "checkpoint",
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
