from __future__ import annotations

import pytest

from aoft_deploy.artefacts.buckets import bucket_of, bucket_sizes


@pytest.mark.parametrize(
    ("smallest", "largest", "sizes"),
    [
        (1, 32, (1, 2, 4, 8, 16, 32)),
        (1, 1, (1,)),
        (7, 7, (7,)),
        (1, 24, (1, 2, 4, 8, 16, 24)),
        (3, 10, (3, 6, 10)),
        (4, 8, (4, 8)),
    ],
)
def test_buckets_double_from_the_smallest_batch_to_the_largest(
    smallest: int, largest: int, sizes: tuple[int, ...]
) -> None:
    assert bucket_sizes(smallest, largest) == sizes


@pytest.mark.parametrize("smallest", [1, 2, 3, 7])
@pytest.mark.parametrize("largest", [7, 24, 32, 100])
def test_every_batch_of_the_range_has_the_next_bucket(smallest: int, largest: int) -> None:
    sizes = bucket_sizes(smallest, largest)
    assert sorted(set(sizes)) == list(sizes)
    for batch in range(smallest, largest + 1):
        bucket = bucket_of(sizes, batch)
        assert bucket == min(size for size in sizes if size >= batch)
        assert bucket < 2 * batch


def test_a_batch_above_the_range_has_no_bucket() -> None:
    with pytest.raises(IndexError):
        bucket_of(bucket_sizes(1, 8), 9)
