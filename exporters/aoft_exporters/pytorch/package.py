"""The file of an AOTInductor package: what it was compiled for, and whether it is unchanged.

A package is a ZIP archive with a shared library of native code. ``aoft.json`` in it holds the
artefact's metadata, the device and the version of PyTorch that it was compiled for, and the SHA-256
of everything else. It is read without running any of the code.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aoft_deploy.errors import ArtefactError
from aoft_deploy.files import json_text
from aoft_deploy.texts import one_line

__all__ = ["Package", "Target"]

FORMAT = "aoft-deploy-aoti/1"
METADATA = "extra/aoft.json"
LARGEST = 1 << 24
"""Largest number of bytes of the metadata."""


@dataclass(frozen=True)
class Target:
    """What a package is compiled for. The code runs there only.

    Attributes:
        torch: Version of PyTorch.
        device: ``cpu`` or ``cuda``.
        capability: The GPU's compute capability, such as ``9.0``; empty for a CPU.
        processor: Extensions of the CPU's instruction set.
    """

    torch: str
    device: str
    capability: str
    processor: tuple[str, ...]

    @classmethod
    def here(cls, device: Any) -> Target:
        """This process's PyTorch, on a device."""
        import torch

        found: Mapping[str, Any] = torch.cpu.get_capabilities()
        extensions = sorted(name for name, value in found.items() if value is True)
        capability = ""
        if device.type == "cuda":
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return cls(torch.__version__, device.type, capability, tuple(extensions))

    def check(self, path: Path, here: Target) -> None:
        """Check that a package for this target runs ``here``.

        Raises:
            ArtefactError: It does not.
        """
        missing = sorted({*self.processor} - {*here.processor})
        for what, ours, theirs in (
            ("PyTorch", self.torch, here.torch),
            ("GPUs of compute capability", self.capability, here.capability),
        ):
            if ours != theirs:
                raise ArtefactError(
                    f"{path} was compiled for {what} {ours}, but this machine has {theirs}: "
                    "export it again here."
                )
        if missing:
            raise ArtefactError(
                f"{path} was compiled for processors with {', '.join(missing)}, which this one "
                "does not have: export it again here."
            )


@dataclass(frozen=True)
class Package:
    """Content of ``aoft.json``.

    Attributes:
        info: Metadata: classes, preprocessing, backbone, method, precision.
        target: What the code was compiled for.
        size: Height and width of an image in pixels.
        sha256: SHA-256 of all other files in the archive.
    """

    info: Mapping[str, str]
    target: Target
    size: tuple[int, int]
    sha256: str = ""

    def add_to(self, path: Path) -> None:
        """Add the metadata to an archive that PyTorch wrote."""
        with zipfile.ZipFile(path, "a") as archive:
            folder = archive.namelist()[0].partition("/")[0]
            complete = replace(self, sha256=_digest(archive))
            text = json_text({"format": FORMAT, **asdict(complete)}, indent=1)
            archive.writestr(f"{folder}/{METADATA}", text)

    @classmethod
    def read(cls, path: Path, *, verified: bool) -> Package:
        """Read the metadata of an archive.

        Args:
            path: The archive.
            verified: Whether to compare all other files with their hash.

        Raises:
            ArtefactError: The file is damaged or changed, or was not written by the exporter.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                (name,) = (each for each in archive.namelist() if _is_metadata(each))
                if archive.getinfo(name).file_size > LARGEST:
                    raise ValueError("its metadata are too large")
                values = json.loads(archive.read(name))
                if values.pop("format") != FORMAT:
                    raise ValueError("another format")
                target = values.pop("target")
                target = Target(**{**target, "processor": tuple(target["processor"])})
                height, width = map(int, values.pop("size"))
                info = dict(values.pop("info"))
                package = cls(info, target, (height, width), **values)
                digest = _digest(archive) if verified else package.sha256
        except (
            *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
            *(zipfile.BadZipFile, NotImplementedError, EOFError),
        ) as error:
            reason = one_line(error, 120)
            raise ArtefactError(f"{path} is no package of the aoti exporter ({reason}).") from error
        if digest != package.sha256:
            raise ArtefactError(
                f"{path} was changed after it was written, so its code is not run: export it again."
            )
        return package


def _is_metadata(name: str) -> bool:
    return name.partition("/")[2] == METADATA


def _digest(archive: zipfile.ZipFile) -> str:
    """SHA-256 of the names and contents of all files but the metadata."""
    digest = hashlib.sha256()
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a file in it is compressed")
        if not _is_metadata(entry.filename):
            with archive.open(entry) as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            digest.update(f"{content}  {entry.filename}\n".encode())
    return digest.hexdigest()
