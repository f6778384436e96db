"""The engine's lanes on a stand-in for CUDA: buckets, padding, recording, and failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from standin_cuda import COPY, KERNEL, Context, Cuda, Engine, TensorRT

from aoft_deploy.errors import ArtefactError, SettingError
from aoft_exporters.tensorrt.engine import TensorrtEngine
from aoft_exporters.tensorrt.library import Library, library
from aoft_exporters.tensorrt.metadata import Metadata, Sample

CLASSES, SIDE, TASKS = 5, 4, 3
WEIGHT = np.random.default_rng(0).normal(size=(3 * SIDE * SIDE, CLASSES))
LIBRARIES = ("tensorrt", "tensorrt-rtx")


def expected(images: NDArray[Any], task: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """The logits that the stand-in's engine computes, in float64."""
    logits: NDArray[np.float64] = images.reshape(len(images), -1).astype(np.float64) @ WEIGHT
    return logits if task is None else logits + task[:, None]


def compute(pixel_values: torch.Tensor, task: torch.Tensor | None = None) -> torch.Tensor:
    ids = None if task is None else task.numpy()
    return torch.from_numpy(expected(pixel_values.numpy(), ids)).float()


def batch(rows: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng([rows, seed])
    return rng.normal(size=(rows, 3, SIDE, SIDE)).astype(np.float32)


def metadata_for(name: str, batches: tuple[int, int, int], fleet: bool = False) -> Metadata:
    inputs: dict[str, tuple[str, tuple[int, ...]]] = {
        "pixel_values": ("float32", (3, SIDE, SIDE)),
        **({"task": ("int64", ())} if fleet else {}),
    }
    sample = Sample(SIDE, False, TASKS if fleet else 0)
    return Metadata({}, inputs, CLASSES, batches, name, "1", "8.9", "", sample, "", "built")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


@pytest.fixture
def opened(cuda: Cuda) -> Callable[..., tuple[TensorrtEngine, Engine]]:
    """Function that opens an engine on the stand-in, and returns the stand-in's engine too."""

    def open_engine(
        name: str = "tensorrt",
        batches: tuple[int, int, int] = (1, 8, 32),
        lanes: int = 1,
        fleet: bool = False,
        failing: str = "",
    ) -> tuple[TensorrtEngine, Engine]:
        inner = Engine(cuda, compute, failing)
        chosen = Library(TensorRT(inner), name, "1", library("tensorrt-rtx").log)
        return TensorrtEngine(b"", metadata_for(name, batches, fleet), chosen, lanes=lanes), inner

    return open_engine


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("batches", [(1, 8, 32), (1, 1, 1), (2, 6, 7), (1, 3, 24)])
def test_every_batch_of_the_range_gets_its_own_logits(
    name: str, batches: tuple[int, int, int], opened: Callable[..., Any]
) -> None:
    engine, _ = opened(name, batches)
    for rows in [*range(1, batches[2] + 1), *range(batches[2], 0, -1)]:
        x = batch(rows)
        np.testing.assert_allclose(engine.run(x), expected(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("fleet", [False, True])
def test_sixteen_threads_get_the_logits_of_their_own_batches(
    name: str, lanes: int, fleet: bool, cuda: Cuda, opened: Callable[..., Any]
) -> None:
    cuda.recorded = partial(time.sleep, 0.002)  # a request that records meets another one
    engine, _ = opened(name, lanes=lanes, fleet=fleet)

    def check(i: int) -> None:
        x = batch(1 + i % 32, seed=i)
        task = np.arange(i, i + len(x), dtype=np.int64) % TASKS if fleet else None
        np.testing.assert_allclose(engine.run(x, task), expected(x, task), rtol=1e-6, atol=1e-6)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(check, range(256)))


@pytest.mark.parametrize("name", LIBRARIES)
def test_requests_neither_allocate_nor_record_nor_synchronise_the_device(
    name: str, cuda: Cuda, opened: Callable[..., Any]
) -> None:
    engine, inner = opened(name, lanes=2)
    contexts = inner._contexts
    assert contexts == 2 * len([1, 2, 4, 8, 16, 32])
    assert "record" in cuda.calls
    assert "synchronize" not in cuda.calls
    cuda.calls.clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: engine.run(batch(1 + i % 32)), range(96)))
    assert cuda.calls == []
    assert inner._contexts == contexts


def test_the_usual_batch_is_not_padded(opened: Callable[..., Any]) -> None:
    _, inner = opened(batches=(1, 24, 32))
    assert inner._contexts == len([1, 2, 4, 8, 16, 24, 32])


