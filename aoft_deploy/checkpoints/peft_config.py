"""adapter_config.json of a plain PEFT LoRA adapter.

The rules for which modules have LoRA, with which rank and factor, follow PEFT 0.21.2
(``check_target_module_exists`` in peft/tuners/tuners_utils.py, ``get_pattern_key`` in
peft/utils/other.py, ``update_layer`` in peft/tuners/lora/layer.py). Fields that could change the
answers in another way must be off, and so must unknown fields.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from aoft_deploy.errors import CheckpointError
from aoft_deploy.texts import shortened

__all__ = ["AdapterConfig"]

HARMLESS = frozenset(
    "task_type peft_version revision inference_mode "
    "lora_dropout megatron_core qalora_group_size runtime_config "
    "eva_config corda_config lora_ga_config loftq_config".split()  # only for initial values
)
"""Fields that do not change what a trained adapter computes."""

USED = frozenset(
    "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora target_modules exclude_modules "
    "layers_to_transform layers_pattern modules_to_save init_lora_weights bias auto_mapping "
    "base_model_name_or_path".split()
)
"""Fields that this module reads."""

REASONS = {
    "use_dora": "DoRA also divides every row of the weight by a norm",
    "fan_in_fan_out": "its matrices belong to transposed weights",
    "lora_bias": "it trains a bias beside B",
    "layer_replication": "it runs layers of the backbone several times",
    "target_parameters": "it changes parameters that do not belong to a layer",
    "trainable_token_indices": "it trains rows of an embedding",
}
"""Why well-known fields must be off."""

KNOWN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Texts for ``init_lora_weights`` that do not change the backbone's weights."""


