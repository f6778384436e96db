"""Checkpoints of tuned tasks: our own format, released RLRR files, and PEFT LoRA folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoft_deploy._lazy import lazy_names

if TYPE_CHECKING:
    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.checkpoints.checkpoint import Checkpoint, read_checkpoint, save
    from aoft_deploy.checkpoints.opening import load, open_checkpoint

__all__ = [
    "BackboneSource",
    "Checkpoint",
    "load",
    "open_checkpoint",
    "read_checkpoint",
    "save",
]

_HOMES = {
    "BackboneSource": "backbone_source",
    "Checkpoint": "checkpoint",
    "load": "opening",
    "open_checkpoint": "opening",
    "read_checkpoint": "checkpoint",
    "save": "checkpoint",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
