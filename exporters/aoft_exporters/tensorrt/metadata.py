"""What stands beside a TensorRT plan: what it takes, what it is for, and how it must answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.manifest import check_unchanged
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.artefacts.verification import random_pixels
from aoft_deploy.errors import ArtefactError, VerificationError
from aoft_deploy.files import json_text
from aoft_exporters.tensorrt.library import Target

if TYPE_CHECKING:
    pass

__all__ = ["MARKER", "METADATA", "Metadata", "Sample", "check_files"]

METADATA = "engine.json"
FORMAT = "aoft-deploy-tensorrt/1"
IMAGES = 4
"""Built-in images that an engine answers whenever it is loaded."""


class Runner(Protocol):
    """An engine of a single model or of a fleet."""

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits."""


@dataclass(frozen=True)
class Sample:
    """Built-in images and the answers that the graph gives about them.

    Attributes:
        size: Side of square images, or height and width of others.
        uint8: Whether they are given as pixels.
        tasks: Number of a fleet's tasks; 0 for a single model.
        logits: The graph's answers in the engine's precision; None stands for −inf.
        allowed: Largest difference that an engine may have.
    """

    size: int | Sequence[int]
    uint8: bool
    tasks: int
    logits: Sequence[Sequence[float | None]] = ()
    allowed: float = 0.0

    @classmethod
    def of(cls, graph: Any, spec: ExportSpec) -> Sample:
        """For a graph, without answers."""
        fleet = any(value.name == "task" for value in graph.graph.input)
        tasks = len(ArtefactInfo(spec.metadata).tasks) if fleet else 0
        height, width = spec.input.height, spec.input.width
        return cls(height if height == width else [height, width], spec.input.uint8, tasks)

    def answers(
        self, engine: Runner, batches: tuple[int, int, int] = (1, 1, IMAGES)
    ) -> NDArray[np.float32]:
        """An engine's logits about the images, those of a fleet by different tasks."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        images: NDArray[Any] = random_pixels(IMAGES, height, width)
        if not self.uint8:
            scaled = images.astype(np.float32) / np.float32(127.5) - np.float32(1)
            images = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
        least, _, most = batches
        step = min(IMAGES, most)
        found = []
        for start in range(0, IMAGES, step):
            piece = np.resize(np.arange(start, min(start + step, IMAGES)), max(step, least))
            task = piece.astype(np.int64) % self.tasks if self.tasks else None
            given = images[piece]
            logits = engine.run(given) if task is None else engine.run(given, task)
            found.append(logits[: min(step, IMAGES - start)])
        return np.concatenate(found)

    def answered(
        self, answers: NDArray[np.float32], exact: NDArray[np.float32], tolerance: float
    ) -> Sample:
        """With the answers, given those in float32.

        Rounding in low precision differs from one kernel to the next by about what it changes at
        all, so several times that is allowed.

        Raises:
            VerificationError: Answers are finite in float32 alone.
        """
        finite = np.isfinite(exact)
        if not np.isfinite(answers[finite]).all():
            raise VerificationError(
                "The logits are not finite in this precision, so nothing is written: choose "
                "another `precision`."
            )
        rounding = float(np.abs(answers[finite] - exact[finite]).max(initial=0))
        largest = max(1.0, float(np.abs(exact[finite]).max(initial=0)))
        rows = [[float(v) if np.isfinite(v) else None for v in row] for row in answers]
        return replace(self, logits=rows, allowed=tolerance * largest + 4 * rounding)

    def difference(self, engine: Runner, batches: tuple[int, int, int]) -> float:
        """Largest difference of an engine's answers; inf where another one is finite."""
        expected = np.array(self.logits, np.float32)  # None becomes nan
        answers = self.answers(engine, batches)
        finite = np.isfinite(expected)
        if answers.shape != expected.shape or not np.isneginf(answers[~finite]).all():
            return float("inf")
        return float(np.abs(answers[finite] - expected[finite]).max())


@dataclass(frozen=True)
class Metadata:
    """What ``engine.json`` holds.

    Attributes:
        info: Metadata: classes, preprocessing, backbone, method, precision.
        inputs: Type and shape of a sample of each input, the images' first.
        classes: Number of logits.
        batches: Smallest, usual and largest batch.
        library: ``tensorrt`` or ``tensorrt-rtx``.
        version: Its version.
        capability: Compute capability that the plan is for.
        sha256: Of the plan.
        sample: How the engine must answer.
        structure: Hash of the graph without the weights that can be refitted; empty if none can.
        origin: ``built``, or ``refitted`` from another engine.
    """

    info: Mapping[str, str]
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    classes: int
    batches: tuple[int, int, int]
    library: str
    version: str
    capability: str
    sha256: str
    sample: Sample
    structure: str
    origin: str

    @classmethod
    def of(
        cls,
        plan: bytes,
        target: Target,
        spec: ExportSpec,
        sample: Sample,
        structure: str = "",
        origin: str = "built",
    ) -> Metadata:
        """For a plan just built or refitted."""
        inputs: dict[str, tuple[str, tuple[int, ...]]] = {
            spec.input.name: (spec.input.dtype, spec.input.shape)
        }
        if sample.tasks:
            inputs["task"] = ("int64", ())
        return cls(
            info={**spec.metadata, "precision": spec.precision},
            inputs=inputs,
            classes=len(sample.logits[0]),
            batches=spec.build.batch_range,
            library=target.library.name,
            version=target.library.version,
            capability=target.capability,
            sha256=hashlib.sha256(plan).hexdigest(),
            sample=sample,
            structure=structure,
            origin=origin,
        )

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json_text({"format": FORMAT, **asdict(self)}, indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path) -> Metadata:
        """Read what ``write`` wrote.

        Raises:
            ArtefactError: The file is missing, damaged or another program's.
        """
        try:
            found = json.loads(path.read_text("utf-8"))
            if found.pop("format") != FORMAT:
                raise ValueError("another format")
            inputs = {
                n: (str(kind), tuple(shape)) for n, (kind, shape) in found.pop("inputs").items()
            }
            least, usual, most = map(int, found.pop("batches"))
            sample = Sample(**found.pop("sample"))
            return cls(inputs=inputs, batches=(least, usual, most), sample=sample, **found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtefactError(
                f"{path} does not say what the plan beside it is ({error!r:.80}): it was not "
                "written by aoft-export, or is damaged."
            ) from error

    def check_here(self, path: Path, version: str, capability: str) -> None:
        """Refuse an engine of another version or GPU.

        Raises:
            ArtefactError: It is one, with what it was built for.
        """
        if version != self.version:
            raise ArtefactError(
                f"{path} was built with {self.library} {self.version}, but {version} is installed: "
                "engines run in their own version alone, so install it or export again."
            )
        if capability != self.capability:
            raise ArtefactError(
                f"{path} was built for GPUs of compute capability {self.capability}, but this "
                f"machine's has {capability}: export it with `compute_capability={capability}`."
            )


def check_files(path: Path, metadata: Metadata, files: tuple[str, str]) -> bytes:
    """The plan, if the folder is as it was written.

    Args:
        path: The folder.
        metadata: What stands beside the plan.
        files: Names of the plan and of the metadata.

    Raises:
        ArtefactError: The plan is not the recorded one, or the manifest beside is of others.
    """
    plan = (path / files[0]).read_bytes()
    if hashlib.sha256(plan).hexdigest() != metadata.sha256:
        raise ArtefactError(
            f"{path / files[0]} is not the plan that {files[1]} names: it was changed after it was "
            "written and is not run; export it again."
        )
    check_unchanged(path)
    return plan


MARKER = "model.plan"
