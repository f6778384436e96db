"""What the package offers by name."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import aoft_deploy


def test_every_public_name_is_importable_listed_and_documented() -> None:
    assert list(aoft_deploy.__all__) == sorted(aoft_deploy.__all__)
    for name in aoft_deploy.__all__:
        assert name in dir(aoft_deploy)
        assert getattr(aoft_deploy, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'aoft_deploy' has no attribute 'merg'"):
        aoft_deploy.merg  # noqa: B018


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(aoft_deploy.__path__, "aoft_deploy.")]
)
def test_modules_list_what_they_define(name: str) -> None:
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert len(set(listed)) == len(listed)
    assert all(hasattr(module, each) for each in listed)
