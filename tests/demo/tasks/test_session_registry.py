"""All sessions: they are independent of each other, and end when idle or with the demo."""

from __future__ import annotations

import time

import pytest

from aoft_demo.actions.classify import classify
from aoft_demo.tasks import session_registry
from aoft_demo.tasks.session_registry import GRACE, IDLE, SessionRegistry
from aoft_demo.tasks.shared_fleet import BUNDLED, SharedFleet, bundled_checkpoints
from aoft_deploy.errors import SettingError

PICTURE = BUNDLED / "star.jpg"


def test_sessions_do_not_see_each_others_tasks(sessions: SessionRegistry) -> None:
    ours, theirs = sessions.get("ours"), sessions.get("theirs")
    task = ours.add(BUNDLED / "shape.ckpt", "mine")
    theirs.add(BUNDLED / "colour.ckpt", "mine")
    assert "mine" in ours.tasks and theirs.tasks["mine"].classes == theirs.tasks["colour"].classes
    assert classify(ours, PICTURE, ["mine"]).predictions["mine"][0].label == "star"
    assert sessions.get("other").tasks.keys() == sessions.shared.tasks.keys()
    ours.remove("shape")
    assert "shape" in theirs.tasks
    sessions.leave("ours")
    assert task.key not in sessions.shared.fleet
    assert not ours.folder.exists()
    assert theirs.tasks["mine"].key in sessions.shared.fleet
    sessions.leave("ours")  # browsers may report it twice


def test_an_idle_session_ends(shared: SharedFleet) -> None:
    now = [0.0]
    sessions = SessionRegistry(shared, clock=lambda: now[0])
    first = sessions.get("first")
    first.add(BUNDLED / "shape.ckpt", "mine")
    now[0] = IDLE + 1
    sessions.get("second")
    assert len(sessions) == 1 and not first.folder.exists() and first.ended
    assert "mine" not in sessions.get("first").tasks


def test_closing_the_registry_ends_all_sessions(shared: SharedFleet) -> None:
    sessions = SessionRegistry(shared)
    first, second = sessions.get("a"), sessions.get("b")
    key = second.add(BUNDLED / "shape.ckpt", "mine").key
    with first.training("trained") as training:
        sessions.close()
        assert training.stopped
    assert len(sessions) == 0 and key not in shared.fleet
    assert all(one.ended and not one.folder.exists() for one in (first, second))
    with pytest.raises(SettingError, match="The demo has ended"):
        sessions.get("late")


KEYS = [f"{number:032x}" for number in range(8)]


def test_a_tabs_key_finds_its_session_again_until_the_grace_time_is_over(
    shared: SharedFleet,
) -> None:
    now = [0.0]
    sessions = SessionRegistry(shared, clock=lambda: now[0])
    first = sessions.attach("page 1", KEYS[0])
    key = first.add(bundled_checkpoints()[0], "mine").key
    assert sessions.get("page 1") is first
    assert sessions.attach("page 2", KEYS[0]) is first  # the reloaded page, or a duplicated tab
    sessions.leave("page 1")
    sessions.sweep()
    now[0] += GRACE + 1
    assert sessions.get("page 2") is first  # a page is still open
    sessions.leave("page 2")
    now[0] += GRACE - 1
    assert sessions.attach("page 3", KEYS[0]) is first and "mine" in first.tasks
    now[0] += 2 * GRACE
    assert sessions.get("page 3") is first  # the page is open again
    sessions.leave("page 3")
    now[0] += GRACE + 1
    assert sessions.attach("page 4", KEYS[0]) is not first
    assert first.ended and key not in shared.fleet and len(sessions) == 1
    sessions.close()


@pytest.mark.parametrize("key", [None, "", 7, ["a"], "0" * 31, "0" * 33, "G" * 32, "../" * 11])
def test_a_key_that_no_tab_makes_finds_no_session(sessions: SessionRegistry, key: object) -> None:
    first = sessions.attach("page 1", key)
    assert sessions.attach("page 2", key) is not first
    sessions.leave("page 1")
    assert first.ended


def test_the_number_of_sessions_is_limited(
    sessions: SessionRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_registry, "MAX_SESSIONS", 3)
    kept = [sessions.attach(f"page {key}", key) for key in KEYS[:3]]
    with pytest.raises(SettingError, match="as many visitors as it can take"):
        sessions.get("one more")
    sessions.leave(f"page {KEYS[1]}")
    sessions.leave(f"page {KEYS[0]}")
    assert sessions.get("one more") not in kept
    assert [session.ended for session in kept] == [False, True, False]  # the first that was left
    assert len(sessions) == 3
    sessions.leave(f"page {KEYS[2]}")
    sessions.get("a third")
    sessions.attach("a third", "f" * 32)  # has its session already, so nobody makes room for it
    assert not kept[2].ended and len(sessions) == 3


def test_a_session_in_use_does_not_end(shared: SharedFleet) -> None:
    now = [0.0]
    sessions = SessionRegistry(shared, clock=lambda: now[0])
    used = sessions.get("a page")
    for _ in range(3):
        now[0] += IDLE - 1
        assert sessions.get("a page") is used
    sessions.close()


def test_a_page_that_is_left_stops_its_trainings(sessions: SessionRegistry) -> None:
    session = sessions.attach("page 1", KEYS[0])
    with session.training("mine") as training:
        sessions.leave("page 1")
        assert training.stopped and not session.ended  # a reload finds the other tasks


def test_a_session_that_no_page_and_no_key_finds_ends(sessions: SessionRegistry) -> None:
    """A request before the page's key arrives makes a session of its own."""
    kept, early = sessions.attach("page 1", KEYS[0]), sessions.get("page 2")
    assert sessions.attach("page 2", KEYS[0]) is kept
    assert early.ended and not early.folder.exists() and len(sessions) == 1


def test_sessions_end_without_further_requests(
    sessions: SessionRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_registry, "GRACE", 0.05)
    session = sessions.attach("page", KEYS[0])
    sessions.leave("page")
    end = time.monotonic() + 60
    while not session.ended:
        assert time.monotonic() < end
        time.sleep(0.01)
