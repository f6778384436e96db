"""The steps in order of worth: correctness first, then speed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STEPS", "Step"]


@dataclass(frozen=True)
class Step:
    """One step, which runs in a process of its own.

    Attributes:
        name: Its name in the results, and the value of ``--only``.
        seconds: Its time budget. A step that takes longer is ended, and its rows so far are kept.
        function: Module of this package and function, which takes a ``Run``.
        artefacts: Whether it needs exported artefacts.
    """

    name: str
    seconds: int
    function: str
    artefacts: bool = True


STEPS = (
    Step("machine", 30, "machine:describe", artefacts=False),
    Step("gradients", 45, "training:gradients", artefacts=False),
    Step("training", 60, "training:same_bits", artefacts=False),
    Step("commands", 75, "commands:as_a_user"),
    Step("parity", 120, "answers:parity"),
    Step("fleet", 60, "answers:fleet"),
    Step("lanes", 45, "answers:lanes"),
    Step("tests", 90, "commands:marked_tests", artefacts=False),
    Step("engines", 120, "speed:engines"),
    Step("fleet speed", 60, "speed:fleets"),
    Step("onnxruntime", 90, "speed:onnxruntime_alone"),
    Step("training speed", 45, "training:speed", artefacts=False),
    Step("compiled", 90, "torch_speed:compiled", artefacts=False),
    Step("pytorch", 45, "torch_speed:eager", artefacts=False),
    Step("peft", 30, "torch_speed:peft_mixed", artefacts=False),
    Step("tensorrt", 60, "speed:tensorrt", artefacts=False),
    Step("aoti", 90, "speed:aoti", artefacts=False),
)
