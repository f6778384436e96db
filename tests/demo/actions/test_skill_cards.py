"""What the page says about a task."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest

from aoft_demo.actions import skill_cards
from aoft_demo.actions.skill_cards import UNSURE_BELOW, SkillCard, skill_card
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import bundled_checkpoints
from aoft_demo.tasks.skills import bundled_skills
from aoft_deploy.checkpoints.checkpoint import read_checkpoint


def test_a_bundled_task_has_its_own_card_and_another_task_its_checkpoints_figures(
    session: Session,
) -> None:
    name, skill = next(iter(bundled_skills().items()))
    card = skill_card(session, name)
    assert (card.question, card.made_for, card.accuracy, card.threshold, card.none_class) == (
        skill.question,
        skill.made_for,
        skill.accuracy,
        skill.threshold,
        skill.none_class,
    )
    assert str(skill.test_pictures) in card.pictures
    checkpoint = bundled_checkpoints()[0]
    session.add(checkpoint, "mine")
    own = skill_card(session, "mine")
    figures = read_checkpoint(checkpoint).training
    expected = figures["test_accuracy"] or figures["val_accuracy"]
    assert (own.question, own.made_for, own.accuracy) == ("mine", "", expected)
    assert own.threshold == UNSURE_BELOW and own.none_class is None


@pytest.mark.parametrize(
    ("accuracy", "shown"), [(1.0, "100%"), (0.995, "99%"), (0.29, "29%"), (0.902, "90%")]
)
def test_an_accuracy_is_rounded_down(accuracy: float, shown: str) -> None:
    card = SkillCard("Which?", "fruit", accuracy, "200 test pictures", 0.5)
    assert card.right == f"right on {shown} of 200 test pictures"
    assert SkillCard("Which?", "fruit", None, "", 0.5).right == ""


def test_the_accuracy_is_of_the_test_if_there_was_one(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (figures, shown) in enumerate(
        (
            ({"val_accuracy": 0.99, "test_accuracy": 0.8}, (0.8, "test pictures")),
            ({"val_accuracy": 0.99, "test_accuracy": None}, (0.99, "pictures kept aside")),
            ({"val_accuracy": 7.0, "test_accuracy": -1.0}, (None, "")),
            ({"val_accuracy": "1", "test_accuracy": math.nan}, (None, "")),
            ({}, (None, "")),
        )
    ):
        monkeypatch.setattr(
            skill_cards, "parse_description", lambda path, text, f=figures: {"training": f}
        )
        copy = session.folder / f"{number}.ckpt"  # what was read of another file is kept
        shutil.copyfile(bundled_checkpoints()[0], copy)
        session.tasks["mine"] = replace(session.tasks["shape"], checkpoint=copy)
        card = skill_card(session, "mine")
        assert (card.accuracy, card.pictures) == shown


def test_a_visitors_file_does_not_get_the_card_of_a_built_in_skill(session: Session) -> None:
    checkpoint = bundled_checkpoints()[0]
    session.remove(checkpoint.stem)
    session.add(checkpoint, checkpoint.stem)  # the copy has the same name
    assert skill_card(session, checkpoint.stem).made_for == ""
    (session.folder / "odd.ckpt").write_bytes(b"odd")
    odd = session.folder / "odd.ckpt"
    session.tasks["odd"] = replace(session.shared.tasks[checkpoint.stem], checkpoint=odd)
    assert skill_card(session, "odd").right == ""
