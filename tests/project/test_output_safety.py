"""Output files are complete and on disk, or absent, also after SIGKILL or without permissions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forked import ForkedPython, run_python

from aoft_deploy.artefacts.manifest import manifest_path
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.checkpoint import save as save_checkpoint
from aoft_deploy.cli.export import main
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ArtefactError, OutputError
from aoft_deploy.export.merged import export_merged
from aoft_deploy.files import file_digest, replacing, write_json
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.fleet.opening import open_store
from aoft_deploy.fleet.packed_tasks import pack
from aoft_deploy.tuning.tuned_model import TunedModel


class Disk:
    """Records calls of fsync and rename; a file must be synced before it is renamed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[int, bytes] = {}
        self.renamed: list[str] = []
        self._sync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(os, "rename", self.replace)

    def fsync(self, file: int) -> None:
        self._sync(file)
        status = os.fstat(file)
        self.synced[status.st_ino] = os.pread(file, status.st_size, 0)

    def replace(self, source: Any, target: Any) -> None:
        source = Path(source)
        for path in source.rglob("*") if source.is_dir() else [source]:
            if path.is_file():
                assert self.synced.get(path.stat().st_ino) == path.read_bytes(), path
        self._replace(source, target)
        self.renamed.append(Path(target).name)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_file_is_synced_before_it_is_renamed(tmp_path: Path, disk: Disk) -> None:
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
    write_json(tmp_path / "b.json", [1])
    assert disk.renamed == ["a", "b.json"]


def test_a_rename_without_a_sync_would_be_noticed(tmp_path: Path, disk: Disk) -> None:
    (tmp_path / "a").write_text("new")
    with pytest.raises(AssertionError):
        (tmp_path / "a").replace(tmp_path / "b")


@pytest.mark.parametrize("to", ["onnx", "timm", "peft", "triton"])
def test_artefact_and_manifest_are_synced_before_they_are_renamed(
    to: str,
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
    disk: Disk,
) -> None:
    suffix = {"onnx": ".onnx", "timm": ".safetensors"}.get(to, "")
    output = tmp_path / f"task{suffix}"
    export_merged(
        make_checkpoint("lora"), output, to=to, backbone=BackboneSource(weights=backbone_weights)
    )
    assert disk.renamed[-2:] == [f"{output.name}.json", output.name]


def test_checkpoints_and_packed_tasks_are_synced_before_they_are_renamed(
    make_tuned: Callable[..., TunedModel],
    classes: tuple[str, ...],
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
    tmp_path: Path,
    disk: Disk,
) -> None:
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(16, crop_pct=1.0, mean=half, std=half)
    save_checkpoint(make_tuned(), tmp_path / "a", classes=classes, preprocessing=preprocessing)
    kind = Fleet(fleet_artefact, threads=1).kind
    pack(open_store(fleet_tasks["pets"].parent, kind), tmp_path / "tasks.pack")
    assert disk.renamed == ["a", "tasks.pack"]


KILLED = """
import os, pathlib, signal, sys
from aoft_deploy.cli.export import main
from aoft_deploy.export import merged

moment, renames = sys.argv.pop(1), []
open_, replace = pathlib.Path.open, pathlib.Path.replace

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

class HalfWritten:
    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        kill()

def opened(path, mode="r", *args, **options):
    file = open_(path, mode, *args, **options)
    return HalfWritten(file) if mode == "wb" and path.suffix == ".onnx" else file

def renamed(path, target):
    if path.name.startswith("task"):
        renames.append(path)
        if len(renames) == {"manifest": 1, "artefact": 2}.get(moment):
            kill()
    return replace(path, target)

if moment == "writing":
    pathlib.Path.open = opened
if moment == "verifying":
    merged.verify = kill
pathlib.Path.replace = renamed
sys.exit(main(sys.argv[1:]))
"""


