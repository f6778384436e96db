"""Export a merged state dict to safetensors, for ``timm.create_model(checkpoint_path=…)``.

It loads strictly into timm's unmodified architecture, without this project. Below fp32, weights
and activations are in the precision, except for what PyTorch itself computes in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.errors import ArtefactError, OutputError, SettingError
from aoft_deploy.file_signatures import foreign
from aoft_deploy.texts import one_line
from aoft_exporters.pytorch.engine import DTYPES, TorchEngine, dtype_of, torch_device
from aoft_exporters.pytorch.usage import load_model

if TYPE_CHECKING:
    from torch import nn

__all__ = ["EXPORTER", "describe", "export", "load"]


def export(model: nn.Module, path: Path, spec: ExportSpec) -> None:
    """Write a plain model's state dict, in the type of the precision.

    Raises:
        SettingError: ``uint8`` is set, or the model has prompts, which timm's architecture cannot
            hold.
        OutputError: The file cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from aoft_deploy.tuning.prompted_blocks import Prompted

    if spec.input.uint8:
        raise SettingError("`uint8` needs a graph: export to onnx with `to`.")
    if any(isinstance(module, Prompted) for module in model.modules()):
        raise SettingError(
            "Prompts are tokens of the graph, which timm's architecture cannot hold: export to "
            "onnx with `to`."
        )
    dtype = getattr(torch, DTYPES[spec.precision])
    tensors = {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    try:
        save_file(tensors, path, metadata=dict(spec.metadata))
    except SafetensorError as error:
        raise OutputError(f"{path.name} could not be written ({error}).") from error


def load(path: Path, options: EngineOptions = EngineOptions()) -> TorchEngine:
    """Open a file: timm creates the architecture and loads the file's weights.

    Raises:
        ArtefactError: The file cannot be read or does not name an architecture of timm.
        SettingError: The device does not exist.
    """
    import timm
    import torch

    from aoft_deploy.tuning.backbones.backbone import unknown_backbone
    from aoft_deploy.tuning.backbones.identity import Backbone

    info = ArtefactInfo(_metadata(path), str(path))
    device, dtype = torch_device(options), dtype_of(info)
    try:
        backbone = Backbone.from_dict(info.backbone)
        if not timm.is_model(backbone.name.partition(".")[0]):
            raise unknown_backbone(backbone.name)
        model = timm.create_model(
            backbone.name,
            pretrained=False,
            num_classes=len(info.classes),
            checkpoint_path=str(path),
            **backbone.args,
        )
    except Exception as error:  # timm raises various exceptions on a tampered file
        reason = one_line(error).rstrip(".")
        raise ArtefactError(f"{path} is no state dict of the timm exporter ({reason}).") from error
    model = model.to(device, getattr(torch, dtype)).eval()
    return TorchEngine(model, info.texts, options, device, dtype)


def describe(path: Path) -> dict[str, Any] | None:
    """Metadata of a state dict; None for a safetensors file of another program.

    Raises:
        ArtefactError: The file is no safetensors file.
    """
    from safetensors import safe_open

    metadata = _metadata(path)
    if "format" not in metadata:
        return None
    with safe_open(path, "np") as file:
        tensors = len(file.keys())
    return {"kind": "timm artefact", "tensors": tensors, **ArtefactInfo(metadata).entries()}


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        other_format = foreign(path, "safetensors")
        reason = f": it {other_format}" if other_format else f" ({one_line(error, 160)})"
        raise ArtefactError(f"{path} is no safetensors file{reason}.") from error


EXPORTER = Exporter(
    name="timm",
    suffix=".safetensors",
    precisions=tuple(DTYPES),
    engines=("torch",),
    tolerance=5e-5,
    export=export,
    load=load,
    describe=describe,
    platform="pytorch",
    next_step=load_model,
)
