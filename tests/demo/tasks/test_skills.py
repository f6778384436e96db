import math
from dataclasses import astuple

import numpy as np
import pytest
from skills.measuring import Answers, image_list
from skills.photographs import Photographs
from skills.questions import QUESTIONS, Maker, Question

from aoft_demo.tasks.session import task_name
from aoft_demo.tasks.shared_fleet import BUNDLED, bundled_checkpoints
from aoft_demo.tasks.skills import bundled_examples, bundled_skills
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.data.images import read_image

QUESTIONS_BY_NAME = {question.name: question for question in QUESTIONS}


def test_every_bundled_checkpoint_has_its_card() -> None:
    skills, checkpoints = bundled_skills(), bundled_checkpoints()
    assert sorted(skills) == sorted(path.stem for path in checkpoints)
    for path in checkpoints:
        skill = skills[path.stem]
        assert skill.classes == tuple(read_checkpoint(path).classes)
        assert path.stat().st_size < 45_000


def test_the_cards_hold_what_the_page_needs() -> None:
    for name, skill in bundled_skills().items():
        assert task_name(name) == name == skill.name
        assert 0 < len(skill.question) <= 40 and skill.question.endswith("?")
        assert skill.made_for and skill.sources
        assert skill.accuracy >= 0.9 and skill.accuracy_answered >= skill.accuracy - 0.005
        assert 0.5 <= skill.threshold < 1 and 0.5 < skill.answered <= 1
        assert skill.test_pictures >= 500
        assert (skill.none_class is None) == (skill.foreign is None) == (not skill.foreign_pictures)
        assert skill.none_class is None or skill.none_class in skill.classes


def test_the_examples_are_small_pictures_with_a_caption_and_a_licence() -> None:
    examples = bundled_examples()
    licences = (BUNDLED / "PICTURES.md").read_text("utf-8")
    assert len(examples) == len({astuple(example) for example in examples}) == 6
    for example in examples:
        assert min(read_image(example.file).size) >= 300
        assert example.file.stat().st_size <= 25_000
        assert 0 < len(example.caption) <= 24
        assert example.alt.endswith(".")
        assert f"`{example.file.name}`" in licences
    assert sum(example.file.stat().st_size for example in examples) <= 120_000


@pytest.mark.slow
@pytest.mark.parametrize("name", bundled_skills())
def test_new_test_pictures_are_answered_as_well_as_the_card_says(name: str) -> None:
    skill, question = bundled_skills()[name], QUESTIONS_BY_NAME[name]
    tuned, _ = open_checkpoint(BUNDLED / f"{name}.ckpt")
    answers = Answers.of(tuned, image_list(Maker(Photographs()), question, "test", COUNT, seed=7))
    assert abs(answers.accuracy() - skill.accuracy) < interval(skill.accuracy)


COUNT = 150
"""Test pictures of each skill. This machine may have some of the test photographs only."""


def interval(share: float) -> float:
    """Four standard errors of a share that is found with ``COUNT`` pictures, and one picture."""
    return 4 * math.sqrt(share * (1 - share) / COUNT) + 1 / COUNT


def test_the_questions_of_the_tool_are_those_of_the_cards() -> None:
    for name, skill in bundled_skills().items():
        question: Question = QUESTIONS_BY_NAME[name]
        assert (skill.question, skill.classes) == (question.question, question.classes)
        assert (skill.made_for, skill.none_class) == (question.made_for, question.none_class)
    assert np.all(np.diff([list(QUESTIONS_BY_NAME).index(name) for name in bundled_skills()]) > 0)
