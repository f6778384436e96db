"""Analysis of a task's checkpoint."""

from __future__ import annotations

import pytest

from aoft_demo.actions.analysis import Family, analyse_task, lora_angles
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import bundled_checkpoints
from aoft_deploy.training.analysis.quantities import analyse_file


def test_the_figures_are_those_of_the_librarys_analysis(session: Session) -> None:
    path = bundled_checkpoints()[0]
    analysis, expected = analyse_task(session, path.stem), analyse_file(path)
    by_name = {family.name: family for family in analysis.families}
    for kind in ("rows", "columns"):
        assert by_name[f"backbone, {kind}"].mean == expected["angles"][kind]["mean"]
    for kind in ("down", "up"):
        assert by_name[f"{expected['method']}, {kind}"].sd == expected["angles"][kind]["sd"]
        assert by_name[f"LoRA, {kind}"].sd == lora_angles()[kind]["sd"]
    ratios = [x["change_ratio"] for x in expected["layers"] if x["change_ratio"] is not None]
    assert [ratio for *_, ratio in analysis.layers] == ratios
    assert analysis.unchanged == len(expected["layers"]) - len(ratios)
    assert analysis.lora.startswith("rank ")


def test_the_share_near_a_right_angle_counts_five_degrees_on_each_side() -> None:
    counts = [0] * 180
    counts[84], counts[85], counts[94], counts[95] = 10, 1, 2, 20
    assert Family("a", 33, 90, 1, 6, tuple(counts)).near == pytest.approx(3 / 33)
    assert Family("a", 0, 90, 1, 6, (0,) * 180).near == 0
