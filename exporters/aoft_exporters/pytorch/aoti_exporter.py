"""Export to an AOTInductor package (``.pt2``): the merged model, compiled by PyTorch's Inductor.

The package is compiled for this machine's GPU, or its CPU if there is none, and for the installed
version of PyTorch. It runs without timm and without a compiler. Its code is native: open a package
of a trusted source only.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.errors import ArtefactError, OutputError, SettingError
from aoft_deploy.texts import one_line
from aoft_exporters.pytorch.engine import DTYPES, TorchEngine, dtype_of, torch_device
from aoft_exporters.pytorch.package import Package, Target

if TYPE_CHECKING:
    from torch import nn

__all__ = ["EXPORTER", "compiled_for", "describe", "export", "load"]

SETTINGS: Mapping[str, Any] = {"cpp.dynamic_threads": True}
"""Settings of Inductor: the number of threads is chosen when the package runs."""


def export(model: nn.Module, path: Path, spec: ExportSpec) -> None:
    """Compile a plain model, which takes about half a minute.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        path: File to write.
        spec: Input form, metadata and precision.

    Raises:
        SettingError: ``uint8`` is set, or there is no C++ compiler.
        OutputError: PyTorch cannot trace or compile the model.
    """
    import torch
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.utils import fresh_cache

    if spec.input.uint8:
        raise SettingError("`uint8` needs a graph: export to onnx with `to`.")
    _check_compiler()
    dtype, place = getattr(torch, DTYPES[spec.precision]), _device()
    copied = copy.deepcopy(model).to(place, dtype).eval()
    images = torch.zeros(2, *spec.input.shape, dtype=dtype, device=place)
    batch = torch.export.Dim("batch", min=1)
    try:
        # The usual cache would keep the weights.
        with TemporaryDirectory() as cache, fresh_cache(dir=cache), torch.no_grad():
            program = torch.export.export(copied, (images,), dynamic_shapes=({0: batch},))
            aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=dict(SETTINGS)
            )
    except Exception as error:  # Inductor raises various exceptions
        reason = one_line(error, 160)
        raise OutputError(f"PyTorch could not compile {path.name} ({reason}).") from error
    height, width = spec.input.height, spec.input.width
    Package(dict(spec.metadata), Target.here(place), (height, width)).add_to(path)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise SettingError(
            "`to=aoti` needs a C++ compiler, and this machine has none that works: install g++, or "
            "export to onnx or timm."
        ) from error


def _device() -> Any:
    """The device to compile for."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def load(path: Path, options: EngineOptions = EngineOptions()) -> TorchEngine:
    """Open a package; its code then runs in this process.

    Args:
        path: A file of ``export``.
        options: The device is of the kind that the package was compiled for, which is the default.

    Raises:
        ArtefactError: The package is missing, damaged or changed, or was compiled for another
            device or version of PyTorch.
        SettingError: The device does not exist, or is of another kind.
    """
    package = Package.read(path, verified=True)
    kind = package.target.device
    if (options.device or kind).partition(":")[0] != kind:
        raise SettingError(
            f"{path} was compiled for {kind}, but `device` is {options.device!r}: leave it out, or "
            "export for that device."
        )
    place = torch_device(EngineOptions(device=options.device or kind))
    info = ArtefactInfo(package.info, str(path))
    dtype = dtype_of(info)
    package.target.check(path, Target.here(place))
    from torch._inductor.package.package import load_package

    index = -1 if place.index is None else place.index
    try:
        compiled = load_package(os.fspath(path), num_runners=options.lanes, device_index=index)
    except Exception as error:  # PyTorch raises various exceptions
        raise ArtefactError(
            f"PyTorch cannot load {path} ({one_line(error, 160)}): export it again."
        ) from error
    return TorchEngine(compiled, info.texts, options, place, dtype, package.size)


def compiled_for(path: Path) -> str:
    """Kind of device that a package was compiled for, ``cpu`` or ``cuda``.

    Raises:
        ArtefactError: The file is missing or damaged, or was not written by the exporter.
    """
    return Package.read(path, verified=False).target.device


def describe(path: Path) -> dict[str, Any]:
    """Metadata of a package, whose code is not run.

    Raises:
        ArtefactError: The file is damaged, or was not written by the exporter.
    """
    package = Package.read(path, verified=False)
    target = package.target
    return {
        "kind": "AOTInductor package",
        "torch": target.torch,
        "device": target.device,
        **({"capability": target.capability} if target.capability else {}),
        **ArtefactInfo(package.info).entries(),
    }


EXPORTER = Exporter(
    name="aoti",
    suffix=".pt2",
    precisions=tuple(DTYPES),
    engines=("aoti",),
    tolerance=5e-5,
    export=export,
    load=load,
    describe=describe,
    platform="pytorch",
    compiled_for=compiled_for,
)
