"""A fine-tuning method: its settings, and the update that it puts at each site."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator

from aoft_deploy.errors import SettingError, UnknownNameError
from aoft_deploy.tuning.sites.site import LINEAR_ROLES, NORM_ROLES, Site
from aoft_deploy.tuning.updates.update import Update

__all__ = ["AUTO", "Build", "Method", "Settings"]


Settings = Mapping[str, Any]
"""Values of a method's settings by name. All are JSON values."""


Build = Callable[[Site, Settings, Generator], Update | None]
"""Creates a method's update for a site, or returns None for a site without one."""


AUTO = "auto"
"""``targets="auto"``: the first of a method's ``fallbacks`` that the model supports."""


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Attributes:
        name: Name for users.
        summary: One line for help texts.
        defaults: Every setting with its default.
        build: Creates the update for a site. None for a method that trains only the classifier or
            the whole model.
        fallbacks: Possible values of ``targets="auto"``, best first.
        everything: Whether the whole model is trained.
    """

    name: str
    summary: str
    defaults: Settings
    build: Build | None
    fallbacks: tuple[tuple[str, ...], ...] = ()
    everything: bool = False

    def settings(self, given: Settings) -> dict[str, Any]:
        """The defaults, updated with ``given``.

        Raises:
            UnknownNameError: This method has no such setting, or a value is not among its choices.
            SettingError: A value has the wrong type or is not finite.
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
            UnknownNameError: ``ranks`` contains a site that the model does not have.
            SettingError: ``ranks`` contains a fused map and a part of it.
        """
        ranks = settings.get("ranks", {})
        linear = {site.name for site in sites if site.role in LINEAR_ROLES}
        for name in ranks:
            if name not in linear:
                raise UnknownNameError(f"site in ranks of {self.name}", name, linear)
            if name.rpartition(".")[0] in ranks:
                raise SettingError(
                    f"ranks of {self.name} contains {name} and the whole map: choose one."
                )
        if settings.get("targets") != AUTO:
            return dict(settings)
        roles = {site.role for site in sites}
        supported = (t for t in self.fallbacks if roles.intersection(t))
        return {**settings, "targets": list(next(supported, self.fallbacks[0]))}


CHOICES = {
    "init": ("published", "identity", "normal", "uniform", "constant", "zero"),
    "sides": ("both", "out", "in"),
}
"""Allowed words of settings that are one word."""


LISTS = {"targets": LINEAR_ROLES, "norms": NORM_ROLES}
"""Allowed roles of settings that are lists of roles."""


def _checked(method: str, name: str, value: Any, default: Any) -> Any:
    """The value, if it has the default's type and is among the setting's choices."""
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
        raise SettingError(f"{name} of {method} must map site names to whole numbers.")
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
        raise SettingError(f"targets of {method} is empty: give at least one role of a linear map.")
    if "qkv" in roles and {"q", "k", "v"}.intersection(roles):
        raise SettingError(f"{name} of {method} contains qkv and a part of it: choose one form.")
    return roles
