"""AOTInductor packages: compiled, verified, run without timm, and refused where they do not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from specs import export_spec

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.cli import bench
from aoft_deploy.cli.export import main
from aoft_deploy.cli.inspect import describe
from aoft_deploy.errors import ArtefactError, SettingError
from aoft_deploy.serving.repository import opened_artefact
from aoft_deploy.serving.settings import Settings
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.pytorch import aoti_exporter as exporter
from aoft_exporters.pytorch.package import Package, Target

HALF = (0.5, 0.5, 0.5)
CPU = torch.device("cpu")
HERE = Target.here(CPU)
INFO = {"format": "aoft-deploy/1", "classes": '["a", "b"]', "precision": "fp32"}


def images(batch: int) -> NDArray[np.float32]:
    return np.random.default_rng(batch).normal(size=(batch, 3, 16, 16)).astype(np.float32)


def exact(tuned: TunedModel, batch: int) -> NDArray[np.float64]:
    with torch.inference_mode():
        logits: NDArray[np.float64] = tuned.double()(
            torch.from_numpy(images(batch)).double()
        ).numpy()
    return logits


def exported(folder: Path, *options: object) -> Path:
    path = folder / "task.pt2"
    assert main([*map(str, options), "--to", "aoti", "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def artefact(
    checkpoint: Path, backbone_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("aoti")
    return exported(folder, "--merge", checkpoint, "--backbone-weights", backbone_weights)


@pytest.mark.slow
def test_a_package_gives_the_unmerged_logits_at_every_batch_size(
    artefact: Path, make_tuned: Callable[..., TunedModel]
) -> None:
    engine = load_artefact(artefact)
    for batch in (1, 2, 3, 7, 33):
        expected = exact(make_tuned("rlrr"), batch)
        np.testing.assert_allclose(engine.run(images(batch)), expected, atol=2e-5, rtol=0)
    with pytest.raises(SettingError, match=r"takes float32 \[batch, 3, 16, 16\], but got"):
        engine.run(images(2)[..., :8])
    manifest = json.loads(artefact.with_name("task.pt2.json").read_text("utf-8"))
    assert manifest["verification"]["arithmetic"] == "fp32 by aoti on CPU"


@pytest.mark.slow
def test_many_threads_get_their_own_answers(artefact: Path) -> None:
    engine = load_artefact(artefact)
    alone = [engine.run(images(1 + i % 9)) for i in range(9)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: engine.run(images(1 + i % 9)), range(90)))
    assert all(np.array_equal(each, alone[i % 9]) for i, each in enumerate(together))


WITHOUT = """
import sys
sys.modules["timm"] = None
from pathlib import Path
import numpy as np
from aoft_deploy.artefacts.registry import load_artefact
engine = load_artefact(Path(sys.argv[1]))
print(engine.device, engine.run(np.zeros((2, 3, 16, 16), np.float32)).shape)
"""


@pytest.mark.slow
def test_a_package_runs_without_timm_and_without_a_compiler(artefact: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "none"}
    command = [sys.executable, "-c", WITHOUT, str(artefact)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "cpu (2, 5)\n"


@pytest.mark.slow
def test_a_package_is_inspected_without_running_it(artefact: Path) -> None:
    found = describe(artefact)
    assert found["kind"] == "AOTInductor package"
    assert (found["torch"], found["device"]) == (torch.__version__, "cpu")
    assert found["manifest"] == "matches"
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_below_fp32_the_package_computes_in_the_precision(
    precision: str,
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    make_tuned: Callable[..., TunedModel],
    tmp_path: Path,
) -> None:
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    options += ["--precision", precision, "--images", *photos, "--min-agreement", 0]
    engine = load_artefact(exported(tmp_path, *options))
    expected = exact(make_tuned("rlrr"), 7)
    error = np.abs(engine.run(images(7)) - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < {"bf16": 3e-2, "fp16": 4e-3}[precision]
    assert engine.info["precision"] == precision


def test_pixels_as_input_are_refused(make_tuned: Callable[..., TunedModel], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="`uint8` needs a graph: export to onnx"):
        spec = export_spec(16, True, HALF, HALF, {})
        exporter.export(merge(make_tuned()), tmp_path / "a.pt2", spec)


def test_a_missing_compiler_is_named(
    make_tuned: Callable[..., TunedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(
        SettingError, match="`to=aoti` needs a C\\+\\+ compiler, and this machine has"
    ):
        exporter.export(
            merge(make_tuned()), tmp_path / "a.pt2", export_spec(16, False, HALF, HALF, {})
        )
    assert list(tmp_path.iterdir()) == []


# What a package says of itself, without compiled code


def package(path: Path, target: Target = HERE) -> Path:
    """An archive with a file that stands in for the library."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("task/archive_format", "pt2")
        archive.writestr("task/data/aotinductor/model/code.so", b"no library " * 99)
    Package(INFO, target, (16, 16)).add_to(path)
    return path


