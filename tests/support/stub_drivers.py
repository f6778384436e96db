"""Stubs of NVIDIA's driver libraries with two GPUs, whose numbers differ between CUDA and NVML."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["UUIDS", "build_drivers"]

UUIDS = (
    "GPU-02020202-0202-0202-0202-020202020202",
    "GPU-01010101-0101-0101-0101-010101010101",
)
"""UUIDs of cuda:0 and cuda:1. The second is NVML's first."""

CUDA = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal > 1 ? 101 : 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    for (int i = 0; i < 16; i++) uuid[i] = 2 - device;
    return 0;
}
"""

NVML = """
#include <string.h>
struct memory { unsigned long long total, free, used; };
struct utilization { unsigned gpu, memory; };
static int ready = 0, gpus[2] = {0, 1};
static int none = 3;                                        /* NVML_ERROR_NOT_SUPPORTED */
int nvmlInit_v2(void) { ready = 1; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **gpu) {
    const char *first = "GPU-01010101-0101-0101-0101-010101010101";
    const char *second = "GPU-02020202-0202-0202-0202-020202020202";
    if (!ready) return 1;                                   /* NVML_ERROR_UNINITIALIZED */
    if (!strcmp(uuid, first)) *gpu = &gpus[0];
    else if (!strcmp(uuid, second)) *gpu = &gpus[1];
    else return 6;                                          /* NVML_ERROR_NOT_FOUND */
    return 0;
}
int nvmlDeviceGetName(void *gpu, char *name, unsigned length) {
    strncpy(name, *(int *)gpu ? "NVIDIA Stub B" : "NVIDIA Stub A", length);
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *gpu, struct memory *found) {
    found->total = 85899345920ull; found->free = 1; found->used = 1000000000ull * (1 + *(int *)gpu);
    return 0;
}
int nvmlDeviceGetUtilizationRates(void *gpu, struct utilization *found) {
    found->gpu = 37; found->memory = 99;
    return *(int *)gpu ? 0 : none;
}
int nvmlDeviceGetPowerUsage(void *gpu, unsigned *milliwatts) { *milliwatts = 312500; return 0; }
"""


def build_drivers(folder: Path) -> Path:
    """Compile the stubs into a folder for ``LD_LIBRARY_PATH``."""
    for name, source in (("libcuda.so.1", CUDA), ("libnvidia-ml.so.1", NVML)):
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name)]
        subprocess.run(command, input=source, text=True, check=True)
    return folder
