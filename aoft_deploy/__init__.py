"""Fine-tuned Vision Transformers from training to production."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aoft_deploy.orthogonal import approximately_orthogonal
    from aoft_deploy.tuned import TunedModel, attach, merge

__all__ = ["TunedModel", "approximately_orthogonal", "attach", "merge"]

_HOMES = {
    "TunedModel": "tuned",
    "approximately_orthogonal": "orthogonal",
    "attach": "tuned",
    "merge": "tuned",
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
