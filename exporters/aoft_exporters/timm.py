"""timm: the merged state dict as plain safetensors, for ``timm.create_model(checkpoint_path=…)``.

Loads strictly into the unmodified architecture; nothing of this project is needed to use it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.engines import Recipe
from aoft_deploy.errors import CheckpointError, OutputError, SettingError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PRECISIONS", "SUFFIX", "TOLERANCE", "TimmEngine", "export", "load"]

SUFFIX = ".safetensors"
TOLERANCE = 5e-5
PRECISIONS = ("fp32",)


def export(model: nn.Module, path: Path, recipe: Recipe) -> None:
    """Write a plain model's state dict.

    Raises:
        SettingError: ``uint8`` is asked, but a state dict has no input form; or the model has
            prompts, for which timm's architecture has no place.
        OutputError: The file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from aoft_deploy.prompts import Prompted

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


class TimmEngine:
    """The architecture made by timm with the file's weights in it, in PyTorch on the CPU.

    Attributes:
        info: Metadata stored in the file.
        takes_pixels: False; inputs are normalised.

    Raises:
        CheckpointError: The file cannot be read or does not say which architecture it is of.
    """

    takes_pixels = False

    def __init__(self, path: Path) -> None:
        import timm
        import torch
        from safetensors import SafetensorError, safe_open

        from aoft_deploy.backbone import Backbone

        try:
            with safe_open(path, "pt") as file:
                self.info: Mapping[str, str] = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is no state dict of --to timm ({error}).") from error
        try:
            backbone = Backbone.from_dict(json.loads(self.info["backbone"]))
            classes = json.loads(self.info["classes"])
            self._model = timm.create_model(
                backbone.name,
                pretrained=False,
                num_classes=len(classes),
                checkpoint_path=str(path),
                **backbone.args,
            ).eval()
        except Exception as error:  # a doctored file makes timm raise anything
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(f"{path} is no state dict of --to timm ({reason}).") from error
        self._torch = torch

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits of normalised images, float32 [batch, 3, H, W]."""
        with self._torch.no_grad():
            logits: NDArray[np.float32] = self._model(self._torch.from_numpy(images)).numpy()
        return logits


def load(path: Path) -> TimmEngine:
    """Open a state dict for inference; see ``TimmEngine``."""
    return TimmEngine(Path(path))
