"""Commands and modules do not import libraries that they do not need."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pytest
from imported import heavy_libraries

import aoft_deploy

COMMANDS = (
    *(f"aoft_deploy.cli.{name}" for name in ("bench", "export", "inspect", "predict", "serve")),
    "aoft_deploy.cli.train",
    "aoft_demo.cli",
)

EXPORTERS = (
    "onnx.exporter",
    "openvino.exporter",
    "openvino.int8",
    "pytorch.aoti_exporter",
    "pytorch.peft_exporter",
    "pytorch.timm_exporter",
)

WITHOUT_TORCH = ("artefacts", "data", "fleet", "serving")
"""Rooms whose modules import neither torch nor timm."""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--no-such-option", 2)])
def test_a_parser_imports_no_heavy_library(command: str, option: str, code: int) -> None:
    script = (
        f"from {command} import main\n"
        f"try:\n    main(['{option}'])\n"
        f"except SystemExit as end:\n    assert end.code == {code}"
    )
    assert heavy_libraries(script) == set()


def test_the_package_imports_no_heavy_library() -> None:
    assert heavy_libraries("import aoft_deploy; dir(aoft_deploy)") == set()


def test_the_exporters_import_no_heavy_library_but_numpy() -> None:
    script = "import " + ", ".join(f"aoft_exporters.{name}" for name in EXPORTERS)
    assert heavy_libraries(script) <= {"numpy"}


def test_the_rooms_for_production_import_neither_torch_nor_timm() -> None:
    modules = [
        module.name
        for module in pkgutil.walk_packages(aoft_deploy.__path__, "aoft_deploy.")
        if module.name.split(".")[1] in WITHOUT_TORCH and module.name != "aoft_deploy.serving.ray"
    ]
    assert len(modules) > 40
    script = "import " + ", ".join([*modules, "aoft_deploy.checkpoints.file_format"])
    assert not heavy_libraries(script) & {"torch", "torchvision", "timm"}


def test_prediction_with_an_onnx_artefact_imports_neither_torch_nor_timm(
    artefact: Path, photos: list[Path]
) -> None:
    script = "from aoft_deploy.cli.predict import main\nassert main(sys.argv[1:]) == 0"
    assert heavy_libraries(script, artefact, *photos) <= {"numpy", "onnxruntime", "PIL"}


def test_inspection_of_an_artefact_or_its_manifest_does_not_import_torch(artefact: Path) -> None:
    script = "from aoft_deploy.cli.inspect import main\nassert main(sys.argv[1:]) == 0"
    assert heavy_libraries(script, artefact) <= {"numpy", "onnx"}
    assert heavy_libraries(script, f"{artefact}.json") == set()


def test_opening_a_fleet_needs_no_library_but_its_engine(fleet_artefact: Path) -> None:
    script = (
        "from pathlib import Path\nfrom aoft_deploy.fleet import Fleet\nFleet(Path(sys.argv[1]))"
    )
    assert heavy_libraries(script, fleet_artefact) <= {"numpy", "onnxruntime", "PIL", "safetensors"}


def test_an_artefact_is_opened_without_the_exporters_after_its_own(artefact: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from aoft_deploy.artefacts.registry import load_artefact\n"
        "load_artefact(Path(sys.argv[1]))\n"
        "assert 'aoft_exporters.onnx.exporter' in sys.modules\n"
        "assert 'aoft_exporters.triton.onnx_exporter' not in sys.modules"
    )
    assert heavy_libraries(script, artefact) <= {"numpy", "onnxruntime"}
