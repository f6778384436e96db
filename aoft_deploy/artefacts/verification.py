"""Verification: an artefact must give the same logits as the unmerged model.

The artefact runs on batches of several sizes, in the runtime that it is exported for. Its logits
are compared with those of the tuned model before the merge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.sampling import share_shown
from aoft_deploy.classes import Classes
from aoft_deploy.errors import VerificationError
from aoft_deploy.texts import one_line

__all__ = ["BATCH_SIZES", "Bar", "Comparison", "Report", "Run", "random_pixels", "verify"]

BATCH_SIZES = (1, 2, 7)
"""Batch sizes at which every artefact is verified."""

SOFTMAX = Classes(())
"""Classes without names, of which the largest logit decides."""

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Computes logits, float32 [batch, classes], from pixels, uint8 [batch, H, W, 3]."""


@dataclass(frozen=True)
class Bar:
    """Acceptance criteria for an artefact.

    Attributes:
        tolerance: Largest allowed difference, for logits up to 1. It scales with the largest logit
            above 1. It is infinite below fp32, where ``min_agreement`` decides.
        min_agreement: Smallest allowed agreement, 0 to 1; see ``Comparison.agreement``.
    """

    tolerance: float
    min_agreement: float = 0.0


@dataclass(frozen=True)
class Report:
    """Result of a verification.

    Attributes:
        images: Number of images.
        batch_sizes: Batch sizes.
        max_abs: Largest absolute difference of two logits.
        relative: ``max_abs`` divided by the largest absolute logit of the reference.
        agreement: See ``Comparison.agreement``.
        tolerance: Largest allowed ``max_abs``; None if only the agreement was checked.
        min_agreement: Smallest allowed ``agreement``.
        agreement_shown: What ``agreement`` shows about other images, see ``share_shown``; for a
            fleet, of the task that agrees least. None if ``tolerance`` or only values decide.
    """

    images: int
    batch_sizes: tuple[int, ...]
    max_abs: float
    relative: float
    agreement: float
    tolerance: float | None
    min_agreement: float = 0.0
    agreement_shown: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def random_pixels(
    count: int, height: int, width: int | None = None, *, seed: int = 0
) -> NDArray[np.uint8]:
    """Random images with structure at every scale, because white noise is unlike real images.

    Args:
        count: Number of images.
        height: Height in pixels.
        width: Width in pixels; None means the height.
        seed: Random seed.

    Returns:
        uint8 [count, height, width, 3].
    """
    generator = np.random.default_rng(seed)
    width = width or height
    size = max(height, width)
    picture = np.zeros((count, height, width, 3))
    cells = 1
    while cells <= size:
        noise = generator.uniform(-1, 1, (count, cells, cells, 3))
        repeat = -(-size // cells)
        picture += noise.repeat(repeat, 1).repeat(repeat, 2)[:, :height, :width]
        cells *= 4
    low, high = picture.min((1, 2, 3), keepdims=True), picture.max((1, 2, 3), keepdims=True)
    pixels: NDArray[np.uint8] = np.rint(255 * (picture - low) / (high - low)).astype(np.uint8)
    return pixels


class Comparison:
    """Compares an artefact's logits with the expected ones, batch by batch.

    Args:
        largest: Largest absolute value of all expected logits.
        bar: Acceptance criteria.

    Raises:
        VerificationError: ``largest`` is not finite.
    """

    def __init__(self, largest: float, bar: Bar) -> None:
        if not math.isfinite(largest):
            raise VerificationError(
                "The unmerged model's own logits are not finite: nothing is written."
            )
        self.largest, self.bar = largest, bar
        self.allowed = bar.tolerance * max(1.0, largest)
        self.max_abs, self.agreeing, self.compared = 0.0, 0, 0
        self.values_error = 0.0
        self.alike, self.images = Counter[str](), Counter[str]()

    def add(
        self,
        answers: NDArray[np.float32],
        expected: NDArray[np.float32],
        size: int,
        classes: Classes,
        whose: str = "the artefact",
        counted: bool = True,
    ) -> None:
        """Compare the logits of some images, (images, classes).

        Args:
            answers: The artefact's logits.
            expected: The unmerged model's logits.
            size: Batch size at which the answers were computed.
            classes: The model's classes, which say what its logits mean.
            whose: Name of the artefact in an error message.
            counted: Whether the images count for the agreement.

        Raises:
            VerificationError: The shapes differ, a logit is not finite, or a difference exceeds the
                tolerance.
        """
        if answers.shape != expected.shape or not np.isfinite(answers).all():
            raise VerificationError(
                f"At batch size {size} {whose} answers with shape {answers.shape} where "
                f"{expected.shape} and finite values are expected: it is not written."
            )
        error = float(np.abs(answers - expected).max())
        self.max_abs = max(self.max_abs, error)
        if self.max_abs > self.allowed:
            raise VerificationError(
                f"At batch size {size} {whose}'s logits differ from the unmerged model's by "
                f"{self.max_abs:.2e}, but at most {self.allowed:.2e} is allowed: it is not written."
            )
        if classes.activation == "none":
            self.values_error = max(self.values_error, error)
        elif counted:
            alike = classes.agreeing(answers, expected)
            self.agreeing += int(alike.sum())
            self.compared += alike.size
            whole = np.logical_and.reduce(alike.reshape(len(answers), -1), axis=1)
            self.alike[whose] += int(whole.sum())
            self.images[whose] += len(whole)

    @property
    def agreement(self) -> float:
        """The agreement of all answers so far, 0 to 1.

        It is the share of equal decisions: the top class of a softmax, or yes or no for each label
        of a sigmoid. For plain values it is 1 minus the largest difference, relative to the largest
        value. In a fleet of both, the smaller of these counts.
        """
        decisions = self.agreeing / self.compared if self.compared else 1.0
        values = 1 - self.values_error / self.largest if self.values_error else 1.0
        return max(min(decisions, values), 0.0)

    def report(self, images: int, batch_sizes: Sequence[int]) -> Report:
        """Check the agreement, and summarise all comparisons.

        Args:
            images: Number of images.
            batch_sizes: Batch sizes.

        Raises:
            VerificationError: The agreement is below the minimum.
        """
        agreement, least = self.agreement, self.bar.min_agreement
        if agreement < least:
            if self.agreeing >= least * self.compared:
                found = (
                    f"The values about {images} images differ from the unmerged model's by "
                    f"{1 - agreement:.2%} of the largest, but at most {1 - least:.2%} is allowed"
                )
            else:
                found = (
                    f"The decisions about {images} images agree with the unmerged model's in "
                    f"{agreement:.2%} ({self.agreeing} of {self.compared}), but at least "
                    f"{least:.2%} is required"
                )
            raise VerificationError(
                f"{found}: nothing is written. Choose a higher `precision`, or lower "
                "`min_agreement`."
            )
        by_tolerance = math.isfinite(self.allowed)
        shown = (share_shown(self.alike[each], count) for each, count in self.images.items())
        return Report(
            images=images,
            batch_sizes=tuple(batch_sizes),
            max_abs=self.max_abs,
            relative=self.max_abs / self.largest if self.largest else 0.0,
            agreement=agreement,
            tolerance=self.allowed if by_tolerance else None,
            min_agreement=self.bar.min_agreement,
            agreement_shown=None if by_tolerance else min(shown, default=None),
        )


def verify(
    reference: Run,
    candidate: Run,
    pixels: NDArray[np.uint8],
    *,
    bar: Bar,
    classes: Classes = SOFTMAX,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Report:
    """Compare two models on the same images, in batches of several sizes.

    Args:
        reference: The unmerged model.
        candidate: The artefact.
        pixels: Images, uint8 [n, H, W, 3].
        bar: Acceptance criteria for the candidate.
        classes: The classes of both, which say what logits mean.
        batch_sizes: Batch sizes for the candidate. It gets all images at the largest size, and one
            batch of the first images at each other size.

    Returns:
        The results over all runs.

    Raises:
        VerificationError: A difference exceeds the tolerance, logits are not finite or have the
            wrong shape, the candidate fails to run, or the agreement is too low. Decisions that
            differ within the tolerance count only against the agreement.
    """
    expected = np.concatenate([reference(batch) for batch in _batches(pixels, max(batch_sizes))])
    comparison = Comparison(float(np.abs(expected).max()), bar)
    for size in batch_sizes:
        is_largest = size == max(batch_sizes)
        count = len(pixels) if is_largest else size
        answers = _answers(candidate, pixels[:count], size)
        comparison.add(answers, expected[:count], size, classes, counted=is_largest)
    return comparison.report(len(pixels), batch_sizes)


def _answers(candidate: Run, pixels: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    try:
        return np.concatenate([candidate(batch) for batch in _batches(pixels, size)])
    except Exception as error:  # runtimes raise many different exception classes
        reason = one_line(error, 160)
        raise VerificationError(
            f"At batch size {size} the artefact does not run ({reason}): it is not written."
        ) from error


def _batches(pixels: NDArray[np.uint8], size: int) -> Iterable[NDArray[np.uint8]]:
    return (pixels[i : i + size] for i in range(0, len(pixels), size))