@pytest.mark.parametrize("name", LIBRARIES)
def test_padding_rows_neither_change_nor_enter_the_answers(
    name: str, opened: Callable[..., Any]
) -> None:
    engine, _ = opened(name, batches=(4, 8, 8), fleet=True)
    spoiled = np.full_like(batch(8), np.nan)
    engine.run(spoiled, np.full(8, TASKS - 1))
    for rows in (1, 3, 5, 7):
        x, task = batch(rows), np.zeros(rows, np.int64)
        logits = engine.run(x, task)
        assert logits.shape == (rows, CLASSES)
        np.testing.assert_allclose(logits, expected(x, task), rtol=1e-6, atol=1e-6)
        engine.run(spoiled, np.full(8, TASKS - 1))


def test_answers_are_not_overwritten_by_later_batches(opened: Callable[..., Any]) -> None:
    engine, _ = opened()
    first = engine.run(batch(3))
    kept = first.copy()
    engine.run(batch(3, seed=1))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("name", LIBRARIES)
def test_engines_that_load_at_once_record_one_after_the_other(
    name: str, cuda: Cuda, opened: Callable[..., Any]
) -> None:
    """The first recording lasts until another thread has tried to load an engine beside it."""
    errors = list[Exception]()
    others = list[threading.Thread]()

    def load() -> None:
        try:
            opened(name)
        except Exception as error:
            errors.append(error)

    def other_loads() -> None:
        if not others:
            others.append(threading.Thread(target=load))
            others[0].start()
            others[0].join(0.5)  # it waits for the lock, or fails

    cuda.recorded = other_loads
    opened("tensorrt")
    assert others
    others[0].join()
    assert errors == []


def test_a_running_lane_is_not_held_up_by_an_engine_that_loads(
    cuda: Cuda, opened: Callable[..., Any]
) -> None:
    engine, _ = opened()
    answered = list[NDArray[np.float32]]()

    def request() -> None:
        thread = threading.Thread(target=lambda: answered.append(engine.run(batch(5))))
        thread.start()
        thread.join()

    cuda.recorded = request
    opened()
    assert len(answered) == len([1, 2, 4, 8, 16, 32])
    for logits in answered:
        np.testing.assert_allclose(logits, expected(batch(5)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("create_execution_context", "cannot create an execution context"),
        ("set_tensor_address", "cannot set the address of pixel_values"),
        ("set_input_shape", "cannot set the shape of pixel_values for a batch of 1 "),
        ("execute_async_v3", "cannot run the engine"),
    ],
)
def test_a_call_of_tensorrt_that_fails_is_an_error(
    call: str, message: str, name: str, opened: Callable[..., Any]
) -> None:
    with pytest.raises(ArtefactError, match=message) as error:
        opened(name, failing=call)
    assert len(str(error.value).splitlines()) == 1


def test_a_plan_that_cannot_be_read_is_an_error(cuda: Cuda) -> None:
    chosen = Library(TensorRT(None), "tensorrt", "1", library("tensorrt-rtx").log)
    with pytest.raises(ArtefactError, match="TensorRT cannot load the engine"):
        TensorrtEngine(b"", metadata_for("tensorrt", (1, 1, 1)), chosen)


def test_too_little_memory_for_the_lanes_is_one_sentence(
    cuda: Cuda, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*size: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(SettingError, match=r"for 9 times a batch of 32: choose fewer `lanes`"):
        opened(lanes=9)


def test_the_seconds_of_the_device_are_those_of_copies_and_kernels(
    opened: Callable[..., Any],
) -> None:
    engine, _ = opened()
    assert engine.device_seconds(batch(3)) == pytest.approx((2 * COPY + KERNEL) / 1e3)
    fleet, _ = opened(fleet=True)
    seconds = fleet.device_seconds(batch(3), np.zeros(3, np.int64))
    assert seconds == pytest.approx((3 * COPY + KERNEL) / 1e3)


def test_the_stand_ins_have_no_method_that_tensorrt_lacks() -> None:
    trt = library("tensorrt-rtx").module
    pairs = {Context: trt.IExecutionContext, Engine: trt.ICudaEngine}
    for standin, real in pairs.items():
        names = [name for name in vars(standin) if not name.startswith("_")]
        assert names and not [name for name in names if not hasattr(real, name)]
    options = vars(Engine.create_runtime_config(None))  # type: ignore[arg-type]
    assert not [name for name in options if not hasattr(trt.IRuntimeConfig, name)]
