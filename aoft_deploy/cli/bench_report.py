"""What aoft-bench prints: placements, timings, and the shares of a device's peak speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aoft_deploy.cli.placements import placement_entry, placement_text

if TYPE_CHECKING:
    from aoft_deploy.artefacts.timing import Subject, Timing

__all__ = ["figures", "is_gpu", "print_placements", "print_shares", "print_timings"]

Peaks = Mapping[str, Mapping[str, float]]
"""Operations per second, by device and precision."""


def is_gpu(device: str) -> bool:
    """Whether an engine's device is an NVIDIA GPU."""
    return device.startswith("cuda")


def print_placements(subjects: Sequence[Subject]) -> None:
    """Print how many nodes of each artefact on a GPU are computed where, if its engine tells."""
    for entry in filter(None, map(placement_entry, subjects)):
        print(f"{entry['name']} on {entry['device']}: {placement_text(entry['nodes'])}", flush=True)


def print_timings(timings: Sequence[Timing], batch: int) -> None:
    """Print the rows of a batch size; the header comes before the first.

    There is a column for the GPU's own time if the rows below the header have values for it.
    """
    if not timings:
        return
    width = max(len(timing.subject.name) for timing in timings)
    first = timings[0].batch
    with_gpu = any(timing.device_seconds for timing in timings if timing.batch == first)
    if first == batch:
        gpu = f"  {'GPU ms':>9}" if with_gpu else ""
        print(f"{'batch':>5}  {'artefact':{width}}  {'ms':>9}{gpu}  {'img/s':>9}  {'ratio':>6}")
    for timing in (timing for timing in timings if timing.batch == batch):
        own = timing.device_median
        text = f"{'-':>9}" if own is None else f"{own * 1e3:9.2f}"
        print(
            f"{timing.batch:5}  {timing.subject.name:{width}}  {timing.median * 1e3:9.2f}"
            f"{f'  {text}' if with_gpu else ''}  {timing.throughput:9.2f}  {timing.ratio:6.2f}",
            flush=True,
        )


def _trusted(timing: Timing, timings: Sequence[Timing], peaks: Peaks) -> dict[str, float]:
    """The peaks of a timing's device that none of its engines exceeds."""
    from aoft_deploy.artefacts.timing import trusted_peaks

    device = timing.subject.engine.device
    return trusted_peaks(peaks[device], _on(timings, device))


def print_shares(timings: Sequence[Timing], peaks: Peaks) -> None:
    """Print each device's peaks, and the share of them that each artefact reaches.

    Args:
        timings: All timings.
        peaks: The devices' peaks; empty for a device that was not measured.
    """
    for device, measured in peaks.items():
        if measured:
            _print_shares(device, _on(timings, device), measured)
        elif device == "cpu" or is_gpu(device):
            print("no shares of the peak: measuring it needs PyTorch, aoft-deploy[train]")
        else:
            print(f"no shares of the peak: it is not measured on {device}")


def _on(timings: Sequence[Timing], device: str) -> list[Timing]:
    return [timing for timing in timings if timing.subject.engine.device == device]


def _print_shares(device: str, timings: Sequence[Timing], measured: Mapping[str, float]) -> None:
    from aoft_deploy.artefacts.gpu_peaks import GPU_PRECISIONS, gpu_name
    from aoft_deploy.artefacts.machine import PRECISIONS
    from aoft_deploy.artefacts.timing import trusted_peaks

    where = f"{device}, {gpu_name(device)}" if is_gpu(device) else "this machine's CPU"
    speeds = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in measured.items())
    print(f"peak of matrix products on {where}, in 10⁹ operations per second: {speeds}")
    peaks = trusted_peaks(measured, timings)
    for name in (name for name in measured if name not in peaks):
        print(
            f"no share of {name}: an artefact is faster than the measured peak, so it is no limit"
        )
    precisions = GPU_PRECISIONS if is_gpu(device) else PRECISIONS
    for name in (name for name in precisions if name not in measured):
        print(
            f"no share of {name}: its products are not faster than those of fp32, as this "
            "processor has no instructions for them or PyTorch no kernels"
        )
    for timing in timings:
        share, subject = timing.share(peaks), timing.subject
        if share is not None:
            print(f"{timing.batch:5}  {subject.name}  {share:.0%} of {subject.precision}")


def figures(timings: Sequence[Timing], peaks: Peaks, threads: int) -> dict[str, Any]:
    """What ``--json`` writes: the machine, its peaks, placements on GPUs, and all timings.

    Args:
        timings: The timings.
        peaks: The measured peaks.
        threads: Largest number of CPU threads of an engine.
    """
    from aoft_deploy.artefacts.gpu_peaks import gpu_name
    from aoft_deploy.artefacts.machine import machine

    subjects = dict.fromkeys(timing.subject for timing in timings)
    gpus = {device: gpu_name(device) for device in peaks if is_gpu(device) and peaks[device]}
    return {
        "machine": {**machine(threads), "gpus": gpus},
        "gemm_peaks": {device: found for device, found in peaks.items() if found},
        "placements": [*filter(None, map(placement_entry, subjects))],
        "rows": [timing.to_dict(_trusted(timing, timings, peaks)) for timing in timings],
    }
