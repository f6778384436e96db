"""The tasks of a session in memory, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass

from aoft_demo.tasks.session import Session, own_first
from aoft_demo.tasks.shared_fleet import task_bytes

__all__ = ["Resident", "residents"]


@dataclass(frozen=True)
class Resident:
    """A task in memory.

    Attributes:
        name: The task's name in the session.
        classes: Number of classes.
        bytes: Size of the task's parameters.
        origin: ``initial``, ``added`` or ``trained``.
    """

    name: str
    classes: int
    bytes: int
    origin: str


def residents(session: Session) -> list[Resident]:
    """The tasks of a session, the visitor's own first."""
    fleet = session.shared.fleet
    return [
        Resident(name, len(task.classes), task_bytes(fleet, task.classes), task.origin)
        for name, task in own_first(session.tasks).items()
    ]
