"""The project's code never executes code from a file that it reads."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT

FOLDERS = ("aoft_deploy", "exporters", "demo", "tools", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

EXECUTING = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "tarfile", "yaml"}
"""Modules that may execute code while reading data, or extract files to any path."""

ISOLATION = ROOT / "aoft_deploy" / "artefacts" / "isolation.py"
"""May unpickle: it reads only from the subprocess that it has started."""

LOADERS = {"torch.load", "load_state_dict"}
"""Functions that unpickle unless ``weights_only`` is given."""

BANNED = {"eval", "exec", "torch.hub.load", "torch.jit.load", "shutil.unpack_archive"}


def faults(tree: ast.AST, *, may_unpickle: bool = False) -> Iterator[str]:
    """Statements of a module that could execute code, or write files, from untrusted data."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in EXECUTING - ({"pickle"} if may_unpickle else set()):
                yield f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if arguments.get("weights_only", "True") != "True":
            yield f"{called} with weights_only={arguments['weights_only']}"
        if called in LOADERS and "weights_only" not in arguments:
            yield f"{called} without weights_only=True"
        if arguments.get("allow_pickle", "False") != "False":
            yield f"{called} with allow_pickle={arguments['allow_pickle']}"
        if called in BANNED or called.endswith((".extractall", ".trust_remote_code")):
            yield f"calls {called}"
        if "trust_remote_code" in arguments:
            yield f"{called} with trust_remote_code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_executes_code_from_data(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert list(faults(tree, may_unpickle=path == ISOLATION)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import yaml as y",
        "from tarfile import open",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "load_state_dict(path, use_ema=True)",
        "f(x, weights_only=trusted)",
        "np.load(path, allow_pickle=True)",
        "zipfile.ZipFile(path).extractall()",
        "eval(text)",
        "load(name, trust_remote_code=True)",
    ],
)
def test_each_such_statement_is_found(code: str) -> None:
    assert len(list(faults(ast.parse(code)))) == 1


def test_all_folders_are_searched() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(FOLDERS)
    assert ISOLATION in SOURCES
