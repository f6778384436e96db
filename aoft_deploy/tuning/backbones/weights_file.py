"""Match the weights in a file of any training code to a timm model.

Training codes save a model beside an optimiser, inside wrappers, or in several copies. The names
then begin with a prefix: ``state_dict.module.base_encoder.`` in MoCo v3, ``teacher.backbone.`` in
DINO, ``state_dict.model.`` in Lightning. A prefix fits if timm's own filter turns every name and
shape below it into the model's. Tensors without a place are refused, except those in ``LEFT_OUT``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aoft_deploy.errors import BackboneError
from aoft_deploy.tuning.backbones.state_dict import first_names, read_state_dict
from aoft_deploy.tuning.backbones.timm_loading import Filter, TimmLoading
from aoft_deploy.tuning.sites.classifier import classifier_names

__all__ = ["LEFT_OUT", "check_fit", "file_weights"]

LEFT_OUT = {
    r"(head|heads|head_dist|aux_head|head\.fc|head\.l|head\.head|heads\.head|fc|classifier|linear"
    r"|last_linear|logits|lm_head|visual\.proj)\.(weight|bias)": "a classifier, which is new",
    r"(head|projector|predictor)\.(\d+|mlp|last_layer|layers?|net)\..*": "a projector",
    r"(projector|projection_head|predictor|dino_head|ibot_head|prototypes)\..*": "a projector",
    r"(.*\.)?mask_token": "replaces masked patches in pre-training",
    r"decoder(_\w+)?(\..*)?": "reconstructs masked patches in pre-training",
    r"(.*\.)?pre_logits\..*": "a layer before the classifier, which is new",
    r"attn_pool\..*": "pools before the classifier, which is new",
    r"(text|text_model|text_encoder|txt|transformer|token_embedding|ln_final)\..*": "a text tower",
    r"positional_embedding|text_projection|logit_scale|logit_bias": "of a text tower",
    r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask|inv_freq)": (
        "follows from the architecture"
    ),
    r"(.*\.)?num_batches_tracked": "counts batches of the pre-training",
}
"""Tensors that a backbone does not need: patterns of their names after timm's filter, and why."""

OPTIONAL = re.compile(r"(.*\.)?num_batches_tracked")
"""Tensors of a model that a file may lack, because evaluation does not use them."""

PREFERRED = ("state_dict_ema", "model_ema", "ema", "teacher", "base_encoder")
"""Parts of a prefix that decide between several copies of one model, best first: moving averages
before the weights themselves, and the copies that DINO and MoCo v3 use."""

OTHER_NAMES = {
    r"attention\.attention\.query|patch_embeddings\.projection": "transformers",
    r"encoder_layer_\d+\.self_attention": "torchvision",
}
"""Patterns of names by which the files of other libraries are recognised."""


@dataclass(frozen=True)
class _Candidate:
    """The tensors of a file below one prefix, as weights of a model.

    Attributes:
        prefix: Start of the tensors' names in the file, with the dot.
        state: Tensors by the model's names, and those without a place in it.
        fault: Why they do not fit; empty if they do.
        matched: Number of tensors that the model has under the same name in the same shape.
    """

    prefix: str
    state: Mapping[str, Tensor]
    fault: str
    matched: int


