"""aoft-export: merge a checkpoint into its backbone and write a verified artefact."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.cli.command import run, with_options
from aoft_deploy.cli.export_options import check_usage, parser
from aoft_deploy.cli.placements import placement_text

if TYPE_CHECKING:
    from aoft_deploy.artefacts.spec import BuildOptions
    from aoft_deploy.artefacts.verification import Report
    from aoft_deploy.export.gpu_verification import GpuVerification
    from aoft_deploy.export.publishing import Exported
    from aoft_deploy.export.race import Candidate

__all__ = ["main", "next_step"]


def export(options: argparse.Namespace) -> None:
    """Run the export, and print the verification results."""
    check_usage(options)
    if options.to == "auto":
        _print_exported(_fastest(options), options)
    elif options.fleet:
        _print_exported(_fleet(options), options)
    else:
        for exported in _merged(options):
            _print_exported(exported, options)
    _note_skipped([*options.images, *options.calibrate])


def _print_exported(exported: Exported, options: argparse.Namespace) -> None:
    print(f"{exported.path}  {exported.size / 2**20:.1f} MiB")
    _print_report(exported.report)
    if exported.gpu is not None and exported.gpu.device is not None:
        print(_on_gpu(exported.gpu))
    if exported.left_in_float:
        higher = "fp16 or float32" if options.precision == "fp8" else "float32"
        print(f"left in {higher}: {', '.join(exported.left_in_float)}")
    if exported.device is None:
        print(_not_on_device(exported, options))
    print(f"manifest: {exported.manifest}")
    print(f"next: {next_step(exported.path)}", flush=True)


def _print_report(report: Report) -> None:
    from aoft_deploy.artefacts.sampling import CONFIDENCE, images_needed
    from aoft_deploy.artefacts.verification import BATCH_SIZES

    allowed = "" if report.tolerance is None else f" (allowed {report.tolerance:.1e})"
    minimum = f" (minimum {report.min_agreement:.1%})" if report.min_agreement else ""
    sizes = f"batch size{'s' * (len(report.batch_sizes) > 1)} {_listed(report.batch_sizes)}"
    if report.same_graph_as is not None:
        sizes += f" (same graph as {report.same_graph_as}, verified at {_listed(BATCH_SIZES)})"
    print(
        f"verified on {report.images} images at {sizes}: max |Δlogit| {report.max_abs:.1e}"
        f"{allowed}, agreement {_at_least(report.agreement)}{minimum}"
    )
    if report.agreement_shown is None:
        return
    claim = f"{report.images} images show an agreement of at least "
    claim += f"{_at_least(report.agreement_shown)} ({CONFIDENCE:.0%} confidence)"
    if report.agreement_shown < report.min_agreement < 1:
        needed = images_needed(report.min_agreement)
        claim += f"; {needed} images that all agree would show {report.min_agreement:.1%}"
    print(claim)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _on_gpu(gpu: GpuVerification) -> str:
    """The line for a GPU beside the CPU."""
    if gpu.report is None:
        return f"not verified on {gpu.device}: {gpu.reason}"
    report = gpu.report
    return (
        f"verified on {gpu.device}: max |Δlogit| {report.max_abs:.1e}, agreement "
        f"{_at_least(report.agreement)}, {placement_text(gpu.placement)}"
    )


def _at_least(share: float) -> str:
    """A share in per cent, rounded down, so that 100.0% means all."""
    return f"{math.floor(round(share * 1000, 6)) / 10:.1f}%"


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


def next_step(artefact: Path) -> str:
    """How to use an artefact, as commands or an expression of Python."""
    from aoft_deploy.artefacts.manifest import manifest_path, read_manifest
    from aoft_deploy.artefacts.registry import get_exporter

    manifest = read_manifest(manifest_path(artefact))
    own = get_exporter(manifest["exporter"]).next_step
    if own is not None:
        return own(artefact, manifest)
    path = shlex.quote(str(artefact))
    tasks = manifest.get("tasks")
    task = f" --task {shlex.quote(tasks[0]['name'])}" if tasks else ""
    lanes = manifest.get("chosen", {}).get("lanes", 1)
    several = f" --lanes {lanes}" if lanes > 1 else ""
    return f"aoft-predict {path}{task} IMAGE …, or aoft-serve {path}{several}"


def _note_skipped(sources: Sequence[Path]) -> None:
    """Print a note on files in folders that are not images."""
    from aoft_deploy.data.listing import describe_skipped, image_files

    skipped = Counter[str]()
    image_files(list(dict.fromkeys(sources)), skipped)
    if skipped:
        print(f"note: {describe_skipped(skipped)}.", file=sys.stderr)


def _merged(options: argparse.Namespace) -> Iterator[Exported]:
    from aoft_deploy.export.merged import export_each, export_merged

    common = {
        "to": options.to,
        "precision": options.precision or "fp32",
        "uint8": options.uint8,
        "build": _build(options),
        **_common(options),
    }
    if len(options.merge) > 1:
        return export_each(options.merge, **common)
    return iter([export_merged(options.merge[0], options.output, **common)])


def _fleet(options: argparse.Namespace) -> Exported:
    from aoft_deploy.export.fleet import export_fleet

    return export_fleet(
        options.fleet,
        options.output,
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
        "overwrite": options.overwrite,
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
    from aoft_deploy.export.fastest import (
        BATCHES,
        CANDIDATES,
        export_fastest,
        export_fastest_fleet,
    )
    from aoft_deploy.export.race import criterion

    def show(candidate: Candidate) -> None:
        reason = with_options(candidate.reason, parser())
        print(f"{candidate.name}: {f'left out, {reason}' if reason else 'verified'}", flush=True)
        if (candidate.to, candidate.precision) == CANDIDATES[-1]:
            print("timing the verified artefacts in turn", flush=True)

    batches = sorted({*(options.batches or BATCHES)})
    print(f"criterion: {criterion(batches, options.goal)}", flush=True)
    how = {"batches": batches, "goal": options.goal, "progress": show, **_common(options)}
    exported, race = (
        export_fastest_fleet(options.fleet, options.output, form=options.form, **how)
        if options.fleet
        else export_fastest(options.merge[0], options.output, uint8=options.uint8, **how)
    )
    for candidate in race.candidates:
        if candidate.ratios:
            ratios = ", ".join(f"{r:.2f}× at batch {b}" for b, r in candidate.ratios.items())
            slower_at = " and ".join(map(str, candidate.slower_at))
            suffix = f"; slower than fp32 at batch {slower_at}" if slower_at else ""
            lanes = f" in {candidate.lanes} lanes" if candidate.lanes > 1 else ""
            print(f"{candidate.name}: {ratios}{lanes}{suffix}")
    print(f"chosen: {race.chosen.name}")
    for batch in race.batches:
        best = race.fastest(batch)
        print(f"fastest at batch {batch}: {best.name}", end="")
        if best.name == race.chosen.name:
            print()
        else:
            ratio = best.ratios[batch] / race.chosen.ratios[batch]
            print(f", {ratio:.2f}× the chosen one's speed; by {_command_for(best, options)}")
    return exported


def _command_for(candidate: Candidate, options: argparse.Namespace) -> str:
    """The command that exports a candidate of --to auto."""
    from aoft_deploy.artefacts.registry import get_exporter
    from aoft_deploy.export.output_paths import artefact_path

    exporter = get_exporter(candidate.to)
    changed = argparse.Namespace(**vars(options))
    changed.to, changed.batches, changed.goal = candidate.to, None, "latency"
    changed.overwrite = False
    changed.precision = None if candidate.precision == "fp32" else candidate.precision
    if candidate.precision not in exporter.calibrated:
        changed.calibrate = []
    if options.output:
        changed.output = artefact_path(options.output, exporter, candidate.precision)
    return _command(changed)


def _command(options: argparse.Namespace) -> str:
    """The command line with these options, quoted for the shell."""
    words = ["aoft-export"]
    for action in parser()._actions:
        value = getattr(options, action.dest, None)
        if value is None or value == action.default:
            continue
        flag, values = max(action.option_strings, key=len), value
        if not isinstance(value, list):
            values = [] if action.nargs == 0 else [value]
        if action.nargs is None:
            words += [word for each in values for word in (flag, str(each))]
        else:
            words += [flag, *map(str, values)]
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-export --help``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser()
    options.set_defaults(argv=arguments)
    return run(options, export, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
