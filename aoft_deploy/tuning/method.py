"""What a fine-tuning method is: which update each role of a site takes, and its settings."""

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
