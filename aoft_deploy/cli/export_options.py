"""Options of aoft-export."""

from __future__ import annotations

import argparse
from pathlib import Path

from aoft_deploy.artefacts.registry import exporter_names
from aoft_deploy.cli.command import Parser, add_import_option

__all__ = ["check_usage", "parser"]

FLEET_REFUSES = ("uint8", "backbone", "refittable", "refit")
"""Options of merged models only."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog="aoft-export",
        description="Export a fine-tuned checkpoint merged into its backbone, or many checkpoints "
        "as a fleet on one backbone. The artefact is verified against the unmerged model before it "
        "is written.",
    )
    _add_source(options.add_argument_group("source"))
    _add_output(options.add_argument_group("output"))
    _add_precision(options.add_argument_group("precision and verification"))
    _add_build(options.add_argument_group("ONNX and TensorRT"))
    return options


def _add_source(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="CKPT",
        help="run folder or its model.ckpt, published RLRR .pth, or PEFT LoRA folder; several "
        "become an artefact each, and share the work on their backbone",
    )
    source.add_argument(
        "--fleet",
        type=Path,
        nargs="+",
        metavar="CKPT",
        help="run folders or checkpoints of one backbone: one graph with a task index per image",
    )
    group.add_argument("--backbone", metavar="TIMM_NAME", help="instead of the checkpoint's own")
    group.add_argument(
        "--backbone-weights",
        dest="weights",
        type=Path,
        metavar="FILE",
        help="the backbone's weights: .safetensors, .pth, .bin or JAX .npz (default: timm's)",
    )
    add_import_option(group)
    group.add_argument(
        "--force",
        action="store_true",
        help="accept backbone weights that differ from those in training",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--to",
        default="onnx",
        metavar="NAME",
        help=f"{', '.join(exporter_names())}, or auto: the fastest on this machine of those that "
        "pass verification (default: onnx)",
    )
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PATH",
        help="artefact, a file or a folder; with --to auto without a suffix (default: model.onnx, "
        "model-int8.onnx … beside the checkpoint; a fleet: fleet.onnx … in the current folder)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing artefact")
    group.add_argument(
        "--uint8",
        action="store_true",
        help="let the artefact take uint8 pixels [batch, H, W, 3] and normalise them itself",
    )
    group.add_argument(
        "--form",
        default="auto",
        metavar="NAME",
        help="with --fleet: mixed (any tasks in a batch), folded (one task at a time), or auto "
        "(default)",
    )


def _add_precision(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--precision",
        metavar="NAME",
        help="fp32 (default); tf32, fp16, bf16, fp8 or int8 if the exporter supports it",
    )
    group.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="verify with these images, or folders of images: needed below fp32; 300 or more show "
        "an agreement of 99 per cent",
    )
    group.add_argument(
        "--min-agreement",
        type=float,
        default=0.99,
        metavar="SHARE",
        help="below fp32: share of --images that must keep their top class, 0 to 1 (default: 0.99)",
    )
    group.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="for fp8, and int8 of openvino: 16 or more other images, or folders of them, for "
        "calibration",
    )


def _add_build(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batches",
        type=int,
        nargs="+",
        metavar="N",
        help="with --to auto: batch sizes to be fast at (default: 1 8); for tensorrt and triton: "
        "smallest, usual and largest batch (default: 1 8 32)",
    )
    group.add_argument(
        "--goal",
        choices=("latency", "throughput"),
        default="latency",
        help="with --to auto: be fast at one batch at a time (default), or at several at once",
    )
    group.add_argument(
        "--opset",
        type=int,
        metavar="N",
        help="for onnx and triton: 23 (attention is one operator; default of onnx) or 20 (for "
        "older runtimes; default of triton)",
    )
    group.add_argument(
        "--compute-capability",
        metavar="X.Y",
        help="for tensorrt: compute capability of the target GPU (default: this machine's)",
    )
    group.add_argument(
        "--refittable",
        action="store_true",
        help="for tensorrt: build an engine whose weights can be replaced later (may be slower)",
    )
    group.add_argument(
        "--refit",
        type=Path,
        metavar="ENGINE",
        help="for tensorrt: replace the weights of this engine, if possible, instead of building",
    )


def check_usage(options: argparse.Namespace) -> None:
    """Exit with 2 if options cannot be combined."""
    refused: tuple[str, ...] = ()
    if options.fleet:
        refused += FLEET_REFUSES
    if options.to == "auto":
        refused += ("precision", "opset", "compute_capability", "refittable", "refit")
    if options.merge and len(options.merge) > 1:
        if options.to == "auto":
            parser().error("--to auto goes with one checkpoint: choose an exporter for several")
        if options.output:
            parser().error("--output goes with one checkpoint: leave it out")
    for name in refused:
        if getattr(options, name):
            auto = options.to == "auto" and name not in FLEET_REFUSES
            beside = "--to auto" if auto or not options.fleet else "--fleet"
            parser().error(f"--{name.replace('_', '-')} does not go with {beside}")
    if options.goal != "latency" and options.to != "auto":
        parser().error("--goal goes with --to auto")
    if options.form != "auto" and not options.fleet:
        parser().error("--form goes with --fleet")
