"""Proof that an artefact gives the unmerged model's answers.

The artefact is run, as it will be used, on batches of several sizes, and its logits are compared
with those of the tuned model before any merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.errors import VerificationError

__all__ = ["BATCH_SIZES", "Report", "random_pixels", "verify"]

BATCH_SIZES = (1, 2, 7)
"""Batch sizes that every artefact is run with."""

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""From pixels, uint8 [batch, H, W, 3], to logits, float32 [batch, classes]."""


@dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        images: Number of images compared.
        batch_sizes: Batch sizes used.
        max_abs: Largest difference of two logits.
        relative: ``max_abs`` over the largest logit of the reference.
        agreement: Share of images with the same top class, 0 to 1.
        tolerance: Largest ``max_abs`` that was allowed.
    """

    images: int
    batch_sizes: tuple[int, ...]
    max_abs: float
    relative: float
    agreement: float
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def random_pixels(count: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    """Images with structure at every scale, so that no layer sees mere noise.

    Args:
        count: Number of images.
        size: Side in pixels.
        seed: Seed of the random values.

    Returns:
        uint8 [count, size, size, 3].
    """
    generator = np.random.default_rng(seed)
    picture = np.zeros((count, size, size, 3))
    cells = 1
    while cells <= size:
        noise = generator.uniform(-1, 1, (count, cells, cells, 3))
        repeat = -(-size // cells)
        picture += noise.repeat(repeat, 1).repeat(repeat, 2)[:, :size, :size]
        cells *= 4
    low, high = picture.min((1, 2, 3), keepdims=True), picture.max((1, 2, 3), keepdims=True)
    pixels: NDArray[np.uint8] = np.rint(255 * (picture - low) / (high - low)).astype(np.uint8)
    return pixels


def verify(
    reference: Run,
    candidate: Run,
    pixels: NDArray[np.uint8],
    *,
    tolerance: float,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Report:
    """Compare two models on the same images, in batches of several sizes.

    Args:
        reference: The unmerged model.
        candidate: The artefact.
        pixels: Images, uint8 [n, H, W, 3], n at least the largest batch size.
        tolerance: Largest difference allowed, for logits up to 1; it grows with the largest logit.
        batch_sizes: Sizes to run the candidate with; the images are gone through once with each.

    Returns:
        The figures, over all runs.

    Raises:
        VerificationError: A difference above the tolerance, an answer that is not finite or of
            another shape, or no answer. A top class that differs within the tolerance is a tie,
            and counts against ``agreement`` only.
    """
    expected = np.concatenate([reference(batch) for batch in _batches(pixels, max(batch_sizes))])
    if not np.isfinite(expected).all():
        raise VerificationError(
            "The unmerged model's own logits are not finite: nothing is written."
        )
    largest = float(np.abs(expected).max())
    allowed = tolerance * max(1.0, largest)
    max_abs, agreeing, compared = 0.0, 0, 0
    for size in batch_sizes:
        answers = _answers(candidate, pixels, size)
        if answers.shape != expected.shape or not np.isfinite(answers).all():
            raise VerificationError(
                f"At batch size {size} the artefact answers with shape {answers.shape} where "
                f"{expected.shape} and finite values are expected: it is not written."
            )
        max_abs = max(max_abs, float(np.abs(answers - expected).max()))
        if max_abs > allowed:
            raise VerificationError(
                f"At batch size {size} the artefact's logits differ from the unmerged model's by "
                f"{max_abs:.2e}, but at most {allowed:.2e} is allowed: it is not written."
            )
        agreeing += int((answers.argmax(1) == expected.argmax(1)).sum())
        compared += len(answers)
    return Report(
        images=len(pixels),
        batch_sizes=tuple(batch_sizes),
        max_abs=max_abs,
        relative=max_abs / largest if largest else 0.0,
        agreement=agreeing / compared,
        tolerance=allowed,
    )


def _answers(candidate: Run, pixels: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    try:
        return np.concatenate([candidate(batch) for batch in _batches(pixels, size)])
    except Exception as error:  # every runtime raises classes of its own
        reason = " ".join(str(error).split())[:160]
        raise VerificationError(
            f"At batch size {size} the artefact does not run ({reason}): it is not written."
        ) from error


def _batches(pixels: NDArray[np.uint8], size: int) -> Iterable[NDArray[np.uint8]]:
    return (pixels[i : i + size] for i in range(0, len(pixels), size))
