"""Fine-tuned Vision Transformers from training to production."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoft_deploy._lazy import lazy_names
from aoft_deploy._version import __version__ as __version__

if TYPE_CHECKING:
    from aoft_deploy.artefacts.prediction import Classifier, load_classifier
    from aoft_deploy.checkpoints.checkpoint import save
    from aoft_deploy.checkpoints.opening import load
    from aoft_deploy.classes import Prediction, Value
    from aoft_deploy.data.preprocessing import Preprocessing
    from aoft_deploy.export.fleet import export_fleet
    from aoft_deploy.export.merged import export_merged
    from aoft_deploy.tuning.attaching import attach
    from aoft_deploy.tuning.backbones.backbone import create_backbone
    from aoft_deploy.tuning.backbones.bundled import register
    from aoft_deploy.tuning.merging import merge
    from aoft_deploy.tuning.tuned_model import TunedModel
    from aoft_deploy.tuning.updates.orthogonal import approximately_orthogonal

__all__ = [
    "Classifier",
    "Prediction",
    "Preprocessing",
    "TunedModel",
    "Value",
    "approximately_orthogonal",
    "attach",
    "create_backbone",
    "export_fleet",
    "export_merged",
    "load",
    "load_classifier",
    "merge",
    "register",
    "save",
]

_HOMES = {
    "Classifier": "artefacts.prediction",
    "Prediction": "classes",
    "Preprocessing": "data.preprocessing",
    "TunedModel": "tuning.tuned_model",
    "Value": "classes",
    "approximately_orthogonal": "tuning.updates.orthogonal",
    "attach": "tuning.attaching",
    "create_backbone": "tuning.backbones.backbone",
    "export_fleet": "export.fleet",
    "export_merged": "export.merged",
    "load": "checkpoints.opening",
    "load_classifier": "artefacts.prediction",
    "merge": "tuning.merging",
    "register": "tuning.backbones.bundled",
    "save": "checkpoints.checkpoint",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
