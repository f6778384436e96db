"""Compare architectures by timm name and arguments, or by the settings of every module.

Two architectures can have the same weights and give different answers: another activation
(QuickGELU), another padding (the tf_ models), another epsilon. Imports neither torch nor timm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

__all__ = [
    "CHANGED",
    "architecture_label",
    "evaluation_args",
    "first_difference",
    "same_architecture",
    "structure",
]

CHANGED = "changed: "
"""Prefix of a backbone's origin if timm does not create it from name and args; a reason follows."""

WITHOUT_EFFECT = ("fused_attn", "grad_checkpointing", "num_classes", "training", "output_fmt")
"""Attributes of modules that do not change what a frozen backbone computes."""


def evaluation_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` that decide what a model computes in evaluation."""
    return {key: value for key, value in args.items() if "drop" not in key}


def same_architecture(
    name: str, args: Mapping[str, Any], other: str, other_args: Mapping[str, Any]
) -> bool:
    """Whether two names with their arguments are the same architecture.

    An image size that only one side gives does not count: the caller compares the input sizes.

    Args:
        name: First timm name; its pre-training tag does not count.
        args: Arguments of the first.
        other: Second timm name.
        other_args: Arguments of the second.
    """
    ours, theirs = evaluation_args(args), evaluation_args(other_args)
    if not ("img_size" in ours and "img_size" in theirs):
        ours.pop("img_size", None)
        theirs.pop("img_size", None)
    return name.partition(".")[0] == other.partition(".")[0] and ours == theirs


def architecture_label(name: str, args: Mapping[str, Any]) -> str:
    """A backbone's name in messages: ``vit_tiny_patch16_224(img_size=64)``."""
    shown = ", ".join(f"{key}={value}" for key, value in args.items())
    return f"{name}({shown})" if shown else name


def structure(model: Any, excluded: Sequence[str] = ()) -> tuple[str, ...]:
    """One line for the class and for each setting of every module of a model.

    Args:
        model: A plain ``nn.Module``.
        excluded: Paths of modules that do not count, such as the classifier's.
    """
    lines = []
    for path, module in model.named_modules():
        if path in excluded:
            continue
        kind = type(module).__name__
        is_identity = "Drop" in kind or kind == "Identity"
        lines.append(f"{path}\tclass\t{'Identity' if is_identity else kind}")
        if not is_identity:
            lines += (f"{path}\t{name}\t{value}" for name, value in _settings(module))
    return tuple(lines)


def first_difference(one: Sequence[str], other: Sequence[str]) -> str:
    """The first difference between two structures, in words; empty if they are equal."""
    for ours, theirs in zip_longest(one, other, fillvalue="\t\tnothing"):
        if ours == theirs:
            continue
        path, name, value = ours.split("\t", 2)
        other_path, other_name, expected = theirs.split("\t", 2)
        if (path, name) != (other_path, other_name):
            return f"{path or other_path or 'the model'} has other parts"
        place = path if name == "class" else f"{path}.{name}".lstrip(".")
        return f"{place or 'the model'} is {value}, not {expected}"
    return ""


def _settings(module: Any) -> Iterator[tuple[str, str]]:
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or "drop" in name or name in WITHOUT_EFFECT:
            continue
        values = value if isinstance(value, (tuple, list)) else (value,)
        if values and all(isinstance(v, (bool, int, float, str)) for v in values):
            yield name, str(value)
        elif callable(value) and not isinstance(value, partial) and hasattr(value, "__qualname__"):
            yield name, value.__qualname__
