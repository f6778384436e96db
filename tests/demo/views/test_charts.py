"""Charts as SVG and HTML."""

from __future__ import annotations

import re

from aoft_demo.views.charts import Bar, Line, bars, dots, lines
from aoft_demo.views.tables import numbers, shades


def test_a_curve_is_clipped_to_the_frame() -> None:
    html = lines(
        [Line("a", [(0, -5), (1, 0.5), (2, 9)], 1)], x=(0, 2), y=(0, 1), x_label="x", y_label="y"
    )
    (points,) = re.findall(r'points="([^"]+)"', html)
    heights = [float(pair.split(",")[1]) for pair in points.split()]
    assert heights[0] > heights[1] > heights[2] >= 0


def test_bars_start_at_zero() -> None:
    html = bars([Bar("a", 3, "3 ×"), Bar("b", 1.5, "half", 0.3)], title="t", most=4, unit=" ×")
    assert re.findall(r'<i class="b1" style="width:([\d.]+)%', html) == ["75.0", "37.5"]
    assert '<u style="left:30.0%;width:15.0%">' in html
    assert re.findall(r'<em style="left:([\d.]+)%">([^<]+)<', html)[:2] == [
        ("0.0", "0 ×"),
        ("25.0", "1 ×"),
    ]
    assert 'aria-label="t. a: 3 ×; b: half"' in html
    assert "<em" not in bars([Bar("a", 0, "0")], title="t")


def test_an_axis_that_does_not_start_at_zero_says_so() -> None:
    rows = [Bar("a", 95, "95"), Bar("b", 91, "91", 2)]
    html = dots(rows, title="t", x=(90, 100), unit="%")
    assert re.findall(r'<i class="dot b1" style="left:([\d.]+)%', html) == ["50.0", "10.0"]
    assert '<u style="left:0.0%;width:30.0%">' in html  # the interval is clipped
    assert "The axis starts at 90%, not at 0" in html and "broken" in html
    assert "starts at" not in dots(rows, title="t", x=(0, 100))


def test_shades_keep_rows_and_columns_and_leave_gaps_empty() -> None:
    html = shades({("0", "q"): 1.0, ("0", "v"): 4.0, ("1", "v"): 2.0}, title="t", row_name="block")
    assert re.findall(r'<th scope="(\w+)">([^<]+)<', html) == [
        ("col", "q"),
        ("col", "v"),
        ("row", "block 0"),
        ("row", "block 1"),
    ]
    assert re.findall(r"--share:([\d.]+)", html) == ["0.250", "1.000", "0.500"]
    assert html.count('class="none"') == 1
    assert shades({}, title="t")


def test_figures_are_a_table_that_opens() -> None:
    html = numbers(("a", "b"), [("1", "<2>")], title="t")
    assert html.startswith("<details") and "<td>1</td><td>&lt;2&gt;</td>" in html
