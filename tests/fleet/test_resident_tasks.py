"""Paging: a name always gives its own task's parameters, whatever is read, evicted or removed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fleet_memories import table_rows
from numpy.typing import NDArray

from aoft_deploy.artefacts.table_memory import TableMemory
from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError
from aoft_deploy.fleet.name_index import NameIndex
from aoft_deploy.fleet.resident_tasks import ResidentTasks
from aoft_deploy.fleet.slots import HeldTask
from aoft_deploy.fleet.tables import TaskTables
from aoft_deploy.fleet.task import TaskKind, TaskParameters

KIND = TaskKind("d" * 64, "lora", {}, {}, (("q", (6,)),), width=1)
ROOM = 40  # bytes of a task with two classes


def task(value: float, classes: int = 2) -> TaskParameters:
    row, head = np.full(6, value, np.float32), np.full((classes, 2), value, np.float32)
    return TaskParameters(row, head, tuple(map(str, range(classes))))


class Store:
    """Tasks ``0``, ``1`` … whose parameters equal their names; counts reads."""

    kind = KIND

    def __init__(self, count: int, classes: Callable[[int], int] = lambda _: 2) -> None:
        self.names, self.reads = NameIndex.of(map(str, range(count))), Counter[str]()
        self.classes = classes
        self.before_read: Callable[[str], object] = lambda _: None

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str) -> TaskParameters:
        self.before_read(name)
        self.reads[name] += 1
        return task(float(name), self.classes(int(name)))


class Resident(ResidentTasks):
    """Resident tasks that can show the parameters of held tasks."""

    reserve: Callable[[int], TableMemory]

    def __init__(self, room: int, store: Store | None = None) -> None:
        self.tables = TaskTables(6, 1, room * ROOM, self.reserve)
        super().__init__(self.tables, store)

    def values(self, *names: str) -> dict[str, float]:
        """Value of each held task; all its parameters must be equal."""
        with self.holding(names) as held:
            return {name: self.value(task) for name, task in held.items()}

    def value(self, held: HeldTask) -> float:
        slot, classes = held
        first, count = int(self.tables.first[slot]), int(self.tables.count[slot])
        assert len(classes) == count
        row, head = table_rows(self.tables.bank, slot), table_rows(self.tables.heads, first, count)
        found = {*row.ravel(), *head.ravel()}
        assert len(found) == 1, found
        assert [table_rows(self.tables.arrays[n], slot)[0] for n in ("first", "count")] == [
            first,
            count,
        ]
        return float(found.pop())


@pytest.fixture(autouse=True)
def memory(reserve: Callable[[int], TableMemory], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with the tables in each of the memories."""
    monkeypatch.setattr(Resident, "reserve", staticmethod(reserve), raising=False)


def test_the_least_recently_used_task_is_evicted_first() -> None:
    tasks = Resident(3, Store(9))
    for name in "0120310":
        assert tasks.values(name) == {name: float(name)}
    assert set(tasks.resident) == {"0", "1", "3"}
    found = tasks.residency
    assert (found.hits, found.misses, found.evictions) == (2, 5, 2)
    assert (found.tasks, found.bytes, found.budget) == (3, 3 * ROOM, 3 * ROOM)


def test_a_wide_task_evicts_as_many_as_it_needs() -> None:
    tasks = Resident(4, Store(9, classes=lambda i: 9 if i == 8 else 2))
    tasks.values("0", "1", "2", "3")
    assert tasks.values("8") == {"8": 8.0}
    assert tasks.residency.bytes <= 4 * ROOM and set(tasks.resident) == {"3", "8"}


def test_a_request_for_too_many_tasks_gets_the_first_ones() -> None:
    tasks = Resident(2, Store(9))
    assert tasks.values("4", "5", "6", "7") == {"4": 4.0, "5": 5.0}
    assert tasks.values("6", "5") == {"5": 5.0, "6": 6.0}


def test_a_held_task_is_not_evicted() -> None:
    tasks = Resident(2, Store(9))
    with tasks.holding(["0"]) as slots:
        for name in "1234":
            assert tasks.values(name) == {name: float(name)}
        assert tasks.value(slots["0"]) == 0 and "0" in tasks.resident


def test_a_removed_task_keeps_its_parameters_while_requests_hold_it() -> None:
    tasks = Resident(3, Store(9))
    tasks.add("mine", task(70))
    with tasks.holding(["0", "mine"]) as slots:
        tasks.remove("0")
        tasks.remove("mine")
        for name in "1231":
            assert tasks.values(name) == {name: float(name)}
        assert (tasks.value(slots["0"]), tasks.value(slots["mine"])) == (0, 70)
        assert tasks.residency.bytes == 3 * ROOM and list(tasks.resident) == ["1"]
    assert tasks.residency.bytes == ROOM


