"""A package that is missing or broken is named together with the extra that installs it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

from aoft_deploy.errors import EXTRAS, MissingExtraError, UnknownNameError, optional_imports

WITHOUT = """
import sys

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Without)
"""
"""Code that hides an installed package."""

SOURCES = [
    path
    for folder in ("aoft_deploy", "exporters/aoft_exporters", "demo/aoft_demo")
    for path in (ROOT / folder).rglob("*.py")
]


def run_without(package: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which a package cannot be found."""
    script = WITHOUT.format(package=package) + code
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def imported_packages(path: Path) -> set[str]:
    """The packages that a source imports anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {module.partition(".")[0] for module in modules}


def requirements(project: dict[str, Any], extra: str) -> set[str]:
    """Names of the distributions that an extra, or the base install, asks for itself."""
    listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {each.partition(">")[0].partition("[")[0] for each in listed}


def test_the_table_has_every_package_that_the_sources_import() -> None:
    found = set().union(*map(imported_packages, SOURCES))
    ours = {"aoft_deploy", "aoft_exporters", "aoft_demo"}
    assert found - ours - set(sys.stdlib_module_names) <= set(EXTRAS)


def test_the_extra_of_a_package_installs_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    installed = packages_distributions()
    for package, extra in EXTRAS.items():
        names = {package.replace("_", "-"), *installed.get(package, ())}
        assert names & requirements(project, extra), package


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("aoft_deploy.cli.train --data digits --out {folder}/run", "accelerate", "train"),
        ("aoft_deploy.cli.export --merge {checkpoint} -o {folder}/a.onnx", "torch", "train"),
        ("aoft_deploy.cli.predict {artefact} {folder}/a.png", "onnxruntime", "cpu"),
        ("aoft_deploy.cli.bench {artefact} --plot {folder}/a.png", "matplotlib", "plots"),
        ("aoft_deploy.cli.serve --repository {folder}", "uvicorn", "serve"),
        ("aoft_deploy.cli.serve --repository {folder}", "orjson", "serve"),
        ("aoft_demo.cli --port 0", "gradio", "demo"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(
    command: str, package: str, extra: str, artefact: Path, checkpoint: Path, tmp_path: Path
) -> None:
    paths = {"artefact": artefact, "checkpoint": checkpoint, "folder": tmp_path}
    module, *arguments = command.format(**paths).split()
    done = run_without(package, f"from {module} import main; exit(main())", *arguments)
    expected = f"error: {package} is not installed: run pip install 'aoft-deploy[{extra}]'.\n"
    assert (done.returncode, done.stderr) == (1, expected)


@pytest.mark.parametrize("use", ["load", "register", "export_merged(sys.argv[1], sys.argv[2])"])
def test_a_public_name_that_needs_torch_names_the_extra_without_it(
    use: str, checkpoint: Path, tmp_path: Path
) -> None:
    code = f"import sys, aoft_deploy; aoft_deploy.{use}"
    done = run_without("torch", code, str(checkpoint), str(tmp_path / "a.onnx"))
    assert done.stderr.splitlines()[-1] == (
        "aoft_deploy.errors.MissingExtraError: torch is not installed: run pip install "
        "'aoft-deploy[train]'."
    )


def test_exports_that_are_made_one_by_one_name_the_extra_too(
    checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "task.ckpt"
    shutil.copyfile(checkpoint, copy)
    code = (
        "import sys; from aoft_deploy.export import export_each; next(export_each([sys.argv[1]]))"
    )
    done = run_without("torch", code, str(copy))
    assert "MissingExtraError: torch is not installed" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'numpy'", name="numpy"),
            "numpy is not installed: run pip install aoft-deploy.",
        ),
        (
            ModuleNotFoundError("No module named 'yaml'", name="yaml"),
            "yaml is not installed, but another package needs it: run pip check.",
        ),
        (
            ImportError("cannot import name 'a' from\n'timm.layers'.", name="timm.layers"),
            "timm cannot be imported (cannot import name 'a' from 'timm.layers'): run pip check, "
            "or pip install --upgrade 'aoft-deploy[train]'.",
        ),
        (
            ModuleNotFoundError("No module named 'timm.nothing'", name="timm.nothing"),
            "timm cannot be imported (No module named 'timm.nothing'): run pip check, or pip "
            "install --upgrade 'aoft-deploy[train]'.",
        ),
    ],
)
def test_a_failed_import_becomes_a_sentence(error: ImportError, message: str) -> None:
    with pytest.raises(MissingExtraError) as raised, optional_imports():
        raise error
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'aoft_deploy.x'", name="aoft_deploy.x"),
        ImportError("cannot import name 'a' from 'yaml'", name="yaml"),
        ImportError("of unknown origin"),
        MissingExtraError("onnxruntime-gpu", "gpu"),
    ],
)
def test_other_failed_imports_stay_as_they_are(error: ImportError) -> None:
    with pytest.raises(ImportError) as raised, optional_imports():
        raise error
    assert raised.value is error


def test_the_command_for_a_package_that_replaces_another_runs_as_it_is_copied(
    tmp_path: Path,
) -> None:
    """pip removes files of the one with the other, so both are uninstalled first."""
    error = MissingExtraError("onnxruntime-gpu", "gpu", replaces="onnxruntime")
    what, command = str(error).removesuffix(".").split(": run ")
    assert what == "onnxruntime-gpu is not installed"
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$#:$@"\n')
    (tmp_path / "pip").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    ended = subprocess.run(
        ["sh", "-c", command], env={"PATH": path}, stdin=subprocess.DEVNULL, capture_output=True
    )
    assert (ended.returncode, ended.stdout.decode().splitlines()) == (
        0,
        ["4:uninstall -y onnxruntime onnxruntime-gpu", "2:install aoft-deploy[gpu]"],
    )


def test_an_unknown_name_gets_suggestions_and_a_hint() -> None:
    error = UnknownNameError("task", "digit", ["digits", "shape"], "See the list.")
    assert str(error) == (
        "Unknown task 'digit'. Did you mean digits? Known: digits, shape. See the list."
    )
