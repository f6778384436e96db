"""Weights of a backbone from anybody's file: read, found under their prefix, and checked.

Training codes save a model beside an optimiser, wrapped, or as one of several copies, so that its
names stand below a prefix: ``state_dict.module.base_encoder.`` of MoCo v3, ``teacher.backbone.`` of
DINO, ``state_dict.model.`` of Lightning. A prefix is taken where every name and shape below it fits
the model after timm's own filter. What is left over then is refused, but for ``LEFT_OUT``.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from aoft_deploy.errors import BackboneError
from aoft_deploy.file_signatures import file_kind, foreign
from aoft_deploy.tuning.backbones.timm_loading import Filter, Usual
from aoft_deploy.tuning.sites.classifier import classifier_names

__all__ = ["LEFT_OUT", "check_fit", "file_weights"]

LEFT_OUT = {
    r"(head|heads|head_dist|aux_head|head\.fc|head\.l|head\.head|heads\.head|fc|classifier|linear"
    r"|last_linear|logits|lm_head|visual\.proj)\.(weight|bias)": "a classifier, which is new",
    r"(head|projector|predictor)\.(\d+|mlp|last_layer|layers?|net)\..*": "a projector",
    r"(projector|projection_head|predictor|dino_head|ibot_head|prototypes)\..*": "a projector",
    r"(.*\.)?mask_token": "stands for hidden patches in pre-training",
    r"decoder(_\w+)?(\..*)?": "rebuilds hidden patches in pre-training",
    r"(.*\.)?pre_logits\..*": "a layer before the classifier, which is new",
    r"attn_pool\..*": "pools before the classifier, which is new",
    r"(text|text_model|text_encoder|txt|transformer|token_embedding|ln_final)\..*": "a text tower",
    r"positional_embedding|text_projection|logit_scale|logit_bias": "of a text tower",
    r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask|inv_freq)": (
        "follows from the architecture"
    ),
    r"(.*\.)?num_batches_tracked": "counts batches of the pre-training",
}
"""Names, after timm's filter, of what a backbone needs not, and why."""

OPTIONAL = re.compile(r"(.*\.)?num_batches_tracked")
"""Tensors of a model that a file may lack: nothing is computed from them."""

PREFERRED = ("state_dict_ema", "model_ema", "ema", "teacher", "base_encoder")
"""Parts of a prefix, by rank, that choose between several copies of one model: an average of the
weights before the weights themselves, and DINO's and MoCo v3's own choice."""

OTHER_NAMES = {
    r"attention\.attention\.query|patch_embeddings\.projection": "transformers",
    r"encoder_layer_\d+\.self_attention": "torchvision",
}
"""Parts of names by which the files of other libraries are known."""

HARMLESS: list[Any] = [argparse.Namespace, np.dtype, np.float64(0).__reduce__()[0]]
HARMLESS += [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32)]
"""What pickles of training runs hold beside tensors: options and NumPy's scalars."""

TOLD = 3
"""Names of tensors in a message."""


@dataclass(frozen=True)
class _Try:
    """What a file holds for a model below one prefix.

    Attributes:
        prefix: Begin of the tensors' names in the file, with the dot.
        state: Tensors by the model's names, and those it has no place for.
        fault: Why they do not fit; empty where they do.
        matched: Tensors of the model that are there in their shape.
    """

    prefix: str
    state: Mapping[str, Tensor]
    fault: str
    matched: int


