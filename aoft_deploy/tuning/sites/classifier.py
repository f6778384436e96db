"""The classifier of a timm model."""

from __future__ import annotations

from torch import nn

from aoft_deploy.errors import AttachError

__all__ = ["classifier_names"]


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifier's parameters. Distilled and token-labelled models have two heads.

    Args:
        model: A timm model.

    Raises:
        AttachError: The model has no trainable classifier.
    """
    get = getattr(model, "get_classifier", None)
    heads = get() if get is not None else ()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    heads = [h for h in (*heads, getattr(model, "aux_head", None)) if isinstance(h, nn.Module)]
    owned = {id(p) for head in heads for p in head.parameters()}
    names = [name for name, p in model.named_parameters() if id(p) in owned]
    if not names:
        raise AttachError(_no_classifier(model))
    return names


def _no_classifier(model: nn.Module) -> str:
    """The message for a model without one of timm's classifiers."""
    class_name = type(model).__name__
    if hasattr(model, "get_classifier"):
        return f"{class_name} has no classifier: create it with num_classes of 1 or more."
    inner = getattr(model, "module", None)
    if hasattr(inner, "get_classifier"):
        return f"{class_name} is a wrapper around a timm model: pass its attribute module."
    library = type(model).__module__.partition(".")[0]
    return (
        f"{class_name} of {library} is no timm model, so its classifier and layers are not known: "
        "create the same architecture with timm.create_model, such as vit_base_patch16_224, with "
        "num_classes of 1 or more."
    )
