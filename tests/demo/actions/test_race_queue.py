"""One race runs at a time, and each visitor has at most one."""

from __future__ import annotations

import pytest

from aoft_demo.actions.race_queue import MAX_WAITING, RaceQueue, RaceStoppedError
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_deploy.errors import SettingError


def test_a_race_waits_for_those_that_entered_before(sessions: SessionRegistry) -> None:
    races = RaceQueue()
    first, second, third = (races.enter(sessions.get(key)) for key in "abc")
    assert [races.ahead(race) for race in (first, second, third)] == [0, 1, 2]
    races.leave(second)
    assert [races.ahead(race) for race in (first, third)] == [0, 1]
    races.leave(first)
    races.leave(first)
    assert races.ahead(third) == 0


def test_a_visitor_has_one_race_at_a_time(session: Session) -> None:
    races = RaceQueue()
    race = races.enter(session)
    with pytest.raises(SettingError, match="running already"):
        races.enter(session)
    races.stop(session)
    assert races.ahead(races.enter(session)) == 1  # its present step still uses the processor
    races.leave(race)


def test_a_stop_concerns_the_visitors_own_race(sessions: SessionRegistry) -> None:
    races = RaceQueue()
    mine, other = races.enter(sessions.get("a")), races.enter(sessions.get("b"))
    mine.check_not_stopped()
    races.stop(sessions.get("a"))
    races.stop(sessions.get("nobody"))
    assert (mine.stopped, other.stopped) == (True, False)
    for step in (mine.check_not_stopped, lambda: mine.pause(600.0)):
        with pytest.raises(RaceStoppedError, match="You stopped the race"):
            step()
    other.pause(0.0)


def test_a_race_stops_when_its_session_ends(sessions: SessionRegistry) -> None:
    race = RaceQueue().enter(sessions.get("a"))
    sessions.get("a").end()
    with pytest.raises(RaceStoppedError):
        race.check_not_stopped()


def test_the_queue_is_limited(sessions: SessionRegistry) -> None:
    races = RaceQueue()
    for number in range(MAX_WAITING + 1):
        races.enter(sessions.get(str(number)))
    with pytest.raises(SettingError, match=f"{MAX_WAITING} races are waiting: try again later"):
        races.enter(sessions.get("one more"))
