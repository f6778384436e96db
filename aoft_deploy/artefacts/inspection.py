"""What a checkpoint or an artefact holds, as JSON values."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.manifest import manifest_path
from aoft_deploy.artefacts.onnx_metadata import read_metadata
from aoft_deploy.errors import CheckpointError
from aoft_deploy.file_signatures import foreign
from aoft_deploy.files import file_digest, folder_digest

if TYPE_CHECKING:
    from aoft_deploy.checkpoints.checkpoint import Checkpoint

__all__ = ["inspect_file"]


OPENVINO_FILES = ("openvino_model.xml", "openvino_model.bin")
TENSORRT_FILES = ("engine.json", "model.plan")
TRITON_FILES = ("config.pbtxt", "1/model.onnx")


def inspect_file(path: Path) -> dict[str, Any]:
    """Describe a file of this project.

    Args:
        path: A checkpoint, a published RLRR .pth, a PEFT LoRA folder, an ONNX, OpenVINO, TensorRT,
            Triton or timm artefact, or a manifest.

    Returns:
        JSON values; ``kind`` says what the file is.

    Raises:
        CheckpointError: The file is missing, damaged, or none of these.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    if path.suffix == ".onnx":
        return {"kind": "ONNX artefact", **_common(path), **_onnx(path), **_manifest(path)}
    if path.suffix == ".json":
        return {"kind": "manifest", **_json(path)}
    if path.suffix == ".safetensors" and (metadata := _timm(path)):
        return {"kind": "timm artefact", **_common(path), **metadata, **_manifest(path)}
    from aoft_deploy.checkpoints.checkpoint import read_checkpoint
    from aoft_deploy.checkpoints.rlrr import is_torch_file, read_published

    if is_torch_file(path):
        tensors = read_published(path)
        return {"kind": "published RLRR checkpoint", **_common(path), **_tensors(tensors)}
    checkpoint = read_checkpoint(path)
    return {"kind": "checkpoint", **_common(path), **_checkpoint(checkpoint)}


def _folder(path: Path) -> dict[str, Any]:
    """What a folder holds, by a file that only such folders have."""
    for files, describe in (
        (OPENVINO_FILES, _openvino),
        (TENSORRT_FILES, _tensorrt),
        (TRITON_FILES, _triton),
    ):
        if (path / files[0]).is_file():
            return describe(path)
    return _peft(path)


def _tensorrt(path: Path) -> dict[str, Any]:
    """What stands beside the plan, which is not opened."""
    try:
        found = json.loads((path / TENSORRT_FILES[0]).read_text("utf-8"))
        info, digest = found.pop("info"), folder_digest(path, TENSORRT_FILES)
        told = ("batches", "library", "version", "capability", "origin")
        return {
            "kind": "TensorRT artefact",
            "file": str(path),
            "bytes": sum((path / name).stat().st_size for name in TENSORRT_FILES),
            "sha256": digest,
            **{key: found[key] for key in told},
            **{key: _decoded(text) for key, text in info.items()},
            **_manifest(path, digest),
        }
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no TensorRT artefact ({error!r:.80}).") from error


def _triton(path: Path) -> dict[str, Any]:
    """The model in the folder, and all files of it."""
    if not (path / TRITON_FILES[1]).is_file():
        raise CheckpointError(f"{path} is a Triton model without {TRITON_FILES[1]}.")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    digest = folder_digest(path, [str(file.relative_to(path)) for file in files])
    return {
        "kind": "Triton artefact",
        "file": str(path),
        "bytes": sum(file.stat().st_size for file in files),
        "sha256": digest,
        **_onnx(path / TRITON_FILES[1]),
        **_manifest(path, digest),
    }


def _common(path: Path) -> dict[str, Any]:
    return {"file": str(path), "bytes": path.stat().st_size, "sha256": file_digest(path)}


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "method": checkpoint.method,
        "settings": dict(checkpoint.settings),
        "backbone": checkpoint.backbone.to_dict(),
        "classes": list(checkpoint.classes),
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "training": dict(checkpoint.training),
        **_tensors(checkpoint.tensors),
    }


