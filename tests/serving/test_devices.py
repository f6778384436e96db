"""One server with replicas on two devices, which are stand-ins for GPUs: stand_in_gpu.py."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import subprocess
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import stand_in_gpu
from stub_drivers import UUIDS, build_drivers

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.errors import ArtefactError
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.serving.repository import opened_artefact
from aoft_deploy.serving.settings import Settings
from aoft_deploy.serving.telemetry import gpus

triton: Any = importlib.import_module("tritonclient.http")  # has no type annotations
IMAGES = np.random.default_rng(8).normal(size=(3, 3, 16, 16)).astype(np.float32)
TOKEN = "a token of more than sixteen bytes"
DEVICES = ["cuda:0", "cuda:1"]
LANES = 2
NOTHING = str(uuid.UUID(int=0))
HAS_COMPILER = shutil.which("gcc") is not None


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Declare the stand-in and the stub drivers to servers; yields the stand-in's log."""
    folder = tmp_path_factory.mktemp("stand-in")
    support = Path(stand_in_gpu.__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAND_IN_LOG", str(folder / "log"))
        patch.setenv("STAND_IN_BATCHES", str(len(DEVICES) * LANES))
        given = [path for path in (os.environ.get("PYTHONPATH"),) if path]
        paths = [str(stand_in_gpu.install(folder)), str(support), *given]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        drivers = tmp_path_factory.mktemp("drivers")
        patch.setenv("LD_LIBRARY_PATH", str(build_drivers(drivers) if HAS_COMPILER else drivers))
        yield folder / "log"


@pytest.fixture(scope="module")
def files(
    artefact: Path, fleet_artefact: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A merged model and a fleet as artefacts of the stand-in."""
    folder = tmp_path_factory.mktemp("artefacts")
    found = {name: folder / f"{name}.standin" for name in ("task", "fleet")}
    shutil.copy(artefact, found["task"])
    shutil.copy(fleet_artefact, found["fleet"])
    return found


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, fleet_tasks: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "token").write_text(TOKEN)
    shutil.copy(fleet_tasks["zürich"], folder / "new.ckpt")
    return folder


@pytest.fixture(scope="module")
def served(
    serve: Callable[..., Any], environment: Path, files: dict[str, Path], repository: Path
) -> Any:
    token = ["--admin-token-file", repository / "token"]
    options = ["--follow", "0", "--max-batch", "1", *token, "--repository", repository]
    return serve(*files.values(), *options, "--device", *DEVICES)


@pytest.fixture(scope="module")
def expected(
    artefact: Path, fleet_artefact: Path, fleet_tasks: dict[str, Path]
) -> dict[str, np.ndarray[Any, Any]]:
    """Logits of the CPU by model."""
    fleet = Fleet(fleet_artefact, threads=1)
    fleet.add(fleet_tasks["zürich"], "new")
    found = {
        name: np.stack([a.logits for a in fleet.predict(IMAGES, [name] * len(IMAGES))])
        for name in fleet.tasks
    }
    return {"task": load_artefact(artefact).run(IMAGES), **found}


def runs(log: Path) -> Counter[tuple[str, str]]:
    """Number of batches so far by kind of engine and device."""
    lines = [line.split() for line in log.read_text().splitlines()]
    return Counter((words[1], words[2]) for words in lines if words[0] == "run")


def change(served: Any, verb: str, name: str) -> int:
    """Load or unload a model; return the status."""
    address = f"/v2/repository/models/{quote(name)}/{verb}"
    status: int = served.ask("POST", address, b"", {"Authorization": f"Bearer {TOKEN}"})[0]
    return status


def ask_at_once(served: Any, model: str, images: Any, times: int) -> list[Any]:
    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(lambda _: served.logits(model, images), range(times)))


def test_every_device_has_a_warm_replica_of_every_model(served: Any, environment: Path) -> None:
    assert served.event("ready")["devices"] == DEVICES
    lines = environment.read_text().splitlines()
    loads = [line for line in lines if line.startswith("load")]
    for device in DEVICES:
        assert f"load merged task.standin {device} lanes={LANES}" in loads
        assert f"load fleet fleet.standin {device} lanes={LANES}" in loads
        for kind in ("merged", "fleet"):
            assert runs(environment)[kind, device] >= LANES  # all at once, or the engine refuses


@pytest.mark.parametrize("model", ["task", "pets"])
def test_all_lanes_of_all_devices_run_at_once(
    served: Any, environment: Path, model: str, expected: dict[str, Any]
) -> None:
    """The stand-in answers these images only while as many batches run as there are lanes."""
    images = np.full((1, 3, 16, 16), stand_in_gpu.MEET, np.float32)
    before, kind = runs(environment), "merged" if model == "task" else "fleet"
    answers = ask_at_once(served, model, images, len(DEVICES) * LANES)
    for answer in answers:
        np.testing.assert_array_equal(answer, answers[0])
    counts = runs(environment) - before
    assert counts == dict.fromkeys([(kind, device) for device in DEVICES], LANES)


@pytest.mark.parametrize("model", ["task", "pets", "birds", "new"])
def test_all_replicas_answer_like_the_cpu(
    served: Any, environment: Path, model: str, expected: dict[str, Any]
) -> None:
    before = runs(environment)
    for logits in ask_at_once(served, model, IMAGES, 12):
        assert np.abs(logits - expected[model]).max() < 1e-5
    assert sum((runs(environment) - before).values()) == 12 * len(IMAGES)


def test_clients_of_triton_see_the_devices(served: Any, expected: dict[str, Any]) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
        for name in ("task", "pets"):
            groups = client.get_model_config(name)["instance_group"]
            assert groups == [
                {"name": device, "kind": "KIND_GPU", "count": LANES, "gpus": [i]}
                for i, device in enumerate(DEVICES)
            ]
            tensor = triton.InferInput("pixel_values", IMAGES.shape, "FP32")
            tensor.set_data_from_numpy(IMAGES)
            assert (
                np.abs(client.infer(name, [tensor]).as_numpy("logits") - expected[name]).max()
                < 1e-5
            )


def test_curl_sees_the_same(served: Any) -> None:
    address = f"http://127.0.0.1:{served.port}/v2/models/task/config"
    done = subprocess.run(["curl", "-sf", address], capture_output=True, check=True)
    assert [group["name"] for group in json.loads(done.stdout)["instance_group"]] == DEVICES


def test_tasks_come_to_and_leave_all_replicas(
    served: Any, repository: Path, fleet_tasks: dict[str, Path], expected: dict[str, Any]
) -> None:
    assert change(served, "unload", "new") == 200
    for _ in range(2 * len(DEVICES)):
        assert served.refused("POST", "/v2/models/new/infer", b"{}")[0] == 404
    assert change(served, "unload", "new") == 404
    assert change(served, "load", "new") == 200
    for logits in ask_at_once(served, "new", IMAGES, 12):
        assert np.abs(logits - expected["new"]).max() < 1e-5
    lines = served.ask("GET", "/metrics")[2].decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    for device in DEVICES:
        assert values[f'aoft_resident{{artefact="fleet",device="{device}",key="tasks"}}'] == "3"
    assert values['aoft_engine_workers{artefact="fleet"}'] == str(len(DEVICES) * LANES)


@pytest.mark.skipif(not HAS_COMPILER, reason="gcc compiles the stub drivers")
def test_metrics_have_the_figures_of_the_gpus_in_use(served: Any) -> None:
    lines = served.ask("GET", "/metrics")[2].decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    found = {name: float(value) for name, value in values.items() if "gpu" in name}
    zero, one = UUIDS
    assert found == {
        f'nv_gpu_utilization{{gpu_uuid="{zero}"}}': 0.37,  # the stub's other GPU has none
        f'nv_gpu_memory_total_bytes{{gpu_uuid="{zero}"}}': 80 * 2**30,
        f'nv_gpu_memory_total_bytes{{gpu_uuid="{one}"}}': 80 * 2**30,
        f'nv_gpu_memory_used_bytes{{gpu_uuid="{zero}"}}': 2e9,
        f'nv_gpu_memory_used_bytes{{gpu_uuid="{one}"}}': 1e9,
        f'nv_gpu_power_usage{{gpu_uuid="{zero}"}}': 312.5,
        f'nv_gpu_power_usage{{gpu_uuid="{one}"}}': 312.5,
        f'aoft_gpu_info{{device="cuda:0",gpu_uuid="{zero}",name="NVIDIA Stub B"}}': 1,
        f'aoft_gpu_info{{device="cuda:1",gpu_uuid="{one}",name="NVIDIA Stub A"}}': 1,
    }


def test_without_a_driver_the_figures_are_left_out_and_the_reason_is_logged_once(
    serve: Callable[..., Any],
    environment: Path,
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH")
    server = serve(files["task"], "--follow", "0", "--max-batch", "1", "--device", "cuda:1")
    for _ in range(3):
        status, _, text = server.ask("GET", "/metrics")
        assert status == 200 and b"gpu" not in text and b"aoft_ready 1" in text
    (event,) = [event for event in server.events if event["event"] == "no figures of GPUs"]
    assert "libcuda.so.1" in event["reason"]
    server.check()
    assert server.stop() == 0


def test_lanes_are_as_many_as_are_asked_for(
    serve: Callable[..., Any], environment: Path, files: dict[str, Path]
) -> None:
    server = serve(
        files["task"], "--follow", "0", "--max-batch", "2", "--device", "cuda", "--lanes", "3"
    )
    assert server.event("ready")["devices"] == ["cuda:0"]
    assert "load merged task.standin cuda:0 lanes=3" in environment.read_text()
    assert server.stop() == 0


class Failing:
    """An engine that fails in every run on one device."""

    def __init__(self, engine: Any, device: str) -> None:
        self.info, self.takes_pixels, self.takes_tasks = engine.info, False, False
        self.device = device
        self._run = engine.run

    def run(self, images: Any) -> Any:
        if self.device == "cuda:1":
            raise RuntimeError("out of memory")
        return self._run(images)


def test_a_replica_that_does_not_run_is_named(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, options: EngineOptions) -> Any:
        return Failing(load_artefact(path), str(options.device))

    monkeypatch.setattr(opened_artefact, "load_artefact", load)
    settings = Settings(device=("cuda:0", "cuda:1"), threads=1)
    with pytest.raises(ArtefactError, match=r"on cuda:1 does not run \(out of memory\)"):
        opened_artefact.open_artefact("task", artefact, settings)


def test_replicas_are_of_one_version_of_the_file(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "task.onnx"
    shutil.copy(artefact, path)

    def load(path: Path, options: EngineOptions) -> Any:
        engine = Failing(load_artefact(path), "cuda:0")
        shutil.copy(artefact, path)  # another one, for the next replica
        return engine

    monkeypatch.setattr(opened_artefact, "load_artefact", load)
    settings = Settings(device=("cuda:0", "cuda:1"), threads=1)
    with pytest.raises(ArtefactError, match="was changed while it was opened"):
        opened_artefact.open_artefact("task", path, settings)


def test_a_driver_that_does_not_answer_is_asked_once_and_delays_no_scrape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers, calls = threading.Event(), list[list[str]]()
    gpu = gpus.Gpu("cuda:0", "GPU-1", "GPU", 2, 1, 0.5, 100.0)

    def read(devices: list[str]) -> list[gpus.Gpu]:
        calls.append(devices)
        assert answers.wait(60)
        return [gpu]

    async def scrape() -> None:
        subject = gpus.Gpus()
        assert await subject.read(["cpu"]) == []
        for _ in range(3):
            assert await subject.read(["cpu", "cuda:0"]) == []
        assert calls == [["cuda:0"]]
        answers.set()
        while await subject.read(["cuda:0"]) != [gpu]:
            await asyncio.sleep(0.001)

    monkeypatch.setattr(gpus, "SECONDS", 0.01)
    monkeypatch.setattr(gpus, "_read", read)
    asyncio.run(scrape())


def test_a_part_of_a_gpu_is_found_by_its_own_uuid() -> None:
    """Stand-ins of the libraries: with MIG, NVML knows a CUDA device as MIG-…, without a load."""
    asked = []

    def find(name: bytes, gpu: Any) -> int:
        asked.append(name)
        return 0 if name.startswith(b"MIG-") else 6

    cuda = SimpleNamespace(cuDeviceGet=lambda *_: 0, cuDeviceGetUuid_v2=lambda *_: 0)
    nvml = SimpleNamespace(
        nvmlDeviceGetHandleByUUID=find,
        nvmlDeviceGetName=lambda *_: 0,
        nvmlDeviceGetMemoryInfo=lambda *_: 0,
        nvmlDeviceGetUtilizationRates=lambda *_: 3,
        nvmlDeviceGetPowerUsage=lambda *_: 3,
    )
    found = gpus._figures(cuda, nvml, "cuda:0")
    assert [name.decode() for name in asked] == [f"GPU-{NOTHING}", f"MIG-{NOTHING}"]
    assert (found.uuid, found.utilization, found.power) == (f"MIG-{NOTHING}", None, None)
    text = [line for lines in gpus.gpu_lines([found]) for line in lines]
    names = {line.partition("{")[0] for line in text if "{" in line}
    assert names == {"nv_gpu_memory_total_bytes", "nv_gpu_memory_used_bytes", "aoft_gpu_info"}


@pytest.mark.parametrize(
    ("device", "lanes"), [(None, 1), ("cpu", 1), ("mps", 1), ("cuda", 2), ("cuda:1", 2)]
)
def test_only_gpus_of_nvidia_have_several_lanes_by_default(
    device: str | None, lanes: int, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def load(path: Path, options: EngineOptions) -> Any:
        given.append(options)
        return Failing(load_artefact(path), "cpu")

    monkeypatch.setattr(opened_artefact, "load_artefact", load)
    settings = Settings(device=() if device is None else (device,), threads=1)
    opened = opened_artefact.open_artefact("task", artefact, settings)
    assert given == [EngineOptions(None, 1, device, lanes)]
    assert opened.batcher.workers == lanes and opened.devices == {"cpu": lanes}
