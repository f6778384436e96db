"""The steps in order of worth: correctness first, then speed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EXPORTS", "STEPS", "Step"]


@dataclass(frozen=True)
class Step:
    """One step, which runs in a process of its own.

    Attributes:
        name: Its name in the results, and the value of ``--only``.
        seconds: Its time budget. A step that takes longer is ended, and its rows so far are kept.
        function: ``MODULE:FUNCTION``, which takes a ``Run``.
        artefacts: Whether it needs exported artefacts.
    """

    name: str
    seconds: int
    function: str
    artefacts: bool = True


STEPS = (
    Step("machine", 30, "benchmarks.gpu.machine:describe", artefacts=False),
    Step("gradients", 45, "benchmarks.gpu.training:gradients", artefacts=False),
    Step("training", 60, "benchmarks.gpu.training:same_bits", artefacts=False),
    Step("commands", 75, "benchmarks.gpu.commands:as_a_user"),
    Step("parity", 120, "benchmarks.gpu.answers:parity"),
    Step("fleet", 60, "benchmarks.gpu.answers:fleet"),
    Step("lanes", 45, "benchmarks.gpu.answers:lanes"),
    Step("tests", 90, "benchmarks.gpu.commands:marked_tests", artefacts=False),
    Step("engines", 120, "benchmarks.gpu.speed:engines"),
    Step("fleet speed", 60, "benchmarks.gpu.speed:fleets"),
    Step("onnxruntime", 90, "benchmarks.gpu.speed:onnxruntime_alone"),
    Step("training speed", 45, "benchmarks.gpu.training:speed", artefacts=False),
    Step("compiled", 120, "benchmarks.gpu.torch_speed:compiled", artefacts=False),
    Step("pytorch", 45, "benchmarks.gpu.torch_speed:eager", artefacts=False),
    Step("peft", 30, "benchmarks.gpu.torch_speed:peft_mixed", artefacts=False),
    Step("tensorrt", 60, "benchmarks.gpu.speed:tensorrt", artefacts=False),
    Step("aoti", 90, "benchmarks.gpu.speed:aoti", artefacts=False),
)

EXPORTS = Step("exports", 600, "benchmarks.gpu.artefacts:export_all", artefacts=False)
"""Exports the artefacts on the CPU, beside the first steps."""
