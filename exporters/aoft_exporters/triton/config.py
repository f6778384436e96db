"""Write the configuration of a Triton model, and the names of its classes or tasks."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.classes import Classes
from aoft_deploy.errors import SettingError

__all__ = ["CONFIG", "LABELS", "TASKS", "check_labels", "serve_command", "write_config"]

CONFIG = "config.pbtxt"
LABELS = "labels.txt"
TASKS = "tasks.json"


class Word(NamedTuple):
    """An enum value of the configuration, written without quotes."""

    text: str


def check_labels(spec: ExportSpec) -> None:
    """Check that the class names can be written one per line.

    Raises:
        SettingError: A name contains a line break.
    """
    for name in _classes(spec) or ():
        if "\n" in name or "\r" in name:
            raise SettingError(
                f"The class {name!r} has a line break, but Triton's labels are one per line: "
                "rename it, or export to onnx."
            )


def write_config(folder: Path, spec: ExportSpec, backend: str) -> None:
    """Write the configuration, and the labels of a single model or the tasks of a fleet.

    The configuration does not name the model: Triton takes the folder's name.

    Args:
        folder: The model's folder in a repository.
        spec: Input form, classes or tasks, and batch sizes.
        backend: Triton's name of the backend that runs the model.
    """
    text = "".join(f"{line}\n" for line in _lines(_config(spec, backend)))
    (folder / CONFIG).write_text(text, "utf-8")
    classes = _classes(spec)
    if classes is not None:
        (folder / LABELS).write_text("".join(f"{name}\n" for name in classes), "utf-8")
    if ArtefactInfo(spec.metadata).is_fleet:
        (folder / TASKS).write_text(spec.metadata["tasks"] + "\n", "utf-8")


def serve_command(path: Path, manifest: Mapping[str, Any]) -> str:
    """Command that serves a model's folder with Triton."""
    return f"tritonserver --model-repository {shlex.quote(str(path.resolve().parent))}"


def _config(spec: ExportSpec, backend: str) -> dict[str, Any]:
    """Fields of Triton's ``ModelConfig``. Shapes do not include the batch axis.

    Clients send ``task`` with shape [1], since Triton requires at least one axis; it is reshaped to
    [] for the model. A preferred batch size is set only for TensorRT, which is tuned for it.
    """
    info = ArtefactInfo(spec.metadata)
    classes = _classes(spec)
    widest = max(map(len, info.tasks.values())) if info.is_fleet else -1
    output = {
        "name": "logits",
        "data_type": Word("TYPE_FP32"),
        "dims": [widest if classes is None else len(classes)],
        **({} if classes is None else {"label_filename": LABELS}),
    }
    kind = Word("TYPE_UINT8" if spec.input.uint8 else "TYPE_FP32")
    inputs: dict[str, dict[str, Any]] = {
        spec.input.name: {"data_type": kind, "dims": list(spec.input.shape)}
    }
    if info.is_fleet:
        inputs["task"] = {"data_type": Word("TYPE_INT64"), "dims": [1]}
    reshape: dict[str, dict[str, Any]] = {"task": {"reshape": {"shape": []}}}
    usual = spec.build.batch_range[1]
    batching = {"preferred_batch_size": [usual]} if backend == "tensorrt" else {}
    warmup_inputs = [
        {"key": name, "value": {**tensor, "zero_data": True}} for name, tensor in inputs.items()
    ]
    metadata_keys = ("activation", "preprocessing", "precision", "method")
    return {
        "backend": backend,
        "max_batch_size": spec.build.batch_range[2],
        "input": [{"name": n, **tensor, **reshape.get(n, {})} for n, tensor in inputs.items()],
        "output": [output],
        "dynamic_batching": batching,
        "model_warmup": [
            {"name": f"batch of {size}", "batch_size": size, "inputs": warmup_inputs}
            for size in sorted(set(spec.build.batch_range))
        ],
        "parameters": [
            {"key": key, "value": {"string_value": spec.metadata[key]}}
            for key in metadata_keys
            if key in spec.metadata
        ],
    }


def _classes(spec: ExportSpec) -> Classes | None:
    """Class names of a single model; None for a fleet or if they are unknown."""
    info = ArtefactInfo(spec.metadata)
    return info.classes if "classes" in info.texts else None


def _lines(fields: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Lines of a message in protobuf's text format; a list is a repeated field."""
    for name, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                yield f"{indent}{name} {{"
                yield from _lines(each, indent + "  ")
                yield f"{indent}}}"
            else:
                yield f"{indent}{name}: {_scalar(each)}"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return value.text
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    escaped = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}
    return '"' + "".join(escaped.get(letter, letter) for letter in value) + '"'
