"""The command and the Python lines that do the same as an export on the page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoft_demo.actions.formats import DEFAULT, Format
from aoft_deploy.artefacts.manifest import manifest_path, read_manifest
from aoft_deploy.artefacts.registry import get_exporter

__all__ = ["PICTURES", "Code", "Plan", "export_code", "export_command", "next_steps"]

PICTURES = "pictures"
"""Folder of pictures in the lines that are shown."""

Code = dict[str, str]
"""Lines by the name of their language or purpose."""


@dataclass(frozen=True)
class Plan:
    """An export in a folder that holds all its inputs.

    Attributes:
        sources: Names of the checkpoints.
        output: Name of the artefact.
        format: Its format.
        pictures: Whether it is checked on the pictures in ``PICTURES``.
        weights: File with the backbone's weights; None takes timm's own.
    """

    sources: Sequence[str]
    output: str
    format: Format
    pictures: bool
    weights: Path | None


def export_command(plan: Plan) -> list[str]:
    """The words of the command aoft-export."""
    chosen = plan.format
    words = ["aoft-export", "--fleet" if chosen.is_fleet else "--merge", *plan.sources]
    words += ["--to", chosen.to] if chosen.to != DEFAULT else []
    words += ["--precision", chosen.precision] if chosen.precision != "fp32" else []
    words += ["--uint8"] if chosen.uint8 else []
    words += ["--images", PICTURES] if plan.pictures else []
    words += ["--backbone-weights", plan.weights.name] if plan.weights else []
    return [*words, "--output", plan.output]


def export_code(plan: Plan) -> Code:
    """A command and Python lines that write the same artefact."""
    chosen, sources = plan.format, list(plan.sources)
    function = "export_fleet" if chosen.is_fleet else "export_merged"
    imports = [f"from aoft_deploy import {function}"]
    arguments = [repr(sources if chosen.is_fleet else sources[0]), repr(plan.output)]
    arguments += [f"to={chosen.to!r}"] if chosen.to != DEFAULT else []
    arguments += [f"precision={chosen.precision!r}"] if chosen.precision != "fp32" else []
    arguments += ["uint8=True"] if chosen.uint8 else []
    if plan.weights:
        imports.append("from aoft_deploy.checkpoints import BackboneSource")
        arguments.append(f"backbone=BackboneSource(weights=Path({plan.weights.name!r}))")
    if plan.pictures:
        imports.append("from aoft_deploy.export import VerifyOptions")
        arguments.append(f"verify=VerifyOptions(images=[Path({PICTURES!r})])")
    if plan.weights or plan.pictures:
        imports = ["from pathlib import Path", "", *imports]
    call = ",\n".join(f"    {argument}" for argument in arguments)
    lines = [*imports, "", f"exported = {function}(\n{call},\n)", "print(exported.report)"]
    return {"Shell": shlex.join(export_command(plan)), "Python": "\n".join(lines)}


def next_steps(artefact: Path, task: str | None = None) -> Code:
    """How to use an artefact, from the folder that holds it.

    Args:
        artefact: The artefact; its manifest is beside it.
        task: Name of a task if the artefact is a fleet.
    """
    manifest: dict[str, Any] = read_manifest(manifest_path(artefact))
    path = shlex.quote(artefact.name)
    option = "" if task is None else f" --task {shlex.quote(task)}"
    argument = "" if task is None else f", {task!r}"
    steps = {
        "Ask it about a picture": f"aoft-predict {path}{option} picture.png",
        "Serve it to programs": f"aoft-serve {path}",
        "Ask it in Python": (
            "from aoft_deploy import load_classifier\n\n"
            f"classifier = load_classifier({artefact.name!r}{argument})\n"
            'print(classifier.predict("picture.png"))'
        ),
    }
    own = get_exporter(manifest["exporter"]).next_step
    if own is not None:
        steps["Use it without this project"] = own(Path(artefact.name), manifest)
    return steps
