"""Fleets in ONNX Runtime whose tasks lie in a device's memory, with the CPU as the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.gpu_recording import RECORDING
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.artefacts.table_memory import HostMemory
from aoft_deploy.cli.export import main as export_main
from aoft_deploy.errors import MissingExtraError, SettingError
from aoft_deploy.fleet.fleet import Fleet
from aoft_exporters.onnx import fleet as onnx_fleet
from aoft_exporters.onnx.fleet import SPARE, DeviceMemory, OnnxFleet, Place
from aoft_exporters.onnx.sessions import library, session


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fleet]:
    """Function that opens a fleet whose tables lie in the memory of a device."""
    monkeypatch.setattr(OnnxFleet, "reserve", staticmethod(partial(DeviceMemory, device="cpu")))
    return partial(Fleet, threads=1, budget=2**22)


def images(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(count, 3, 16, 16)).astype(np.float32)


def test_writing_changes_the_bytes_of_its_place_only() -> None:
    memory, rng = DeviceMemory(10_000, "cpu"), np.random.default_rng(0)
    assert memory.size == 10_000 * (1 + SPARE)
    expected = memory._memory.numpy().copy()
    for _ in range(200):
        kind = (np.float32, np.int64)[rng.integers(2)]
        values = rng.integers(0, 255, rng.integers(0, 300)).astype(kind)
        offset = int(rng.integers(0, memory.size - values.nbytes))
        memory.write(offset, values)
        expected[offset : offset + values.nbytes] = values.view(np.uint8)
        np.testing.assert_array_equal(memory._memory.numpy(), expected)


def test_with_a_batch_travel_only_its_images_and_tasks(
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
    on_device: Callable[..., Fleet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    binding, sent, read = library().IOBinding, dict[str, int](), dict[str, int]()
    bind_cpu_input, bind_input = binding.bind_cpu_input, binding.bind_input

    def sending(self: Any, name: str, values: NDArray[Any]) -> None:
        sent[name] = sent.get(name, 0) + values.nbytes
        bind_cpu_input(self, name, values)

    def reading(self: Any, name: str, *place: Any) -> None:
        read[name] = place[-1]
        bind_input(self, name, *place)

    fleet = on_device(fleet_artefact)
    monkeypatch.setattr(binding, "bind_cpu_input", sending)
    monkeypatch.setattr(binding, "bind_input", reading)
    x = images(3)
    fleet.predict(x, ["pets", "birds", "pets"])
    assert sent == {"pixel_values": x.nbytes, "task": 3 * 8, "columns": 5 * 8}
    memory: Any = fleet._tables._memory
    start = memory._memory.data_ptr()
    assert set(read) == {"bank", "heads", "first", "count"}
    assert all(start <= place < start + memory.size for place in read.values())
    sent.clear()
    fleet.add(fleet_tasks["zürich"])
    assert sent == {"values": fleet._tables.size(5) + 2 * 8}


@pytest.mark.parametrize(
    "how",
    [["--form", "mixed"], ["--form", "folded"], ["--form", "mixed", "--precision", "fp16"]],
    ids=" ".join,
)
def test_a_device_answers_as_the_host_and_as_the_file_itself(
    how: list[str],
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    photos: list[Path],
    on_device: Callable[..., Fleet],
    tmp_path: Path,
) -> None:
    tasks = [tmp_path / f"{name}.ckpt" for name in "abc"]
    for seed, path in enumerate(tasks):
        path.write_bytes(make_checkpoint("rlrr", seed=seed).read_bytes())
    path = tmp_path / "fleet.onnx"
    options = ["--fleet", *tasks, "--backbone-weights", backbone_weights, "-o", path, *how]
    assert export_main([*map(str, options), "--images", *map(str, photos)]) == 0
    x, task = images(5), np.array([2, 0, 1, 1, 2])
    expected = load_artefact(path, EngineOptions(threads=1)).run(x, task)
    names = ["abc"[i] for i in task]
    fleets = [on_device(path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxFleet, "reserve", lambda _, size: HostMemory(size))
        fleets.append(Fleet(path, threads=1))
    found, host = (np.stack([a.logits for a in fleet.predict(x, names)]) for fleet in fleets)
    np.testing.assert_array_equal(found, host)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_a_budget_beyond_the_devices_memory_is_refused(
    fleet_artefact: Path, on_device: Callable[..., Fleet]
) -> None:
    message = r"cpu has no room for \d+ bytes of tasks \(.*\): give a smaller `budget`"
    with pytest.raises(SettingError, match=message):
        on_device(fleet_artefact, budget=2**58)


def test_without_a_budget_a_fleet_and_its_next_version_take_a_third_of_the_gpu(
    fleet_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, held = list[int](), 0

    def free_memory(index: int) -> int:
        asked.append(index)
        return 4_500_000 - held

    engine = OnnxFleet(fleet_artefact, EngineOptions(threads=1))
    monkeypatch.setattr(onnx_fleet, "free_memory", free_memory)
    monkeypatch.setattr(onnx_fleet, "taken", lambda index: held)
    for device, index in (("cuda", 0), ("cuda:3", 3)):
        engine._place = Place.of(device)
        assert engine.capacity() == 1_000_000 and asked.pop() == index
    held = 1_500_000
    assert engine.capacity() == 1_000_000
    held = 3_000_000
    assert engine.capacity() == 500_000
    assert DeviceMemory(1_000_000, "cpu").size == 1_500_000


def test_a_device_that_cannot_run_the_fleet_is_refused(fleet_artefact: Path) -> None:
    with pytest.raises(SettingError, match="Unknown device of ONNX Runtime 'gpu': give cpu, cuda"):
        Fleet(fleet_artefact, device="gpu")
    if "CUDAExecutionProvider" not in library().get_available_providers():
        with pytest.raises(MissingExtraError, match="onnxruntime-gpu"):
            Fleet(fleet_artefact, device="cuda")


def test_a_gpu_computes_one_batch_for_each_lane_at_a_time(
    fleet_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's part is played by the CPU, in the session alone."""
    on_cpu, both = partial(session, device="cpu"), threading.Barrier(2)
    lock, running, most = threading.Lock(), 0, 0

    class Counting:
        """A session that notes how many of its runs overlap; the first two wait for each other."""

        def __init__(self, opened: Any) -> None:
            self.opened, self.runs = opened, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

        def run_with_iobinding(self, binding: Any) -> None:
            nonlocal running, most
            with lock:
                self.runs, running = self.runs + 1, running + 1
                first, most = self.runs <= 2, max(most, running)
            if first:
                both.wait(20)
            self.opened.run_with_iobinding(binding)
            with lock:
                running -= 1

    def opened(model: bytes, threads: int, device: str, path: Path, *, tf32: bool) -> Counting:
        assert device == "cuda:1"
        return Counting(on_cpu(model, threads, path=path))

    monkeypatch.setattr(onnx_fleet, "session", opened)
    engine = OnnxFleet(fleet_artefact, EngineOptions(threads=1, device="cuda:1", lanes=2))
    tables, x, task = engine.tables, images(2), np.array([0, 1])
    assert tables is not None
    with ThreadPoolExecutor(6) as pool:
        found = [pool.submit(engine.run, x, task, tables) for _ in range(40)]
    expected = load_artefact(fleet_artefact, EngineOptions(threads=1)).run(x, task)
    for logits in found:
        np.testing.assert_allclose(logits.result(), expected, atol=1e-5, rtol=0)
    assert most == 2


