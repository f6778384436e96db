"""The form of a fleet: mixed, or folded, as exporter, precision and method allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from aoft_deploy.artefacts.exporter import Exporter, FleetSupport
from aoft_deploy.artefacts.registry import exporters, get_exporter
from aoft_deploy.errors import AttachError, SettingError, UnknownNameError

if TYPE_CHECKING:
    from aoft_deploy.data.preprocessing import Preprocessing
    from aoft_deploy.tuning.multitask import FleetModel
    from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["fleet_exporter", "fleet_model"]

FORMS = ("auto", "mixed", "folded")


def fleet_exporter(to: str, form: str, precision: str) -> tuple[Exporter, FleetSupport]:
    """Find an exporter, and check that it supports fleets of a form.

    Raises:
        UnknownNameError: There is no such exporter or form.
        SettingError: The exporter does not support fleets, or not this form, or the form is
            ``folded`` below fp32.
    """
    exporter = get_exporter(to)
    if form not in FORMS:
        raise UnknownNameError("form of fleet", form, FORMS)
    if exporter.fleet is None:
        able = sorted(each.name for each in exporters() if each.fleet is not None)
        raise SettingError(f"{to} writes no fleets: choose {' or '.join(able)} with `to`.")
    if form not in ("auto", *exporter.fleet.forms):
        raise SettingError(f"{to} does not support fleets of the form {form}: leave `form` out.")
    if form == "folded" and precision != "fp32":
        raise SettingError(
            f'Updates cannot be folded into weights of {precision}: use `form="mixed"`.'
        )
    return exporter, exporter.fleet


def fleet_model(
    make: Callable[[], TunedModel], form: str, precision: str, preprocessing: Preprocessing
) -> tuple[FleetModel, str]:
    """Create the model to export, and choose its form.

    Args:
        make: Opens a new model of the first task.
        form: ``mixed``, ``folded`` or ``auto``.
        precision: Precision of the shared backbone.
        preprocessing: Size of the images.

    Raises:
        AttachError: The model does not support the form.
    """
    from aoft_deploy.tuning.multitask import FoldedModel, MixedModel

    tuned = make()
    if form == "folded" or (form == "auto" and precision == "fp32" and _multiplies_twice(tuned)):
        return FoldedModel(tuned), "folded"
    try:
        model = MixedModel(tuned)
        model.try_out(preprocessing.height, preprocessing.width)
    except AttachError:
        if form == "mixed" or precision != "fp32":
            raise
        return FoldedModel(make()), "folded"
    return model, "mixed"


def _multiplies_twice(tuned: TunedModel) -> bool:
    """Whether a mixed batch needs a second product with a weight, as for RLRR's gains."""
    deltas = (update.delta() for update in tuned.updates.values())
    return any(getattr(delta, "gain_out", None) is not None for delta in deltas)
