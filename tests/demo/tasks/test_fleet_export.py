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