def file_weights(
    model: nn.Module, timm_loading: TimmLoading, path: Path, resized: bool = False
) -> dict[str, Tensor]:
    """The weights in a PyTorch or safetensors file, by the names of a model's state dict.

    Args:
        model: The model as timm creates it.
        timm_loading: How timm fills it with its own weights.
        path: The file.
        resized: Whether timm may resample convolutions to another kernel size.

    Returns:
        Every tensor of the model in the model's shape. The classifier is included if the file has
        it under the model's names, in the file's shape.

    Raises:
        BackboneError: The file is of another kind, is damaged, or does not fit the model.
    """
    tensors = read_state_dict(path)
    candidates = []
    for prefix in _prefixes(tensors, len(_needed(model)) // 3):
        below = {
            name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
        }
        candidates.append(_candidate(model, timm_loading, prefix, below, resized))
        if not candidates[-1].fault and not prefix:
            break
    found = _chosen([one for one in candidates if not one.fault], path)
    if found is None:
        raise BackboneError(_misfit(path, max(candidates, key=lambda one: one.matched), tensors))
    known = model.state_dict()
    state = {name: tensor for name, tensor in found.state.items() if name in known}
    _check_finite(state, path)
    return state


def check_fit(model: nn.Module, state: Mapping[str, Any], source: str, strict: bool) -> None:
    """Refuse a state dict, after timm's filter, that does not fill a model exactly.

    Args:
        model: The model; the state dict may lack its classifier.
        state: Tensors by name.
        source: Origin of the state dict, for the message.
        strict: Whether timm's own weights fill the model exactly. If not, vectors may be missing,
            which then keep their initial values, and tensors may be left over.

    Raises:
        BackboneError: A tensor is missing, has another shape, or has no place in the model.
    """
    fault = _missing(model, state, strict) or (strict and _unplaced(model, state))
    if fault:
        raise BackboneError(f"{source} {fault}.")


def _needed(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the classifier."""
    classifier = set(classifier_names(model))
    return {name: t for name, t in model.state_dict().items() if name not in classifier}


def _missing(model: nn.Module, state: Mapping[str, Any], strict: bool) -> str:
    """What a model needs and a state dict lacks, in words; empty if nothing is missing."""
    needed = _needed(model)
    missing = [n for n in needed if n not in state and not OPTIONAL.fullmatch(n)]
    missing = [n for n in missing if strict or needed[n].dim() > 1]
    if missing:
        return f"lacks {first_names(missing)}"
    for name in (n for n in needed if n in state):
        given, tensor = state[name], needed[name]
        if given.shape != tensor.shape:
            return (
                f"has {name} of shape {tuple(given.shape)}, but the model needs "
                f"{tuple(tensor.shape)}"
            )
        wide_float = given.is_floating_point() and given.element_size() > 1
        if tensor.is_floating_point() and not wide_float:
            return f"has {name} of type {given.dtype}, but quantised weights are not read"
    return ""


def _unplaced(model: nn.Module, state: Mapping[str, Any]) -> str:
    """What a state dict holds and a model has no place for, in words; empty for nothing."""
    known = model.state_dict().keys() | set(classifier_names(model))
    extra = [name for name in state if name not in known]
    extra = [name for name in extra if not any(re.fullmatch(rule, name) for rule in LEFT_OUT)]
    return f"holds {first_names(extra)}, which the model has no place for" if extra else ""


def _candidate(
    model: nn.Module,
    timm_loading: TimmLoading,
    prefix: str,
    below: dict[str, Tensor],
    resized: bool,
) -> _Candidate:
    sizes = {tensor.numel() for tensor in below.values()}
    try:
        state = _converted(timm_loading.convert, below, model)
    except Exception as error:  # filters raise many types for unexpected names and shapes
        return _Candidate(prefix, {}, f"cannot be renamed by timm ({error!r:.80})", 0)
    needed = _needed(model)
    matched = sum(n in state and state[n].shape == tensor.shape for n, tensor in needed.items())
    fault = _missing(model, state, timm_loading.strict) or _unplaced(model, state)
    for name, tensor in {} if fault or resized else needed.items():
        kernel = tensor.dim() == 4 and name.endswith(".weight")
        if kernel and tensor.numel() not in sizes:
            fault = f"has {name} for another size of patches than the model's {tuple(tensor.shape)}"
    return _Candidate(prefix, state, fault, matched)


def _converted(convert: Filter, below: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    if convert is None:
        return below
    try:
        converted = convert(dict(below), model)
    except TypeError:  # timm supports filters of one argument too
        converted = convert(dict(below))
    return {str(name): t for name, t in converted.items() if isinstance(t, Tensor)}


def _prefixes(tensors: Mapping[str, Tensor], least: int) -> list[str]:
    """Prefixes that at least ``least`` tensors share, shortest first."""
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        counts.update(".".join(parts[: i + 1]) + "." for i in range(min(len(parts) - 1, 6)))
    common = [prefix for prefix, count in counts.items() if count >= max(least, 1)]
    return ["", *sorted(common, key=lambda prefix: prefix.count("."))[:40]]


def _chosen(fitting: Sequence[_Candidate], path: Path) -> _Candidate | None:
    """The fitting candidate whose prefix ranks best, or None if there is none."""

    def rank(one: _Candidate) -> int:
        parts = one.prefix.split(".")
        return next((i for i, part in enumerate(PREFERRED) if part in parts), len(PREFERRED))

    if len(fitting) < 2:
        return fitting[0] if fitting else None
    best = min(map(rank, fitting))
    first = [one for one in fitting if rank(one) == best]
    if len(first) > 1 and any(not _equal(first[0].state, one.state) for one in first[1:]):
        raise BackboneError(
            f"{path} holds this model {len(first)} times, below "
            f"{' and '.join(one.prefix for one in first)}: save only the one to use."
        )
    return first[0]


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _misfit(path: Path, best: _Candidate, names: Collection[str]) -> str:
    """The message for a file that fits below no prefix."""
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
        if not tensor.sum().isfinite() and not tensor.isfinite().all():  # a sum may overflow
            raise BackboneError(f"{name} in {path} holds values that are not finite.")
