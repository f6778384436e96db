"""All sessions: they are independent of each other, and end when idle or with the demo."""

from __future__ import annotations

import pytest

from aoft_demo.actions.classify import classify
from aoft_demo.tasks.session_registry import IDLE, SessionRegistry
from aoft_demo.tasks.shared_fleet import BUNDLED, SharedFleet
from aoft_deploy.errors import SettingError

PICTURE = BUNDLED / "digits-7.png"


def test_sessions_do_not_see_each_others_tasks(sessions: SessionRegistry) -> None:
    ours, theirs = sessions.get("ours"), sessions.get("theirs")
    task = ours.add(BUNDLED / "digits.ckpt", "mine")
    theirs.add(BUNDLED / "colour.ckpt", "mine")
    assert "mine" in ours.tasks and len(theirs.tasks["mine"].classes) == 8
    assert classify(ours, PICTURE, ["mine"]).predictions["mine"][0].label == "7"
    assert sessions.get("other").tasks.keys() == sessions.shared.tasks.keys()
    ours.remove("digits")
    assert "digits" in theirs.tasks
    sessions.end("ours")
    assert task.key not in sessions.shared.fleet
    assert not ours.folder.exists()
    assert theirs.tasks["mine"].key in sessions.shared.fleet
    sessions.end("ours")  # browsers may report it twice


def test_an_idle_session_ends(shared: SharedFleet) -> None:
    now = [0.0]
    sessions = SessionRegistry(shared, clock=lambda: now[0])
    first = sessions.get("first")
    first.add(BUNDLED / "digits.ckpt", "mine")
    now[0] = IDLE + 1
    sessions.get("second")
    assert len(sessions) == 1 and not first.folder.exists() and first.ended
    assert "mine" not in sessions.get("first").tasks


def test_closing_the_registry_ends_all_sessions(shared: SharedFleet) -> None:
    sessions = SessionRegistry(shared)
    first, second = sessions.get("a"), sessions.get("b")
    key = second.add(BUNDLED / "digits.ckpt", "mine").key
    with first.training("trained") as training:
        sessions.close()
        assert training.stopped
    assert len(sessions) == 0 and key not in shared.fleet
    assert all(one.ended and not one.folder.exists() for one in (first, second))
    with pytest.raises(SettingError, match="The demo has ended"):
        sessions.get("late")