def test_a_gpus_memory_is_used_while_no_graph_is_recorded(
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
    on_device: Callable[..., Fleet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for place, users in ((Place("cuda", 1), 1), (Place("cpu", 0), 0)):
        with place.using():
            assert RECORDING._others == users
    assert RECORDING._others == 0

    ort, using, used = library(), [False], list[str]()

    @contextmanager
    def noted(_: Place) -> Iterator[None]:
        assert not using[0]  # the lock is not reentrant
        using[0] = True
        yield
        using[0] = False

    def checked(name: str, work: Callable[..., Any], inside: bool) -> Callable[..., Any]:
        def check(*arguments: Any, **named: Any) -> Any:
            assert using[0] is inside
            used.append(name)
            return work(*arguments, **named)

        return check

    monkeypatch.setattr(Place, "using", noted)
    monkeypatch.setattr(onnx_fleet, "session", checked("open", session, False))  # takes it itself
    make = checked("allocate", ort.OrtValue.ortvalue_from_shape_and_type, True)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", staticmethod(make))
    for name in ("bind_cpu_input", "bind_input"):
        monkeypatch.setattr(ort.IOBinding, name, checked(name, getattr(ort.IOBinding, name), True))
    run = checked("run", ort.InferenceSession.run_with_iobinding, True)
    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", run)
    fleet = on_device(fleet_artefact)
    fleet.add(fleet_tasks["zürich"])
    fleet.predict(images(1), ["zürich"])
    assert set(used) == {"open", "allocate", "bind_cpu_input", "bind_input", "run"}
    assert used.count("run") == 3 * 4 + 1 and not using[0]
