"""The skills as rows, and their proof."""

from __future__ import annotations

import math
import re
import shlex
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aoft_demo.actions.residents import Resident
from aoft_demo.actions.skill_cards import SkillCard
from aoft_demo.actions.verification import Proof
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import bundled_checkpoints
from aoft_demo.views.skills import view
from aoft_demo.views.skills.cards import rows
from aoft_demo.views.skills.proof import CLASSES, proof_card
from aoft_demo.views.units import size
from aoft_deploy.classes import Classes

CARD = SkillCard("Which fruit is it?", "fruit", 0.995, "200 test pictures", 0.5)
ORIGINS = {"a": "initial", "b": "added", "c": "trained"}


def some(session: Session, *names: str) -> str:
    """The rows of some tasks."""
    tasks = [Resident(name, 1 + (name == "a"), 30_000, ORIGINS[name]) for name in names]
    return rows(session, tasks, dict.fromkeys(names, CARD))


def row(html: str, name: str) -> str:
    return html.partition(f'<li data-task="{name}"')[2].partition("</li>")[0]


def test_a_row_says_what_is_known_and_whether_it_is_on(session: Session) -> None:
    session.off = {"b"}
    html = some(session, "a", "b", "c")
    checked = [re.findall(r'aria-checked="(\w+)"', row(html, name)) for name in "abc"]
    assert checked == [["true"], ["false"], ["true"]]
    for name, facts in (
        ("a", "30.0 KB · 2 answers · built in · right on 99% of 200 test pictures"),
        ("b", "30.0 KB · 1 answer · added by you · "),
        ("c", "taught by you"),
    ):
        assert facts in row(html, name)
        assert set(re.findall(r'data-name="(\w+)"', row(html, name))) == {name}


def test_the_memory_bars_compare_one_model_with_separate_ones(session: Session) -> None:
    backbone = session.shared.backbone_bytes
    html = some(session, "a", "b", "c")
    widths = [float(width) for width in re.findall(r'class="b\d" style="width:([\d.]+)%', html)]
    together, separate = backbone + 90_000, 3 * backbone + 90_000
    assert widths == [pytest.approx(100 * together / separate, abs=0.06), 100]
    values = re.findall(r'<span class="value">([^<]+)<', html)
    assert values == [size(together), size(separate)]
    assert "No skills" in rows(session, [], {}) and "<section" not in rows(session, [], {})


def test_undo_is_offered_for_the_last_removed_skill(session: Session) -> None:
    assert "Undo" not in some(session, "a")
    first, second = list(session.tasks)[:2]
    session.remove(first)
    session.remove(second)
    assert f"<span>{second} was removed.</span>" in some(session, "a")
    session.restore()
    assert f"<span>{first} was removed.</span>" in some(session, "a")
    session.restore()
    assert "Undo" not in some(session, "a")


UNMERGED = np.array([[0.5, 3.0, -1.0, 2.0, 1.0, 0.25, 0.75, -2.0]], np.float32)


def proof(merged: float, fleet: float) -> Proof:
    """Eight classes; the models add a number to the first of them."""
    first = np.eye(1, 8, dtype=np.float32)
    classes = Classes(tuple("abcdefgh"))
    return Proof(classes, UNMERGED, UNMERGED + merged * first, UNMERGED + fleet * first)


def test_each_column_of_the_proof_shows_its_own_model() -> None:
    html = proof_card("skill", proof(0.25, 0.125))
    columns = re.findall(r"<th scope='col'>([^<]+)<", html)
    assert columns == ["trained", "merged", "shared, here"]
    lines = re.findall(r"<tr><th scope='row'>(\w)</th>(.*?)</tr>", html)
    assert [name for name, _ in lines] == list("bdegaf")  # the largest first
    assert len(lines) == CLASSES
    values = {name: re.findall(r'data-value="([^"]+)"', cells) for name, cells in lines}
    code = re.findall(r"<pre[^>]*>(aoft-export[^<]+)<", proof_card("it's", proof(0.0, 0.0)))
    assert shlex.split(unescape(code[0]), comments=True)[2] == "it's.ckpt"
    assert values["a"] == ["0.5", "0.75", "0.625"] and values["b"] == ["3"] * 3


def test_the_differences_are_on_one_scale() -> None:
    found = proof(1e-6, 1e-5)
    html = proof_card("skill", found)
    marks = re.findall(r'data-mark="(\w+)" data-value="([^"]+)".*?width:([\d.]+)%', html)
    values = {kind: float(value) for kind, value, _ in marks}
    assert values == {
        "merged": pytest.approx(found.merged_difference),
        "fleet": pytest.approx(found.fleet_difference),
        "step": pytest.approx(found.rounding),
        "tolerance": pytest.approx(found.tolerance),
        "largest": 3.0,
    }
    assert found.tolerance == pytest.approx(3 * 5e-5)
    places = {kind: float(width) for kind, _, width in marks}
    per_decade = (places["largest"] - places["tolerance"]) / math.log10(3 / found.tolerance)
    for kind, value in values.items():
        expected = places["largest"] - per_decade * math.log10(3 / value)
        assert places[kind] == pytest.approx(expected, abs=0.2), kind
    none = proof_card("skill", proof(0.0, 0.0))
    assert re.findall(r'data-mark="merged" data-value="0".*?width:([\d.]+)%', none) == ["0.0"]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("pets.ckpt", "pets"),
        ("runs/pets/model.ckpt", "pets"),
        ("model.ckpt", "model"),
        ("runs/pets/best.safetensors", "best"),
    ],
)
def test_a_files_task_is_named_after_the_file_or_its_folder(given: str, name: str) -> None:
    assert view._wanted(given) == name


def test_only_uploaded_files_are_added(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    own, host = tmp_path / "uploads" / "x" / "a.ckpt", tmp_path / "host.ckpt"
    own.parent.mkdir(parents=True)
    for path in (own, host):
        path.write_bytes(bundled_checkpoints()[0].read_bytes())
    for odd in (str(host), f"{own.parent}/../../host.ckpt", "\0", "", 7, str(own.parent)):
        said = view._added(session, {"path": odd, "name": "mine.ckpt"})
        assert "Not added" in said and "mine" not in session.tasks, odd
    files: tuple[Any, ...] = ("text", None, {}, {"path": str(own)}, {"path": str(own), "name": 7})
    assert all("This file was not uploaded." in view._added(session, file) for file in files)
    said = view._added(session, {"path": str(own), "name": "mine/model.ckpt"})
    assert "<b>mine</b> joined the fleet with" in said and session.tasks["mine"].origin == "added"
    own.write_bytes(b"odd")
    said = view._added(session, {"path": str(own), "name": "bad.ckpt"})
    assert "bad.ckpt was not added" in said and str(tmp_path) not in said
