"""Fine-tuned Vision Transformers from training to production."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoft_deploy._lazy import lazy_names
from aoft_deploy._version import __version__ as __version__

if TYPE_CHECKING:
    from aoft_deploy.checkpoints.checkpoint import save
    from aoft_deploy.checkpoints.opening import load
    from aoft_deploy.data.preprocessing import Preprocessing
    from aoft_deploy.export.merged import export_merged
    from aoft_deploy.tuning.attaching import attach
    from aoft_deploy.tuning.backbones.backbone import create_backbone
    from aoft_deploy.tuning.backbones.bundled import register
    from aoft_deploy.tuning.merging import merge
    from aoft_deploy.tuning.tuned_model import TunedModel
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
    "register",
    "save",
]

_HOMES = {
    "Preprocessing": "data.preprocessing",
    "TunedModel": "tuning.tuned_model",
    "approximately_orthogonal": "tuning.updates.orthogonal",
    "attach": "tuning.attaching",
    "create_backbone": "tuning.backbones.backbone",
    "export_merged": "export.merged",
    "load": "checkpoints.opening",
    "merge": "tuning.merging",
    "register": "tuning.backbones.bundled",
    "save": "checkpoints.checkpoint",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
