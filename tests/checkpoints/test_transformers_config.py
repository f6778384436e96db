"""What outputs mean, from a config.json of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from aoft_deploy.checkpoints.transformers_config import outputs
from aoft_deploy.errors import CheckpointError

LABELS = {0: "ripe", 1: "red", 2: "round"}


@pytest.mark.parametrize(
    ("problem_type", "activation"),
    [
        (None, "softmax"),
        ("single_label_classification", "softmax"),
        ("multi_label_classification", "sigmoid"),
        ("regression", "none"),
    ],
)
def test_the_problem_type_and_the_labels_of_transformers_are_read(
    problem_type: Any, activation: str, tmp_path: Path
) -> None:
    PretrainedConfig(problem_type=problem_type, id2label=LABELS).save_pretrained(tmp_path)
    found = outputs(tmp_path, 3)
    assert (found, found.activation) == (("ripe", "red", "round"), activation)


def test_labels_of_another_number_are_those_of_the_backbone(tmp_path: Path) -> None:
    PretrainedConfig(id2label=LABELS).save_pretrained(tmp_path)
    assert outputs(tmp_path, 2) == ("0", "1")


def test_a_folder_without_a_config_has_a_softmax_of_numbered_classes(tmp_path: Path) -> None:
    found = outputs(tmp_path, 2)
    assert (found, found.activation) == (("0", "1"), "softmax")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"config\.json is no config of transformers"),
        ("{", r"config\.json is no config of transformers"),
        ("[" * 100_000, r"config\.json is no config of transformers"),
        ('{"id2label": 7}', r"config\.json is no config of transformers"),
        ('{"problem_type": "ranking"}', "has the problem_type 'ranking', but must have single_la"),
        ('{"problem_type": ["x"]}', r"has the problem_type \['x'\], but must have single_la"),
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_config_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        outputs(tmp_path, 2)
