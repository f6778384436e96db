"""The fine-tuning methods: which sites take which kind of update.

A method is a name, its settings with their defaults, and one function from a site to an update or
to None. Adding one is a few lines and a call of ``register``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Generator

from aoft_deploy.errors import AttachError, SettingError, UnknownNameError
from aoft_deploy.tuning.sites.discovery import LINEAR_ROLES, NORM_ROLES, Site
from aoft_deploy.tuning.updates.update import (
    Aoft,
    AoftAdapter,
    AoftLowRank,
    AoftPrompts,
    LowRank,
    LowRankAdapter,
    Prompts,
    Rescale,
    ScaleShift,
    Shift,
    Update,
)

__all__ = ["Method", "Settings", "get_method", "method_names"]

Settings = Mapping[str, Any]
"""Values of a method's settings by name; all are JSON values."""

Build = Callable[[Site, Settings, Generator], Update | None]

AUTO = "auto"
"""The ``targets`` that stand for the first of a method's ``fallbacks`` that the model has."""


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: What users call it.
        summary: One line for help texts.
        defaults: Every setting with its default.
        build: The update for a site, or None where the method leaves the site alone. A method that
            trains the classifier alone, or everything, has no ``build``.
        fallbacks: What ``targets="auto"`` may stand for, best first.
        everything: Whether all of the backbone's own parameters are trained.
    """

    name: str
    summary: str
    defaults: Settings
    build: Build | None
    fallbacks: tuple[tuple[str, ...], ...] = ()
    everything: bool = False

    def settings(self, given: Settings) -> dict[str, Any]:
        """The defaults with ``given`` put in.

        Raises:
            UnknownNameError: A setting that this method does not have.
            SettingError: A value of the wrong type or outside its choices.
        """
        merged = dict(self.defaults)
        for name, value in given.items():
            if name not in merged:
                raise UnknownNameError(f"setting of {self.name}", name, merged)
            merged[name] = _checked(self.name, name, value, self.defaults[name])
        return merged

    def resolved(self, settings: Settings, sites: Sequence[Site]) -> dict[str, Any]:
        """The settings with ``targets="auto"`` replaced by roles that the model has.

        Raises:
            UnknownNameError: ``ranks`` names a site that the model does not have.
            SettingError: ``ranks`` names a fused map and a part of it.
        """
        ranks = settings.get("ranks", {})
        linear = {site.name for site in sites if site.role in LINEAR_ROLES}
        for name in ranks:
            if name not in linear:
                raise UnknownNameError(f"site in ranks of {self.name}", name, linear)
            if name.rpartition(".")[0] in ranks:
                raise SettingError(f"ranks of {self.name} names {name} and the whole: choose one.")
        if settings.get("targets") != AUTO:
            return dict(settings)
        roles = {site.role for site in sites}
        found = (t for t in self.fallbacks if roles.intersection(t))
        return {**settings, "targets": list(next(found, self.fallbacks[0]))}


METHODS: dict[str, Method] = {}


def register(
    name: str,
    summary: str,
    build: Build | None,
    *,
    fallbacks: tuple[tuple[str, ...], ...] = (),
    everything: bool = False,
    **defaults: Any,
) -> None:
    """Add a method under ``name``."""
    frozen = MappingProxyType(defaults)
    METHODS[name] = Method(name, summary, frozen, build, fallbacks, everything)


def method_names() -> tuple[str, ...]:
    """Names of all methods, sorted."""
    return tuple(sorted(METHODS))


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UnknownNameError: No method has that name.
    """
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    return METHODS[name]


CHOICES = {
    "init": ("published", "identity", "normal", "uniform", "constant", "zero"),
    "sides": ("both", "out", "in"),
}
"""Settings that take one of a few words."""

LISTS = {"targets": LINEAR_ROLES, "norms": NORM_ROLES}
"""Settings that take a list of roles."""


def _checked(method: str, name: str, value: Any, default: Any) -> Any:
    """Value, if it is of the default's type and among the setting's choices."""
    if name in LISTS:
        return _roles(method, name, value, default)
    if name in CHOICES and value not in CHOICES[name]:
        raise UnknownNameError(f"{name} of {method}", str(value), CHOICES[name])
    if isinstance(default, float) and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not type(default):
        raise SettingError(
            f"{name} of {method} is {value!r}, but must be of type {type(default).__name__}."
        )
    if isinstance(value, dict) and not all(type(rank) is int for rank in value.values()):
        raise SettingError(f"{name} of {method} must give a whole number for each site's name.")
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(f"{name} of {method} is {value}, but must be finite.")
    return value