def _tensors(tensors: Any) -> dict[str, Any]:
    sites: Counter[str] = Counter()
    for name, tensor in tensors.items():
        owner = name.removeprefix("update.").rpartition(".")[0]
        sites["classifier" if name.startswith("head.") else owner] += tensor.numel()
    return {
        "trained_numbers": sum(sites.values()),
        "update_numbers": sum(sites.values()) - sites["classifier"],
        "sites": dict(sites),
    }


def _peft(path: Path) -> dict[str, Any]:
    from aoft_deploy.checkpoints.peft_adapter import FILES, read_peft_folder

    folder = read_peft_folder(path)
    digest = folder_digest(path, FILES)
    matrices = {f"head.{name}": tensor for name, tensor in folder.saved.items()}
    for module, (a, b) in folder.pairs.items():
        matrices |= {f"{module}.a": a, f"{module}.b": b}
    written = _decoded(folder.metadata.get("aoft", "{}"))
    return {
        "kind": "PEFT LoRA folder",
        "file": str(path),
        "bytes": sum((path / name).stat().st_size for name in FILES),
        "sha256": digest,
        **(written if isinstance(written, dict) else {}),
        "ranks": {module: len(a) for module, (a, _) in folder.pairs.items()},
        "factors": {module: folder.config.scaling(module) for module in folder.pairs},
        **_tensors(matrices),
        **_manifest(path, digest),
    }


def _onnx(path: Path) -> dict[str, Any]:
    import onnx

    metadata = read_metadata(path)
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise classes of their own
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} is no valid ONNX model ({reason}).") from error
    return {
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "nodes": len(model.graph.node),
        "operators": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        **{key: _decoded(text) for key, text in metadata.items()},
    }


def _openvino(path: Path) -> dict[str, Any]:
    """Metadata and operators, read from the XML alone."""
    from xml.etree import ElementTree

    try:
        root = ElementTree.parse(path / OPENVINO_FILES[0]).getroot()
        digest = folder_digest(path, OPENVINO_FILES)
    except (OSError, ElementTree.ParseError) as error:
        raise CheckpointError(f"{path} is no OpenVINO model ({error}).") from error
    operators = Counter(layer.get("type", "") for layer in root.iterfind("layers/layer"))
    written = root.find("rt_info/aoft")
    return {
        "kind": "OpenVINO artefact",
        "file": str(path),
        "bytes": sum((path / name).stat().st_size for name in OPENVINO_FILES),
        "sha256": digest,
        "operators": dict(operators.most_common()),
        **{
            entry.tag: _decoded(entry.get("value", ""))
            for entry in ([] if written is None else written)
        },
        **_manifest(path, digest),
    }


def _timm(path: Path) -> dict[str, Any]:
    """Metadata of a state dict that aoft-export wrote, empty for any other safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            metadata, tensors = file.metadata() or {}, len(file.keys())
    except (SafetensorError, OSError) as error:
        told = foreign(path, "safetensors")
        why = f": it {told}" if told else f" ({error})"
        raise CheckpointError(f"{path} is no safetensors file{why}.") from error
    if "format" not in metadata:
        return {}
    return {"tensors": tensors, **{key: _decoded(text) for key, text in metadata.items()}}


def _value(value: Any) -> str:
    from onnx import TensorProto

    kind = value.type.tensor_type
    shape = ", ".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
    return f"{value.name} {TensorProto.DataType.Name(kind.elem_type).lower()} [{shape}]"


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON file ({error}).") from error
    if not isinstance(value, dict) or "artefact" not in value:
        raise CheckpointError(f"{path} is no manifest of aoft-export.")
    return value


def _manifest(path: Path, digest: str | None = None) -> dict[str, Any]:
    """The verification from the manifest beside an artefact, if it is of this very one."""
    path = path.resolve() if path.is_dir() else path
    manifest = manifest_path(path)
    if not manifest.is_file():
        return {"manifest": "none"}
    values = _json(manifest)
    if values.get("sha256") != (digest or file_digest(path)):
        return {"manifest": "of another file: the artefact was changed after it was verified"}
    return {"manifest": "matches", "verification": values.get("verification")}
