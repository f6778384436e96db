"""The cached export of a fleet."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aoft_demo.tasks.fleet_export import export_cached
from aoft_deploy.artefacts.manifest import manifest_path


def test_demos_that_start_at_once_export_a_fleet_once(
    fleet_tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AOFT_CACHE_DIR", str(tmp_path))
    exported: list[Path] = []
    together = threading.Barrier(2)

    def export(checkpoints: Any, output: Path, **options: Any) -> None:
        try:
            together.wait(1)  # a second export that runs at the same time
        except threading.BrokenBarrierError:
            exported.append(output)
        output.write_bytes(b"")
        manifest_path(output).write_bytes(b"")

    monkeypatch.setattr("aoft_deploy.export.fleet.export_fleet", export)
    start = threading.Barrier(2)

    def demo(number: int) -> Path:
        start.wait()
        return export_cached([fleet_tasks["pets"]], tmp_path, None)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(demo, range(2))
    assert one == other and exported == [one]


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The fleets that are exported from now on; each is an empty file with a manifest."""
    monkeypatch.setenv("AOFT_CACHE_DIR", str(tmp_path / "cache"))
    done: list[Path] = []

    def export(checkpoints: Any, output: Path, **options: Any) -> None:
        done.append(output)
        output.write_bytes(b"")
        manifest_path(output).write_bytes(b"")

    monkeypatch.setattr("aoft_deploy.export.fleet.export_fleet", export)
    return done


def test_whatever_changes_the_fleet_changes_its_file(
    tmp_path: Path, exported: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, renamed, other, weights = (tmp_path / f"{name}.ckpt" for name in "abcw")
    for path, content in ((one, b"1"), (renamed, b"1"), (other, b"2"), (weights, b"3")):
        path.write_bytes(content)
    for checkpoints, backbone in (
        ([one], None),
        ([renamed], None),
        ([other], None),
        ([one, other], None),
        ([other, one], None),  # the order of the tasks on the page
        ([one], weights),
    ):
        for _ in range(2):  # the second one finds the first
            export_cached(checkpoints, tmp_path, backbone)
    weights.write_bytes(b"4")
    export_cached([one], tmp_path, weights)
    monkeypatch.setattr("aoft_demo.tasks.fleet_export.version", lambda package: f"{package} 9.9")
    export_cached([one], tmp_path, None)
    assert len(exported) == len(set(exported)) == 8


def test_a_part_of_a_fleet_is_exported_again(tmp_path: Path, exported: list[Path]) -> None:
    """A demo that is killed during an export leaves a file without its manifest."""
    (tmp_path / "a.ckpt").write_bytes(b"1")
    artefact = export_cached([tmp_path / "a.ckpt"], tmp_path, None)
    for part in (manifest_path(artefact), artefact):
        part.unlink()
        assert export_cached([tmp_path / "a.ckpt"], tmp_path, None) == artefact
    assert exported == [artefact] * 3
