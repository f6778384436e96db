"""Build a strongly typed TensorRT plan from an ONNX graph."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.gpu_recording import GPU_SETUP
from aoft_deploy.cache import cache_folder
from aoft_deploy.errors import OutputError
from aoft_exporters.tensorrt.library import Target, find_gpu
from aoft_exporters.tensorrt.refit import mark

__all__ = ["build"]


def build(
    graph: bytes,
    target: Target,
    batches: tuple[int, int, int],
    refittable: Collection[str] = (),
    *,
    tf32: bool = False,
) -> bytes:
    """Build a plan for a range of batch sizes.

    The graph's types set the precision.

    Args:
        graph: An ONNX model whose inputs have a dynamic first axis.
        target: The library to build with and the GPU to build for.
        batches: Smallest, usual and largest batch; TensorRT tunes for the usual one.
        refittable: Names of weights that can be replaced later; any needs the GPU while building.
        tf32: Whether products of float32 may be computed in TF32.

    Raises:
        OutputError: TensorRT cannot read the graph or build the engine.
    """
    trt, log = target.library.module, target.library.log
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise OutputError(f"TensorRT cannot read the graph ({' '.join(reasons)[:200]}).")
    config = builder.create_builder_config()
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        profile.set_shape(tensor.name, *([size, *tensor.shape[1:]] for size in batches))
    if config.add_optimization_profile(profile) < 0:
        raise OutputError(f"TensorRT cannot build for batches {batches} ({log.reason()}).")
    if refittable:
        mark(target.library, network, config, refittable)
    with GPU_SETUP, _timing_cache(trt, config, target):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise OutputError(f"TensorRT cannot build the engine ({log.reason()}).")
    return bytes(plan)


def _strongly_typed(trt: Any) -> int:
    """Creation flags of a strongly typed network; from TensorRT 11 on, every network is."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


@contextlib.contextmanager
def _timing_cache(trt: Any, config: Any, target: Target) -> Iterator[None]:
    """Context manager: set the GPU of TensorRT-RTX, or reuse and update TensorRT's timing cache."""
    if target.library.name == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        name = f"SM{target.capability.replace('.', '')}"
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name), 0):
            reason = target.library.log.reason()
            raise OutputError(
                f"TensorRT cannot build for compute capability {target.capability} ({reason})."
            )
        yield  # TensorRT-RTX times kernels only when the engine runs
        return
    path = _timing_path(target)
    stored = path.read_bytes() if path and path.is_file() else b""
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, False):  # damaged, or of another driver
        config.set_timing_cache(config.create_timing_cache(b""), False)
    yield
    cache = config.get_timing_cache()
    if path and cache is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}")
            draft.write_bytes(bytes(cache.serialize()))
            draft.replace(path)


def _timing_path(target: Target) -> Path | None:
    """File of the timing cache for this version and GPU; None without a cache or GPU."""
    folder, gpu = cache_folder(), find_gpu()
    if folder is None or gpu is None:
        return None
    name = f"tensorrt-{target.library.version}-{gpu.name}-{gpu.capability}.timing"
    return folder / name.replace(" ", "_").replace("/", "_")
