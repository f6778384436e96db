"""Comparison of unmerged model, merged model and fleet."""

from __future__ import annotations

from aoft_demo.actions.verification import verify
from aoft_demo.tasks.session import Session


def test_unmerged_model_merged_model_and_fleet_agree(session: Session) -> None:
    result = verify(session, "shape")
    assert result.agreeing == result.images
    assert 0 < result.merged < 1e-4 * result.largest
    assert 0 < result.fleet < 1e-4 * result.largest