def leftovers(folder: Path) -> set[str]:
    """Names of the files that are not temporary."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".aoft-")}


def matches_manifest(artefact: Path) -> bool:
    """Whether the manifest is that of the artefact."""
    manifest = json.loads(manifest_path(artefact).read_text("utf-8"))
    return bool(manifest["sha256"] == file_digest(artefact))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "older"),
    [("writing", False), ("verifying", True), ("manifest", True), ("artefact", True)],
)
def test_a_killed_export_leaves_no_partial_artefact(
    moment: str,
    older: bool,
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    output, names = tmp_path / "task.onnx", {"task.onnx", "task.onnx.json"}
    if older:
        export_merged(
            make_checkpoint("linear"), output, backbone=BackboneSource(weights=backbone_weights)
        )
    before = output.read_bytes() if older else None
    options = ["--merge", make_checkpoint("rlrr"), "--backbone-weights", backbone_weights]
    words = [str(word) for word in (*options, "-o", output, "--overwrite")]
    process = run_python("-c", KILLED, moment, *words, timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".aoft-*"))
    assert (output.read_bytes() if output.exists() else None) == before
    if moment == "artefact":  # the old artefact has the new manifest, and is refused
        assert leftovers(tmp_path) == names
        with pytest.raises(ArtefactError, match="was changed after its manifest"):
            load_artefact(output)
    else:
        assert leftovers(tmp_path) == (names if older else set())
        assert not older or matches_manifest(output)
    assert main(words) == 0
    assert leftovers(tmp_path) == names
    assert matches_manifest(output) and load_artefact(output).info["method"] == "rlrr"


@pytest.mark.slow
def test_an_export_killed_by_another_process_leaves_only_temporary_files(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "task.onnx"
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "-o", output]
    process = ForkedPython("-m", "aoft_deploy.cli.export", *options)
    end = time.monotonic() + 120
    while not list(tmp_path.glob(".aoft-*")) and time.monotonic() < end:
        assert process.returncode is None
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    assert leftovers(tmp_path) == set()
    assert main([str(word) for word in options]) == 0
    assert matches_manifest(output)


NOBODY = 65534


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Context manager: run as an ordinary user, since root ignores permissions."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def readable(checkpoint: Path, backbone_weights: Path) -> Iterator[Path]:
    """A folder with inputs that any user may read, and in it a folder that nobody may write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copyfile(checkpoint, folder / "model.ckpt")
        shutil.copyfile(backbone_weights, folder / "weights.safetensors")
        locked = folder / "locked"
        locked.mkdir()
        for suffix in (".safetensors", ".onnx"):
            (locked / f"old{suffix}").write_text("old")
        if os.geteuid() == 0:
            os.chown(locked, NOBODY, NOBODY)
        locked.chmod(0o555)
        yield folder
        locked.chmod(0o755)


@pytest.mark.parametrize("name", ["new", "old"])
@pytest.mark.parametrize("to", ["onnx", "timm"])
def test_an_unwritable_folder_is_reported_and_unchanged(
    to: str, name: str, readable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locked, suffix = readable / "locked", ".onnx" if to == "onnx" else ".safetensors"
    options = ["--merge", readable / "model.ckpt", "--to", to]
    options += ["--backbone-weights", readable / "weights.safetensors", "-o"]
    words = [str(word) for word in options]
    assert main([*words, str(tmp_path / f"free{suffix}")]) == 0
    capsys.readouterr()
    with bound_by_permissions():
        with pytest.raises(PermissionError):
            (locked / "anything").touch()
        code = main([*words, str(locked / f"{name}{suffix}"), "--overwrite"])
    assert code == 1
    line = capsys.readouterr().err
    assert line == f"error: Cannot write into {locked}: Permission denied.\n"
    assert sorted(path.name for path in locked.iterdir()) == ["old.onnx", "old.safetensors"]
    assert {path.read_text() for path in locked.iterdir()} == {"old"}


def test_a_checkpoint_is_not_written_into_an_unwritable_folder(
    make_tuned: Callable[..., TunedModel], readable: Path
) -> None:
    task = read_checkpoint(readable / "model.ckpt")
    tuned, path = make_tuned(), readable / "locked" / "model.ckpt"
    with pytest.raises(OutputError, match=r"Cannot write into .*locked: Permission denied"):
        with bound_by_permissions():
            save_checkpoint(tuned, path, classes=task.classes, preprocessing=task.preprocessing)
    assert not path.exists()
