"""Python expressions that use an artefact in PyTorch, for the last line of aoft-export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aoft_exporters.pytorch.engine import DTYPES

__all__ = ["load_adapter", "load_model"]


def load_model(path: Path, manifest: Mapping[str, Any]) -> str:
    """Expression that creates timm's model with the weights of a file."""
    model = _registered(manifest) + _create(manifest, checkpoint_path=str(path))
    precision = manifest["precision"]
    return model if precision == "fp32" else f"{model}.to(torch.{DTYPES[precision]})"


def load_adapter(path: Path, manifest: Mapping[str, Any]) -> str:
    """Expression that puts a PEFT LoRA folder onto its backbone."""
    origin = manifest["backbone"]["origin"]
    if origin == "timm":
        model = _create(manifest, pretrained=True)
        return f"{_registered(manifest)}peft.PeftModel.from_pretrained({model}, {str(path)!r})"
    return (
        f"peft.PeftModel.from_pretrained(model, {str(path)!r}), where model is "
        f"{_registered(manifest)}{_create(manifest)} with the weights of the backbone ({origin})"
    )


def _create(manifest: Mapping[str, Any], **weights: Any) -> str:
    backbone = manifest["backbone"]
    arguments = {"num_classes": len(manifest["classes"]), **backbone["args"], **weights}
    words = [repr(backbone["name"]), *(f"{name}={value!r}" for name, value in arguments.items())]
    return f"timm.create_model({', '.join(words)})"


def _registered(manifest: Mapping[str, Any]) -> str:
    is_bundled = manifest["backbone"]["name"] == "aoft_vit_nano"
    return "aoft_deploy.register(); " if is_bundled else ""
