"""Batch sizes that an engine prepares when it is loaded, such as 1, 2, 4, … 32.

A batch of another size is padded to the next of these, its bucket, and the padding's logits are
dropped. So an engine records a few CUDA graphs, and no request waits for a first run of its size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

__all__ = ["bucket_of", "bucket_sizes"]


def bucket_sizes(smallest: int, largest: int) -> tuple[int, ...]:
    """Buckets of a range: ``smallest`` doubled until it would exceed ``largest``, and ``largest``.

    So less than half of a padded batch is padding, within the range.

    Args:
        smallest: Smallest batch, at least 1.
        largest: Largest batch, at least ``smallest``.
    """
    sizes, size = list[int](), smallest
    while size < largest:
        sizes.append(size)
        size *= 2
    return (*sizes, largest)


def bucket_of(sizes: Sequence[int], batch: int) -> int:
    """The smallest bucket that holds a batch.

    Args:
        sizes: The buckets, in rising order.
        batch: Number of images, at most the last bucket.
    """
    return sizes[bisect_left(sizes, batch)]
