"""PEFT: AOFT-LoRA and LoRA as a LoRA folder, for ``peft.PeftModel.from_pretrained``.

The folder holds adapter_config.json and adapter_model.safetensors: two matrices for every changed
layer and the classifier. PEFT puts LoRA into whole layers only, so q and v of a fused qkv stand
beside each other in one pair, v's columns of B below q's and zeros elsewhere.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.spec import Recipe
from aoft_deploy.errors import OutputError, SettingError
from aoft_exporters.pytorch.engine import TorchEngine

if TYPE_CHECKING:
    from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["ENGINES", "MARKER", "PRECISIONS", "SUFFIX", "TAKES", "TOLERANCE", "export", "load"]

SUFFIX = ".peft"
MARKER = "adapter_config.json"
TAKES = "tuned"
TOLERANCE = 1e-5
PRECISIONS = ("fp32",)
ENGINES = ("torch",)


def export(model: TunedModel, path: Path, recipe: Recipe) -> None:
    """Write a tuned model's updates and classifier.

    Args:
        model: The model before any merge; it is not changed.
        path: Folder to make.
        recipe: Input form and description of the task.

    Raises:
        SettingError: ``uint8`` is asked, the method is no low-rank change of linear maps, or PEFT
            would leave out a part of it.
        OutputError: The folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from aoft_deploy.checkpoints.checkpoint import description
    from aoft_deploy.checkpoints.lora_factors import bypassed_layers, low_rank_factors
    from aoft_deploy.checkpoints.peft_adapter import CONFIG, PREFIX, WEIGHTS
    from aoft_deploy.data.preprocessing import Preprocessing

    if recipe.uint8:
        raise SettingError("--uint8 needs a graph: export with --to onnx.")
    factors = low_rank_factors(model)
    for layer in bypassed_layers(model, recipe.size):
        raise SettingError(
            f"{type(model.backbone).__name__} reads the weight of {layer} without calling the "
            "layer, so PEFT's LoRA would have no effect there: export with --to onnx."
        )
    tensors = {
        f"{PREFIX}{layer}.lora_{letter}.weight": matrix.float().contiguous()
        for layer, pair in factors.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    for name in model.classifier:
        tensors[PREFIX + name] = model.backbone.get_parameter(name).detach().float().contiguous()
    ranks = {layer: len(a) for layer, (a, _) in factors.items()}
    classes = json.loads(recipe.metadata["classes"])
    preprocessing = Preprocessing.from_dict(json.loads(recipe.metadata["preprocessing"]))
    metadata = {"format": "pt", "aoft": description(model, classes, preprocessing)}
    try:
        path.mkdir()
        config = json.dumps(_config(ranks, model.classifier), indent=2)
        (path / CONFIG).write_text(config + "\n", "utf-8")
        save_file(tensors, path / WEIGHTS, metadata=metadata)
    except SafetensorError as error:
        raise OutputError(f"{path.name} could not be written ({error}).") from error


def _config(ranks: Mapping[str, int], classifier: list[str]) -> dict[str, Any]:
    """adapter_config.json: alpha = r everywhere, so that nothing is scaled."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {layer: rank for layer, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": list(ranks),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in classifier}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def load(
    path: Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    weights: Path | None = None,
) -> TorchEngine:
    """A folder merged into its backbone.

    Args:
        path: The folder.
        engine: ``torch``.
        threads: Threads within a batch on a CPU; None lets PyTorch choose.
        device: What PyTorch calls it; None is the CPU.
        weights: File with the backbone's weights; None takes timm's own.

    Raises:
        CheckpointError: The folder cannot be used, or does not say which backbone it belongs to.
        BackboneError: The backbone's weights cannot be had.
        SettingError: There is no such device.
    """
    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.checkpoints.opening import open_checkpoint
    from aoft_deploy.tuning.merging import merge

    tuned, task = open_checkpoint(Path(path), BackboneSource(weights=weights))
    info = {
        "classes": json.dumps(list(task.classes)),
        "preprocessing": json.dumps(task.preprocessing.to_dict()),
        "backbone": json.dumps(task.backbone.to_dict()),
    }
    return TorchEngine(merge(tuned, in_place=True), info, threads, device)
