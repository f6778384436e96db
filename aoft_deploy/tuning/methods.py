"""The registry of fine-tuning methods: which sites get which kind of update.

A method is a name, its settings with defaults, and one function that returns the update for a site,
or None. To add a method, write that function, call ``register``, and give ``SUMMARIES`` a line.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from torch import Generator

from aoft_deploy.errors import AttachError, UnknownNameError
from aoft_deploy.tuning.method import AUTO, Build, Method, Settings
from aoft_deploy.tuning.method_summaries import SUMMARIES
from aoft_deploy.tuning.sites.site import LINEAR_ROLES, Site
from aoft_deploy.tuning.updates.aoft import Aoft, AoftAdapter, AoftLowRank, AoftPrompts
from aoft_deploy.tuning.updates.low_rank import LowRank, LowRankAdapter
from aoft_deploy.tuning.updates.prompts import Prompts
from aoft_deploy.tuning.updates.rescale import Rescale
from aoft_deploy.tuning.updates.scale_shift import ScaleShift, Shift
from aoft_deploy.tuning.updates.update import Update

__all__ = ["get_method", "method_names"]


METHODS: dict[str, Method] = {}


def register(
    name: str,
    build: Build | None,
    *,
    fallbacks: tuple[tuple[str, ...], ...] = (),
    everything: bool = False,
    **defaults: Any,
) -> None:
    """Add a method. For the arguments see ``Method``; ``defaults`` are its settings."""
    frozen = MappingProxyType(defaults)
    METHODS[name] = Method(name, SUMMARIES[name], frozen, build, fallbacks, everything)


def method_names() -> tuple[str, ...]:
    """Names of all methods, sorted."""
    return tuple(sorted(METHODS))


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UnknownNameError: There is no such method.
    """
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    return METHODS[name]


def _low_rank(site: Site, settings: Settings, generator: Generator) -> Update | None:
    ranks, rank = settings["ranks"], settings["rank"]
    if ranks:
        rank = ranks.get(site.name)
    elif site.role not in settings["targets"]:
        rank = None
    if rank is None:
        return None
    return LowRank(site.in_features, site.out_features, rank, settings["scale"], generator)


def _adapter(site: Site, settings: Settings, generator: Generator) -> Update | None:
    if site.role not in settings["targets"]:
        return None
    return LowRankAdapter(site.channels, settings["rank"], settings["scale"], generator)


def _prompts(site: Site, settings: Settings, generator: Generator) -> Update | None:
    if not _has_prompts(site, settings):
        return None
    return Prompts(site.in_features, settings["rank"], site.patch, generator, site.embed_dim)


def _has_prompts(site: Site, settings: Settings) -> bool:
    if site.windows and not settings["deep"]:
        raise AttachError(
            f"Prompts in {site.name} only (deep=False) would reach patch merging, where VPT's "
            "paper ignores them and its code repeats them: use deep=True."
        )
    return site.role == "block" and (settings["deep"] or site.index == 0)


def _aoft(settings: Settings, per_rank_scale: bool) -> Aoft:
    names = ("rank", "scale", "strict", "shared")
    options = {name: settings[name] for name in names if name in settings}
    return Aoft(per_rank_scale=per_rank_scale, **options)


def _aoft_low_rank(star: bool) -> Build:
    def build(site: Site, settings: Settings, generator: Generator) -> Update | None:
        if site.role not in settings["targets"]:
            return None
        features = site.in_features, site.out_features
        return AoftLowRank(*features, _aoft(settings, star), generator)

    return build


def _aoft_adapter(star: bool) -> Build:
    def build(site: Site, settings: Settings, generator: Generator) -> Update | None:
        if site.role not in settings["targets"]:
            return None
        options = _aoft(settings, star)
        return AoftAdapter(site.channels, options, settings["residual"], generator)

    return build


def _aoft_prompts(star: bool) -> Build:
    def build(site: Site, settings: Settings, generator: Generator) -> Update | None:
        if not _has_prompts(site, settings):
            return None
        return AoftPrompts(site.in_features, _aoft(settings, star), generator)

    return build


def _rlrr(site: Site, settings: Settings, generator: Generator) -> Update | None:
    init = settings["init"]
    if site.part if settings["fused_qkv"] else site.role == "qkv":
        return None
    if site.role in LINEAR_ROLES or site.role == "other":
        features = site.in_features, site.out_features
        shifts = site.channels if site.bias else 0
        form = settings["sides"], settings["residual"]
        return Rescale(*features, settings["rank"], shifts, init, generator, *form)
    if site.role in ("q_bias", "v_bias"):
        return Shift(site.out_features)
    if site.role in settings["norms"]:
        std = 0.02 if init == "published" else 0.0
        return ScaleShift(site.channels, site.bias, std, generator)
    return None


def _ssf(site: Site, settings: Settings, generator: Generator) -> Update | None:
    if site.role in ("q_bias", "v_bias"):
        return Shift(site.channels)
    if site.part or site.role == "block":
        return None
    return ScaleShift(site.channels, site.bias, settings["init_std"], generator)


def _bitfit(site: Site, settings: Settings, generator: Generator) -> Update | None:
    if site.part or site.role == "block" or not site.bias or site.absorber:
        return None
    return Shift(site.channels)


ATTENTION_FIRST = (("q", "v"), ("fc1", "fc2"), ("conv",))
"""Automatic targets of LoRA: attention, otherwise MLPs, otherwise convolutions."""

BRANCH_OUTPUTS = (("proj", "fc2"), ("conv",))
"""Automatic targets of adapters: the last maps of the branches, otherwise convolutions."""

for star, suffix in ((False, ""), (True, "-star")):
    register(
        f"aoft-lora{suffix}",
        _aoft_low_rank(star),
        fallbacks=ATTENTION_FIRST,
        rank=8,
        scale=1.0,
        strict=False,
        targets=AUTO,
    )
    register(
        f"aoft-adapter{suffix}",
        _aoft_adapter(star),
        fallbacks=BRANCH_OUTPUTS,
        rank=8,
        scale=1.0,
        strict=False,
        shared=False,
        residual=True,
        targets=AUTO,
    )
    register(
        f"aoft-vpt{suffix}",
        _aoft_prompts(star),
        rank=8,
        scale=1.0,
        strict=False,
        deep=True,
    )
register(
    "rlrr",
    _rlrr,
    rank=1,
    init="published",
    sides="both",
    residual=True,
    fused_qkv=False,
    norms=["norm", "patch"],
)
register(
    "lora",
    _low_rank,
    fallbacks=ATTENTION_FIRST,
    rank=8,
    scale=1.0,
    targets=AUTO,
    ranks={},
)
register(
    "adapter",
    _adapter,
    fallbacks=BRANCH_OUTPUTS,
    rank=8,
    scale=1.0,
    targets=AUTO,
)
register("vpt", _prompts, rank=8, deep=True)
register("ssf", _ssf, init_std=0.02)
register("bitfit", _bitfit)
register("linear", None)
register("full", None, everything=True)
