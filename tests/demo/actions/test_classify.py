"""Classification of a picture by several tasks at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from photographs import PHOTOGRAPHS, photograph
from PIL import Image

from aoft_demo.actions.classify import classify
from aoft_demo.actions.export import export_task
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import BUNDLED
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.errors import ImageError, SettingError, UnknownNameError

PICTURE = BUNDLED / "star.jpg"


def test_one_pass_gives_the_answers_of_the_merged_models(
    session: Session,
) -> None:
    names = list(session.tasks)
    answers = classify(session, PICTURE, names, top=3)
    assert list(answers.predictions) == names
    assert 0 < answers.switch < answers.seconds
    exported = export_task(session, "shape", "onnx")
    expected = load_classifier(exported.path, options=EngineOptions(threads=1)).predict(PICTURE, 3)
    for ours, theirs in zip(answers.predictions["shape"], expected, strict=True):
        assert ours.label == theirs.label
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)
    assert answers.predictions["shape"][0].label == "star"


def test_unusable_input_is_refused(session: Session, tmp_path: Path) -> None:
    odd = tmp_path / "odd.png"
    odd.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"odd\.png"):
        classify(session, odd, ["shape"])
    with pytest.raises(SettingError, match="Choose at least one task"):
        classify(session, PICTURE, [])
    with pytest.raises(UnknownNameError, match="task 'shap'"):
        classify(session, PICTURE, ["shap"])


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_photograph_is_classified_as_if_decoded_in_full(
    session: Session, tmp_path: Path, name: str, progressive: bool
) -> None:
    path = photograph(tmp_path / "photo.jpg", PHOTOGRAPHS[name], progressive=progressive)
    answers = classify(session, path, ["shape"], top=3)
    assert (answers.width, answers.height) == PHOTOGRAPHS[name]
    full = Image.open(path).convert("RGB")
    row = session.shared.fleet.preprocessing(full)
    ((logits, _),) = session.shared.fleet.predict(row[None], ["shape"])
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for label, probability in answers.predictions["shape"]:
        expected = probabilities[session.shared.tasks["shape"].classes.index(label)]
        assert probability == pytest.approx(expected, abs=0.02)
