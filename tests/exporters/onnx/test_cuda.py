"""ONNX Runtime's CUDA provider: on the host, where it computes nothing but does all else; on a GPU.

See ``cuda_on_host``.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cuda_on_host import CudaOnHost, cuda_on_host
from onnx import helper, numpy_helper
from specs import export_spec
from torch import nn

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_exporters.onnx import exporter

BUCKETS = 7  # 1, 2, 4 … 64
HOST_DRIVER = Path(__file__).parents[2] / "support" / "driver_on_host.c"

OPEN = """
import sys
from pathlib import Path
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.errors import AoftError
from aoft_exporters.onnx.exporter import load

def opened(path, device="cuda", lanes=1):
    return load(Path(path), EngineOptions(device=device, lanes=lanes))
"""
EVENTS = """
import ctypes

def events():
    cuda = ctypes.CDLL("libcudart.so.13")
    cuda.host_events.restype = ctypes.c_char_p
    return cuda.host_events().decode()
"""
REFUSED = (
    OPEN
    + """
try:
    opened(*sys.argv[1:])
except AoftError as error:
    print(type(error).__name__, error, sep=": ")
"""
)


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> CudaOnHost:
    return cuda_on_host(tmp_path_factory.mktemp("cuda"))


def output(ended: subprocess.CompletedProcess[str]) -> str:
    """What a process printed; it must end well and say nothing else."""
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def test_the_provider_and_its_libraries_load_without_torch(
    cuda: CudaOnHost, artefact: Path
) -> None:
    """With NVIDIA's libraries and a driver that has no device."""
    loaded = """
print(sorted({"torch", "onnx"} & set(sys.modules)))
maps = Path("/proc/self/maps").read_text()
print([name for name in ("libonnxruntime_providers_cuda.so", "libcublasLt.so.13", "libcudnn.so.9")
       if name not in maps])
"""
    if importlib.util.find_spec("nvidia") is None:
        pytest.skip("this torch brings no CUDA libraries")
    sentence, heavy, missing = output(
        cuda.run(REFUSED + loaded, artefact, device=False)
    ).splitlines()
    assert sentence == (
        "SettingError: ONNX Runtime could not start on cuda (CUDA failure 100: no CUDA-capable "
        "device is detected): check the number of the GPU, its driver and, with pip check, the "
        'CUDA libraries, or choose `device="cpu"`.'
    )
    assert (heavy, missing) == ("[]", "[]")


def test_a_missing_driver_library_or_device_is_one_sentence(
    cuda: CudaOnHost, artefact: Path
) -> None:
    sentence = output(cuda.run(REFUSED, artefact, driver=False))
    assert sentence.startswith("SettingError: Device 'cuda' needs NVIDIA's driver, which cannot")
    hidden = "from aoft_exporters.onnx import cuda_libraries as c; c._packages = lambda: ();"
    sentence = output(cuda.run(hidden + REFUSED, artefact, device=False))
    assert "could not start on cuda (libcublasLt.so.13: cannot open shared" in sentence
    sentence = output(cuda.run(REFUSED, artefact, "cuda:1"))
    assert "could not start on cuda:1 (Invalid device ID: 1, must be between 0" in sentence


def test_a_gpu_is_found_by_the_driver_alone(cuda: CudaOnHost, tmp_path: Path) -> None:
    code = """
from pathlib import Path
from aoft_exporters.onnx.sessions import usable_gpu
print(usable_gpu(), "cudart" in Path("/proc/self/maps").read_text())
"""
    driver = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", HOST_DRIVER, "-o", driver], check=True)
    with_device = replace(cuda, driver=tmp_path)
    assert output(with_device.run(code)) == "GPU 0 of the host False\n"
    assert output(cuda.run(code)) == output(cuda.run(code, driver=False)) == "None False\n"


def test_each_lane_records_all_sizes_and_replays_them_in_its_thread(
    cuda: CudaOnHost, artefact: Path
) -> None:
    """What CUDA forbids beside a recording is done by neither lane, nor while batches run."""
    code = """
import threading, numpy as np
engine = opened(sys.argv[1], lanes=2)
x = np.zeros((70, 3, 16, 16), np.float32)
loaded = events()
def work():
    for size in (1, 3, 64, 70):
        assert engine.run(x[:size]).shape == (size, 5)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(loaded, events()[len(loaded):], engine.info["placement"], engine.device, sep="----")
"""
    loaded, later, placement, device = output(cuda.run(OPEN + EVENTS + code, artefact)).split(
        "----"
    )
    assert "forbidden" not in loaded + later
    records = Counter(line for line in loaded.splitlines() if line.startswith("record"))
    assert sorted(records.values()) == [BUCKETS, BUCKETS]
    threads = {line.split()[1] for line in records}
    assert "record" not in later and "cudaMalloc" not in later
    replays = [line.split()[1:] for line in later.splitlines() if line.startswith("replay")]
    recorded = {tuple(x.split()[1:]) for x in loaded.splitlines() if x.startswith("replay")}
    assert len(replays) == 4 * 5 and {tuple(replay) for replay in replays} <= recorded
    assert {thread for thread, _ in replays} <= threads
    nodes = json.loads(placement)
    assert nodes["CPUExecutionProvider"] == {"Concat": 1}  # of the shape of the class token
    assert nodes["CUDAExecutionProvider"].items() >= {"MatMul": 4, "Attention": 1}.items()
    assert device.strip() == "cuda:0"


