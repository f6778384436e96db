"""The faces of packages: what they offer exists, is documented, and is not hidden by a module."""

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
    """The names that a face imports for type checkers, and their modules."""
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
def test_a_module_lists_what_it_defines(name: str) -> None:
    module = importlib.import_module(name)
    listed = list(getattr(module, "__all__", []))
    assert len(set(listed)) == len(listed)
    assert all(hasattr(module, each) for each in listed)
    assert module.__doc__


@pytest.mark.parametrize("name", FACES)
def test_a_face_offers_what_it_lists(name: str) -> None:
    face = importlib.import_module(name)
    assert list(face.__all__) == sorted(face.__all__)
    assert set(face.__all__) == set(face._HOMES) == set(typed(face))
    for each in face.__all__:
        value = getattr(face, each)
        assert value.__doc__
        assert each in dir(face)
        assert typed(face)[each] == f"{name}.{face._HOMES[each]}"


@pytest.mark.parametrize("name", FACES)
def test_no_module_bears_the_name_of_what_its_face_offers(name: str) -> None:
    face = importlib.import_module(name)
    modules = {module.name for module in pkgutil.iter_modules(face.__path__)}
    assert not modules & set(face.__all__)


@pytest.mark.parametrize("name", FACES)
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        importlib.import_module(name).nothing  # noqa: B018
