"""Proof that unmerged model, merged model and fleet agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aoft_demo.actions.classify import classify
from aoft_demo.actions.verification import IMAGES, verify
from aoft_demo.tasks.session import Session
from aoft_deploy.classes import Prediction
from aoft_deploy.errors import ImageError


def test_unmerged_model_merged_model_and_fleet_agree(session: Session) -> None:
    name, picture = next(iter(session.tasks)), session.shared.examples[0]
    proof = verify(session, name, picture)
    assert proof.proved and proof.agreeing == len(proof.unmerged) == 1 + IMAGES
    assert 0 < proof.merged_difference < proof.tolerance < 1e-4 * proof.largest
    assert 0 < proof.fleet_difference < proof.tolerance
    assert proof.rounding < proof.tolerance and proof.digits >= 4
    scores = proof.classes.scores(proof.fleet[:1])[0]
    (best, *_) = classify(session, picture, [name]).predictions[name]
    assert isinstance(best, Prediction)
    assert best.label == proof.classes[int(np.argmax(scores))]
    assert best.probability == pytest.approx(float(scores.max()), abs=1e-5)


def test_an_unreadable_picture_is_refused(session: Session, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_bytes(b"text")
    with pytest.raises(ImageError, match="text"):
        verify(session, next(iter(session.tasks)), tmp_path / "text.png")
