"""The PyTorch engine: its precision, and its lanes on a GPU, with stand-ins for streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from devices import no_gpu
from numpy.typing import NDArray
from torch import Tensor, backends, nn

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.errors import SettingError
from aoft_exporters.pytorch.engine import Lanes, TorchEngine, torch_device

CPU = torch.device("cpu")


def images(batch: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(batch, 3, 4, 4)).astype(np.float32)


def means(x: Tensor) -> Tensor:
    """Stands in for a model: a logit for each channel."""
    return x.mean((2, 3))


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
def test_products_of_a_run_are_in_float32_whatever_the_process_allows(matmul: str) -> None:
    seen: list[list[str]] = []

    def model(x: Tensor) -> Tensor:
        switches: tuple[Any, ...] = (
            backends.cuda.matmul,
            backends.cudnn.conv,  # type: ignore[attr-defined]
            backends.mkldnn.matmul,  # type: ignore[attr-defined]
        )
        seen.append([switch.fp32_precision for switch in switches])
        return means(x)

    engine = TorchEngine(model, {}, EngineOptions(), CPU)
    torch.set_float32_matmul_precision(matmul)
    try:
        engine.run(images(2))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [["ieee"] * 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_computes_in_its_own_type(dtype: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).to(getattr(torch, dtype)).eval()
    engine = TorchEngine(model, {}, EngineOptions(), CPU, dtype)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images(3)).to(getattr(torch, dtype)))
    logits = engine.run(images(3))
    assert logits.dtype == np.float32
    assert torch.equal(torch.from_numpy(logits), expected.float())


def test_a_device_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingError, match="PyTorch cannot use the device 'cuda:99'"):
        torch_device(EngineOptions(device="cuda:99"))
    with pytest.raises(SettingError, match="PyTorch cannot use the device 'tpu'"):
        torch_device(EngineOptions(device="tpu"))


class _Stream:
    """Stands in for a CUDA stream: what is queued is done when it is synchronised."""

    current = threading.local()

    def __init__(self, device: torch.device) -> None:
        self.users, self.most, self.queued, self.runs = 0, 0, 0, 0

    def synchronize(self) -> None:
        self.queued = 0
        self.users -= 1


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[_Stream]:
    """Replace CUDA's streams and page-locked memory; return the streams that are made."""
    made: list[_Stream] = []

    def stream(device: torch.device) -> _Stream:
        made.append(_Stream(device))
        return made[-1]

    @contextmanager
    def use(chosen: _Stream) -> Iterator[None]:
        chosen.users += 1
        chosen.most, chosen.runs = max(chosen.most, chosen.users), chosen.runs + 1
        _Stream.current.stream = chosen
        yield
        _Stream.current.stream = None

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.clone())
    return made


@pytest.mark.parametrize("lanes", [1, 3])
def test_each_lane_computes_one_batch_at_a_time_in_its_own_stream(
    lanes: int, streams: list[_Stream]
) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def compute(x: Tensor) -> Tensor:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        assert _Stream.current.stream is not None
        _Stream.current.stream.queued += 1
        time.sleep(0.005)
        with lock:
            inside -= 1
        return means(x)

    engine = Lanes(compute, CPU, lanes)
    batches = [torch.from_numpy(images(1 + i % 5, i)) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(engine.run, batches))
    for batch, answer in zip(batches, answers, strict=True):
        np.testing.assert_array_equal(answer, means(batch).numpy())
    assert len(streams) == lanes
    assert most == lanes
    assert [(stream.most, stream.queued, stream.users) for stream in streams] == [(1, 0, 0)] * lanes
    assert sum(stream.runs for stream in streams) == 40


def test_a_lane_is_free_again_after_an_error(streams: list[_Stream]) -> None:
    def compute(x: Tensor) -> Tensor:
        if len(x) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return means(x)

    engine = Lanes(compute, CPU, 1)
    with pytest.raises(torch.OutOfMemoryError):
        engine.run(torch.from_numpy(images(2)))
    assert engine.run(torch.from_numpy(images(1))).shape == (1, 3)


@pytest.mark.gpu
@no_gpu
def test_threads_get_their_own_answers_from_a_gpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    with torch.inference_mode():
        expected = [
            model.double()(torch.from_numpy(images(1 + i % 9, i)).double()) for i in range(64)
        ]
    options = EngineOptions(device="cuda", lanes=3)
    device = torch_device(options)
    engine = TorchEngine(model.float().to(device).eval(), {}, options, device)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(engine.run, [images(1 + i % 9, i) for i in range(64)]))
    for answer, exact in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer, exact, atol=2e-6)