@pytest.mark.parametrize("what", ["asked", "added"])
def test_a_task_without_room_waits_until_a_request_ends(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, waits = Resident(1, Store(9)), threading.Event()
    wait = tasks._wait

    def waiting(changes: int) -> None:
        waits.set()
        wait(changes)

    monkeypatch.setattr(tasks, "_wait", waiting)
    with ThreadPoolExecutor() as pool:
        with tasks.holding(["0"]) as slots:
            if what == "asked":
                other = pool.submit(tasks.values, "1")
            else:
                other = pool.submit(tasks.add, "new", task(7))  # type: ignore[arg-type]
            assert waits.wait(20)
            assert not other.done() and tasks.value(slots["0"]) == 0
        assert other.result(20) == ({"1": 1.0} if what == "asked" else None)
    assert list(tasks.resident) == (["1"] if what == "asked" else ["new"])


def test_a_task_gets_its_name_after_its_parameters_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, writing, gate = Resident(4), threading.Event(), threading.Event()
    tasks.add("old", task(70))
    memory = tasks.tables._memory
    write, writes = memory.write, list[int]()

    def slow(offset: int, values: NDArray[Any]) -> None:
        write(offset, values)
        writes.append(offset)
        if len(writes) == 4:  # row, classifier, its first row and its number of classes
            writing.set()
            gate.wait(20)

    monkeypatch.setattr(memory, "write", slow)
    with ThreadPoolExecutor() as pool:
        added = pool.submit(tasks.add, "new", task(71))
        assert writing.wait(20)
        assert "new" not in tasks and tasks.values("old") == {"old": 70.0}
        gate.set()
        added.result(20)
    assert tasks.values("old", "new") == {"old": 70.0, "new": 71.0} and len(writes) == 4


def test_concurrent_requests_for_a_task_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store, gate, asked = Store(9), threading.Event(), threading.Semaphore(0)
    store.before_read = lambda _: gate.wait(20)
    tasks = Resident(4, store)
    page_in = tasks._page_in

    def missed(name: str, wait: bool) -> HeldTask | None:
        asked.release()
        return page_in(name, wait)

    monkeypatch.setattr(tasks, "_page_in", missed)
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(tasks.values, "5") for _ in range(8)]
        assert all(asked.acquire(timeout=20) for _ in range(8))
        assert tasks.resident == {}
        gate.set()
        assert [future.result(20) for future in found] == [{"5": 5.0}] * 8
    counts = tasks.residency
    assert store.reads == {"5": 1} and counts.hits + counts.misses == 8


def test_requests_for_tasks_in_memory_do_not_wait_for_a_disk() -> None:
    store, gate, reading = Store(9), threading.Event(), threading.Event()
    tasks = Resident(4, store)
    tasks.values("1")

    def read_slowly(_: str) -> None:
        reading.set()
        gate.wait(20)

    store.before_read = read_slowly
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(tasks.values, "5")
        assert reading.wait(20)
        assert tasks.values("1") == {"1": 1.0} and not slow.done()
        gate.set()
        assert slow.result(20) == {"5": 5.0}


def test_a_task_removed_while_it_is_read_does_not_answer() -> None:
    store, gate, reading = Store(40), threading.Event(), threading.Event()

    def wait(_: str) -> None:
        reading.set()
        gate.wait(20)

    store.before_read = wait
    tasks = Resident(4, store)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(tasks.values, "5")
        assert reading.wait(20)
        tasks.remove("5")
        gate.set()
        with pytest.raises(UnknownNameError, match="Unknown task '5'"):
            asked.result(20)
    assert tasks.residency.bytes == 0


def test_a_task_replaced_while_it_is_read_answers_with_the_new_parameters() -> None:
    store, gate, reading = Store(9), threading.Event(), threading.Event()

    def wait(_: str) -> None:
        reading.set()
        gate.wait(20)

    store.before_read = wait
    tasks = Resident(4, store)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(tasks.values, "5")
        assert reading.wait(20)
        tasks.remove("5")
        tasks.add("5", task(55))
        gate.set()
        assert asked.result(20) == {"5": 55.0}
    assert tasks.residency.bytes == ROOM


def test_a_removed_task_of_the_store_stays_removed_but_its_name_can_be_reused() -> None:
    tasks = Resident(4, Store(30))
    tasks.values("5")
    for name in ("5", "6"):
        tasks.remove(name)
        with pytest.raises(UnknownNameError, match=f"Unknown task '{name}'"):
            tasks.values(name)
        with pytest.raises(UnknownNameError, match=f"Unknown task '{name}'"):
            tasks.remove(name)
        with pytest.raises(UnknownNameError, match=f"Unknown task '{name}'"):
            tasks.classes(name)
    tasks.add("5", task(55))
    assert tasks.values("5") == {"5": 55.0}
    tasks.remove("5")
    with pytest.raises(UnknownNameError):
        tasks.values("5")


