"""PEFT LoRA folders: adapter_config.json and adapter_model.safetensors.

PEFT stores ``base_model.model.PATH.lora_A.weight`` (r, in), ``….lora_B.weight`` (out, r) and the
parameters of fully trained modules, such as the classifier. Our own folders also contain the
classes, the preprocessing and the backbone's identity, as metadata that PEFT ignores. Weights are
read only from safetensors, never from a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from aoft_deploy.checkpoints.file_format import read_tensors
from aoft_deploy.checkpoints.lora_factors import bounded_rank
from aoft_deploy.checkpoints.peft_config import AdapterConfig
from aoft_deploy.errors import CheckpointError
from aoft_deploy.file_signatures import foreign
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.sites.discovery import find_sites
from aoft_deploy.tuning.sites.site import LINEAR_ROLES

__all__ = ["CONFIG", "FILES", "PREFIX", "WEIGHTS", "PeftFolder", "read_peft_folder"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
"""The files that a folder consists of."""

PREFIX = "base_model.model."
"""Prefix of the names of the model's own modules."""


@dataclass(frozen=True)
class PeftFolder:
    """A PEFT LoRA adapter, read from its folder.

    Attributes:
        path: The folder.
        config: The adapter's config.
        pairs: A (r, in) and B (out, r) by the path of the module.
        saved: Parameters of fully trained modules, by name.
        metadata: Metadata of the safetensors file; that of our own folders describes the task.
    """

    path: Path
    config: AdapterConfig
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    saved: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @property
    def num_classes(self) -> int | None:
        """Width of the classifier, or None if none was saved.

        Raises:
            CheckpointError: Other modules were saved too.
        """
        widths = {len(tensor) if tensor.dim() else 0 for tensor in self.saved.values()}
        if len(widths) > 1 or 0 in widths:
            raise CheckpointError(
                f"modules_to_save of {self.path} holds {', '.join(self.saved)}, which is more than "
                "one classifier: only the classifier may be fully trained."
            )
        return next(iter(widths), None)

    def placed(self, model: nn.Module) -> tuple[dict[str, int], dict[str, Tensor]]:
        """The adapter as updates of our method ``lora`` on a plain timm model.

        Args:
            model: The backbone, with a classifier of the right width. If the folder contains no
                classifier, this one must have the values it had in training.

        Returns:
            The rank of every site, and the tensors of a checkpoint, with alpha folded into B.

        Raises:
            CheckpointError: Config, tensors and model do not match.
        """
        modules = dict(model.named_modules())
        self._check_targets(modules)
        heads = {name: p.detach().clone() for name, p in model.named_parameters()}
        heads = {name: heads[name] for name in classifier_names(model)}
        self._check_saved(model, heads)
        sites = {site.name for site in find_sites(model) if site.role in LINEAR_ROLES}
        ranks: dict[str, int] = {}
        tensors: dict[str, Tensor] = {}
        for path in self.pairs:
            a, b = self._matrices(path, modules[path])
            if f"{path}.weight" in heads:
                heads[f"{path}.weight"] = (heads[f"{path}.weight"].double() + b @ a).float()
                continue
            if path not in sites:
                raise CheckpointError(
                    f"{self.path} changes {path}, which is no linear map of a block with a known "
                    "role: it cannot be merged."
                )
            ranks[path] = len(a)
            tensors |= {f"update.{path}.a": a.float(), f"update.{path}.b": b.float()}
        heads |= self.saved
        return ranks, tensors | {f"head.{name}": tensor for name, tensor in heads.items()}

    def _check_targets(self, modules: Mapping[str, nn.Module]) -> None:
        """Refuse tensors and modules without each other, which PEFT accepts silently."""
        for path in self.pairs:
            if path not in modules:
                raise CheckpointError(f"{self.path} changes {path}, which the backbone lacks.")
            if not self.config.adapts(path):
                raise CheckpointError(
                    f"{self.path} holds matrices for {path}, but target_modules does not name it."
                )
        for path in modules:
            if path not in self.pairs and self.config.adapts(path):
                raise CheckpointError(
                    f"{self.path} lacks matrices for {path}, which target_modules names."
                )

    def _check_saved(self, model: nn.Module, heads: Mapping[str, Tensor]) -> None:
        for name, tensor in self.saved.items():
            if name not in heads:
                raise CheckpointError(
                    f"modules_to_save of {self.path} holds {name}, which is not of the classifier "
                    f"({', '.join(heads)}): nothing else may be fully trained."
                )
            if not self.config.saves(name):
                raise CheckpointError(
                    f"{self.path} holds {name}, but modules_to_save does not name its module."
                )
            if tensor.shape != heads[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensor.shape)} in {self.path}, but the model needs "
                    f"{tuple(heads[name].shape)}."
                )
        for name, _ in model.named_parameters():
            if self.config.saves(name) and name not in self.saved:
                raise CheckpointError(
                    f"{self.path} lacks {name}, whose module modules_to_save names: copy it from "
                    "the adapter as it was trained, which PEFT's conversion of PiSSA or OLoRA "
                    "leaves out."
                )

    def _matrices(self, path: str, module: nn.Module) -> tuple[Tensor, Tensor]:
        """A and B in float64, with the scaling in B and a rank that the weight allows."""
        a, b = self.pairs[path]
        if not isinstance(module, nn.Linear):
            raise CheckpointError(
                f"{self.path} changes {path}, a {type(module).__name__}: only LoRA of linear maps "
                "is read."
            )
        rank = self.config.rank_of(path)
        for name, tensor, shape in (
            ("lora_A", a, (rank, module.in_features)),
            ("lora_B", b, (module.out_features, rank)),
        ):
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{path}.{name} has shape {tuple(tensor.shape)} in {self.path}, but r = {rank} "
                    f"and the backbone need {shape}."
                )
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"{path}.{name} in {self.path} holds values that are not finite."
                )
        return bounded_rank(a.double(), b.double() * self.config.scaling(path))


