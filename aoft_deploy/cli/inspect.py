"""aoft-inspect: show the contents of a checkpoint or artefact, or plot a checkpoint's geometry."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from aoft_deploy.cli.command import Parser, add_import_option, run

__all__ = ["describe", "main"]

SHOWN = 12
"""Number of entries of a list or table that the text output shows."""

KINDS = {
    "rows": "rows of W",
    "columns": "columns of W",
    "weight": "W",
    "change": "ΔW",
    "down": "down",
    "up": "up",
    "prompts": "prompts",
}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog="aoft-inspect",
        description="Show the contents of a checkpoint, a training run, an artefact, a manifest or "
        "a PEFT LoRA folder. With --plots, plot the angles between the vectors of a checkpoint's "
        "matrices, their spectral norms and their deviation from orthogonality.",
    )
    options.add_argument(
        "file",
        type=Path,
        metavar="PATH",
        help="a file or folder that aoft-train, aoft-export or PEFT wrote",
    )
    options.add_argument("--json", action="store_true", help="print everything as JSON")
    plots = options.add_argument_group("plots (needs the backbone's weights)")
    plots.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help="write PNG files and analysis.json into this folder",
    )
    plots.add_argument("--overwrite", action="store_true", help="replace an earlier analysis")
    plots.add_argument("--backbone", metavar="TIMM_NAME", help="instead of the checkpoint's own")
    plots.add_argument(
        "--backbone-weights", type=Path, metavar="FILE", help=".safetensors, .pth, .bin or JAX .npz"
    )
    add_import_option(plots)
    plots.add_argument(
        "--force",
        action="store_true",
        help="accept backbone weights that differ from those in training",
    )
    return options


def inspect(options: argparse.Namespace) -> None:
    """Print the description, or write and print the analysis."""
    if options.plots is not None:
        _analyse(options)
        return
    if options.backbone or options.backbone_weights or options.force or options.overwrite:
        parser().error("--backbone, --backbone-weights, --force and --overwrite need --plots")
    description = describe(options.file)
    if options.json:
        print(json.dumps(description, indent=2, ensure_ascii=False))
        return
    for key, value in description.items():
        rows = value.items() if key == "runs" else [(key.replace("_", " "), value)]
        for name, entry in rows:
            print(f"{name:17} {_text(entry)}")


def describe(path: Path) -> dict[str, Any]:
    """Describe an artefact, a manifest, a checkpoint or a folder of runs as JSON values."""
    from aoft_deploy.artefacts.inspection import describe_artefact

    description = describe_artefact(path)
    if description is None:
        from aoft_deploy.checkpoints.inspection import describe_checkpoint

        description = describe_checkpoint(path)
    return description


def _analyse(options: argparse.Namespace) -> None:
    from aoft_deploy.drawing import check_matplotlib
    from aoft_deploy.training.analysis.files import check_folder, write_analysis

    check_matplotlib()
    check_folder(options.plots, options.overwrite)
    from aoft_deploy.training.analysis.quantities import analyse_file

    analysis = analyse_file(
        options.file,
        backbone=options.backbone,
        weights=options.backbone_weights,
        force=options.force,
    )
    files = write_analysis(analysis, options.plots, options.overwrite)
    if options.json:
        print(json.dumps(analysis, indent=2, ensure_ascii=False))
        return
    print("\n".join(_table(analysis)))
    print(f"wrote {', '.join(file.name for file in files)} into {options.plots}")


def _table(analysis: Mapping[str, Any]) -> list[str]:
    """A summary over all layers, with one line for each kind of matrix."""
    lines = ["angles (degrees)    mean      sd  random sd  farthest from 90"]
    for kind, a in analysis["angles"].items():
        figures = (
            f"{a['mean']:8.2f}{a['sd']:8.2f}{a['random_sd']:11.2f}{a['farthest_from_90']:18.2f}"
        )
        lines.append(f"  {KINDS[kind]:14}{figures}")
    columns = "       least    median   largest"
    lines.append(f"spectral norms {columns}")
    changed = [x for x in analysis["layers"] if x["spectral_norms"].keys() - {"weight"}]
    for kind in ("weight", "change", "down", "up", "prompts"):
        lines += _spread(KINDS[kind], [x["spectral_norms"].get(kind) for x in changed])
    lines += _spread("ΔW / W", [x["change_ratio"] for x in changed])
    rows = []
    for kind in ("down", "up", "prompts"):
        rows += _spread(KINDS[kind], [x["deviations"].get(kind) for x in changed])
    lines += [f"max |AOᵀAO − I| {columns[1:]}", *rows] if rows else []
    return lines + [f"note: {note}" for note in analysis["notes"]]


def _spread(name: str, values: Sequence[float | None]) -> list[str]:
    known = [value for value in values if value is not None]
    if not known:
        return []
    figures = "".join(f"{f(known):10.3g}" for f in (min, median, max))
    return [f"  {name:15}{figures}"]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        parts = [f"{k} {_text(v)}" for k, v in list(value.items())[:SHOWN]]
    elif isinstance(value, list):
        parts = [_text(v) for v in value[:SHOWN]]
    else:
        number = {int: ",", float: ".6g"}.get(type(value))  # a bool is neither
        return str(value) if number is None else format(value, number)
    rest = len(value) - len(parts)
    return ", ".join(parts + ([f"… and {rest} more"] if rest else []))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-inspect --help``."""
    return run(parser(), inspect, argv)


if __name__ == "__main__":
    raise SystemExit(main())
