"""Analysis of a task's checkpoint."""

from __future__ import annotations

from aoft_demo.actions.analysis import analyse_task, lora_angles
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import BUNDLED
from aoft_deploy.training.analysis.quantities import analyse_file


def test_the_figures_are_those_of_the_librarys_analysis(session: Session) -> None:
    analysis = analyse_task(session, "digits")
    expected = analyse_file(BUNDLED / "digits.ckpt")
    by_name = {family.name: family for family in analysis.families}
    for kind in ("rows", "columns"):
        assert by_name[f"backbone, {kind}"].mean == expected["angles"][kind]["mean"]
    for kind in ("down", "up"):
        assert by_name[f"aoft-lora-star, {kind}"].sd == expected["angles"][kind]["sd"]
        assert by_name[f"LoRA, {kind}"].sd == lora_angles()[kind]["sd"]
    ratios = [x["change_ratio"] for x in expected["layers"] if x["change_ratio"] is not None]
    assert [ratio for _, ratio in analysis.layers] == ratios
