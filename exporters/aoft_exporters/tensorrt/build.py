"""From an ONNX graph to a TensorRT plan: strongly typed, one profile over the batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from aoft_deploy.cache import cache_folder
from aoft_deploy.errors import OutputError
from aoft_exporters.tensorrt.library import Target, find_gpu
from aoft_exporters.tensorrt.refit import mark

__all__ = ["build"]


def build(
    graph: bytes, target: Target, batches: tuple[int, int, int], refittable: Collection[str] = ()
) -> bytes:
    """A plan for a range of batches.

    The precision is the graph's: float32 is computed in float32, never in TF32.

    Args:
        graph: An ONNX model whose inputs have a dynamic first axis.
        target: What to build with and for.
        batches: Smallest, usual and largest batch; TensorRT tunes for the usual one.
        refittable: Weights that may be replaced later; TensorRT needs the GPU to build for any.

    Raises:
        OutputError: TensorRT cannot read the graph or build it, with its reason.
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
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        given = network.get_input(i)
        profile.set_shape(given.name, *([size, *given.shape[1:]] for size in batches))
    config.add_optimization_profile(profile)
    if refittable:
        mark(target.library, network, config, refittable)
    with _choices_kept(trt, config, target):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = " ".join(log.errors)[:200] or "it gives no reason"
        raise OutputError(f"TensorRT cannot build the engine ({reason}).")
    return bytes(plan)


def _strongly_typed(trt: Any) -> int:
    """Flags of a network whose types are the graph's; from TensorRT 11 on every network is so."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


@contextlib.contextmanager
def _choices_kept(trt: Any, config: Any, target: Target) -> Iterator[None]:
    """Name the GPU to TensorRT-RTX; let TensorRT reuse and keep what it has timed on this one."""
    if target.library.name == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        name = f"SM{target.capability.replace('.', '')}"
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
        yield  # it times nothing before it runs
        return
    path = _timing_path(target)
    known = path.read_bytes() if path and path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(known), False)
    yield
    cache = config.get_timing_cache()
    if path and cache is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{path.name}.{os.getpid()}")
            draft.write_bytes(bytes(cache.serialize()))
            draft.replace(path)


def _timing_path(target: Target) -> Path | None:
    """Where timings are kept for this version and GPU; None where nothing is to be kept."""
    folder, gpu = cache_folder(), find_gpu()
    if folder is None or gpu is None:
        return None
    name = f"tensorrt-{target.library.version}-{gpu.name}-{gpu.capability}.timing"
    return folder / name.replace(" ", "_").replace("/", "_")