def _roles(method: str, name: str, value: Any, default: Any) -> Any:
    if value == AUTO == default:
        return AUTO
    roles = list(value) if isinstance(value, (list, tuple)) else [value]
    for role in roles:
        if role not in LISTS[name]:
            raise UnknownNameError(f"{name.removesuffix('s')} of {method}", str(role), LISTS[name])
    if name == "targets" and not roles:
        raise SettingError(f"targets of {method} is empty: name at least one linear map.")
    if "qkv" in roles and {"q", "k", "v"}.intersection(roles):
        raise SettingError(f"{name} of {method} names qkv and a part of it: choose one form.")
    return roles


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
    if not _takes_prompts(site, settings):
        return None
    return Prompts(site.in_features, settings["rank"], site.patch, generator, site.embed_dim)


def _takes_prompts(site: Site, settings: Settings) -> bool:
    if site.windows and not settings["deep"]:
        raise AttachError(
            f"Prompts before {site.name} alone (deep=False) would have to pass patch merging, "
            "where VPT's paper ignores them and its code repeats them: use deep=True."
        )
    return site.role == "block" and (settings["deep"] or site.index == 0)


def _options(settings: Settings, per_rank_scale: bool) -> Aoft:
    names = ("rank", "scale", "strict", "shared")
    chosen = {name: settings[name] for name in names if name in settings}
    return Aoft(per_rank_scale=per_rank_scale, **chosen)


def _aoft_low_rank(star: bool) -> Build:
    def build(site: Site, settings: Settings, generator: Generator) -> Update | None:
        if site.role not in settings["targets"]:
            return None
        features = site.in_features, site.out_features
        return AoftLowRank(*features, _options(settings, star), generator)

    return build


def _aoft_adapter(star: bool) -> Build:
    def build(site: Site, settings: Settings, generator: Generator) -> Update | None:
        if site.role not in settings["targets"]:
            return None
        options = _options(settings, star)
        return AoftAdapter(site.channels, options, settings["residual"], generator)

    return build


def _aoft_prompts(star: bool) -> Build:
    def build(site: Site, settings: Settings, generator: Generator) -> Update | None:
        if not _takes_prompts(site, settings):
            return None
        return AoftPrompts(site.in_features, _options(settings, star), generator)

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
BRANCH_OUTPUTS = (("proj", "fc2"), ("conv",))

for star, suffix, extra in (
    (False, "", ""),
    (True, "-star", ", with one scale per rank component"),
):
    register(
        f"aoft-lora{suffix}",
        f"AOFT{'*' if star else ''} in LoRA's place: one vector generates each projection{extra} "
        "(arXiv 2507.13260)",
        _aoft_low_rank(star),
        fallbacks=ATTENTION_FIRST,
        rank=8,
        scale=1.0,
        strict=False,
        targets=AUTO,
    )
    register(
        f"aoft-adapter{suffix}",
        f"AOFT{'*' if star else ''} on the output of attention and MLP{extra}",
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
        f"AOFT{'*' if star else ''} as prompts: one vector generates a block's{extra}",
        _aoft_prompts(star),
        rank=8,
        scale=1.0,
        strict=False,
        deep=True,
    )
register(
    "rlrr",
    "residual low-rank rescaling of every linear map, SSF on norms and patches (arXiv 2403.19067)",
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
    "LoRA (arXiv 2106.09685)",
    _low_rank,
    fallbacks=ATTENTION_FIRST,
    rank=8,
    scale=1.0,
    targets=AUTO,
    ranks={},
)
register(
    "adapter",
    "adapter without activation on the output of attention and MLP (arXiv 1902.00751, 2410.22952)",
    _adapter,
    fallbacks=BRANCH_OUTPUTS,
    rank=8,
    scale=1.0,
    targets=AUTO,
)
register("vpt", "visual prompt tuning (arXiv 2203.12119)", _prompts, rank=8, deep=True)
register(
    "ssf",
    "scale and shift of every map's output (arXiv 2210.08823)",
    _ssf,
    init_std=0.02,
)
register("bitfit", "every bias (arXiv 2106.10199)", _bitfit)
register("linear", "linear probing: the classifier alone", None)
register("full", "full fine-tuning: every parameter", None, everything=True)
