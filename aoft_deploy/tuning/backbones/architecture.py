"""What a backbone computes with its weights: timm's name without its tag, and its arguments.

Two architectures can have the same weights and other answers: another activation (QuickGELU), other
padding (the tf_ models), another epsilon. Needs neither torch nor timm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

__all__ = ["CHANGED", "called", "first_difference", "same_architecture", "shaping", "structure"]

CHANGED = "changed: "
"""Begin of the origin of a backbone that its name and arguments do not make, before the reason."""

WITHOUT_EFFECT = ("fused_attn", "grad_checkpointing", "num_classes", "training", "output_fmt")
"""Attributes of modules that do not change what a frozen backbone computes."""


def shaping(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` that decide what a model computes in evaluation."""
    return {key: value for key, value in args.items() if "drop" not in key}


def same_architecture(
    name: str, args: Mapping[str, Any], other: str, other_args: Mapping[str, Any]
) -> bool:
    """Whether two names and arguments say the same architecture.

    An image size that only one of them gives is left to what is fed, which is compared elsewhere.

    Args:
        name: timm name of the one, whose tag says nothing of the architecture.
        args: Its arguments.
        other: Name of the other.
        other_args: Its arguments.
    """
    ours, theirs = shaping(args), shaping(other_args)
    if not ("img_size" in ours and "img_size" in theirs):
        ours.pop("img_size", None)
        theirs.pop("img_size", None)
    return name.partition(".")[0] == other.partition(".")[0] and ours == theirs


def called(name: str, args: Mapping[str, Any]) -> str:
    """A backbone as a message names it: ``vit_tiny_patch16_224(img_size=64)``."""
    told = ", ".join(f"{key}={value}" for key, value in args.items())
    return f"{name}({told})" if told else name


def structure(model: Any, left_out: Sequence[str] = ()) -> tuple[str, ...]:
    """One line for each class and each setting of a model's modules.

    Args:
        model: A plain ``nn.Module``.
        left_out: Paths of modules that do not count, such as the classifier's.
    """
    lines = []
    for path, module in model.named_modules():
        if path in left_out:
            continue
        kind = type(module).__name__
        passes = "Drop" in kind or kind == "Identity"
        lines.append(f"{path}\tclass\t{'Identity' if passes else kind}")
        if not passes:
            lines += (f"{path}\t{name}\t{value}" for name, value in _settings(module))
    return tuple(lines)


def first_difference(one: Sequence[str], other: Sequence[str]) -> str:
    """How the first differs from the second, in words; empty where they are equal."""
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
