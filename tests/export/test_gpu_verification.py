"""Exports on a machine with a GPU: the answers there decide too, and the manifest says what ran.

The real CUDA provider runs in a subprocess with CUDA libraries that compute nothing, so its answers
are wrong. Where a test needs right ones, the CPU gives them in its place.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cuda_on_host import RUNTIME, CudaOnHost, cuda_on_host

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.isolation import SubprocessEngine
from aoft_deploy.cli.export import main
from aoft_deploy.cli.inspect import main as inspect_main
from aoft_deploy.errors import AoftError
from aoft_exporters.onnx import exporter
from aoft_exporters.onnx.gpu_engine import OnnxGpuEngine

GPU = "a GPU of this test"
Open = Callable[[Path], Any]


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> CudaOnHost:
    return cuda_on_host(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def provider(cuda: CudaOnHost) -> Iterator[Open]:
    """Function that opens a file in the CUDA provider."""
    with ExitStack() as stack:

        def opened(path: Path) -> SubprocessEngine:
            load = partial(exporter.load, path, EngineOptions(device="cuda"))
            with (
                pytest.MonkeyPatch.context() as patch
            ):  # a subprocess takes over what it starts with
                patch.setenv("LD_LIBRARY_PATH", str(cuda.driver))
                patch.setattr(sys, "path", [str(RUNTIME), str(cuda.packages), *sys.path])
                return stack.enter_context(SubprocessEngine(load))

        yield opened


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Open], None]:
    """Function that gives this machine a GPU whose engines a function opens."""
    load = exporter.load

    def given(on_gpu: Open) -> None:
        def opened(path: Path, options: EngineOptions) -> Any:
            return on_gpu(path) if options.device == "cuda" else load(path, options)

        found = replace(exporter.EXPORTER, load=opened, gpu=lambda: GPU)
        monkeypatch.setattr(exporter, "EXPORTER", found)

    return given


class Placed:
    """Where the CUDA provider computes a file, with the answers of the CPU or of its emulation."""

    def __init__(self, info: Mapping[str, str], path: Path) -> None:
        self.info = info
        low = info["precision"] in exporter.EMULATION.precisions
        self.run = (exporter.emulation(path) if low else exporter.load(path)).run


def merge_options(checkpoint: Path, weights: Path, output: Path, *more: object) -> list[str]:
    options = ["--merge", checkpoint, "--backbone-weights", weights, "-o", output, *more]
    return [*map(str, options)]


def verification(output: Path) -> dict[str, Any]:
    manifest = output.with_name(f"{output.name}.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(manifest)["verification"]
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_manifest_names_the_gpu_and_the_nodes_that_stay_on_the_cpu(
    precision: str,
    provider: Open,
    with_gpu: Callable[[Open], None],
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_gpu(lambda path: Placed(provider(path).info, path))
    output = tmp_path / "a.onnx"
    options = ["--precision", precision, "--images", *photos, "--min-agreement", 0.5]
    assert main(merge_options(checkpoint, backbone_weights, output, *options)) == 0
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.startswith(f"verified on {GPU}: max"))
    assert line.endswith(
        " nodes on CUDAExecutionProvider, 1 nodes on CPUExecutionProvider (Concat)"
    )
    assert "NOT VERIFIED" not in printed
    found = verification(output)
    assert found.get("verified_on_device", GPU) == GPU
    assert ("verified_on_device" in found) is (precision != "fp32")
    gpu = found["gpu"]
    assert (gpu["verified"], gpu["device"], gpu["agreement"]) == (True, GPU, found["agreement"])
    assert gpu["max_abs"] == found["max_abs"]
    assert gpu["nodes"]["CUDAExecutionProvider"] > 20
    assert gpu["nodes"]["CPUExecutionProvider"] == 1
    (node,) = gpu["nodes_on_cpu"]
    assert node["operator"] == "Concat" and node["name"]
    assert inspect_main([str(output)]) == 0
    assert f"device {GPU}" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["--merge", "--fleet"])
def test_a_gpu_with_wrong_answers_ends_the_export(
    what: str,
    provider: Open,
    with_gpu: Callable[[Open], None],
    checkpoint: Path,
    fleet_tasks: dict[str, Path],
    backbone_weights: Path,
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    with_gpu(provider)
    tasks = [checkpoint] if what == "--merge" else [*fleet_tasks.values()][:2]
    options = [what, *tasks, "--backbone-weights", backbone_weights]
    line = refused(main, *options, "-o", tmp_path / "a.onnx")
    assert line.startswith(f"The CPU verified the artefact, but {GPU} did not. At batch size 1 ")
    assert "differ from the unmerged model's by " in line
    assert line.endswith("set the environment variable CUDA_VISIBLE_DEVICES to -1.")


def test_a_gpu_that_fails_while_it_computes_ends_the_export(
    with_gpu: Callable[[Open], None],
    fleet_tasks: dict[str, Path],
    backbone_weights: Path,
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    class Failing:
        def __init__(self, path: Path) -> None:
            self.path = path

        def run(self, *batch: object) -> None:
            raise AoftError(f"{self.path} could not be computed on cuda:0 (CUDA failure 719).")

    with_gpu(Failing)
    options = ["--fleet", *fleet_tasks.values(), "--backbone-weights", backbone_weights]
    line = refused(main, *options, "-o", tmp_path / "a.onnx")
    assert "did not. a.onnx could not be computed on cuda:0 (CUDA failure 719). To export" in line


def test_a_file_that_the_gpu_does_not_run_is_for_the_cpu_and_the_manifest_says_why(
    provider: Open,
    with_gpu: Callable[[Open], None],
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_gpu(provider)
    output = tmp_path / "a.onnx"
    options = ["--precision", "int8", "--images", *photos, "--min-agreement", 0.5]
    assert main(merge_options(checkpoint, backbone_weights, output, *options)) == 0
    gpu = verification(output)["gpu"]
    assert (gpu["verified"], gpu["device"]) == (False, GPU)
    assert gpu["reason"].startswith("a.onnx cannot run on cuda: ONNX Runtime 1.")
    assert "MatMulInteger (6)" in gpu["reason"]
    assert f"not verified on {GPU}: {gpu['reason']}" in capsys.readouterr().out


def test_a_fleet_is_verified_on_the_gpu_task_by_task(
    with_gpu: Callable[[Open], None],
    fleet_tasks: dict[str, Path],
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    """The engine for GPUs computes it, with the CPU as its device."""
    with_gpu(lambda path: OnnxGpuEngine(path, EngineOptions(threads=1, device="cpu")))
    output = tmp_path / "fleet.onnx"
    options = ["--fleet", *fleet_tasks.values(), "--backbone-weights", backbone_weights]
    assert main([*map(str, [*options, "-o", output])]) == 0
    gpu = verification(output)["gpu"]
    assert gpu["verified"] and 0 < gpu["max_abs"] < 1e-5
    assert gpu["nodes"] == {"CPUExecutionProvider": len(gpu["nodes_on_cpu"])}


def test_without_a_gpu_the_manifest_says_that_only_the_cpu_verified(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verification(artefact)["gpu"] == {
        "verified": False,
        "reason": "onnxruntime finds no GPU on this machine, so only the CPU verified the artefact",
    }
    monkeypatch.setattr(ctypes, "CDLL", None)  # the ONNX Runtime for CPUs asks for no library
    assert exporter.EXPORTER.gpu is not None and exporter.EXPORTER.gpu() is None
