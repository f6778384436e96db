"""The engine for GPUs on the CPU provider, which takes the same bindings but records nothing."""

from __future__ import annotations

import gc
import importlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.gpu_recording import Recording
from aoft_deploy.errors import AoftError, ArtefactError, MissingExtraError, SettingError
from aoft_exporters.onnx import cuda_libraries, exporter, sessions
from aoft_exporters.onnx.engine import OnnxEngine
from aoft_exporters.onnx.gpu_engine import LARGEST_BUCKET, OnnxGpuEngine
from aoft_exporters.onnx.gpu_lane import GpuLane, _padded
from aoft_exporters.onnx.placement import check_placement, placement_of

ON_CPU = EngineOptions(threads=1, device="cpu")


def images(engine: OnnxEngine, batch: int, seed: int = 0) -> NDArray[Any]:
    source = np.random.default_rng(seed)
    if engine.takes_pixels:
        return source.integers(0, 256, (batch, 16, 16, 3), np.uint8)
    return source.normal(0, 1, (batch, 3, 16, 16)).astype(np.float32)


def in_buckets(plain: OnnxEngine, batch: NDArray[Any], *task: NDArray[Any]) -> NDArray[np.float32]:
    """Answers of a plain session to the batches that the engine should compute."""
    parts = []
    for start in range(0, len(batch), LARGEST_BUCKET):
        rows = [values[start : start + LARGEST_BUCKET] for values in (batch, *task)]
        size = 1 << (len(rows[0]) - 1).bit_length()
        padded = [np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1), "edge") for x in rows]
        parts.append(plain.run(*padded)[: len(rows[0])])
    return np.concatenate(parts)


@pytest.mark.parametrize("form", ["artefact", "pixel_artefact"])
@pytest.mark.parametrize("batch", [1, 2, 3, 63, 64, 65, 130])
def test_batches_of_all_sizes_give_the_bits_of_a_plain_session(
    form: str, batch: int, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(form)
    plain, bound = OnnxEngine(path, 1), OnnxGpuEngine(path, ON_CPU)
    x = images(plain, batch)
    logits = bound.run(x)
    np.testing.assert_array_equal(logits, in_buckets(plain, x))
    np.testing.assert_allclose(logits, plain.run(x), atol=2e-6, rtol=0)
    assert (bound.takes_pixels, bound.takes_tasks) == (form == "pixel_artefact", False)


def test_a_later_batch_does_not_change_the_answers_of_an_earlier_one(artefact: Path) -> None:
    plain, bound = OnnxEngine(artefact, 1), OnnxGpuEngine(artefact, ON_CPU)
    many, few = images(plain, 8, seed=1), images(plain, 5, seed=2)
    first = bound.run(many)
    second = bound.run(few)
    np.testing.assert_array_equal(first, in_buckets(plain, many))
    np.testing.assert_array_equal(second, in_buckets(plain, few))


def test_padding_repeats_the_last_row() -> None:
    rows = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(_padded(rows, 5), [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]])
    assert _padded(rows, 3) is rows


@pytest.mark.parametrize("lanes", [1, 4])
def test_sixteen_threads_get_their_own_answers(lanes: int, artefact: Path) -> None:
    plain = OnnxEngine(artefact, 1)
    bound = OnnxGpuEngine(artefact, EngineOptions(threads=1, device="cpu", lanes=lanes))
    batches = [images(plain, 1 + seed % 7, seed) for seed in range(160)]
    expected = [in_buckets(plain, batch) for batch in batches]
    with ThreadPoolExecutor(16) as pool:
        for logits, right in zip(pool.map(bound.run, batches), expected, strict=True):
            np.testing.assert_array_equal(logits, right)


