"""Detect a file's format by its first bytes, independent of its suffix.

Common download mistakes are Git LFS pointers, HTML pages in place of the file, and archives that
were not unpacked. This module needs neither torch nor numpy.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

__all__ = ["file_kind", "foreign"]

STARTS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs\.github\.com/spec/", "lfs"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)*(<!doctype html|<html|<head|<body)", "html"),
    (rb"(\xef\xbb\xbf)?\s*<\?xml[^<]*<net ", "openvino"),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", "xml"),
    (rb"(\xef\xbb\xbf)?\s*[{\[]", "json"),
    (rb"\x1f\x8b", "gzip"),
    (rb"BZh[1-9]", "bzip2"),
    (rb"\xfd7zXZ\0", "xz"),
    (rb"\x28\xb5\x2f\xfd", "zstd"),
    (rb"7z\xbc\xaf\x27\x1c", "7z"),
    (rb"Rar!\x1a\x07", "rar"),
    (rb".{257}ustar", "tar"),
    (rb"PK[\x03\x05]", "zip"),
    (rb"\x80[\x02-\x05]", "pickle"),
    (rb"\x93NUMPY", "npy"),
    (rb"\x89HDF\r\n", "hdf5"),
    (rb"GGUF", "gguf"),
    (rb"ftrt", "tensorrt"),
    (rb".{4}TFL3", "tflite"),
    (rb"AOFTASK1", "packed"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", "picture"),
    (rb"%PDF", "pdf"),
    (rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]", "onnx"),
)
"""Regular expressions for the first bytes, with the format's key. The first match counts."""

UNPACK = "unpack it first, and give the file inside"
FOREIGN = {
    "lfs": "a Git LFS pointer instead of the file: fetch it with git lfs pull",
    "html": "an HTML page, which a server sent instead of the file: download it again",
    "xml": "an XML text, which a server may have sent instead of the file: download it again",
    "index": "the index of a checkpoint in several files: give one file with all weights",
    "json": "a JSON text without weights: give the file that it describes",
    "gzip": f"a gzip archive: {UNPACK}",
    "bzip2": f"a bzip2 archive: {UNPACK}",
    "xz": f"an xz archive: {UNPACK}",
    "zstd": f"a Zstandard archive: {UNPACK}",
    "7z": f"a 7z archive: {UNPACK}",
    "rar": f"a RAR archive: {UNPACK}",
    "tar": f"a tar archive: {UNPACK}",
    "archive": f"a zip archive: {UNPACK}",
    "cut": "an incomplete zip archive, as after an interrupted download: download it again",
    "script": "a TorchScript program, which is not run: save the model's state_dict() instead",
    "npy": "a single NumPy array: give all weights as .safetensors, .npz or .pth",
    "hdf5": "an HDF5 file, such as Keras writes: convert its weights to .safetensors",
    "keras": "a Keras model: convert its weights to .safetensors",
    "exported": "a program of torch.export: save the model's state_dict() instead",
    "gguf": "a GGUF file, whose weights are quantised: give the original weights",
    "openvino": "the graph of an OpenVINO model: give its folder, or what it was made from",
    "tensorrt": "a TensorRT engine: give its folder, or what it was made from",
    "tflite": "a TensorFlow Lite model: give the model that it was made from",
    "packed": "a file of packed tasks: give it as the tasks of a fleet",
    "picture": "a picture: give a model's file",
    "pdf": "a PDF document: give a model's file",
    "onnx": "an ONNX model: give the checkpoint or the weights that it was made from",
    "safetensors": "a safetensors file, but has another suffix",
    "torch": "a file of torch.save, but has another suffix",
    "pickle": "a pickle, which could run code, but has another suffix",
    "npz": "an .npz file of NumPy arrays, but has another suffix",
}
"""Description of each kind of file, and what the user should do."""


def file_kind(path: Path) -> str:
    """Return the kind of a file, such as ``"gzip"``; an empty string for an unknown kind.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    if len(start) > 8 and start[8:9] == b"{" and 0 < int.from_bytes(start[:8], "little") < 2**32:
        return "safetensors"
    kind = next((kind for rule, kind in STARTS if re.match(rule, start, re.DOTALL)), "")
    if kind == "zip":
        return _zip_kind(path)
    if kind == "json" and b'"weight_map"' in start:
        return "index"
    return kind


def foreign(path: Path, *expected: str) -> str:
    """Describe a file of an unexpected kind, as the end of a sentence that starts with its name.

    Args:
        path: The file.
        expected: Kinds that the caller can read.

    Returns:
        For example ``is a gzip archive: unpack it first``. Empty for an unknown or expected kind,
        and for a file that cannot be read.
    """
    try:
        kind = file_kind(path)
    except OSError:
        return ""
    return f"is {FOREIGN[kind]}" if kind in FOREIGN and kind not in expected else ""


def _zip_kind(path: Path) -> str:
    """Tell apart zip archives of PyTorch, of NumPy, and others."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "cut"
    leaves = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in leaves:
        return "script"
    if {"archive_format", "serialized_exported_program.json"} & leaves:
        return "exported"
    if "model.weights.h5" in leaves:
        return "keras"
    if "data.pkl" in leaves:
        return "torch"
    return "npz" if names and all(name.endswith(".npy") for name in names) else "archive"
