"""Time the first export of a backbone and the export of further tasks.

Each round starts with an empty graph cache and exports tasks of one ViT with random weights.
``command`` runs ``aoft-export`` for each of two tasks. ``together`` runs it once for three tasks.
``within`` exports three tasks in one process, by ``export_each``, without the time to start Python
and import torch, timm and onnx. ``fleet`` exports a fleet of three tasks twice. Each figure is a
process's wall time, CPU time or peak memory. ``--before`` names an earlier checkout, which takes
turns with this one. Figures are medians.

    python benchmarks/export/exporting.py --out benchmarks/results/exporting.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from measured import Measured, environment, medians, run
from safetensors.torch import save_file

from aoft_deploy.artefacts.machine import machine
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.processors import processors
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone

WITHIN = """
import json, resource, sys, time
from pathlib import Path
import onnxruntime, torch, timm, onnx
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.export.merged import export_each
backbone = BackboneSource(weights=Path(sys.argv[1]))
measured = []
start, cpu = time.perf_counter(), time.process_time()
for exported in export_each([*map(Path, sys.argv[3:])], backbone=backbone, overwrite=True):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    measured.append([time.perf_counter() - start, time.process_time() - cpu, peak])
    start, cpu = time.perf_counter(), time.process_time()
Path(sys.argv[2]).write_text(json.dumps(measured))
"""


def tasks(model: str, folder: Path) -> tuple[Path, list[Path]]:
    """A file of random backbone weights and three checkpoints on it."""
    torch.manual_seed(0)
    weights = folder / "backbone.safetensors"
    save_file(timm.create_model(model, num_classes=0).state_dict(), weights)
    half = (0.5, 0.5, 0.5)
    paths = []
    for name in ("first", "second", "third"):
        backbone, identity = create_backbone(model, num_classes=20, weights=weights)
        size = int(backbone.pretrained_cfg["input_size"][-1])  # type: ignore[index]
        tuned = attach(backbone, "aoft-lora-star", backbone=identity)
        with torch.no_grad():
            for parameter in tuned.trained().values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        paths.append(folder / f"{name}.ckpt")
        classes = [f"c{i}" for i in range(20)]
        save(tuned, paths[-1], classes=classes, preprocessing=Preprocessing(size, 0.9, half, half))
    return weights, paths


def empty(folder: Path) -> None:
    """Delete the files of a folder."""
    for path in folder.iterdir():
        path.unlink()


def export_command(weights: Path, paths: Sequence[Path], how: str = "--merge") -> list[object]:
    """Arguments of Python that export these checkpoints."""
    start = ["-m", "aoft_deploy.cli.export", "--overwrite", "--backbone-weights", weights]
    return [*start, how, *paths]


WAYS = ("command", "together", "within", "fleet")
"""Ways to export. All but ``together`` start with an empty graph cache."""


def exports(
    weights: Path, paths: list[Path], given: dict[str, str], ways: Sequence[str]
) -> dict[str, list[Measured]]:
    """Export the tasks in each of these ways."""
    found = dict[str, list[Measured]]()
    graphs = Path(given["AOFT_CACHE_DIR"])
    if "command" in ways:
        empty(graphs)
        for path, kind in zip(paths[:2], ("first", "further"), strict=True):
            found[f"command {kind}"] = [run(export_command(weights, [path]), given)]
    if "together" in ways:
        found["together three"] = [run(export_command(weights, paths), given)]
    if "within" in ways:
        empty(graphs)
        output = paths[0].parent / "seconds.json"
        run(["-c", WITHIN, weights, output, *paths], given)
        first, *further = (Measured(*each) for each in json.loads(output.read_text()))
        found |= {"within first": [first], "within further": further}
    if "fleet" in ways:
        empty(graphs)
        fleet = export_command(weights, paths, "--fleet")
        fleet += ["-o", paths[0].parent / "fleet.onnx"]
        for kind in ("first", "further"):
            found[f"fleet {kind}"] = [run(fleet, given)]
    return found


def main() -> None:
    """Time the exports, print the figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--before", type=Path, help="an earlier checkout to compare with")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = dict[str, list[Measured]]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights, paths = tasks(options.model, folder)
        sides = {"now": None, **({"before": options.before} if options.before else {})}
        for side, checkout in sides.items():  # compiles all modules that an export imports
            run(export_command(weights, paths[:1]), environment(folder / side, checkout))
        for _ in range(options.rounds):
            for side, checkout in sides.items():
                given = environment(folder / side, checkout)
                for name, found in exports(weights, paths, given, options.ways).items():
                    runs.setdefault(f"{name}, {side}", []).extend(found)
    result: dict[str, Any] = {"machine": machine(processors()), "model": options.model}
    result |= {"medians": {name: medians(found) for name, found in runs.items()}, "runs": runs}
    print(result["machine"])
    for name, found in result["medians"].items():
        cpu = found["cpu"]
        print(f"{name}: {found['seconds']:.1f} s, {cpu:.1f} s of CPU, {found['peak']:.0f} MB")
    for side in sides:
        for kind in (way for way in options.ways if way != "together"):
            pair = (result["medians"][f"{kind} {each}, {side}"] for each in ("further", "first"))
            further, first = (each["cpu"] for each in pair)
            print(f"{kind}, {side}: further {further / first:.0%} of the first's CPU time")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