def test_metadata_return_as_they_were_written(tmp_path: Path) -> None:
    found = Package.read(package(tmp_path / "a.pt2"), verified=True)
    assert (found.info, found.target, found.size) == (INFO, HERE, (16, 16))
    assert exporter.EXPORTER.device_name(tmp_path / "a.pt2", "fp32") == "CPU"


def test_a_package_for_a_gpu_gets_lanes_and_no_threads(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = package(tmp_path / "a.pt2", replace(HERE, device="cuda", capability="1.0"))
    with pytest.raises((SettingError, ArtefactError), match=r"the device 'cuda'|compute cap"):
        load_artefact(path, EngineOptions(lanes=2))
    line = refused(bench.main, path, "--threads", 2)
    assert line == "--threads is for artefacts on the CPU, but all run on a GPU."
    (served,) = opened_artefact._options(path, Settings())
    assert served.lanes == opened_artefact.GPU_LANES


def test_a_damaged_package_does_not_keep_others_from_being_timed(tmp_path: Path) -> None:
    files = [tmp_path / "damaged.pt2", package(tmp_path / "b.pt2")]
    files[0].write_bytes(b"no archive")
    given = bench.parser().parse_args([*map(str, files), "--threads", "3"])
    wanted = bench._wanted(given)
    assert [(path, options.threads) for _, path, options in wanted] == [(f, 3) for f in files]


def changed(path: Path, name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of an archive with another file in it."""
    copy = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w", compression) as new:
        for each in {*old.namelist(), name}:
            new.writestr(each, content if each == name else old.read(each))
    return copy


@pytest.mark.parametrize("name", ["task/data/aotinductor/model/code.so", "task/other.so"])
def test_changed_or_added_code_is_not_run(name: str, tmp_path: Path) -> None:
    path = changed(package(tmp_path / "a.pt2"), name, b"other code")
    with pytest.raises(ArtefactError, match="was changed after it was written, so its code is not"):
        exporter.load(path)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"format": "x"}', b"[" * 100_000])
def test_damaged_metadata_are_refused(text: bytes, tmp_path: Path) -> None:
    path = changed(package(tmp_path / "a.pt2"), "task/extra/aoft.json", text)
    for use in (exporter.load, exporter.describe):
        with pytest.raises(ArtefactError, match="is no package of the aoti exporter"):
            use(path)


@pytest.mark.parametrize("kept", [0, 100, 700])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = package(tmp_path / "a.pt2")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtefactError, match="is no package of the aoti exporter"):
        exporter.load(path)


def test_a_package_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/archive_format", "pt2")
    with pytest.raises(ArtefactError, match="is no package of the aoti exporter"):
        exporter.load(path)
    with pytest.raises(ArtefactError, match="a file in it is compressed"):
        exporter.load(changed(package(tmp_path / "b.pt2"), "task/x", b"", zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"torch": "2.0.0"}, r"was compiled for PyTorch 2\.0\.0, but this machine has 2\."),
        (
            {"processor": ("amx_of_2040",)},
            "for processors with amx_of_2040, which this one does not",
        ),
        ({"capability": "9.0"}, r"for GPUs of compute capability 9\.0, but this machine has"),
    ],
    ids=["torch", "processor", "capability"],
)
def test_a_package_for_another_machine_is_refused(
    other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtefactError, match=message):
        exporter.load(package(tmp_path / "a.pt2", replace(HERE, **other)))


def test_a_package_for_another_kind_of_device_is_refused(tmp_path: Path) -> None:
    path = package(tmp_path / "a.pt2")
    with pytest.raises(SettingError, match="was compiled for cpu, but `device` is 'cuda'"):
        exporter.load(path, EngineOptions(device="cuda"))


def test_a_library_that_does_not_load_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="PyTorch cannot load"):
        exporter.load(package(tmp_path / "a.pt2"))
