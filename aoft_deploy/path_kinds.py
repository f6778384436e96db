"""Say what a path is, and what to give instead, where a reader got something else.

This module needs neither torch nor numpy.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from aoft_deploy.file_signatures import file_kind, foreign
from aoft_deploy.texts import natural_order

__all__ = ["CHECKPOINT", "GIVE", "described", "missing", "run_folders"]

CHECKPOINT = "model.ckpt"
"""Name of the checkpoint in the folder of a training run."""

GIVE = {
    "any": "give what aoft-train or aoft-export wrote, such as model.ckpt or model.onnx",
    "artefact": "give what aoft-export wrote, such as model.onnx",
    "checkpoint": "give a model.ckpt, or the folder of its training run",
    "weights": "give a file with all weights of the backbone",
}
"""What each kind of reader takes, as advice."""

MADE_FROM = {
    "any": "give one that aoft-export wrote, under its suffix",
    "artefact": "export it first: aoft-export --merge {path}",
    "checkpoint": "give the checkpoint that it was made from",
    "weights": "give the weights that it was made from",
}
"""Advice for something that belongs to another step than the reader's."""

SUFFIXES = {
    ".py": "a Python script",
    ".sh": "a shell script",
    ".toml": "a TOML file",
    ".yaml": "a YAML file",
    ".yml": "a YAML file",
    ".csv": "a table",
    ".log": "a log",
    ".md": "a text",
    ".txt": "a text",
}
"""Texts, which have no signature."""

FILES_INSIDE = {
    ".ckpt": ("checkpoint", "checkpoints"),
    ".onnx": ("artefact", "ONNX models"),
    ".safetensors": ("weights", "weights"),
}
FOLDERS_INSIDE = {
    "adapter_config.json": ("checkpoint", "PEFT adapters"),
    "config.pbtxt": ("artefact", "Triton models"),
}
"""What a folder holds, by the suffix of its files or by a file in its sub-folders."""

LISTED = 5
"""Number of paths that a message lists."""

MOST_HEADER = 16 * 2**20
"""Bytes of a header or a JSON text that are read."""

DEPTH = 3
"""Levels of folders that are searched for runs; those of a suite are ``TASK/seed-N``."""


def described(path: Path, wanted: str) -> str:
    """What a path is, as the end of a sentence that starts with its name.

    Args:
        path: A file or folder.
        wanted: What the reader takes: ``artefact``, ``checkpoint``, ``weights``, or ``any`` of the
            first two.

    Returns:
        For example ``is an ONNX model: give the checkpoint that it was made from``. Empty for a
        path that is unknown, cannot be read, or is of the wanted kind.
    """
    try:
        found = _folder(path, wanted) if path.is_dir() else _file(path, wanted)
    except (OSError, ValueError, RecursionError):
        return ""
    what, _, advice = found.partition(": ")
    return f"is {what}: {advice or GIVE[wanted]}" if what else ""


