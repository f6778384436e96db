"""timm: the merged state dict as plain safetensors, for ``timm.create_model(checkpoint_path=…)``.

Loads strictly into the unmodified architecture; nothing of this project is needed to use it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aoft_deploy.artefacts.spec import Recipe
from aoft_deploy.errors import CheckpointError, OutputError, SettingError
from aoft_deploy.file_signatures import foreign
from aoft_exporters.pytorch.engine import TorchEngine

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ENGINES", "PRECISIONS", "SUFFIX", "TOLERANCE", "export", "load"]

SUFFIX = ".safetensors"
TOLERANCE = 5e-5
PRECISIONS = ("fp32",)
ENGINES = ("torch",)


def export(model: nn.Module, path: Path, recipe: Recipe) -> None:
    """Write a plain model's state dict.

    Raises:
        SettingError: ``uint8`` is asked, but a state dict has no input form; or the model has
            prompts, for which timm's architecture has no place.
        OutputError: The file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from aoft_deploy.tuning.prompted_blocks import Prompted

    if recipe.uint8:
        raise SettingError("--uint8 needs a graph: export with --to onnx.")
    if any(isinstance(module, Prompted) for module in model.modules()):
        raise SettingError(
            "Prompts are tokens of the graph, which timm's architecture has no place for: export "
            "with --to onnx."
        )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(tensors, path, metadata=dict(recipe.metadata))
    except SafetensorError as error:
        raise OutputError(f"{path.name} could not be written ({error}).") from error


def load(
    path: Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> TorchEngine:
    """The architecture made by timm with the file's weights in it.

    Raises:
        CheckpointError: The file cannot be read or does not say which architecture it is of.
        SettingError: There is no such device.
    """
    import timm
    from safetensors import SafetensorError, safe_open

    from aoft_deploy.tuning.backbones.identity import Backbone

    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            info: Mapping[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        why = foreign(path, "safetensors") or str(error)
        raise CheckpointError(f"{path} is no state dict of --to timm ({why}).") from error
    try:
        backbone = Backbone.from_dict(json.loads(info["backbone"]))
        classes = json.loads(info["classes"])
        model = timm.create_model(
            backbone.name,
            pretrained=False,
            num_classes=len(classes),
            checkpoint_path=str(path),
            **backbone.args,
        )
    except Exception as error:  # a doctored file makes timm raise anything
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path} is no state dict of --to timm ({reason}).") from error
    return TorchEngine(model, info, threads, device)