@dataclass(frozen=True)
class AdapterConfig:
    """Which modules a PEFT LoRA adapter changes, and with which rank and factor.

    Attributes:
        rank: Default rank r.
        alpha: Default alpha.
        ranks: Ranks by pattern; the first pattern that matches the end of a path counts.
        alphas: Values of alpha by pattern, matched in the same way.
        rslora: Whether the factor is alpha / √r instead of alpha / r.
        targets: Modules to change: a regular expression of full paths, or ends of paths.
        excluded: Modules not to change, in the same form.
        layers: Indices of the blocks to change, if targets are ends of paths; empty for all. A
            target that is a full path is changed in any block.
        layers_patterns: Possible path components before those indices; empty for any.
        saved: Ends of the paths of fully trained modules.
        base: Name of the model that the adapter was trained on, if known.
        base_class: Python module and class of that model, if known.
    """

    rank: int = 8
    alpha: float = 8
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    targets: str | Sequence[str] = ()
    excluded: str | Sequence[str] = ()
    layers: Sequence[int] = ()
    layers_patterns: Sequence[str] = ()
    saved: Sequence[str] = ()
    base: str = ""
    base_class: tuple[str, str] = ("", "")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Parse the contents of adapter_config.json.

        Raises:
            CheckpointError: A field has a wrong type, or the adapter is not a plain LoRA.
        """
        _check_plain(data)
        values: dict[str, Any] = {key: value for key, value in data.items() if value is not None}
        config = cls(
            rank=_number("r", values.get("r", 8), int),
            alpha=_number("lora_alpha", values.get("lora_alpha", 8), float),
            ranks=_numbers("rank_pattern", values.get("rank_pattern", {}), int),
            alphas=_numbers("alpha_pattern", values.get("alpha_pattern", {}), float),
            rslora=values.get("use_rslora", False) is True,
            targets=_names("target_modules", values.get("target_modules", [])),
            excluded=_names("exclude_modules", values.get("exclude_modules", [])),
            layers=_indices(values.get("layers_to_transform", [])),
            layers_patterns=_name_list("layers_pattern", values.get("layers_pattern", [])),
            saved=_name_list("modules_to_save", values.get("modules_to_save", [])),
            base=str(values.get("base_model_name_or_path", "")),
            base_class=_base_class(values.get("auto_mapping", {})),
        )
        expressions = [v for v in (config.targets, config.excluded) if isinstance(v, str)]
        _check_patterns(map(_indexed, config.layers_patterns))
        _check_patterns(
            [*expressions, *config.ranks, *config.alphas, *config.layers_patterns, *config.saved]
        )
        return config

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its path."""
        return self.ranks.get(_pattern_key(self.ranks, module), self.rank)

    def scaling(self, module: str) -> float:
        """The factor of B A in a module, by its path."""
        alpha = self.alphas.get(_pattern_key(self.alphas, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def adapts(self, module: str) -> bool:
        """Whether PEFT puts LoRA into the module with this path."""
        if _matches(self.excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        full_path = isinstance(self.targets, str) or module in self.targets
        return _matches(self.targets, module) and (full_path or self._in_layers(module))

    def saves(self, parameter: str) -> bool:
        """Whether a parameter belongs to a fully trained module."""
        parts = parameter.split(".")[:-1]
        owners = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(owner.endswith(name) for owner in owners for name in self.saved)

    def _in_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        names: Sequence[str | None] = self.layers_patterns or [None]
        found = (re.match(_indexed(name), module) for name in names)
        first = next((match for match in found if match), None)
        index = first and first["idx"]
        return index is not None and int(index) in self.layers


def _check_plain(data: Mapping[str, Any]) -> None:
    """Refuse fields that a plain LoRA on a timm model does not have."""
    kind = data.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"peft_type is {shortened(kind)}, but only LORA can be merged.")
    if data.get("bias", "none") != "none":
        raise CheckpointError(
            f"bias is {shortened(data['bias'])}: it trains biases of the backbone, which is no "
            "LoRA; only 'none' is read."
        )
    init = data.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else init
    if not isinstance(init, bool) and init not in KNOWN_INITS:
        raise CheckpointError(
            f"init_lora_weights is {shortened(init)}: this changes the backbone's weights; save "
            "the adapter with path_initial_model_for_weight_conversion, and copy the tensors of "
            "modules_to_save, which that leaves out, from the adapter saved without it."
        )
    for name, value in data.items():
        if name in HARMLESS or name in USED or value is None or value is False or value in ([], {}):
            continue
        reason = REASONS.get(name, "this field is unknown and may change the answers")
        raise CheckpointError(f"{name} is {shortened(value)}: {reason}; only plain LoRA is read.")
    if not isinstance(data.get("use_rslora", False), bool):
        raise CheckpointError(f"use_rslora is {shortened(data['use_rslora'])}, but must be a bool.")


def _number(name: str, value: Any, kind: type) -> Any:
    """A rank (a whole number from 1) or an alpha (any finite number)."""
    if kind is int and type(value) is int and 1 <= value < 2**31:
        return value
    if kind is float and type(value) in (int, float) and abs(value) < 2**53:
        return float(value)
    rule = "a whole number of 1 or more" if kind is int else "a finite number"
    raise CheckpointError(f"{name} is {shortened(value)}, but must be {rule}.")


def _numbers(name: str, value: Any, kind: type) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is {shortened(value)}, but must map patterns to numbers.")
    return {pattern: _number(name, number, kind) for pattern, number in value.items()}


def _names(name: str, value: Any) -> str | list[str]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value
    raise CheckpointError(f"{name} is {shortened(value)}, but must be a text or a list of texts.")


def _name_list(name: str, value: Any) -> list[str]:
    names = _names(name, value)
    return [names] if isinstance(names, str) and names else list(names)


def _base_class(value: Any) -> tuple[str, str]:
    """Module and name of a class, which PEFT writes for models outside transformers."""
    mapping = value if isinstance(value, dict) else {}
    return str(mapping.get("parent_library", "")), str(mapping.get("base_model_class", ""))


def _indices(value: Any) -> list[int]:
    indices = [value] if type(value) is int else value
    if isinstance(indices, list) and all(type(index) is int for index in indices):
        return indices
    raise CheckpointError(
        f"layers_to_transform is {shortened(value)}, but must be indices of blocks."
    )


def _indexed(name: str | None) -> str:
    """Regular expression of a path with a block's index after a given name, or after any name."""
    start = r".*?\.[^.]*" if name is None else rf"(?:^|.*?\.){name}"
    return rf"{start}\.(?P<idx>\d+)\."


def _check_patterns(patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{shortened(pattern)} is no regular expression ({error})."
            ) from error


def _matches(names: str | Sequence[str], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern_key(patterns: Iterable[str], module: str) -> str:
    found = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    return next(found, module)