def missing(path: Path) -> str:
    """The sentence for a path that does not exist, with similar names in its folder."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"There is no file {path}.{f' Did you mean {path.parent / close[0]}?' if close else ''}"


def run_folders(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The folders of training runs below a folder, in natural order, without runs inside runs.

    Raises:
        OSError: A folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    for child in (folder / name for name in sorted(names, key=natural_order)):
        if (child / CHECKPOINT).is_file():
            yield child
        elif depth > 1:
            yield from run_folders(child, depth - 1)


def _folder(path: Path, wanted: str) -> str:
    """``WHAT`` or ``WHAT: ADVICE`` for a folder; empty if it is of the wanted kind."""
    names = set(os.listdir(path))
    to_export = MADE_FROM["artefact"].format(path=path)
    if CHECKPOINT in names:
        return _unless(wanted, "checkpoint", "the folder of a training run", artefact=to_export)
    if names & {"metrics.jsonl", "resume.safetensors"}:
        return "the folder of a training run that wrote no model.ckpt: continue it with --resume"
    if "adapter_config.json" in names:
        return _unless(wanted, "checkpoint", "a PEFT adapter", artefact=to_export)
    made = {
        "openvino_model.xml": "an OpenVINO model",
        "config.pbtxt": "a Triton model",
        "model.plan": "a TensorRT engine",
    }
    for name, what in made.items():
        if name in names:
            return _unless(wanted, "artefact", what, checkpoint=MADE_FROM["checkpoint"])
    if "saved_model.pb" in names:
        return "a TensorFlow model"
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".h5"))]
    if "config.json" in names and weights:
        file = next((n for n in ("model.safetensors", "pytorch_model.bin") if n in names), "")
        advice = f": give {path / file}" if file and wanted == "weights" else ""
        return f"the folder of a Hugging Face model{advice}"
    if "adapter_model.safetensors" in names:
        return "a PEFT adapter without adapter_config.json: save it again with save_pretrained"
    return _inside(path, names, wanted)


def _inside(path: Path, names: Collection[str], wanted: str) -> str:
    """``WHAT: ADVICE`` for a folder of models, or ``WHAT`` for one without."""
    runs = [str(run) for run in run_folders(path)]
    if runs:
        what = f"a folder of {len(runs)} training run{'s'[: len(runs) > 1]}"
        return f"{what}: {_choice(runs, 'checkpoint', wanted)}"
    for suffix, (own, what) in FILES_INSIDE.items():
        inside = sorted(str(path / name) for name in names if name.lower().endswith(suffix))
        if inside:
            return f"a folder of {what}: {_choice(inside, own, wanted)}"
    for file, (own, what) in FOLDERS_INSIDE.items():
        inside = sorted(str(path / name) for name in names if (path / name / file).is_file())
        if inside:
            return f"a folder of {what}: {_choice(inside, own, wanted)}"
    return "a folder without a model" if names else "an empty folder"


def _file(path: Path, wanted: str) -> str:
    """``WHAT`` or ``WHAT: ADVICE`` for a file; empty if it is unknown or of the wanted kind."""
    kind = file_kind(path)
    if kind == "safetensors":
        return _safetensors(path, wanted)
    if kind == "json":
        found = _json(path, wanted)
        if found:
            return found
    if kind == "onnx":
        return _unless(wanted, "artefact", "an ONNX model", **MADE_FROM)
    if path.suffix in SUFFIXES and (not kind or kind == "json"):
        return SUFFIXES[path.suffix]
    other = foreign(path, "torch", "pickle", "npz").removeprefix("is ")
    return other.partition(":")[0] if kind in ("picture", "pdf") else other


def _safetensors(path: Path, wanted: str) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, MOST_HEADER)))
    metadata = header.pop("__metadata__", {})
    if "aoft" in metadata:
        to_export = MADE_FROM["artefact"].format(path=path)
        return _unless(wanted, "checkpoint", "a checkpoint", artefact=to_export)
    if "aoft-run" in metadata:
        return f"the state of an unfinished training run: give its {path.parent / CHECKPOINT}"
    if any(".lora_A." in name for name in header):
        return f"the weights of a PEFT adapter: give their folder, {path.parent}"
    if str(metadata.get("format", "")).startswith("aoft-deploy/"):
        return _unless(wanted, "artefact", "a merged model of aoft-export", **MADE_FROM)
    return _unless(wanted, "weights", "a file of weights, such as a backbone's")


def _json(path: Path, wanted: str) -> str:
    with path.open(encoding="utf-8") as file:
        text = file.read(MOST_HEADER)
    for part in (text, text.partition("\n")[0]):  # the whole text, or one value a line
        try:
            value = json.loads(part)
            break
        except ValueError:
            value = None
    keys = set(value) if isinstance(value, dict) else set()
    if keys >= {"artefact", "sha256"}:
        made = path.with_name(path.name.removesuffix(".json"))
        advice = f"give {made}" if wanted == "artefact" else MADE_FROM[wanted]
        return f"the manifest of {made.name}: {advice}"
    if "peft_type" in keys:
        return f"the config of a PEFT adapter: give its folder, {path.parent}"
    if {"epoch", "lr"} <= keys:
        return f"the metrics of a training run: give its folder, {path.parent}"
    if keys & {"architectures", "architecture", "model_type"}:
        return "the config of a model, without weights"
    return "a notebook" if "nbformat" in keys else ""


def _unless(wanted: str, own: str, what: str, **advice: str) -> str:
    """Empty if ``own`` is wanted; else what it is, with the advice for the wanted kind."""
    if wanted == own or (wanted, own) == ("any", "checkpoint"):
        return ""
    return f"{what}: {advice[wanted]}" if wanted in advice else what


def _choice(paths: Sequence[str], own: str, wanted: str) -> str:
    """Advice to give one of the paths in a folder, or what belongs to their step."""
    if wanted in (own, "any"):
        rest = f" and {len(paths) - LISTED} more" if len(paths) > LISTED else ""
        return f"give {'one of ' * (len(paths) > 1)}{', '.join(paths[:LISTED])}{rest}"
    if (own, wanted) == ("checkpoint", "artefact"):
        return f"export one first: aoft-export --merge {paths[0]}"
    return MADE_FROM[wanted] if own == "artefact" else GIVE[wanted]
