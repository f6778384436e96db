"""Commands start without the libraries that they may not need."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import aoft_deploy

HEAVY = (
    "accelerate nncf numpy onnx onnxruntime onnxscript openvino PIL safetensors sklearn timm torch "
    "torchvision"
).split()


def imported(code: str, *arguments: object) -> set[str]:
    """Heavy libraries in memory after a fresh interpreter has run the code."""
    report = f"\nimport json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    command = [sys.executable, "-c", f"import sys\n{code}{report}", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("command", ["export", "inspect", "predict", "serve", "train"])
def test_help_needs_no_heavy_library(command: str) -> None:
    code = (
        f"from aoft_deploy.cli.{command} import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0"
    )
    assert imported(code) == set()


@pytest.mark.parametrize("command", ["export", "inspect", "predict", "serve", "train"])
def test_wrong_usage_is_told_without_a_heavy_library(command: str) -> None:
    code = (
        f"from aoft_deploy.cli.{command} import main\n"
        "try:\n    main(['--no-such-option'])\n"
        "except SystemExit as end:\n    assert end.code == 2"
    )
    assert imported(code) == set()


def test_importing_the_package_needs_no_heavy_library() -> None:
    assert imported("import aoft_deploy; dir(aoft_deploy)") == set()


def test_importing_the_exporters_needs_no_heavy_library_but_numpy() -> None:
    names = ("openvino.int8", "onnx.exporter", "openvino.exporter", "pytorch.peft_exporter")
    names += ("pytorch.timm_exporter",)
    code = "import " + ", ".join(f"aoft_exporters.{name}" for name in names)
    assert imported(code) <= {"numpy"}


def test_predicting_with_an_onnx_artefact_needs_neither_torch_nor_timm(
    artefact: Path, photos: list[Path]
) -> None:
    code = "from aoft_deploy.cli.predict import main\nassert main(sys.argv[1:]) == 0"
    assert imported(code, artefact, *photos) <= {"numpy", "onnxruntime", "PIL"}


def test_inspecting_an_artefact_or_its_manifest_needs_no_torch(artefact: Path) -> None:
    code = "from aoft_deploy.cli.inspect import main\nassert main(sys.argv[1:]) == 0"
    assert imported(code, artefact) <= {"numpy", "onnx"}
    assert imported(code, f"{artefact}.json") == set()


def test_every_public_name_can_be_had() -> None:
    assert aoft_deploy.__all__ == sorted(aoft_deploy.__all__)
    for name in aoft_deploy.__all__:
        assert getattr(aoft_deploy, name).__module__.startswith("aoft_deploy.")
        assert name in dir(aoft_deploy)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'aoft_deploy' has no attribute 'nothing'"):
        aoft_deploy.__getattr__("nothing")


@pytest.mark.parametrize(
    "module",
    sorted(
        ".".join(path.relative_to(root).with_suffix("").parts)
        for root in [Path(aoft_deploy.__file__).parents[1]]
        for path in Path(aoft_deploy.__file__).parent.rglob("*.py")
        if not path.name.startswith("__")
    ),
)
def test_all_of_a_module_is_sorted_and_exists(module: str) -> None:
    imported_module = importlib.import_module(module)
    names = imported_module.__all__
    assert all(hasattr(imported_module, name) for name in names)
    assert len(set(names)) == len(names)
