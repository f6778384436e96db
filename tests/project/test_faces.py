"""The public names of packages exist, are documented, and are not shadowed by a module."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import aoft_demo
import aoft_deploy
import aoft_exporters

PACKAGES = (aoft_deploy, aoft_exporters, aoft_demo)
NAMES = sorted(
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)
FACES = ["aoft_deploy", *(f"aoft_deploy.{name}" for name in ("artefacts", "checkpoints", "data"))]
FACES += [f"aoft_deploy.{name}" for name in ("export", "fleet", "training", "tuning")]


def typed(face: ModuleType) -> dict[str, str]:
    """The names that a package imports for type checkers, and their modules."""
    tree = ast.parse(Path(str(face.__file__)).read_text("utf-8"))
    return {
        alias.name: str(node.module)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_names_in_all_of_a_module_exist(name: str) -> None:
    module = importlib.import_module(name)
    listed = list(getattr(module, "__all__", []))
    assert len(set(listed)) == len(listed)
    assert all(hasattr(module, each) for each in listed)
    assert module.__doc__


@pytest.mark.parametrize("name", FACES)
def test_the_public_names_of_a_package_can_be_imported(name: str) -> None:
    face = importlib.import_module(name)
    assert list(face.__all__) == sorted(face.__all__)
    assert set(face.__all__) == set(face._HOMES) == set(typed(face))
    for each in face.__all__:
        value = getattr(face, each)
        assert value.__doc__
        assert each in dir(face)
        assert typed(face)[each] == f"{name}.{face._HOMES[each]}"


@pytest.mark.parametrize("name", FACES)
def test_no_module_shadows_a_public_name_of_its_package(name: str) -> None:
    face = importlib.import_module(name)
    modules = {module.name for module in pkgutil.iter_modules(face.__path__)}
    assert not modules & set(face.__all__)


@pytest.mark.parametrize("name", FACES)
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        importlib.import_module(name).nothing  # noqa: B018