def file_weights(
    model: nn.Module, usual: Usual, path: Path, resized: bool = False
) -> dict[str, Tensor]:
    """The weights in a PyTorch or safetensors file by the names of a model's state dict.

    Args:
        model: The model as timm makes it.
        usual: How timm fills it with its own weights.
        path: The file.
        resized: Whether convolutions may have been resampled to another kernel.

    Returns:
        Every tensor of the model in its shape, but the classifier's, which stand in the file's own
        shape where it has them under the model's names.

    Raises:
        BackboneError: The file is of another kind, is damaged, or does not fit the model.
    """
    tensors = _read(path)
    tries = []
    for prefix in _prefixes(tensors, len(_needed(model)) // 3):
        below = {
            name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
        }
        tries.append(_tried(model, usual, prefix, below, resized))
        if not tries[-1].fault and not prefix:
            break
    found = _chosen([one for one in tries if not one.fault], path)
    if found is None:
        raise BackboneError(_misfit(path, max(tries, key=lambda one: one.matched), tensors))
    known = model.state_dict()
    state = {name: tensor for name, tensor in found.state.items() if name in known}
    _check_finite(state, path)
    return state


def check_fit(model: nn.Module, state: Mapping[str, Any], source: str, strict: bool) -> None:
    """Refuse a state dict, after timm's filter, that does not fill a model just so.

    Args:
        model: The model; its classifier may be missing.
        state: Tensors by name.
        source: Where they come from, for the message.
        strict: Whether timm takes it to fill the model just so; if not, vectors may be missing,
            which then stay as the model starts, and tensors may be left over.

    Raises:
        BackboneError: A tensor is missing, has another shape, or has no place.
    """
    fault = _missing(model, state, strict) or (strict and _unplaced(model, state))
    if fault:
        raise BackboneError(f"{source} {fault}.")


def _needed(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the classifier."""
    classifier = set(classifier_names(model))
    return {name: t for name, t in model.state_dict().items() if name not in classifier}


def _missing(model: nn.Module, state: Mapping[str, Any], strict: bool) -> str:
    """What a state dict does not give the model, in words; empty where it fills it."""
    needed = _needed(model)
    missing = [n for n in needed if n not in state and not OPTIONAL.fullmatch(n)]
    missing = [n for n in missing if strict or needed[n].dim() > 1]
    if missing:
        return f"lacks {_listed(missing)}"
    for name in (n for n in needed if n in state):
        given, tensor = state[name], needed[name]
        if given.shape != tensor.shape:
            return (
                f"has {name} of shape {tuple(given.shape)}, but the model needs "
                f"{tuple(tensor.shape)}"
            )
        whole = given.is_floating_point() and given.element_size() > 1
        if tensor.is_floating_point() and not whole:
            return f"has {name} of type {given.dtype}, but quantised weights are not read"
    return ""


def _unplaced(model: nn.Module, state: Mapping[str, Any]) -> str:
    """What a state dict holds that the model has no place for, in words."""
    known = model.state_dict().keys() | set(classifier_names(model))
    rest = [name for name in state if name not in known]
    rest = [name for name in rest if not any(re.fullmatch(rule, name) for rule in LEFT_OUT)]
    return f"holds {_listed(rest)}, which the model has no place for" if rest else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join(names[:TOLD]) + more


def _tried(
    model: nn.Module, usual: Usual, prefix: str, below: dict[str, Tensor], resized: bool
) -> _Try:
    sizes = {tensor.numel() for tensor in below.values()}
    try:
        state = _converted(usual.convert, below, model)
    except Exception as error:  # names and shapes that a filter does not expect make it raise
        return _Try(prefix, {}, f"cannot be renamed by timm ({error!r:.80})", 0)
    needed = _needed(model)
    matched = sum(n in state and state[n].shape == tensor.shape for n, tensor in needed.items())
    fault = _missing(model, state, usual.strict) or _unplaced(model, state)
    for name, tensor in {} if fault or resized else needed.items():
        kernel = tensor.dim() == 4 and name.endswith(".weight")
        if kernel and tensor.numel() not in sizes:
            fault = f"has {name} for another size of patches than the model's {tuple(tensor.shape)}"
    return _Try(prefix, state, fault, matched)


def _converted(convert: Filter, below: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    if convert is None:
        return below
    try:
        found = convert(dict(below), model)
    except TypeError:  # as timm does for filters of one argument
        found = convert(dict(below))
    return {str(name): t for name, t in found.items() if isinstance(t, Tensor)}


def _prefixes(tensors: Mapping[str, Tensor], least: int) -> list[str]:
    """Begins of names that at least so many tensors have, the shortest first."""
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        counts.update(".".join(parts[: i + 1]) + "." for i in range(min(len(parts) - 1, 6)))
    often = [prefix for prefix, count in counts.items() if count >= max(least, 1)]
    return ["", *sorted(often, key=lambda prefix: prefix.count("."))[:40]]


def _chosen(fitting: Sequence[_Try], path: Path) -> _Try | None:
    """The one that fits, or the one that its prefix makes the first choice."""

    def rank(one: _Try) -> int:
        parts = one.prefix.split(".")
        return next((i for i, part in enumerate(PREFERRED) if part in parts), len(PREFERRED))

    if len(fitting) < 2:
        return fitting[0] if fitting else None
    best = min(map(rank, fitting))
    first = [one for one in fitting if rank(one) == best]
    if len(first) > 1 and any(not _equal(first[0].state, one.state) for one in first[1:]):
        raise BackboneError(
            f"{path} holds this model {len(first)} times, below "
            f"{' and '.join(one.prefix for one in first)}: save the one that is meant alone."
        )
    return first[0]


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _misfit(path: Path, best: _Try, names: Collection[str]) -> str:
    """The sentence for a file that fits below no prefix."""
    if best.matched and best.prefix:
        return f"{path} holds a model below {best.prefix}, which {best.fault}."
    if best.matched and not best.fault.startswith("lacks"):
        return f"{path} {best.fault}."
    if best.matched:
        return f"{path} {best.fault}: it holds weights of another model."
    first = min(names)
    rules = OTHER_NAMES.items()
    library = next((lib for rule, lib in rules if any(re.search(rule, n) for n in names)), "")
    if library:
        return (
            f"{path} has the names of {library} ({first}), not timm's: give the file that timm "
            "publishes for this model."
        )
    return f"{path} has other names than the model, such as {first}: it {best.fault}."


def _check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise BackboneError(f"{name} in {path} holds values that are not finite.")


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by their path in it.

    Raises:
        BackboneError: It is of another kind, is damaged, or would run code.
    """
    told = foreign(path, "safetensors", "torch", "pickle")
    if told:
        raise BackboneError(f"{path} {told}.")
    try:
        if file_kind(path) == "safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}
        else:
            metadata = {}
            with torch.serialization.safe_globals(HARMLESS), path.open("rb") as stream:
                # A stream, because of a path torch.load believes the suffix.
                found = dict(_tensors(torch.load(stream, map_location="cpu", weights_only=True)))
    except Exception as error:  # damaged files make their readers raise anything
        raise BackboneError(_unreadable(path, error)) from error
    if "aoft" in metadata:
        raise BackboneError(
            f"{path} is a checkpoint of aoft-train, which holds no weights of its backbone: give "
            "the backbone's own file."
        )
    if not found:
        raise BackboneError(f"{path} holds no tensors.")
    return found


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, with the keys on the way as one dotted name."""
    if isinstance(value, Tensor):
        yield path.removesuffix("."), value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{path}{key}.")


def _unreadable(path: Path, error: Exception) -> str:
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # no archive of PyTorch's
        found = []
    known = {f"{one.__module__}.{one.__qualname__}" for one in HARMLESS}
    unsafe = [name for name in found if name not in known]
    if unsafe:
        return (
            f"{path} holds objects of {_listed(unsafe)} beside its tensors, which could run code: "
            "save the model's state_dict() alone."
        )
    reason = " ".join(str(error).split())[:100]
    reason = type(error).__name__ if "weights_only" in str(error) else reason  # no option of ours
    return f"{path} cannot be read as weights: it is damaged or of another kind ({reason})."
