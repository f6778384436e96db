"""Fixtures of the demo's tests: the shared fleet of the bundled tasks, and sessions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.tasks.shared_fleet import SharedFleet, open_shared_fleet


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SharedFleet:
    return open_shared_fleet([], tmp_path_factory.mktemp("shared fleet"), threads=1)


@pytest.fixture
def sessions(shared: SharedFleet) -> Iterator[SessionRegistry]:
    registry = SessionRegistry(shared)
    yield registry
    registry.close()


@pytest.fixture
def session(sessions: SessionRegistry) -> Session:
    return sessions.get("a session")
