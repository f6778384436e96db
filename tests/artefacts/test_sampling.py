from __future__ import annotations

import pytest
from scipy.stats import binomtest  # type: ignore[import-untyped]

from aoft_deploy.artefacts.sampling import CONFIDENCE, images_needed, share_shown


@pytest.mark.parametrize(
    ("agreeing", "images"),
    [(0, 5), (1, 5), (5, 5), (58, 60), (60, 60), (100, 100), (298, 299), (9950, 10_000)],
)
def test_the_share_shown_is_scipys_exact_lower_bound(agreeing: int, images: int) -> None:
    test = binomtest(agreeing, images, alternative="greater")
    wanted = test.proportion_ci(CONFIDENCE, "exact").low
    assert share_shown(agreeing, images) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.999])
def test_the_images_needed_are_the_fewest_that_show_a_share(share: float) -> None:
    needed = images_needed(share)
    assert share_shown(needed, needed) >= share > share_shown(needed - 1, needed - 1)
