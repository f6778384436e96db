"""Export AOFT-LoRA and LoRA to a PEFT LoRA folder, for ``peft.PeftModel.from_pretrained``.

The folder holds adapter_config.json and adapter_model.safetensors with matrices A and B of every
adapted layer, and the classifier. PEFT adapts whole layers only. So the updates of q and v in a
fused qkv share one pair: A stacks their rows, and B is block-wise, zero outside the blocks of q
and v.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.exporter import Exporter, UpdateSupport
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.errors import OutputError, SettingError
from aoft_deploy.files import folder_digest
from aoft_deploy.texts import decoded
from aoft_exporters.pytorch.engine import TorchEngine, torch_device
from aoft_exporters.pytorch.usage import load_adapter

if TYPE_CHECKING:
    from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["EXPORTER", "describe", "export", "load", "load_on"]


def export(model: TunedModel, path: Path, spec: ExportSpec) -> None:
    """Write a tuned model's updates and classifier.

    Args:
        model: The unmerged model; it is not changed.
        path: Folder to create.
        spec: Input form and metadata of the task.

    Raises:
        SettingError: ``uint8`` is set, the method is no low-rank update of linear layers, or PEFT
            would ignore a part of it.
        OutputError: The folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from aoft_deploy.checkpoints.checkpoint import description
    from aoft_deploy.checkpoints.lora_factors import bypassed_layers, low_rank_factors
    from aoft_deploy.checkpoints.peft_adapter import CONFIG, PREFIX, WEIGHTS

    if spec.input.uint8:
        raise SettingError("`uint8` needs a graph: export to onnx with `to`.")
    factors = low_rank_factors(model)
    for layer in bypassed_layers(model, spec.input.height, spec.input.width):
        raise SettingError(
            f"{type(model.backbone).__name__} reads the weight of {layer} without calling the "
            "layer, so PEFT's LoRA would have no effect there: export to onnx with `to`."
        )
    tensors = {
        f"{PREFIX}{layer}.lora_{letter}.weight": matrix.float().contiguous()
        for layer, pair in factors.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    for name in model.classifier:
        tensors[PREFIX + name] = model.backbone.get_parameter(name).detach().float().contiguous()
    ranks = {layer: len(a) for layer, (a, _) in factors.items()}
    info = ArtefactInfo(spec.metadata)
    text = description(model, info.classes, info.preprocessing)
    metadata = {"format": "pt", "aoft": text}
    try:
        path.mkdir()
        config = json.dumps(_config(ranks, model.classifier), indent=2)
        (path / CONFIG).write_text(config + "\n", "utf-8")
        save_file(tensors, path / WEIGHTS, metadata=metadata)
    except SafetensorError as error:
        raise OutputError(f"{path.name} could not be written ({error}).") from error


def _config(ranks: Mapping[str, int], classifier: list[str]) -> dict[str, Any]:
    """Content of adapter_config.json. All layers have alpha = r, which is a scale of 1."""
    default = Counter(ranks.values()).most_common(1)[0][0]
    exceptions = {layer: rank for layer, rank in ranks.items() if rank != default}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": default,
        "lora_alpha": default,
        "rank_pattern": exceptions,
        "alpha_pattern": exceptions,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": list(ranks),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in classifier}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def load(path: Path, options: EngineOptions = EngineOptions()) -> TorchEngine:
    """Open a folder, merged into its backbone with timm's weights.

    Raises:
        CheckpointError: The folder cannot be read, or does not name its backbone.
        BackboneError: The backbone's weights cannot be loaded.
        SettingError: The device does not exist.
    """
    return _merged(path, None, options)


def load_on(path: Path, weights: Path | None) -> TorchEngine:
    """Open a folder, merged into its backbone.

    Args:
        path: The folder.
        weights: File with the backbone's weights; None loads timm's.

    Raises:
        CheckpointError: The folder cannot be read, or does not name its backbone.
        BackboneError: The backbone's weights cannot be loaded.
    """
    return _merged(path, weights, EngineOptions())


def _merged(path: Path, weights: Path | None, options: EngineOptions) -> TorchEngine:
    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.checkpoints.opening import open_checkpoint
    from aoft_deploy.tuning.merging import merge

    device = torch_device(options)
    tuned, task = open_checkpoint(path, BackboneSource(weights=weights))
    info = ArtefactInfo.of_model(
        task.classes, task.preprocessing, tuned.method, tuned.settings, task.backbone.to_dict()
    )
    model = merge(tuned, in_place=True).to(device).eval()
    return TorchEngine(model, info.texts, options, device)


def describe(path: Path) -> dict[str, Any]:
    """Ranks, scaling factors and sites of any PEFT LoRA folder.

    Raises:
        CheckpointError: The folder cannot be read, or holds more than LoRA.
    """
    from aoft_deploy.checkpoints.inspection import describe_sizes
    from aoft_deploy.checkpoints.peft_adapter import FILES, read_peft_folder

    folder = read_peft_folder(path)
    sizes = {f"head.{name}": tensor.numel() for name, tensor in folder.saved.items()}
    for module, (a, b) in folder.pairs.items():
        sizes |= {f"{module}.a": a.numel(), f"{module}.b": b.numel()}
    task = decoded(folder.metadata.get("aoft", "{}"))
    return {
        "kind": "PEFT LoRA folder",
        "bytes": sum((path / name).stat().st_size for name in FILES),
        "sha256": folder_digest(path, FILES),
        **(task if isinstance(task, dict) else {}),
        "ranks": {module: len(a) for module, (a, _) in folder.pairs.items()},
        "factors": {module: folder.config.scaling(module) for module in folder.pairs},
        **describe_sizes(sizes),
    }


EXPORTER = Exporter(
    name="peft",
    suffix=".peft",
    marker="adapter_config.json",
    precisions=("fp32",),
    engines=("torch",),
    tolerance=1e-5,
    export=export,
    load=load,
    describe=describe,
    platform="pytorch",
    updates=UpdateSupport(load_on),
    next_step=load_adapter,
)
