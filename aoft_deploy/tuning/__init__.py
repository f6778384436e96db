"""Fine-tuning methods: updates in a frozen timm model, merged into it, or mixed per sample.

To learn the method, read in this order: ``updates.orthogonal`` (the matrix AO(q)),
``updates.update`` and ``updates.aoft`` (an update and its formula), ``updates.delta`` (what a
formula returns), ``updates.applying``, ``.folding`` and ``.mixing`` (its three uses), ``methods``
(which sites get which update), ``attaching``, ``merging`` and ``multitask`` (whole models).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoft_deploy._lazy import lazy_names

if TYPE_CHECKING:
    from aoft_deploy.tuning.attaching import attach
    from aoft_deploy.tuning.backbones.backbone import create_backbone
    from aoft_deploy.tuning.backbones.identity import Backbone
    from aoft_deploy.tuning.merging import merge
    from aoft_deploy.tuning.methods import get_method, method_names
    from aoft_deploy.tuning.multitask import FoldedModel, MixedModel
    from aoft_deploy.tuning.tuned_model import TunedModel
    from aoft_deploy.tuning.updates.orthogonal import approximately_orthogonal

__all__ = [
    "Backbone",
    "FoldedModel",
    "MixedModel",
    "TunedModel",
    "approximately_orthogonal",
    "attach",
    "create_backbone",
    "get_method",
    "merge",
    "method_names",
]

_HOMES = {
    "Backbone": "backbones.identity",
    "FoldedModel": "multitask",
    "MixedModel": "multitask",
    "TunedModel": "tuned_model",
    "approximately_orthogonal": "updates.orthogonal",
    "attach": "attaching",
    "create_backbone": "backbones.backbone",
    "get_method": "methods",
    "merge": "merging",
    "method_names": "methods",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
