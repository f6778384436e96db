"""The example scripts, run in an empty folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forked import run_python

from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.data.synthetic import load_task


def run(root: Path, name: str, folder: Path) -> str:
    """The output of an example."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found = run_python(root / "examples" / name, cwd=folder, env=environment)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder"),
    [("accelerate_loop.py", "accelerate_run"), ("huggingface_trainer.py", "trainer_run")],
)
def test_a_loop_trains_a_task_whose_artefact_is_mostly_right(
    name: str, folder: str, root: Path, tmp_path: Path
) -> None:
    output = run(root, name, tmp_path)
    line = next(line for line in output.splitlines() if line.startswith(f"{folder}/model.onnx: "))
    assert line.endswith("of 64 digits are right")
    assert int(line.split()[1]) > 32  # of ten classes, chance is 6
    data = load_task("digits")
    assert load_classifier(tmp_path / folder / "model.onnx").classes == data.classes
    assert read_checkpoint(tmp_path / folder / "model.ckpt").classes == data.classes


@pytest.mark.slow
def test_the_lightning_example_trains_independent_labels(root: Path, tmp_path: Path) -> None:
    lines = run(root, "lightning_module.py", tmp_path).splitlines()[-5:]
    digits = [line.split("  ") for line in lines]
    data = load_task("digits")
    assert [digit for digit, *_ in digits] == [
        data.classes[data.test[i][1]] for i in range(5) if data.test is not None
    ]
    assert {text.split()[0] for _, *texts in digits for text in texts} <= {"even", "prime", "round"}
    classes = load_classifier(tmp_path / "lightning_run" / "model.onnx").classes
    assert (classes, classes.activation) == (("even", "prime", "round"), "sigmoid")


def test_the_examples_are_short(root: Path) -> None:
    for path in (root / "examples").glob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 60, path
