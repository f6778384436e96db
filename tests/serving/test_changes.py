"""Which files a sequence of scans opens, retries and closes."""

from __future__ import annotations

import numpy as np

from aoft_deploy.serving.repository.changes import MAX_SECONDS, Changes, ChangeTracker, Observation


def observe(follower: ChangeTracker, now: float, unseen: str = "", **marks: object) -> Changes:
    return follower.observe(Observation(marks, frozenset(unseen)), now)


NOTHING = Changes([], [])


def attempt(follower: ChangeTracker, name: str, mark: object, now: float, *, success: bool) -> None:
    follower.opening(name, mark)
    if success:
        follower.opened(name)
    else:
        follower.failed(name, now)


def test_a_file_is_opened_after_two_equal_scans() -> None:
    follower = ChangeTracker(2.0)
    for now, mark in enumerate((1, 2, 3)):  # it grows
        assert observe(follower, now, a=mark) == NOTHING
    assert observe(follower, 3, a=3) == Changes(["a"], [])
    attempt(follower, "a", 3, 3, success=True)
    assert observe(follower, 4, a=3) == NOTHING
    assert follower.observe(Observation({"b": 1}), 5, settled=True).opened == ["b"]


def test_a_file_is_gone_after_two_scans_without_it() -> None:
    follower = ChangeTracker(2.0)
    follower.observe(Observation({"a": 1, "b": 1}), 0, settled=True)
    for name in "ab":
        attempt(follower, name, 1, 0, success=True)
    assert observe(follower, 1, b=1) == NOTHING
    assert observe(follower, 2, a=1, b=1) == NOTHING  # it is back unchanged
    assert observe(follower, 3, b=1) == NOTHING  # the count starts again
    assert observe(follower, 4, b=1) == Changes([], ["a"])
    assert observe(follower, 5, b=1) == NOTHING
    assert observe(follower, 6, a=1, b=1) == NOTHING  # like a new file
    assert observe(follower, 7, a=1, b=1) == Changes(["a"], [])


def test_an_unreadable_folder_or_entry_changes_nothing() -> None:
    follower = ChangeTracker(2.0)
    follower.observe(Observation({"a": 1}), 0, settled=True)
    attempt(follower, "a", 1, 0, success=True)
    for now in range(1, 9):
        assert follower.observe(Observation({}, complete=False), now) == NOTHING
        assert observe(follower, now, unseen="a") == NOTHING
    assert observe(follower, 9, a=1) == observe(follower, 10, a=1) == NOTHING


def test_a_failed_file_is_retried_with_doubling_delays() -> None:
    follower, times = ChangeTracker(2.0), []
    follower.observe(Observation({"a": 1}), 0, settled=True)
    attempt(follower, "a", 1, 0, success=False)
    for now in range(1, 400):
        if observe(follower, now, a=1).opened:
            times.append(now)
            attempt(follower, "a", 1, now, success=False)
    waits = np.diff([0, *times]).tolist()
    assert waits[:6] == [2, 4, 8, 16, 32, MAX_SECONDS] and set(waits[6:]) == {MAX_SECONDS}
    attempt(follower, "a", 1, 400, success=True)
    assert not any(observe(follower, now, a=1).opened for now in range(401, 600))


def test_a_failed_file_is_retried_when_any_file_has_changed() -> None:
    follower = ChangeTracker(1000.0)
    follower.observe(Observation({"a": 1, "b": 1}), 0, settled=True)
    for name in "ab":
        attempt(follower, name, 1, 0, success=False)
    assert observe(follower, 1, a=1, b=1) == observe(follower, 2, a=1, b=1) == NOTHING
    observe(follower, 3, a=1, b=1, c=1)
    assert observe(follower, 4, a=1, b=1, c=1).opened == ["c"]
    attempt(follower, "c", 1, 4, success=True)
    assert observe(follower, 5, a=1, b=1, c=1).opened == ["a", "b"]


def test_a_model_closed_by_a_client_stays_closed_until_its_file_changes() -> None:
    follower = ChangeTracker(2.0)
    follower.observe(Observation({"a": 1}), 0, settled=True)
    attempt(follower, "a", 1, 0, success=False)
    follower.closed("a")
    for now in range(1, 200):
        assert observe(follower, now, a=1) == NOTHING
    observe(follower, 200, a=2)
    assert observe(follower, 201, a=2).opened == ["a"]
