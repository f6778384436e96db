"""Fixtures that run a fleet's tests with its tables in every memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fleet_memories import MEMORIES, OpenFleet, on_gpu

from aoft_deploy.artefacts.table_memory import TableMemory
from aoft_deploy.fleet.fleet import Fleet
from aoft_exporters.onnx.fleet import OnnxFleet

BUDGET = 2**24


@pytest.fixture(params=["cpu", "stand-in", pytest.param("cuda", marks=on_gpu)])
def memory_name(request: pytest.FixtureRequest) -> str:
    """A key of ``MEMORIES``."""
    return str(request.param)


@pytest.fixture
def reserve(memory_name: str) -> Callable[[int], TableMemory]:
    """Function that reserves memory for tables."""
    return MEMORIES[memory_name]


@pytest.fixture
def open_fleet(memory_name: str, monkeypatch: pytest.MonkeyPatch) -> OpenFleet:
    """Function that opens a fleet, with one thread and its tables in one of the memories."""
    if memory_name == "stand-in":
        reserve = staticmethod(MEMORIES["stand-in"])
        monkeypatch.setattr(OnnxFleet, "reserve", reserve)

    def opened(path: Path, **options: Any) -> Fleet:
        if memory_name != "cpu":  # which takes its whole budget at once
            options = {"budget": BUDGET, **options}
        device = "cuda" if memory_name == "cuda" else None
        return Fleet(path, threads=1, device=device, **options)

    return opened
