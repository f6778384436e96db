"""aoft-export: merge a checkpoint into its backbone and write a verified artefact."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.cli.command import Parser, add_import_option, run, with_options

if TYPE_CHECKING:
    from aoft_deploy.artefacts.spec import BuildOptions
    from aoft_deploy.export.publishing import Exported

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog="aoft-export",
        description="Export a fine-tuned checkpoint merged into its backbone, or many checkpoints "
        "as a fleet on one backbone. The artefact is verified against the unmerged model before it "
        "is written.",
    )
    source = options.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--merge",
        type=Path,
        metavar="CKPT",
        help="model.ckpt, published RLRR .pth, or PEFT LoRA folder",
    )
    source.add_argument(
        "--fleet",
        type=Path,
        nargs="+",
        metavar="CKPT",
        help="checkpoints of one backbone: export one graph with a task index for each image",
    )
    options.add_argument(
        "--to",
        default="onnx",
        metavar="NAME",
        help="onnx (default), openvino, tensorrt, triton, triton-tensorrt, timm or peft; auto: the "
        "fastest on this machine that passes verification",
    )
    options.add_argument(
        "-o",
        "--output",
        type=Path,
        help="artefact; default: beside the checkpoint, or for a fleet in the current folder; an "
        "existing file is replaced, an existing folder is not",
    )
    options.add_argument(
        "--overwrite",
        action="store_true",
        help="with --to auto: replace an existing artefact of the chosen name",
    )
    options.add_argument(
        "--uint8",
        action="store_true",
        help="let the artefact take uint8 pixels [batch, H, W, 3] and normalise them itself",
    )
    options.add_argument("--backbone", metavar="TIMM_NAME", help="instead of the checkpoint's own")
    options.add_argument(
        "--backbone-weights",
        dest="weights",
        type=Path,
        metavar="FILE",
        help=".safetensors, .pth, .bin or JAX .npz",
    )
    add_import_option(options)
    options.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="verify with these images, or folders of images, as well",
    )
    options.add_argument(
        "--precision",
        metavar="NAME",
        help="fp32 (default); int8, fp16 or bf16 if the exporter supports it, verified on --images",
    )
    options.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="calibration images, or folders of images, for int8 of openvino",
    )
    options.add_argument(
        "--form",
        default="auto",
        metavar="NAME",
        help="with --fleet: mixed (any tasks in a batch), folded (one task at a time), or auto",
    )
    options.add_argument(
        "--min-agreement",
        type=float,
        default=0.99,
        metavar="SHARE",
        help="below fp32: share of images that must keep their top class (default 0.99)",
    )
    options.add_argument(
        "--batches",
        type=int,
        nargs=3,
        metavar=("MIN", "USUAL", "MAX"),
        help="for tensorrt: batch sizes that the engine supports (default 1 8 32)",
    )
    options.add_argument(
        "--compute-capability",
        metavar="X.Y",
        help="for tensorrt: compute capability of the target GPU (default: this machine's)",
    )
    options.add_argument(
        "--opset",
        type=int,
        metavar="N",
        help="for onnx: 23 (default; attention is one operator) or 20, for older runtimes",
    )
    options.add_argument(
        "--refittable",
        action="store_true",
        help="for tensorrt: build an engine whose weights can be replaced later (may be slower)",
    )
    options.add_argument(
        "--refit",
        type=Path,
        metavar="ENGINE",
        help="for tensorrt: replace the weights of this engine, if possible, instead of building",
    )
    options.add_argument(
        "--force",
        action="store_true",
        help="accept backbone weights that differ from those in training",
    )
    return options


def export(options: argparse.Namespace) -> None:
    """Run the export, and print the verification results."""
    _check_usage(options)
    if options.fleet:
        exported = _fleet(options)
    elif options.to == "auto":
        exported = _fastest(options)
    else:
        exported = _merged(options)
    _note_skipped([*options.images, *options.calibrate])
    report = exported.report
    print(f"{exported.path}  {exported.size / 2**20:.1f} MiB")
    allowed = f"{report.tolerance:.1e}" if report.tolerance is not None else "any"
    minimum = f" (minimum {report.min_agreement:.1%})" if report.min_agreement else ""
    print(
        f"verified on {report.images} images at batch sizes "
        f"{', '.join(map(str, report.batch_sizes))}: max |Δlogit| {report.max_abs:.1e} "
        f"(allowed {allowed}), top-1 agreement {report.agreement:.1%}{minimum}"
    )
    if exported.left_in_float:
        print(f"left in float32: {', '.join(exported.left_in_float)}")
    if exported.device is None:
        print(_not_on_device(exported, options))
    print(f"manifest: {exported.manifest}")


def _check_usage(options: argparse.Namespace) -> None:
    """Exit with 2 if options cannot be combined."""
    if options.overwrite and (options.fleet or options.to != "auto"):
        parser().error("--overwrite goes with --to auto: other exports always replace a file")
    refused: tuple[str, ...] = ()
    if options.fleet:
        refused += ("uint8", "backbone", "refittable", "refit")
    elif options.to == "auto":
        refused += ("precision", "opset", "batches", "compute_capability", "refittable", "refit")
    for name in refused:
        if getattr(options, name):
            beside = "--fleet" if options.fleet else "--to auto"
            parser().error(f"--{name.replace('_', '-')} does not go with {beside}")
    if options.form != "auto" and not options.fleet:
        parser().error("--form goes with --fleet")


def _not_on_device(exported: Exported, options: argparse.Namespace) -> str:
    """The notice for an artefact that this machine cannot run in its precision."""
    from aoft_deploy.artefacts.registry import get_exporter

    figures = f"the figures are those of {exported.arithmetic}"
    if get_exporter(options.to).device is None:
        reason = f"no runtime on the CPU computes in {options.precision}"
    else:
        reason = "this machine has no GPU that runs the engine"
        figures += "; the engine is compared with them when it is loaded"
    return f"NOT VERIFIED ON DEVICE: {reason}, so {figures}"


def _note_skipped(sources: Sequence[Path]) -> None:
    """Print a note on files in folders that are not images."""
    from aoft_deploy.data.listing import describe_skipped, image_files

    skipped = Counter[str]()
    image_files(list(dict.fromkeys(sources)), skipped)
    if skipped:
        print(f"note: {describe_skipped(skipped)}.", file=sys.stderr)


def _merged(options: argparse.Namespace) -> Exported:
    from aoft_deploy.export.merged import export_merged

    return export_merged(
        options.merge,
        options.output,
        to=options.to,
        precision=options.precision or "fp32",
        uint8=options.uint8,
        build=_build(options),
        **_common(options),
    )


def _fleet(options: argparse.Namespace) -> Exported:
    from aoft_deploy.artefacts.registry import get_exporter
    from aoft_deploy.export.fleet import export_fleet

    return export_fleet(
        options.fleet,
        options.output or Path(f"fleet{get_exporter(options.to).suffix}"),
        to=options.to,
        precision=options.precision or "fp32",
        form=options.form,
        build=_build(options),
        **_common(options),
    )


def _common(options: argparse.Namespace) -> dict[str, Any]:
    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.export.options import VerifyOptions

    return {
        "backbone": BackboneSource(options.backbone, options.weights, options.force),
        "verify": VerifyOptions(options.images, options.calibrate, options.min_agreement),
        "command": ["aoft-export", *(options.argv or [])],
    }


def _build(options: argparse.Namespace) -> BuildOptions:
    from aoft_deploy.artefacts.spec import BuildOptions

    return BuildOptions(
        batches=tuple(options.batches) if options.batches else None,
        compute_capability=options.compute_capability,
        opset=options.opset,
        refittable=options.refittable,
        refit=options.refit,
    )


def _fastest(options: argparse.Namespace) -> Exported:
    """Export every candidate, and print the result of each."""
    from aoft_deploy.export.fastest import BATCHES, Candidate, export_fastest

    def show(candidate: Candidate) -> None:
        reason = with_options(candidate.reason, parser())
        print(f"tried {candidate.to} {candidate.precision}: {reason or 'verified'}")

    exported, tried = export_fastest(
        options.merge,
        options.output,
        uint8=options.uint8,
        overwrite=options.overwrite,
        progress=show,
        **_common(options),
    )
    batches = " and ".join(map(str, BATCHES))
    for candidate in tried:
        if candidate.ratios:
            ratios = " and ".join(f"{ratio:.2f}×" for ratio in candidate.ratios)
            slower_at = " and ".join(map(str, candidate.slower_at))
            suffix = f"; slower than fp32 at batch {slower_at}: not chosen" if slower_at else ""
            print(f"{candidate.to} {candidate.precision}: {ratios} at batch {batches}{suffix}")
    return exported


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-export --help``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser()
    options.set_defaults(argv=arguments)
    return run(options, export, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