def test_added_tasks_are_never_evicted() -> None:
    tasks = Resident(3, Store(9))
    tasks.add("mine", task(70))
    tasks.add("yours", task(71))
    for name in "01230":
        tasks.values(name)
    assert tasks.values("mine", "yours") == {"mine": 70.0, "yours": 71.0}
    tasks.add("hers", task(72))
    with pytest.raises(SettingError, match="of 2 classes takes 40 bytes, but the tasks added"):
        tasks.add("his", task(73))
    with pytest.raises(
        SettingError, match="leave no room for it in a `budget` of 120: remove some"
    ):
        tasks.values("1")
    tasks.remove("hers")
    assert tasks.values("1") == {"1": 1.0}


def test_a_task_without_enough_contiguous_rows_is_refused() -> None:
    tasks = Resident(3)
    slots = [tasks.tables.allocate(1) for _ in range(3)]
    lowest = int(tasks.tables.first[2])
    tasks.tables._free_rows = [(i, 1) for i in range(0, lowest, 2)]
    for slot in slots[1:]:
        assert slot is not None
        tasks.tables.free(slot)
    with pytest.raises(SettingError, match="A task of 4 classes takes 56 bytes"):
        tasks.add("wide", task(1, classes=4))


def test_a_name_in_use_is_refused() -> None:
    store = Store(9)
    tasks = Resident(4, store)
    tasks.add("mine", task(70))
    for name in ("mine", "3"):
        with pytest.raises(SettingError, match=f"The fleet has a task '{name}': remove it first"):
            tasks.add(name, task(71))
    assert tasks.values("mine", "3") == {"mine": 70.0, "3": 3.0}


def test_one_of_two_concurrent_additions_of_a_name_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, both = Resident(4), threading.Barrier(2)
    write = tasks._write

    def together(parameters: TaskParameters) -> int | None:
        slot = write(parameters)
        both.wait(20)
        return slot

    monkeypatch.setattr(tasks, "_write", together)
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(tasks.add, "new", task(i)).exception for i in range(2)]
        errors = [error(20) for error in found]
    assert sorted(type(error).__name__ for error in errors) == ["NoneType", "SettingError"]
    assert tasks.residency.bytes == ROOM


def test_tasks_from_the_store_are_checked_and_read_again_after_a_failure() -> None:
    class Broken(Store):
        def read(self, name: str) -> TaskParameters:
            self.reads[name] += 1
            if self.reads[name] == 1:
                raise CheckpointError("The disk is gone.")
            return (
                task(1)._replace(row=np.ones(1, np.float32)) if self.reads[name] == 2 else task(1)
            )

    tasks = Resident(4, Broken(9))
    with pytest.raises(CheckpointError, match="The disk is gone"):
        tasks.values("1")
    with pytest.raises(CheckpointError, match="Task '1' has parameters of shape"):
        tasks.values("1")
    assert tasks.values("1") == {"1": 1.0} and not tasks._reads


def test_an_unknown_name_is_reported_with_similar_ones() -> None:
    tasks = Resident(4, Store(300))
    tasks.add("pets", task(1))
    with pytest.raises(UnknownNameError, match=r"Unknown task 'pest'\. Did you mean pets\?$"):
        tasks.values("1", "pest")
    with pytest.raises(UnknownNameError, match=r"Unknown task '1234'\. Did you mean .*234"):
        tasks.remove("1234")
    assert tasks.residency.misses == 0
    assert tasks.classes("17") == tasks.classes("pets") == ("0", "1")


@pytest.mark.parametrize("room", [1, 3, 20])
def test_no_request_gets_the_parameters_of_another_task(room: int) -> None:
    store = Store(60, classes=lambda i: 2 + i % 3 * (room > 1))
    tasks = Resident(room, store)
    stop, wrong, served = threading.Event(), list[object](), Counter[int]()

    def churn() -> None:
        while not stop.is_set():
            if room > 1:
                tasks.add("new", task(1000))
                tasks.remove("new")
            time.sleep(0)

    def ask(worker: int) -> None:
        rng = np.random.default_rng(worker)
        for _ in range(300):
            names = list(dict.fromkeys(map(str, (60 * rng.random(4) ** 3).astype(int))))
            while names:
                with tasks.holding(names) as slots:
                    found = {name: tasks.value(slot) for name, slot in slots.items()}
                if not found or any(value != float(name) for name, value in found.items()):
                    wrong.append((names, found))
                names = [name for name in names if name not in found]
            served[worker] += 1

    changer = threading.Thread(target=churn)
    changer.start()
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(ask, worker) for worker in range(8)]:
            future.result(120)
    stop.set()
    changer.join()
    assert not wrong and set(served.values()) == {300}
    assert tasks.residency.bytes <= tasks.residency.budget
    for name in tasks.resident:
        tasks.remove(name)
    assert tasks.residency.bytes == 0 and not tasks._reads and not tasks._slots._references
