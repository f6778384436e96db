"""aoft-export: merge a checkpoint into its backbone and write a verified artefact."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.cli.command import run, with_options

if TYPE_CHECKING:
    from aoft_deploy.artefacts.spec import BuildOptions
    from aoft_deploy.export.publishing import Exported

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="aoft-export",
        description="Merge a fine-tuned checkpoint into its backbone, or put many beside each "
        "other on one backbone, export, and verify the artefact against the unmerged model before "
        "it appears.",
    )
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--merge",
        type=Path,
        metavar="CKPT",
        help="model.ckpt, published RLRR .pth, or PEFT LoRA folder",
    )
    what.add_argument(
        "--fleet",
        type=Path,
        nargs="+",
        metavar="CKPT",
        help="checkpoints of one backbone: one graph that answers each image by its own task",
    )
    options.add_argument(
        "--to",
        default="onnx",
        metavar="NAME",
        help="onnx (default), openvino, tensorrt, triton, triton-tensorrt, timm or peft; auto: the "
        "fastest on this machine whose answers hold",
    )
    options.add_argument(
        "-o",
        "--output",
        type=Path,
        help="artefact; default: beside the checkpoint, or a fleet's in this folder; a file of "
        "that name is replaced, a folder is not",
    )
    options.add_argument(
        "--overwrite",
        action="store_true",
        help="of auto: replace the artefact of the chosen name",
    )
    options.add_argument(
        "--uint8",
        action="store_true",
        help="take uint8 pixels [batch, H, W, 3] and normalise inside",
    )
    options.add_argument("--backbone", metavar="TIMM_NAME", help="instead of the checkpoint's own")
    options.add_argument(
        "--backbone-weights",
        dest="weights",
        type=Path,
        metavar="FILE",
        help=".safetensors, .pth, .bin or JAX .npz",
    )
    options.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="verify with these images, or folders of images, too",
    )
    options.add_argument(
        "--precision",
        metavar="NAME",
        help="fp32 (default); int8, fp16 or bf16 where the exporter has it, judged on --images",
    )
    options.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="int8 of openvino learns its ranges from these images, or folders of images",
    )
    options.add_argument(
        "--form",
        default="auto",
        metavar="NAME",
        help="of a fleet: mixed (any tasks in one batch), folded (task by task), or auto (default)",
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
        help="of tensorrt: sizes of the batches that the engine takes (default 1 8 32)",
    )
    options.add_argument(
        "--compute-capability",
        metavar="X.Y",
        help="of tensorrt: build for this kind of GPU, such as 8.9, instead of this machine's",
    )
    options.add_argument(
        "--opset",
        type=int,
        metavar="N",
        help="of onnx: 23 (default: attention is one operator) or 20, for older runtimes",
    )
    options.add_argument(
        "--refittable",
        action="store_true",
        help="of tensorrt: let the engine be given other weights later (may cost speed)",
    )
    options.add_argument(
        "--refit",
        type=Path,
        metavar="ENGINE",
        help="of tensorrt: give the weights to this engine instead of building one, where possible",
    )
    options.add_argument(
        "--force", action="store_true", help="accept other backbone weights than those trained on"
    )
    return options


def export(options: argparse.Namespace) -> None:
    """Export and print the figures."""
    _check_usage(options)
    if options.fleet:
        exported = _fleet(options)
    elif options.to == "auto":
        exported = _fastest(options)
    else:
        exported = _merged(options)
    _note_passed_over([*options.images, *options.calibrate])
    report = exported.report
    print(f"{exported.path}  {exported.size / 2**20:.1f} MiB")
    allowed = f"{report.tolerance:.1e}" if report.tolerance is not None else "any"
    asked = f" (asked {report.min_agreement:.1%})" if report.min_agreement else ""
    print(
        f"verified on {report.images} images at batch sizes "
        f"{', '.join(map(str, report.batch_sizes))}: max |Δlogit| {report.max_abs:.1e} "
        f"(allowed {allowed}), top-1 agreement {report.agreement:.1%}{asked}"
    )
    if exported.left_in_float:
        print(f"left in float32: {', '.join(exported.left_in_float)}")
    if exported.device is None:
        print(_not_on_device(exported, options))
    print(f"manifest: {exported.manifest}")


def _check_usage(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
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
    """The notice on an artefact that this machine cannot run in its own precision."""
    from aoft_deploy.artefacts.registry import get_exporter

    figures = f"the figures are those of {exported.arithmetic}"
    if get_exporter(options.to).device is None:
        why = f"no runtime on the CPU computes in {options.precision}"
    else:
        why = "this machine has no GPU that runs the engine"
        figures += "; the engine is compared with them when it is loaded"
    return f"NOT VERIFIED ON DEVICE: {why}, so {figures}"


def _note_passed_over(sources: Sequence[Path]) -> None:
    """Name the files in folders that are no images."""
    from aoft_deploy.data.listing import describe_skipped, image_files

    others = Counter[str]()
    image_files(list(dict.fromkeys(sources)), others)
    if others:
        print(f"note: {describe_skipped(others)}.", file=sys.stderr)


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
    """Arguments of every export."""
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
    """Export every candidate, and print the outcome of each."""
    from aoft_deploy.export.fastest import BATCHES, Candidate, export_fastest

    def show(candidate: Candidate) -> None:
        reason = with_options(candidate.reason, parser())
        print(f"tried {candidate.to} {candidate.precision}: {reason or 'answers hold'}")

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
            slow = " and ".join(map(str, candidate.slower_at))
            suffix = f"; slower than fp32 at batch {slow}: not chosen" if slow else ""
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
