"""Nothing in the project's own code can be made to run a stranger's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("aoft_deploy", "exporters", "demo", "tools", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

EXECUTING = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "tarfile", "yaml"}
"""Modules that read code with data, or archives that write where they like."""

CHILD = ROOT / "aoft_deploy" / "artefacts" / "isolation.py"
"""Talks to the process that it started itself."""

LOADERS = {"torch.load", "load_state_dict"}
"""Functions that unpickle unless they are told to take weights only."""

BANNED = {"eval", "exec", "torch.hub.load", "torch.jit.load", "shutil.unpack_archive"}


def faults(tree: ast.AST, *, child: bool = False) -> Iterator[str]:
    """What in a module could run code, or write files, that a stranger's file holds."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in EXECUTING - ({"pickle"} if child else set()):
                yield f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if told.get("weights_only", "True") != "True":
            yield f"{called} with weights_only={told['weights_only']}"
        if called in LOADERS and "weights_only" not in told:
            yield f"{called} without weights_only=True"
        if told.get("allow_pickle", "False") != "False":
            yield f"{called} with allow_pickle={told['allow_pickle']}"
        if called in BANNED or called.endswith((".extractall", ".trust_remote_code")):
            yield f"calls {called}"
        if "trust_remote_code" in told:
            yield f"{called} with trust_remote_code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_reads_code_from_data(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert list(faults(tree, child=path == CHILD)) == []


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
def test_each_way_to_do_so_is_seen(code: str) -> None:
    assert len(list(faults(ast.parse(code)))) == 1


def test_all_of_the_project_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(FOLDERS)
    assert CHILD in SOURCES
