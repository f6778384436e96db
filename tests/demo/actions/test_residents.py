"""The list of a session's tasks with their sizes."""

from __future__ import annotations

import pytest

from aoft_demo.actions.residents import residents
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import BUNDLED, SharedFleet
from aoft_deploy.errors import SettingError, UnknownNameError


def test_tasks_are_added_and_removed(session: Session, shared: SharedFleet) -> None:
    before = shared.fleet.residency.bytes
    session.add(BUNDLED / "shape.ckpt", "  my   shape ")
    assert "my shape" in session.tasks and shared.fleet.residency.bytes > before
    rows = {row.name: row for row in residents(session)}
    taken = shared.fleet.residency.bytes - before
    assert taken - 64 <= rows["my shape"].bytes <= taken
    assert rows["my shape"].bytes == rows["shape"].bytes
    assert (rows["my shape"].origin, rows["shape"].origin) == ("added", "initial")
    with pytest.raises(SettingError, match="There is a task 'my shape'"):
        session.add(BUNDLED / "shape.ckpt", "my shape")
    session.remove("my shape")
    assert shared.fleet.residency.bytes == before
    with pytest.raises(UnknownNameError, match="my shape"):
        session.remove("my shape")
