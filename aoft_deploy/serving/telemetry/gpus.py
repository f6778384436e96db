"""Figures of the GPUs that run models, read through the driver's own libraries.

CUDA says which GPU a device's number stands for, and NVML, the library of nvidia-smi, has its
figures under the same UUID. Their own numbers may differ.
"""

from __future__ import annotations

import asyncio
import ctypes
import uuid
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

from aoft_deploy.serving.log import log
from aoft_deploy.serving.telemetry.metrics import gauge
from aoft_deploy.serving.threads import in_thread

__all__ = ["Gpu", "Gpus", "gpu_lines"]

SECONDS = 1.0
"""Maximum seconds that a scrape waits for the driver."""


class Gpu(NamedTuple):
    """Figures of a GPU. None stands for those that it does not have, as a part of a GPU (MIG).

    Attributes:
        device: Its name here, such as ``cuda:0``.
        uuid: Its name for the driver: ``GPU-`` or ``MIG-``, and a UUID.
        name: Name of the product.
        total: Bytes of its memory.
        used: Bytes of it in use, by all processes.
        utilization: Share of the time in which a kernel ran, from 0 to 1.
        power: Watts.
    """

    device: str
    uuid: str
    name: str
    total: int | None
    used: int | None
    utilization: float | None
    power: float | None


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Utilization(ctypes.Structure):
    """nvmlUtilization_t, in percent of the last sample period."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Gpus:
    """Reads the figures of GPUs. Used in one event loop; the driver is called in a thread.

    If the driver cannot be asked, this is logged once and there are no figures. While it does not
    answer, there are none either, and it is not asked again.
    """

    def __init__(self) -> None:
        self._reading: asyncio.Task[list[Gpu]] | None = None
        self._logged = False

    async def read(self, devices: Iterable[str]) -> list[Gpu]:
        """Figures of the GPUs among the devices."""
        names = [name for name in devices if name.startswith("cuda:")]
        if not names:
            return []
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(in_thread(_read, names))
        reading = self._reading
        await asyncio.wait({reading}, timeout=SECONDS)
        if not reading.done():
            return []
        try:
            return reading.result()
        except (OSError, AttributeError) as error:  # no library, a failure, or an older library
            if not self._logged:
                self._logged = True
                log("no figures of GPUs", reason=str(error))
            return []


def gpu_lines(gpus: Iterable[Gpu]) -> Iterator[Iterable[str]]:
    """Metrics under the names that Triton gives them, without those that no GPU has."""
    found = list(gpus)
    for name, help, values in (
        ("nv_gpu_utilization", "GPU utilization rate [0.0 - 1.0].", [g.utilization for g in found]),
        ("nv_gpu_memory_total_bytes", "GPU total memory, in bytes.", [g.total for g in found]),
        ("nv_gpu_memory_used_bytes", "GPU used memory, in bytes.", [g.used for g in found]),
        ("nv_gpu_power_usage", "GPU power usage in watts.", [g.power for g in found]),
    ):
        known = {
            (g.uuid,): value for g, value in zip(found, values, strict=True) if value is not None
        }
        if known:
            yield gauge(name, help, ("gpu_uuid",), known)
    if found:
        labels = ("device", "gpu_uuid", "name")
        entries = {(g.device, g.uuid, g.name): 1.0 for g in found}
        yield gauge("aoft_gpu_info", "GPUs that run models.", labels, entries)


def _read(devices: list[str]) -> list[Gpu]:
    """Figures of these devices.

    Raises:
        OSError: There is no driver, or it refuses.
        AttributeError: The driver is too old.
    """
    cuda, nvml = _libraries()
    return [_figures(cuda, nvml, device) for device in devices]


@cache
def _libraries() -> tuple[Any, Any]:
    """CUDA's and NVML's library, initialised once; a failure is not kept."""
    cuda, nvml = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL("libnvidia-ml.so.1")
    _check("CUDA", cuda.cuInit(0))
    _check("NVML", nvml.nvmlInit_v2())
    return cuda, nvml


def _figures(cuda: Any, nvml: Any, device: str) -> Gpu:
    number, raw, gpu = ctypes.c_int(), (ctypes.c_ubyte * 16)(), ctypes.c_void_p()
    _check("CUDA", cuda.cuDeviceGet(ctypes.byref(number), int(device.partition(":")[2])))
    _check("CUDA", cuda.cuDeviceGetUuid_v2(raw, number))
    for kind in ("GPU", "MIG"):
        name = f"{kind}-{uuid.UUID(bytes=bytes(raw))}"
        status = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(gpu))
        if not status:
            break
    _check("NVML", status)
    product = ctypes.create_string_buffer(96)
    _check("NVML", nvml.nvmlDeviceGetName(gpu, product, len(product)))
    memory, use, power = _Memory(), _Utilization(), ctypes.c_uint()
    has_memory = not nvml.nvmlDeviceGetMemoryInfo(gpu, ctypes.byref(memory))
    has_use = not nvml.nvmlDeviceGetUtilizationRates(gpu, ctypes.byref(use))
    has_power = not nvml.nvmlDeviceGetPowerUsage(gpu, ctypes.byref(power))
    return Gpu(
        device,
        name,
        product.value.decode("utf-8", "replace"),
        int(memory.total) if has_memory else None,
        int(memory.used) if has_memory else None,
        use.gpu / 100 if has_use else None,
        power.value / 1000 if has_power else None,
    )


def _check(library: str, status: int) -> None:
    if status:
        raise OSError(f"{library} answered with error {status}")
