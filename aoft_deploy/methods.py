"""The fine-tuning methods: which sites take which kind of update.

A method is a name, its settings with their defaults, and one function from a site to an update or
to None. Adding one is a few lines and a call of ``register``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Generator

from aoft_deploy.errors import SettingError, UnknownNameError
from aoft_deploy.sites import LINEAR_ROLES, Site
from aoft_deploy.updates import AoftLowRank, LowRank, Rescale, ScaleShift, Shift, Update

__all__ = ["Method", "Settings", "get_method", "method_names"]

Settings = Mapping[str, Any]
"""Values of a method's settings by name; all are JSON values."""

Build = Callable[[Site, Settings, Generator], Update | None]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: What users call it.
        summary: One line for help texts.
        defaults: Every setting with its default.
        build: The update for a site, or None where the method leaves the site alone. A method that
            trains the classifier alone has no ``build``.
    """

    name: str
    summary: str
    defaults: Settings
    build: Build | None

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


METHODS: dict[str, Method] = {}


def register(name: str, summary: str, build: Build | None, **defaults: Any) -> None:
    """Add a method under ``name``."""
    METHODS[name] = Method(name, summary, MappingProxyType(defaults), build)


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


INITS = ("published", "identity")


def _checked(method: str, name: str, value: Any, default: Any) -> Any:
    """Value, if it is of the default's type and among the setting's choices."""
    if name == "targets":
        roles = list(value) if isinstance(value, (list, tuple)) else [value]
        for role in roles:
            if role not in LINEAR_ROLES:
                raise UnknownNameError(f"target of {method}", str(role), LINEAR_ROLES)
        if not roles:
            raise SettingError(f"targets of {method} is empty: name at least one linear map.")
        return roles
    if name == "init" and value not in INITS:
        raise UnknownNameError(f"init of {method}", str(value), INITS)
    if isinstance(default, float) and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not type(default):
        raise SettingError(
            f"{name} of {method} is {value!r}, but must be of type {type(default).__name__}."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(f"{name} of {method} is {value}, but must be finite.")
    return value


def _low_rank(site: Site, settings: Settings, generator: Generator) -> Update | None:
    if site.role not in settings["targets"]:
        return None
    rank, scale = settings["rank"], settings["scale"]
    return LowRank(site.in_features, site.out_features, rank, scale, generator)


def _aoft(per_rank_scale: bool) -> Build:
    def build(site: Site, settings: Settings, generator: Generator) -> Update | None:
        if site.role not in settings["targets"]:
            return None
        rank, scale = settings["rank"], settings["scale"]
        features = site.in_features, site.out_features
        return AoftLowRank(*features, rank, scale, per_rank_scale, generator)

    return build


def _rlrr(site: Site, settings: Settings, generator: Generator) -> Update | None:
    init = settings["init"]
    if site.role in LINEAR_ROLES:
        features = site.in_features, site.out_features
        return Rescale(*features, settings["rank"], site.bias, init, generator)
    if site.role in ("q_bias", "v_bias"):
        return Shift(site.out_features)
    return ScaleShift(site.out_features, site.bias, init, generator)


register(
    "aoft-lora",
    "AOFT in LoRA's place: one vector generates each projection (arXiv 2507.13260)",
    _aoft(per_rank_scale=False),
    rank=8,
    scale=1.0,
    targets=["q", "v"],
)
register(
    "aoft-lora-star",
    "AOFT*: aoft-lora with one trained scale per rank component",
    _aoft(per_rank_scale=True),
    rank=8,
    scale=1.0,
    targets=["q", "v"],
)
register(
    "rlrr",
    "residual low-rank rescaling of every linear map, SSF on norms and patches (arXiv 2403.19067)",
    _rlrr,
    rank=1,
    init="published",
)
register("lora", "LoRA (arXiv 2106.09685)", _low_rank, rank=8, scale=1.0, targets=["q", "v"])
register("linear", "linear probing: the classifier alone", None)