def test_each_lane_computes_a_batch_at_once(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer lanes than threads that meet in a run, the barrier would break."""
    together, run = threading.Barrier(3), GpuLane.run

    def meeting(lane: GpuLane, feed: Any) -> Any:
        together.wait(30)
        return run(lane, feed)

    monkeypatch.setattr(GpuLane, "run", meeting)
    bound = OnnxGpuEngine(artefact, EngineOptions(threads=1, device="cpu", lanes=3))
    batch = images(OnnxEngine(artefact, 1), 2)
    with ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(bound.run, [batch] * 3))) == 3


def test_a_fleet_answers_each_image_for_its_task(fleet_artefact: Path) -> None:
    plain, bound = OnnxEngine(fleet_artefact, 1), OnnxGpuEngine(fleet_artefact, ON_CPU)
    x = images(plain, 11)
    task = np.arange(11) % len(json.loads(plain.info["tasks"]))
    np.testing.assert_array_equal(bound.run(x, task), in_buckets(plain, x, task))
    with pytest.raises(SettingError, match="needs a task for each image"):
        bound.run(x)


def test_an_engine_that_is_dropped_ends_its_threads(artefact: Path) -> None:
    before = set(threading.enumerate())
    bound = OnnxGpuEngine(artefact, EngineOptions(threads=1, device="cpu", lanes=2))
    started = set(threading.enumerate()) - before
    bound.run(images(OnnxEngine(artefact, 1), 3))
    assert len(started) == 2
    del bound
    gc.collect()
    for thread in started:
        thread.join(30)
    assert not any(thread.is_alive() for thread in started)


def test_sizes_beyond_the_memory_of_the_device_are_computed_in_parts(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = GpuLane.record

    def recorded(lane: GpuLane, size: int) -> None:
        if size > 4:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 9")
        record(lane, size)

    monkeypatch.setattr(GpuLane, "record", recorded)
    plain, bound = OnnxEngine(artefact, 1), OnnxGpuEngine(artefact, ON_CPU)
    x = images(plain, 9)
    np.testing.assert_allclose(bound.run(x), plain.run(x), atol=2e-6, rtol=0)


def test_a_failure_while_loading_or_running_is_one_sentence(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = OnnxGpuEngine(artefact, ON_CPU)

    def failed(*arguments: object) -> None:
        raise RuntimeError("/onnxruntime_src/a.cc:1 CUDA failure 719: launch failed ; GPU=0 ; x")

    monkeypatch.setattr(GpuLane, "run", failed)
    sentence = r"could not be computed on cuda:0 \(CUDA failure 719: launch failed\)\.$"
    with pytest.raises(AoftError, match=sentence):
        bound.run(images(OnnxEngine(artefact, 1), 1))
    monkeypatch.setattr(GpuLane, "record", failed)
    with pytest.raises(SettingError, match=r"could not start on cpu \(CUDA failure 719"):
        OnnxGpuEngine(artefact, ON_CPU)


def test_a_file_without_the_size_of_its_images_is_refused(artefact: Path, tmp_path: Path) -> None:
    model = onnx.load(artefact)
    del model.metadata_props[:]
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ArtefactError, match="a GPU states the size of its images: export it"):
        OnnxGpuEngine(tmp_path / "a.onnx", ON_CPU)


class Runtime:
    """Stands for onnxruntime-gpu on a machine whose GPU has kernels for some operators.

    The sessions are of the CPU provider; the options that they are opened with are kept.
    """

    __version__, cuda_version, __file__ = "1.31.1", "13.0", sessions.__file__

    def __init__(self, on_cpu: tuple[str, ...] = ("Concat",), started: bool = True) -> None:
        self.on_cpu, self.started = on_cpu, started
        self.providers: dict[str, dict[str, str]] = {}
        self.config: dict[str, Any] = {}
        self.severity: int | None = None
        self._real: Any = importlib.import_module("onnxruntime")
        self.SessionOptions, self.OrtValue = self._real.SessionOptions, self._real.OrtValue

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def set_default_logger_severity(self, severity: int) -> None:
        self.severity = severity

    def InferenceSession(self, model: Any, options: Any, providers: Any, **settings: Any) -> Any:
        self.providers, self.config = dict(providers), settings
        if self.providers["CUDAExecutionProvider"]["enable_cuda_graph"] == "1" and self.on_cpu != (
            "Concat",
        ):
            raise RuntimeError("This session cannot use the graph capture feature as requested")
        opened = self._real.InferenceSession(model, options, ["CPUExecutionProvider"])
        counts = placement_of(opened)["CPUExecutionProvider"]
        cpu = [SimpleNamespace(domain="", op_type=name) for name in self.on_cpu]
        gpu = [SimpleNamespace(domain="", op_type=name) for name in counts]
        parts = [("CPUExecutionProvider", cpu), ("CUDAExecutionProvider", gpu)]
        return SimpleNamespace(
            get_inputs=opened.get_inputs,
            get_providers=lambda: [*self.providers][0 if self.started else 1 :],
            get_provider_graph_assignment_info=lambda: [
                SimpleNamespace(ep_name=name, get_nodes=lambda nodes=nodes: nodes)
                for name, nodes in parts
            ],
        )


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runtime]:
    """Make ``session`` find a stand-in for onnxruntime-gpu, with a driver."""

    def made(**settings: Any) -> Runtime:
        runtime = Runtime(**settings)
        monkeypatch.setattr(sessions, "library", lambda: runtime)
        monkeypatch.setattr(sessions, "driver_failure", lambda: "")
        monkeypatch.setattr(sessions, "load_cuda_libraries", lambda cuda: None)
        monkeypatch.setattr(sessions, "provider_failure", lambda folder: "libcublas.so.13: missing")
        return runtime

    return made


@pytest.mark.parametrize(("tf32", "option"), [(False, "0"), (True, "1")])
def test_float32_products_use_tf32_only_where_it_is_asked_for(
    tf32: bool, option: str, artefact: Path, on_gpu: Callable[..., Runtime]
) -> None:
    runtime = on_gpu()
    sessions.session(artefact, 1, "cuda:1", artefact, tf32=tf32)
    assert runtime.providers["CUDAExecutionProvider"] == {
        "device_id": "1",
        "use_tf32": option,
        "enable_cuda_graph": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    assert [*runtime.providers] == ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(("precision", "option"), [("fp32", "0"), ("tf32", "1"), (None, "0")])
def test_a_file_uses_tf32_only_if_its_metadata_say_so(
    precision: str | None, option: str, artefact: Path, tmp_path: Path, on_gpu: Any
) -> None:
    model, path = onnx.load(artefact), tmp_path / "a.onnx"
    kept = [p for p in model.metadata_props if p.key not in ("precision", "sha256-4MiB")]
    props = {p.key: p.value for p in kept} | ({"precision": precision} if precision else {})
    onnx.helper.set_model_props(model, props)
    onnx.save(model, path)
    runtime = on_gpu()
    with pytest.raises(Exception, match="io_binding"):  # the stand-in opens files, no more
        exporter.load(path, EngineOptions(device="cuda"))
    cuda = runtime.providers["CUDAExecutionProvider"]
    assert (cuda["use_tf32"], cuda["enable_cuda_graph"]) == (option, "1")


def test_onnxruntime_never_falls_back_and_writes_nothing(artefact: Path, on_gpu: Any) -> None:
    runtime = on_gpu()
    sessions.session(artefact, 1, "cuda", artefact)
    assert runtime.config == {"enable_fallback": 0}
    assert runtime.severity == 4
    started = on_gpu(started=False)
    with pytest.raises(
        SettingError, match=r"not start on cuda \(libcublas.so.13: missing\): check"
    ):
        sessions.session(artefact, 1, "cuda", artefact)
    assert started.config == {"enable_fallback": 0}


@pytest.mark.parametrize("recorded", [False, True])
def test_layers_on_the_cpu_are_refused_by_name(
    recorded: bool, artefact: Path, on_gpu: Callable[..., Runtime]
) -> None:
    on_gpu(on_cpu=("Concat", "MatMulInteger", "MatMulInteger"))
    sentence = r"on the CPU: MatMulInteger \(2\). Choose `device=\"cpu\"`, or export"
    with pytest.raises(SettingError, match=sentence):
        sessions.session(artefact, 1, "cuda", artefact, recorded=recorded)


def test_shapes_on_the_cpu_are_reported() -> None:
    on_cpu = {"CPUExecutionProvider": {"Shape": 1, "Concat": 2, "Gather": 1}}
    check_placement(on_cpu, Path("a.onnx"), "cuda", "1.31.1")
    with pytest.raises(SettingError, match=r"CPU: com.microsoft.Gelu \(3\), Attention \(1\)\."):
        on_cpu["CPUExecutionProvider"] |= {"com.microsoft.Gelu": 3, "Attention": 1}
        check_placement(on_cpu, Path("a.onnx"), "cuda", "1.24.0")


@pytest.mark.parametrize("device", ["mps", "cuda:x", "cpu:1", "tensorrt", "tensorrt:1"])
def test_an_unknown_device_is_refused(device: str, artefact: Path) -> None:
    hint = '; export with `to="tensorrt"` to run in TensorRT' if "tensorrt" in device else ""
    with pytest.raises(SettingError, match=f"Runtime '{device}': give .* several GPUs{hint}.$"):
        exporter.load(artefact, EngineOptions(device=device))


def test_the_package_for_the_cpu_has_no_gpu(artefact: Path) -> None:
    with pytest.raises(MissingExtraError, match="run pip uninstall -y onnxruntime onnxruntime-gpu"):
        exporter.load(artefact, EngineOptions(device="cuda"))


def test_an_onnxruntime_without_attention_on_gpus_is_refused(artefact: Path, on_gpu: Any) -> None:
    on_gpu().__version__ = "1.24.4"
    with pytest.raises(SettingError, match=r"needs onnxruntime-gpu 1.25 or newer, but 1.24.4"):
        sessions.session(artefact, 1, "cuda", artefact)


def test_libraries_of_onnxruntimes_version_of_cuda_come_first(tmp_path: Path) -> None:
    for name in ("cublas", "cu12", "cu13", "cudnn"):
        (tmp_path / "a/nvidia" / name / "lib").mkdir(parents=True)
    (tmp_path / "b/nvidia/cu13/lib").mkdir(parents=True)
    packages = [tmp_path / "a/nvidia", tmp_path / "b/nvidia"]

    def folders(major: str) -> list[str]:
        found = cuda_libraries._folders(major, packages)
        return [str(folder.parent.relative_to(tmp_path)) for folder in found]

    others = ["a/nvidia/cublas", "a/nvidia/cudnn"]
    assert folders("13") == ["a/nvidia/cu13", "b/nvidia/cu13", *others]
    assert folders("12") == ["a/nvidia/cu12", *others]


def test_a_recording_is_alone_and_does_not_starve() -> None:
    recording, order = Recording(), list[str]()
    inside, go_on = threading.Event(), threading.Event()

    def use(name: str) -> None:
        with recording.apart():
            order.append(name)
            inside.set()
            assert go_on.wait(30)

    def record() -> None:
        with recording.alone():
            order.append("recording")

    first = threading.Thread(target=use, args=("first",))
    first.start()
    assert inside.wait(30)
    second = threading.Thread(target=record)
    second.start()
    while not recording._waiting:
        pass
    third = threading.Thread(target=use, args=("third",))
    third.start()
    third.join(0.2)
    assert order == ["first"]  # neither the recording nor the one that came after it
    go_on.set()
    for thread in (first, second, third):
        thread.join(30)
    assert order == ["first", "recording", "third"]
