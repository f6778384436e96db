"""Profile CPU engines node by node: where the time goes, and how far from the peak products are.

Each engine runs in a subprocess with its own profiler. The nodes are grouped by what they compute;
a group's share is its share of the time of all nodes, and the rate of linear maps is compared with
the machine's peak in the same precision. Profilers cost time, so the sum is not the engine's speed:
``engines.py`` measures that.

    python benchmarks/export/node_profile.py --folder artefacts --out \
        benchmarks/results/nodes-MACHINE.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import engines
import numpy as np
import torch
import torch_engines
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import nn

from aoft_deploy.artefacts.machine import gemm_peaks, machine
from aoft_deploy.processors import processors
from aoft_exporters.openvino.files import MARKER, SECTION, TASKS
from aoft_exporters.openvino.library import inference_precision, openvino_library

GROUPS = {
    "linear maps": r"FullyConnected|MatMul|Gemm|addmm|linear|(^|::)mm$",
    "attention": r"Attention|attention|Subgraph|bmm",
    "patch embedding": r"[Cc]onv",
    "norms": r"[Nn]orm|MVN",
    "GELU": r"[Gg]elu",
    "quantisation": r"Quantize|PowerStatic",
    "additions": r"Add|add_|Multiply|^aten::(add|mul)|Eltwise|fused",
}
"""What nodes compute, by regular expressions of their kinds; the first that matches counts."""

MOVES, THIN = "copies and others", "thin products"

NEGLIGIBLE = 0.001
"""Share of the time up to which a kind of node is left out of the results."""

Inputs = dict[str, NDArray[Any]]

VARIANTS = (
    *("PyTorch", "onnxruntime fp32", "onnxruntime int8", "openvino fp32", "openvino bf16"),
    *("openvino int8", "openvino fp32, 16 tasks mixed", "openvino int8, 16 tasks mixed"),
)


Node = tuple[str, str, float]
"""A node of a graph: what it computes, the engine's name of its operator and, if known, of its
kernel, and its median duration in seconds."""


def group(kind: str, *, thin: bool = False) -> str:
    """The group of a kind of node; ``thin`` if it multiplies two computed matrices."""
    found = next((name for name, pattern in GROUPS.items() if re.search(pattern, kind)), MOVES)
    return THIN if thin and found == "linear maps" else found


def onnx_nodes(path: Path, inputs: Inputs, precision: str, threads: int, runs: int) -> list[Node]:
    """Nodes of an ONNX file in ONNX Runtime."""
    import onnxruntime

    library: Any = onnxruntime
    options = library.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "nodes")
        session = library.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for _ in range(runs + 1):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    found = defaultdict[tuple[str, str, bool], list[float]](list)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            shapes = [
                shape for each in event["args"]["input_type_shape"] for shape in each.values()
            ]
            thin = len(shapes) > 1 and len(shapes[1]) > 2
            found[event["name"], event["args"]["op_name"], thin].append(event["dur"] * 1e-6)
    return [
        (group(kind, thin=thin), kind, statistics.median(seconds[1:]))
        for (_, kind, thin), seconds in found.items()
    ]


def openvino_nodes(
    path: Path, inputs: Inputs, precision: str, threads: int, runs: int
) -> list[Node]:
    """Nodes of a folder in OpenVINO, with the kernels that compute them."""
    core = openvino_library().Core()
    graph = core.read_model(path / MARKER)
    info = graph.get_rt_info([SECTION]).value
    properties = {
        "INFERENCE_PRECISION_HINT": inference_precision(core, info),
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "PERF_COUNT": True,
    }
    compiled = core.compile_model(graph, "CPU", properties)
    tables = load_file(path / TASKS) if (path / TASKS).exists() else {}
    request = compiled.create_infer_request()
    found = defaultdict[tuple[str, str, str], list[float]](list)
    for _ in range(runs + 1):
        request.infer({**inputs, **tables}, share_inputs=True)
        for node in request.get_profiling_info():
            key = node.node_name, node.node_type, node.exec_type
            found[key].append(node.real_time.total_seconds())
    return [
        (group(kind, thin=kind == "MatMul"), f"{kind}, {kernel}", statistics.median(times[1:]))
        for (_, kind, kernel), times in found.items()
    ]


def torch_nodes(model: str, method: str, inputs: Inputs, threads: int, runs: int) -> list[Node]:
    """Operators of the merged model in eager PyTorch."""
    engine = torch_engines.pytorch(model, method, threads)
    engine.run(inputs["pixel_values"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(runs):
            engine.run(inputs["pixel_values"])
    return [
        (group(event.key), event.key, event.self_cpu_time_total * 1e-6 / runs)
        for event in profile.key_averages()
    ]


def map_flops(model: nn.Module, side: int) -> int:
    """Operations of a model's linear maps for one image."""
    counts = list[int]()

    def count(layer: Any, _: Any, out: torch.Tensor) -> None:
        counts.append(2 * out.numel() * layer.in_features)

    hooks = [
        layer.register_forward_hook(count)
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.inference_mode():
        model(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return sum(counts)


def profiles(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The profile of every variant and batch, and the operations of an image's linear maps."""
    variants = engines.Variants(options, folder)
    size, flops = variants.size, map_flops(variants.merged, variants.size)
    rng, rows = np.random.default_rng(0), list[dict[str, Any]]()
    for name in options.variants:
        precision, make = engines.VARIANTS[name]
        profile = partial(torch_nodes, options.model, options.method)
        if name != "PyTorch":
            variants.folder = folder / re.sub(r"\W+", "-", name)
            if not variants.folder.exists():
                variants.folder.mkdir(parents=True)
                make(variants)
            (path,) = variants.folder.iterdir()
            measure = onnx_nodes if path.suffix == ".onnx" else openvino_nodes
            profile = partial(measure, path, precision=precision)
        for batch in options.batches:
            inputs: Inputs = {"pixel_values": rng.standard_normal((batch, 3, size, size), "f4")}
            if "tasks" in name:
                inputs["task"] = np.arange(batch) % torch_engines.TASKS
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                nodes = pool.submit(
                    profile, inputs=inputs, threads=options.threads, runs=options.runs
                ).result()
            rows.append({"name": name, "precision": precision, "batch": batch, **summary(nodes)})
    return rows, flops


def summary(nodes: Sequence[Node]) -> dict[str, Any]:
    """Seconds of all nodes, and of each group and kind, longest first."""
    groups, kinds = defaultdict[str, float](float), defaultdict[str, float](float)
    for name, kind, seconds in nodes:
        groups[name] += seconds
        kinds[kind] += seconds
    ordered = {
        name: dict(sorted(found.items(), key=lambda item: -item[1]))
        for name, found in (("groups", groups), ("kinds", kinds))
    }
    total = sum(groups.values())
    ordered["kinds"] = {k: s for k, s in ordered["kinds"].items() if s > NEGLIGIBLE * total}
    return {"seconds": total, **ordered}


def main() -> None:
    """Profile the variants, print the shares and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--method", default="aoft-lora-star")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--calibration", type=int, default=8, help="images for openvino int8")
    parser.add_argument("--folder", type=Path, help="keep the artefacts here for later runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows, flops = profiles(options, options.folder or Path(scratch))
    peaks = gemm_peaks(options.threads)
    for row in rows:
        seconds = row["groups"].get("linear maps")
        rate = flops * row["batch"] / seconds if seconds else None
        row["map_rate"] = rate
        peak = peaks.get(row["precision"])
        row["share_of_peak"] = rate / peak if rate and peak else None
        shares = ", ".join(f"{n} {s / row['seconds']:.0%}" for n, s in row["groups"].items())
        print(f"{row['name']}, batch {row['batch']}: {row['seconds'] * 1e3:.0f} ms; {shares}")
    if options.out:
        packages = ("torch", "onnxruntime", "openvino")
        results = {
            "machine": machine(options.threads),
            "versions": {package: version(package) for package in packages},
            "model": options.model,
            "method": options.method,
            "gemm_peaks": peaks,
            "rows": rows,
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
