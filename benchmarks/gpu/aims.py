"""What the project aims at on an H100, and what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Aim", "aims"]

OURS = ("ONNX Runtime", "tensorrt", "aoti")
"""Runtimes of artefacts, as users load them."""

ALONE = "ONNX Runtime alone"
"""The same artefacts in ONNX Runtime, without the copies to the GPU and back."""


@dataclass(frozen=True)
class Aim:
    """A figure that is aimed at.

    Attributes:
        text: What is measured.
        found: The figure; None if it was not measured.
        reached: Whether it is as good as the aim.
    """

    text: str
    found: float | None
    reached: bool

    @property
    def verdict(self) -> str:
        """For the table."""
        return "" if self.found is None else "yes" if self.reached else "no"


class _Speeds:
    """The rows of speeds, as images per second by what they are about."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = [row for row in rows if row.get("kind") == "speed"]

    @property
    def batches(self) -> list[int]:
        return sorted({row["batch"] for row in self._rows})

    def best(self, batch: int | None = None, **wanted: Sequence[str]) -> float | None:
        """The most images per second of rows in which each named field has one of the values."""
        found = [
            row["images_per_second"]
            for row in self._rows
            if batch in (None, row["batch"])
            and all(row[field] in values for field, values in wanted.items())
        ]
        return max(found, default=None)


def aims(rows: Sequence[Mapping[str, Any]]) -> Iterator[Aim]:
    """Every aim, in the order of the table."""
    speeds = _Speeds(rows)
    half = ("fp16", "bf16")
    fastest = speeds.best(runtime=(*OURS, ALONE), model=["merged"], precision=half)
    yield _at_least("artefact of ViT-B/16 in bf16 or fp16, images per second", fastest, 16_600)
    for images, ours in (("NumPy", OURS), ("GPU", [ALONE])):
        found = speeds.best(runtime=ours, model=["merged"], precision=half, images=[images])
        rival = speeds.best(runtime=["torch.compile"], images=[images])
        text = f"artefact × torch.compile, images in {images}"
        yield _at_least(text, _ratio(found, rival), 1.3)
    for runtime in ("ONNX Runtime", "PyTorch"):
        ratios = []
        for batch in speeds.batches:
            merged, plain = (
                speeds.best(batch, runtime=[runtime], model=[model], precision=["fp16"])
                for model in ("merged", "plain")
            )
            ratios.append(_ratio(merged, plain))
        worst = min((ratio for ratio in ratios if ratio is not None), default=None)
        yield _at_least(f"merged × plain in {runtime}, worst batch size", worst, 0.99)
    for precision in ("fp16", "fp32"):
        yield _fleet_aim(speeds, precision)
    fp8, fp16 = (
        speeds.best(runtime=OURS, model=["merged"], precision=[p]) for p in ("fp8", "fp16")
    )
    yield _at_least("FP8 × fp16", _ratio(fp8, fp16), 1.4)
    agreements = (row.get("agreement") for row in rows if row["row"] == "digits fp8")
    agreement = next((share for share in agreements if share is not None), None)
    yield _at_least("FP8, share of equal decisions", agreement, 0.995)
    steps = {row["row"]: row["ms"] for row in rows if row.get("kind") == "training step"}
    step = _ratio(steps.get("aoft-lora"), steps.get("PEFT LoRA"))
    yield Aim("AOFT's training step × PEFT's, at most 0.9", step, step is not None and step <= 0.9)


def _fleet_aim(speeds: _Speeds, precision: str) -> Aim:
    """A mixed batch of many tasks beside one merged model, at the largest batch size."""
    largest = max(speeds.batches, default=0)
    one = speeds.best(largest, runtime=["fleet"], model=["merged"], precision=[precision])
    many = ("64 tasks", "6 tasks")  # the second in a dry run
    mixed = speeds.best(largest, runtime=["fleet"], model=many, precision=[precision])
    text = f"64 mixed tasks × one merged model, {precision}"
    return _at_least(text, _ratio(mixed, one), 0.97)


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _at_least(text: str, found: float | None, least: float) -> Aim:
    return Aim(f"{text}, at least {least:,}", found, found is not None and found >= least)
