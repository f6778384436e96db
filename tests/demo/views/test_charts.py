"""Charts as SVG."""

from __future__ import annotations

import re

from aoft_demo.views.charts import Line, lines


def test_a_curve_is_clipped_to_the_frame() -> None:
    html = lines(
        [Line("a", [(0, -5), (1, 0.5), (2, 9)], 1)], x=(0, 2), y=(0, 1), x_label="x", y_label="y"
    )
    (points,) = re.findall(r'points="([^"]+)"', html)
    heights = [float(pair.split(",")[1]) for pair in points.split()]
    assert heights[0] > heights[1] > heights[2] >= 0