def read_peft_folder(path: Path) -> PeftFolder:
    """Read a folder that ``save_pretrained`` of PEFT or ``aoft-export --to peft`` wrote.

    Raises:
        CheckpointError: A file is missing or damaged, or the adapter is more than a plain LoRA.
    """
    data = _read_config(path)
    try:
        config = AdapterConfig.from_dict(data)
    except CheckpointError as error:
        raise CheckpointError(f"In {path / CONFIG}, {error}") from error
    tensors, metadata = _read_weights(path)
    halves: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        module, _, half = name.removesuffix(".weight").rpartition(".")
        if name.endswith(".weight") and half in ("lora_A", "lora_B") and key.startswith(PREFIX):
            halves.setdefault(module, {})[half] = tensor
        elif "lora_" in name or not key.startswith(PREFIX):
            raise CheckpointError(
                f"{path / WEIGHTS} holds {key}, which a plain LoRA of linear maps does not have."
            )
        else:
            saved[name] = tensor
    for module, pair in halves.items():
        if len(pair) < 2:
            missing = ({"lora_A", "lora_B"} - set(pair)).pop()
            raise CheckpointError(f"{path / WEIGHTS} lacks {module}.{missing}.")
    if not halves:
        raise CheckpointError(f"{path / WEIGHTS} holds no LoRA matrices.")
    pairs = {module: (pair["lora_A"], pair["lora_B"]) for module, pair in halves.items()}
    return PeftFolder(path, config, pairs, saved, metadata)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(f"There is no file {file}, which every PEFT LoRA folder contains.")
    try:
        data = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        kind = foreign(file, "json")
        reason = f": it {kind}" if kind else f" ({error})"
        raise CheckpointError(f"{file} is no JSON file{reason}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds no JSON object.")
    return data


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = path / WEIGHTS
    if not file.is_file():
        pickled = " (adapter_model.bin is a pickle: save it again with safe_serialization=True)"
        hint = pickled if (path / "adapter_model.bin").is_file() else ""
        raise CheckpointError(f"{path} has no {WEIGHTS}{hint}.")
    try:
        tensors, metadata = read_tensors(file, "pt")
    except CheckpointError:
        raise
    except Exception as error:
        kind = foreign(file, "safetensors")
        reason = f": it {kind}" if kind else f" ({error})"
        raise CheckpointError(f"{file} is no safetensors file{reason}.") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise CheckpointError(f"{key} in {file} is {tensor.dtype}, but must be a float type.")
    return tensors, metadata
