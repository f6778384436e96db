"""Proof that an artefact gives the unmerged model's answers.

The artefact is run, as it will be used, on batches of several sizes, and its logits are compared
with those of the tuned model before any merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.errors import VerificationError
from aoft_deploy.texts import one_line

__all__ = ["BATCH_SIZES", "Bar", "Comparison", "Report", "random_pixels", "verify"]

BATCH_SIZES = (1, 2, 7)
"""Batch sizes that every artefact is run with."""

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""From pixels, uint8 [batch, H, W, 3], to logits, float32 [batch, classes]."""


@dataclass(frozen=True)
class Bar:
    """What an artefact must reach before it is written.

    Attributes:
        tolerance: Largest difference allowed, for logits up to 1; it grows with the largest logit.
            Inf where low precision makes differences that agreement judges.
        min_agreement: Least share of images with the same top class, 0 to 1.
    """

    tolerance: float
    min_agreement: float = 0.0


@dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        images: Number of images compared.
        batch_sizes: Batch sizes used.
        max_abs: Largest difference of two logits.
        relative: ``max_abs`` over the largest logit of the reference.
        agreement: Share of images with the same top class, 0 to 1.
        tolerance: Largest ``max_abs`` that was allowed; None where agreement alone decided.
        min_agreement: Least ``agreement`` that was allowed.
    """

    images: int
    batch_sizes: tuple[int, ...]
    max_abs: float
    relative: float
    agreement: float
    tolerance: float | None
    min_agreement: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def random_pixels(
    count: int, height: int, width: int | None = None, *, seed: int = 0
) -> NDArray[np.uint8]:
    """Images with structure at every scale, so that no layer sees mere noise.

    Args:
        count: Number of images.
        height: In pixels.
        width: Likewise; None is the height.
        seed: Seed of the random values.

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
    """Answers of an artefact beside those expected, as they come.

    Args:
        largest: Largest of all logits expected.
        bar: What must be reached.

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

    def add(
        self,
        answers: NDArray[np.float32],
        expected: NDArray[np.float32],
        size: int,
        whose: str = "the artefact",
        counted: bool = True,
    ) -> None:
        """Compare some answers, each (images, classes).

        Args:
            answers: The artefact's.
            expected: The unmerged model's.
            size: Batch size they were computed at.
            whose: What to call the artefact in a refusal.
            counted: Whether they count for the agreement.

        Raises:
            VerificationError: Another shape, a number that is not finite, a difference too large.
        """
        if answers.shape != expected.shape or not np.isfinite(answers).all():
            raise VerificationError(
                f"At batch size {size} {whose} answers with shape {answers.shape} where "
                f"{expected.shape} and finite values are expected: it is not written."
            )
        self.max_abs = max(self.max_abs, float(np.abs(answers - expected).max()))
        if self.max_abs > self.allowed:
            raise VerificationError(
                f"At batch size {size} {whose}'s logits differ from the unmerged model's by "
                f"{self.max_abs:.2e}, but at most {self.allowed:.2e} is allowed: it is not written."
            )
        if counted:
            self.agreeing += int((answers.argmax(1) == expected.argmax(1)).sum())
            self.compared += len(answers)

    def report(self, images: int, batch_sizes: Sequence[int]) -> Report:
        """The figures.

        Args:
            images: Number of images compared.
            batch_sizes: Sizes of the batches they were compared in.

        Raises:
            VerificationError: The top classes agree too rarely.
        """
        agreement = self.agreeing / self.compared
        if agreement < self.bar.min_agreement:
            raise VerificationError(
                f"The top class agrees with the unmerged model's in {agreement:.2%} of the answers "
                f"({self.agreeing} of {self.compared}) about {images} images, but at least "
                f"{self.bar.min_agreement:.2%} is asked: nothing is written. Choose a higher "
                "`precision`, or lower `min_agreement`."
            )
        return Report(
            images=images,
            batch_sizes=tuple(batch_sizes),
            max_abs=self.max_abs,
            relative=self.max_abs / self.largest if self.largest else 0.0,
            agreement=agreement,
            tolerance=self.allowed if math.isfinite(self.allowed) else None,
            min_agreement=self.bar.min_agreement,
        )


def verify(
    reference: Run,
    candidate: Run,
    pixels: NDArray[np.uint8],
    *,
    bar: Bar,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Report:
    """Compare two models on the same images, in batches of several sizes.

    Args:
        reference: The unmerged model.
        candidate: The artefact.
        pixels: Images, uint8 [n, H, W, 3].
        bar: What the candidate must reach.
        batch_sizes: Sizes to run the candidate with: all images at the largest, and a batch of
            the first ones at each of the others.

    Returns:
        The figures, over all runs.

    Raises:
        VerificationError: A difference above the tolerance, an answer that is not finite or of
            another shape, no answer, or too little agreement. A top class that differs within the
            tolerance is a tie, and counts against ``agreement`` only.
    """
    expected = np.concatenate([reference(batch) for batch in _batches(pixels, max(batch_sizes))])
    comparison = Comparison(float(np.abs(expected).max()), bar)
    for size in batch_sizes:
        whole = size == max(batch_sizes)
        few = len(pixels) if whole else size
        answers = _answers(candidate, pixels[:few], size)
        comparison.add(answers, expected[:few], size, counted=whole)
    return comparison.report(len(pixels), batch_sizes)


def _answers(candidate: Run, pixels: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    try:
        return np.concatenate([candidate(batch) for batch in _batches(pixels, size)])
    except Exception as error:  # every runtime raises classes of its own
        reason = one_line(error, 160)
        raise VerificationError(
            f"At batch size {size} the artefact does not run ({reason}): it is not written."
        ) from error


def _batches(pixels: NDArray[np.uint8], size: int) -> Iterable[NDArray[np.uint8]]:
    return (pixels[i : i + size] for i in range(0, len(pixels), size))