def test_an_engine_that_is_loaded_and_one_that_is_dropped_do_not_disturb_each_other(
    cuda: CudaOnHost, artefact: Path, pixel_artefact: Path
) -> None:
    code = """
import threading, numpy as np
engine, ended = opened(sys.argv[1]), threading.Event()
x = np.zeros((5, 3, 16, 16), np.float32)
def work():
    while not ended.is_set():
        engine.run(x)
thread = threading.Thread(target=work)
thread.start()
for _ in range(3):
    opened(sys.argv[2])
ended.set()
thread.join()
print(events())
"""
    log = output(cuda.run(OPEN + EVENTS + code, artefact, pixel_artefact))
    assert log.count("record") == 4 * BUCKETS and "forbidden" not in log


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_products_use_tf32_only_in_a_file_that_says_so(
    precision: str, cuda: CudaOnHost, merged: nn.Module, tmp_path: Path
) -> None:
    spec = export_spec(16, False, (0.5,) * 3, (0.5,) * 3, {"precision": precision})
    exporter.export(merged, tmp_path / "a.onnx", spec)
    code = "engine = opened(sys.argv[1]); print(events())"
    log = output(cuda.run(OPEN + EVENTS + code, tmp_path / "a.onnx"))
    tensor_cores = "cublasSetMathMode 3"  # CUBLAS_TF32_TENSOR_OP_MATH
    assert (tensor_cores in log) is (precision == "tf32")


def test_operators_without_a_kernel_for_gpus_are_named(
    cuda: CudaOnHost, merged: nn.Module, tmp_path: Path
) -> None:
    spec = replace(export_spec(16, False, (0.5,) * 3, (0.5,) * 3, {}), precision="int8")
    exporter.export(merged, tmp_path / "a.onnx", spec)
    sentence = output(cuda.run(REFUSED, tmp_path / "a.onnx"))
    assert f"SettingError: {tmp_path}/a.onnx cannot run on cuda: ONNX Runtime 1." in sentence
    assert "operators on the CPU: MatMulInteger (6), DynamicQuantizeLinear (4). Choose" in sentence


def test_all_precisions_and_fleets_are_computed_by_the_gpu(
    cuda: CudaOnHost, merged: nn.Module, fleet_artefact: Path, tmp_path: Path
) -> None:
    paths, spec = [fleet_artefact], export_spec(16, True, (0.5,) * 3, (0.5,) * 3, {})
    for precision in exporter.EXPORTER.precisions:
        if precision not in ("int8", *exporter.EXPORTER.calibrated):
            paths.append(tmp_path / f"{precision}.onnx")
            exporter.export(merged, paths[-1], replace(spec, precision=precision))
    code = """
import json
for path in sys.argv[1:]:
    print(json.loads(opened(path).info["placement"])["CPUExecutionProvider"])
"""
    on_cpu = output(cuda.run(OPEN + code, *paths)).splitlines()
    assert on_cpu == ["{'Concat': 1}"] * len(paths)


