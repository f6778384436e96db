"""The view How it works in a real browser."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser_support import PICTURE
from demo_page import DemoPage

from aoft_demo.actions.evidence import accuracies
from aoft_demo.tasks.shared_fleet import BUNDLED
from aoft_deploy.training.analysis.quantities import analyse_file

pytestmark = pytest.mark.slow


def test_looking_inside(open_page: Callable[..., DemoPage]) -> None:
    page = open_page()
    page.classify(PICTURE)
    page.tab("How it works")
    page.click("#look")
    page.see("#inside .chart")
    task = page.find("#inside-task input").input_value()
    expected = analyse_file(BUNDLED / f"{task}.ckpt")
    for kind in ("rows", "columns"):
        cells = page.find(f"[data-family='backbone, {kind}'] td").all_inner_texts()
        assert cells[1] == f"{expected['angles'][kind]['mean']:.1f}°"
        assert cells[2] == f"{expected['angles'][kind]['sd']:.2f}°"
    for family in ("aoft-lora-star, down", "LoRA, up"):
        assert page.find(f"[data-family='{family}']").count() == 1
    ratios = [x["change_ratio"] for x in expected["layers"] if x["change_ratio"] is not None]
    shown = page.find("#inside .bars .value").all_inner_texts()
    assert shown == [f"{ratio:.3f}" for ratio in ratios]
    assert (
        page.see("#attention img").get_attribute("alt").startswith("Attention of the class token")
    )

    best = max(accuracies(), key=lambda a: a.mean)
    page.shows("#measured", f"{100 * best.mean:.1f} ± {100 * best.margin:.1f}")
