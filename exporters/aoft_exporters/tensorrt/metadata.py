"""Metadata of a TensorRT plan: its inputs, its GPU, and the logits that it must reproduce."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.manifest import check_unchanged
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.artefacts.verification import random_pixels
from aoft_deploy.errors import ArtefactError, VerificationError
from aoft_deploy.files import json_text
from aoft_exporters.tensorrt.library import Target

__all__ = ["MARKER", "METADATA", "Metadata", "Sample", "check_files"]

MARKER = "model.plan"
METADATA = "engine.json"
FORMAT = "aoft-deploy-tensorrt/1"
IMAGES = 4
"""Number of built-in images that check an engine whenever it is loaded."""


class Runner(Protocol):
    """An engine of a single model or of a fleet."""

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits."""


@dataclass(frozen=True)
class Sample:
    """Built-in images and the graph's logits of them.

    Attributes:
        size: Side of square images, or height and width of others.
        uint8: Whether the engine takes uint8 pixels.
        tasks: Number of a fleet's tasks; 0 for a single model.
        logits: The graph's logits in the engine's precision; None is −inf.
        allowed: Largest allowed difference of an engine's logits.
    """

    size: int | Sequence[int]
    uint8: bool
    tasks: int
    logits: Sequence[Sequence[float | None]] = ()
    allowed: float = 0.0

    @classmethod
    def of(cls, graph: Any, spec: ExportSpec) -> Sample:
        """A sample for a graph, without logits."""
        fleet = any(value.name == "task" for value in graph.graph.input)
        tasks = len(ArtefactInfo(spec.metadata).tasks) if fleet else 0
        height, width = spec.input.height, spec.input.width
        return cls(height if height == width else [height, width], spec.input.uint8, tasks)

    def answers(
        self, engine: Runner, batches: tuple[int, int, int] = (1, 1, IMAGES)
    ) -> NDArray[np.float32]:
        """An engine's logits of the images; a fleet cycles through its tasks."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        images: NDArray[Any] = random_pixels(IMAGES, height, width)
        if not self.uint8:
            scaled = images.astype(np.float32) / np.float32(127.5) - np.float32(1)
            images = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
        smallest, _, largest = batches
        step = min(IMAGES, largest)
        logits = []
        for start in range(0, IMAGES, step):
            piece = np.resize(np.arange(start, min(start + step, IMAGES)), max(step, smallest))
            task = piece.astype(np.int64) % self.tasks if self.tasks else None
            batch = images[piece]
            rows = engine.run(batch) if task is None else engine.run(batch, task)
            logits.append(rows[: min(step, IMAGES - start)])
        return np.concatenate(logits)

    def answered(
        self, answers: NDArray[np.float32], exact: NDArray[np.float32], tolerance: float
    ) -> Sample:
        """This sample with logits and the allowed difference.

        Rounding errors differ between kernels by about their own size. So the allowed difference
        includes four times the difference between the precision and float32.

        Args:
            answers: The graph's logits in the engine's precision.
            exact: The graph's logits in float32.
            tolerance: Allowed difference in float32, for logits up to 1.

        Raises:
            VerificationError: Logits that are finite in float32 are not finite in the precision.
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
        """Largest difference from an engine's logits; inf if they differ in their −inf entries."""
        expected = np.array(self.logits, np.float32)  # None becomes nan
        answers = self.answers(engine, batches)
        finite = np.isfinite(expected)
        if answers.shape != expected.shape or not np.isneginf(answers[~finite]).all():
            return float("inf")
        return float(np.abs(answers[finite] - expected[finite]).max())


@dataclass(frozen=True)
class Metadata:
    """Content of ``engine.json``.

    Attributes:
        info: Metadata: classes, preprocessing, backbone, method, precision.
        inputs: Type and shape of each input, without the batch; the images come first.
        classes: Number of logits.
        batches: Smallest, usual and largest batch.
        library: ``tensorrt`` or ``tensorrt-rtx``.
        version: Version of the library.
        capability: Compute capability of the GPU that the plan was built for.
        sha256: SHA-256 of the plan.
        sample: Logits that the engine must reproduce.
        structure: Hash of the graph without its refittable weights; empty if there are none.
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
        """Metadata of a plan that was just built or refitted."""
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
        """Write the metadata as JSON."""
        path.write_text(json_text({"format": FORMAT, **asdict(self)}, indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path) -> Metadata:
        """Read a file of ``write``.

        Raises:
            ArtefactError: The file is missing or damaged, or was not written by ``write``.
        """
        try:
            values = json.loads(path.read_text("utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            inputs = {
                n: (str(kind), tuple(shape)) for n, (kind, shape) in values.pop("inputs").items()
            }
            smallest, usual, largest = map(int, values.pop("batches"))
            sample = Sample(**values.pop("sample"))
            return cls(inputs=inputs, batches=(smallest, usual, largest), sample=sample, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtefactError(
                f"{path} does not describe the plan beside it ({error!r:.80}): it is damaged or "
                "was not written by aoft-export."
            ) from error

    def check_here(self, path: Path, version: str, capability: str) -> None:
        """Check that the engine was built for this version and GPU.

        Raises:
            ArtefactError: It was built for another version or GPU.
        """
        if version != self.version:
            raise ArtefactError(
                f"{path} was built with {self.library} {self.version}, but {version} is installed: "
                "an engine runs in its own version only, so install that version or export again."
            )
        if capability != self.capability:
            raise ArtefactError(
                f"{path} was built for GPUs of compute capability {self.capability}, but this "
                f"machine's has {capability}: export it with `compute_capability={capability}`."
            )


def check_files(path: Path, metadata: Metadata, files: tuple[str, str]) -> bytes:
    """Read the plan and check that the folder is unchanged.

    Args:
        path: The folder.
        metadata: Metadata of the plan.
        files: Names of the plan and of the metadata.

    Raises:
        ArtefactError: The plan does not match its metadata, or the folder does not match its
            manifest.
    """
    plan = (path / files[0]).read_bytes()
    if hashlib.sha256(plan).hexdigest() != metadata.sha256:
        raise ArtefactError(
            f"{path / files[0]} is not the plan that {files[1]} names: it was changed after it was "
            "written and is not run; export it again."
        )
    check_unchanged(path)
    return plan
