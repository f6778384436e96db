"""Options of an export, and their checks against the exporter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.spec import BuildOptions
from aoft_deploy.artefacts.verification import Bar
from aoft_deploy.errors import SettingError, UnknownNameError

__all__ = ["MIN_AGREEMENT", "VerifyOptions", "bar_for", "check_build"]

MIN_AGREEMENT = 0.99
"""Default share of images whose top class a low-precision artefact must keep."""


@dataclass(frozen=True)
class VerifyOptions:
    """Images and criteria for verification and calibration.

    Attributes:
        images: Real images, or folders of them. At fp32, they are used beside the built-in images;
            below fp32, they are used alone.
        calibrate: Real images, or folders of them, for precisions that need calibration. Those that
            are also in ``images`` are not used.
        min_agreement: Below fp32, the smallest allowed share of answers with the same top class as
            the unmerged model.
    """

    images: Sequence[Path] = ()
    calibrate: Sequence[Path] = ()
    min_agreement: float = MIN_AGREEMENT


def bar_for(exporter: Exporter, precision: str, verify: VerifyOptions) -> Bar:
    """Acceptance criteria for an artefact of a precision.

    Raises:
        UnknownNameError: The exporter does not support the precision.
        SettingError: Images are missing below fp32, or ``min_agreement`` is not from 0 to 1.
    """
    if precision not in exporter.precisions:
        raise UnknownNameError(f"precision of {exporter.name}", precision, exporter.precisions)
    if not 0 <= verify.min_agreement <= 1:
        raise SettingError(
            f"`min_agreement` is {verify.min_agreement}, but must be a share from 0 to 1."
        )
    if precision == "fp32":
        return Bar(exporter.tolerance)
    if not verify.images:
        raise SettingError(
            f"`precision={precision}` is verified on real images: give images of the task, or "
            "a folder of them, with `images`."
        )
    return Bar(float("inf"), verify.min_agreement)


def check_build(exporter: Exporter, build: BuildOptions) -> None:
    """Check build options against an exporter.

    Raises:
        SettingError: The exporter does not use an option, or its value is out of range.
    """
    name = exporter.name
    if build.opset is not None and build.opset not in exporter.opsets:
        known = ", ".join(map(str, exporter.opsets))
        rule = f"supported: {known}" if known else "leave `opset` out"
        raise SettingError(f"opset {build.opset} is not supported by {name}; {rule}.")
    if build.batches is not None:
        if not exporter.ranged:
            raise SettingError(f"{name} takes batches of any size: leave `batches` out.")
        sizes = list(build.batches)
        if len(sizes) != 3 or sizes != sorted(sizes) or sizes[0] < 1:
            raise SettingError(
                f"`batches` is {' '.join(map(str, sizes))}, but must be the smallest, usual and "
                "largest batch: three ascending numbers from 1."
            )
    if exporter.device is None:
        if build.compute_capability is not None:
            raise SettingError(f"{name} builds for no GPU: leave `compute_capability` out.")
        if build.refittable or build.refit:
            raise SettingError(f"{name} builds no engine: leave `refittable` and `refit` out.")
