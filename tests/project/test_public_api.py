"""Public names: those of the package, and the ``__all__`` of every module."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import aoft_demo
import aoft_deploy

MODULES = [
    module.name
    for package in (aoft_deploy, aoft_demo)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


def test_every_public_name_is_importable_listed_and_documented() -> None:
    assert list(aoft_deploy.__all__) == sorted(aoft_deploy.__all__)
    for name in aoft_deploy.__all__:
        assert name in dir(aoft_deploy)
        public = getattr(aoft_deploy, name)
        assert public.__doc__ and public.__module__.startswith("aoft_deploy.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'aoft_deploy' has no attribute 'merg'"):
        aoft_deploy.merg  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_a_module_defines_all_that_it_lists(name: str) -> None:
    module = importlib.import_module(name)
    is_package = hasattr(module, "__path__")
    listed = getattr(module, "__all__", []) if is_package else module.__all__
    assert len(set(listed)) == len(listed)
    assert all(hasattr(module, each) for each in listed)
