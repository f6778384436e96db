"""Proof that unmerged model, merged model and fleet agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aoft_demo.actions.classify import classify
from aoft_demo.actions.verification import IMAGES, Proof, verify
from aoft_demo.tasks.session import Session
from aoft_deploy.classes import Classes, Prediction
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
    assert not np.array_equal(proof.merged, proof.unmerged)  # another model computed them
    assert best.probability == pytest.approx(float(scores.max()), abs=1e-5)


def test_an_unreadable_picture_is_refused(session: Session, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_bytes(b"text")
    with pytest.raises(ImageError, match="text"):
        verify(session, next(iter(session.tasks)), tmp_path / "text.png")


def test_a_proof_needs_small_differences_and_equal_answers() -> None:
    unmerged = np.array([[4.0, 1.0], [1.0, 1.0 + 1e-6]], np.float32)

    def proof(place: tuple[int, int], merged: float, fleet: float) -> Proof:
        found = [unmerged.copy(), unmerged.copy()]
        for logits, change in zip(found, (merged, fleet), strict=True):
            logits[place] += change
        return Proof(Classes(("x", "y")), unmerged, *found)

    same = proof((0, 0), 1e-5, 1e-5)
    assert same.proved and same.agreeing == 2
    for merged, fleet in ((1e-2, 0), (0, 1e-2)):
        differing = proof((0, 0), merged, fleet)
        assert not differing.proved and differing.agreeing == 2
        assert differing.merged_difference == pytest.approx(merged, rel=1e-3)
        assert differing.fleet_difference == pytest.approx(fleet, rel=1e-3)
        assert differing.digits == 2
        other = proof((1, 0), merged / 1e3, fleet / 1e3)  # decides the second picture otherwise
        assert other.agreeing == 1 and not other.proved
        assert max(other.merged_difference, other.fleet_difference) < other.tolerance