def test_sizes_that_do_not_fit_into_memory_are_left_out(cuda: CudaOnHost, tmp_path: Path) -> None:
    """The graph takes 192 KiB an image, of 6 MiB: batches of 16 fit, and larger ones do not."""
    arrays = {"times": np.array([1, 64, 1, 1]), "head": np.ones((192, 5), np.float32)}
    nodes = [
        helper.make_node("Tile", ["pixel_values", "times"], ["many"]),
        helper.make_node("GlobalAveragePool", ["many"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("pixel_values", 1, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", 1, ["batch", 5])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "a.onnx")
    code = """
import numpy as np
engine = opened(sys.argv[1])
assert engine.run(np.zeros((70, 3, 16, 16), np.float32)).shape == (70, 5)
print(events())
"""
    run = partial(cuda.run, OPEN + EVENTS + code, tmp_path / "a.onnx")
    log = output(run(CUDA_ON_HOST_BYTES=str(6 << 20)))
    assert log.count("record") == 5 and "forbidden" not in log
    assert output(run()).count("record") == BUCKETS
    sentence = output(cuda.run(REFUSED, tmp_path / "a.onnx", CUDA_ON_HOST_BYTES="99"))
    assert "could not start on cuda (Failed to allocate memory for requested" in sentence


def test_the_commands_say_where_nodes_are_computed(
    cuda: CudaOnHost, artefact: Path, photos: list[Path], tmp_path: Path
) -> None:
    code = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else found(name, *more)
from aoft_deploy.cli.{} import main
sys.exit(main(sys.argv[1:]))
"""  # PyTorch cannot be imported with the CUDA libraries of this test
    figures = tmp_path / "figures.json"
    options = ["--device", "cuda", "--rounds", "1", "--json", figures]
    ended = cuda.run(code.format("bench"), artefact, *options)
    line = ended.stdout.splitlines()[0]
    assert ended.returncode == 0, ended.stderr
    assert line.startswith(f"{artefact.name} on cuda:0: ")
    assert line.endswith(
        " nodes on CUDAExecutionProvider, 1 nodes on CPUExecutionProvider (Concat)"
    )
    (placed,) = json.loads(figures.read_text("utf-8"))["placements"]
    assert (placed["name"], placed["device"]) == (artefact.name, "cuda:0")
    assert placed["nodes"]["CUDAExecutionProvider"]["MatMul"] == 4
    (node,) = placed["nodes_on_cpu"]
    assert node["operator"] == "Concat" and node["name"]
    ended = cuda.run(code.format("predict"), artefact, photos[0], "--device", "cuda")
    assert (ended.returncode, ended.stderr) == (0, "") and photos[0].name in ended.stdout


@pytest.fixture(scope="module")
def merged(make_tuned: object) -> nn.Module:
    from aoft_deploy.tuning.merging import merge

    return merge(make_tuned("rlrr"))  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_answers_of_the_cpu_in_all_lanes(artefact: Path) -> None:
    if importlib.util.find_spec("onnxruntime") is None or "CUDAExecutionProvider" not in (
        importlib.import_module("onnxruntime").get_available_providers()
    ):
        pytest.skip("needs onnxruntime-gpu in place of onnxruntime")
    plain = exporter.load(artefact)
    bound = exporter.load(artefact, EngineOptions(device="cuda", lanes=3))
    source = np.random.default_rng(0)
    sizes = [1, 2, 3, 5, 8, 13, 64, 70] * 8
    batches = [source.normal(0, 1, (size, 3, 16, 16)).astype(np.float32) for size in sizes]
    with ThreadPoolExecutor(16) as pool:
        for batch, logits in zip(batches, pool.map(bound.run, batches), strict=True):
            np.testing.assert_allclose(logits, plain.run(batch), atol=5e-5, rtol=0)


def test_a_fleet_writes_tasks_into_the_gpus_memory_and_computes_there(
    cuda: CudaOnHost, fleet_artefact: Path, fleet_tasks: dict[str, Path]
) -> None:
    code = """
import json
import numpy as np
sys.path.append(sys.argv.pop())
from fleet_memories import table_rows
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.fleet.task import read_task

fleet = Fleet(sys.argv[1], device="cuda", budget=100_000)
tables = fleet._tables
for path in sys.argv[2:] * 5:
    fleet.add(path, "task", replace=True)
    task = read_task(Path(path), fleet.kind)
    with fleet._tasks.holding(["task"]) as held:
        slot, first, count = held["task"].slot, int(tables.first[held["task"].slot]), len(task.head)
    np.testing.assert_array_equal(table_rows(tables.bank, slot), task.row[None])
    np.testing.assert_array_equal(table_rows(tables.heads, first, count), task.head)
    assert table_rows(tables.arrays["first"], slot) == [first]
    assert table_rows(tables.arrays["count"], slot) == [count]
answers = fleet.predict(np.zeros((3, 3, 16, 16), np.float32), ["task", "pets", "birds"])
print([answer.logits.shape for answer in answers], type(tables._memory._memory).__name__)
print(set(json.loads(fleet._engine.info["placement"])["CPUExecutionProvider"]))
"""
    support = Path(__file__).parents[2] / "support"
    ended = cuda.run(OPEN + code, fleet_artefact, *fleet_tasks.values(), support)
    assert output(ended) == "[(5,), (5,), (5,)] GpuBlock\n{'Concat'}\n"


def test_a_fleet_takes_as_many_bytes_as_it_says_and_returns_them(cuda: CudaOnHost) -> None:
    """ONNX Runtime's allocator would take 32 MiB, and keep them. No recording is disturbed."""
    code = """
import gc, time
from aoft_deploy.artefacts.gpu_recording import RECORDING
from aoft_exporters.onnx.fleet import DeviceMemory
from aoft_exporters.onnx.gpu_block import taken
memory = DeviceMemory(20_000_000, "cuda")
print(memory.size, taken(0), taken(1), f"cudaMalloc {memory.size}\\n" in events())
try:
    DeviceMemory(20_000_001, "cuda")
except AoftError as error:
    print(error)
before = events().count("cudaFree\\n")
with RECORDING.alone():
    del memory
    gc.collect()
    time.sleep(0.2)
    print(taken(0), events().count("cudaFree\\n") - before)
with RECORDING.alone():
    pass
for _ in range(500):
    if freed := events().count("cudaFree\\n") - before:
        break
    time.sleep(0.01)
print(freed)
"""
    printed = output(cuda.run(OPEN + EVENTS + code, CUDA_ON_HOST_BYTES="50000000"))
    assert printed.splitlines() == [
        "30000000 30000000 0 True",
        "cuda has no room for 30000001 bytes of tasks (out of memory): give a smaller `budget`.",
        "0 0",
        "1",
    ]
