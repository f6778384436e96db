"""The attention of a task's model to a picture."""

from __future__ import annotations

import numpy as np

from aoft_demo.actions.attention import attention_map, attention_overlay
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import BUNDLED

PICTURE = BUNDLED / "digits-7.png"


def test_each_task_has_its_own_attention_map(session: Session) -> None:
    grid = attention_map(session, "digits", PICTURE)
    assert grid.shape == (8, 8) and grid.min() >= 0 and grid.max() == 1
    other = attention_map(session, "shape", PICTURE)
    assert np.abs(grid - other).max() > 0.01
    assert attention_overlay(session, PICTURE, grid).size == (384, 384)
