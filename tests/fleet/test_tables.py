"""The tables take as much memory as the tasks in them need, whatever was there before."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable

import numpy as np
import psutil
import pytest
from fleet_memories import table_rows

from aoft_deploy.artefacts import table_memory
from aoft_deploy.artefacts.table_memory import TableMemory
from aoft_deploy.errors import SettingError
from aoft_deploy.fleet.tables import TaskTables
from aoft_deploy.fleet.task import TaskParameters

Reserve = Callable[[int], TableMemory]


def task(numbers: int, width: int, classes: int, value: float) -> TaskParameters:
    row = np.full(numbers, value, np.float32)
    head = np.full((classes, width + 1), value, np.float32)
    return TaskParameters(row, head, tuple(map(str, range(classes))))


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)  # type: ignore[no-untyped-call]


def test_a_task_keeps_its_parameters_while_others_come_and_go(reserve: Reserve) -> None:
    tables = TaskTables(row_length=50, width=6, budget=40_000, reserve=reserve)
    rng = np.random.default_rng(0)
    there: dict[int, tuple[float, int]] = {}
    for value in map(float, range(1, 3000)):
        if there and rng.random() < 0.5:
            slot = int(rng.choice(list(there)))
            del there[slot]
            tables.free(slot)
        classes = int(rng.choice([1, 2, 3, 7, 20, 90]))
        taken = tables.allocate(classes)
        if taken is not None:
            assert taken not in there
            tables.write(taken, task(50, 6, classes, value))
            there[taken] = value, classes
        assert tables.used == sum(200 + 28 * classes for _, classes in there.values())
        assert tables.used <= tables.budget
    for slot, (value, classes) in there.items():
        first = int(tables.first[slot])
        assert int(tables.count[slot]) == classes
        assert (table_rows(tables.bank, slot) == value).all()
        assert (table_rows(tables.heads, first, classes) == value).all()
        for name, number in (("first", first), ("count", classes)):
            assert table_rows(tables.arrays[name], slot) == [number]
    for slot in there:
        tables.free(slot)
    assert tables._free_rows == [(0, tables.heads.shape[0])] and tables.used == 0
    assert tables._next_slot == 0 and tables._free_slots == []


@pytest.mark.parametrize("widths", [(1, 1), (1, 90), (90, 1), (7, 20)])
def test_tasks_of_any_width_fill_the_budget_after_those_of_another(
    reserve: Reserve, widths: tuple[int, int]
) -> None:
    tables = TaskTables(row_length=50, width=6, budget=40_000, reserve=reserve)
    for classes in widths:
        slots = []
        while (slot := tables.allocate(classes)) is not None:
            tables.write(slot, task(50, 6, classes, float(slot)))
            slots.append(slot)
        assert len(slots) == 40_000 // (200 + 28 * classes)
        for slot in slots:
            first = int(tables.first[slot])
            assert (table_rows(tables.bank, slot) == slot).all()
            assert (table_rows(tables.heads, first, classes) == slot).all()
            tables.free(slot)


def test_the_bank_and_the_classifiers_never_overlap(reserve: Reserve) -> None:
    """Also where nearly all of the memory is taken, in pieces of many sizes."""
    tables = TaskTables(row_length=20, width=6, budget=4000, reserve=reserve)
    rng, there = np.random.default_rng(1), dict[int, set[int]]()
    for _ in range(3000):
        classes = int(rng.choice([1, 2, 3, 7, 20, 90]))
        slot = tables.allocate(classes)
        while slot is None:
            freed = int(rng.choice(list(there)))
            del there[freed]
            tables.free(freed)
            slot = tables.allocate(classes)
        first = 28 * int(tables.first[slot])
        taken = {*range(80 * slot, 80 * slot + 80), *range(first, first + 28 * classes)}
        assert len(taken) == tables.size(classes)
        assert max(taken) < tables._memory.size - tables._start
        assert all(taken.isdisjoint(other) for other in there.values())
        there[slot] = taken


def test_a_task_beyond_the_budget_gets_no_slot() -> None:
    tables = TaskTables(row_length=10, width=4, budget=150)
    slot = tables.allocate(2)
    assert slot == 0 and tables.allocate(2) is None
    tables.free(slot)
    assert tables.allocate(2) == 0


@pytest.mark.parametrize("budget", [-1, 0, 59])
def test_a_budget_without_room_for_one_task_is_refused(budget: int) -> None:
    with pytest.raises(SettingError, match=f"`budget` is {budget} bytes, but one task takes"):
        TaskTables(row_length=10, width=4, budget=budget)


def test_a_budget_that_the_system_cannot_reserve_is_refused() -> None:
    with pytest.raises(SettingError, match=r"does not reserve .* give a smaller `budget`"):
        TaskTables(row_length=10, width=4, budget=2**60)


def test_a_fleet_of_classifiers_only_has_empty_rows(reserve: Reserve) -> None:
    tables = TaskTables(row_length=0, width=4, budget=1000, reserve=reserve)
    slot = tables.allocate(3)
    assert slot is not None
    tables.write(slot, task(0, 4, 3, 2.0))
    head = table_rows(tables.heads, int(tables.first[slot]), 3)
    assert tables.bank.shape[1] == 0 and (head == 2).all()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
@pytest.mark.parametrize("widths", [(2, 2), (2, 400), (400, 2)])
def test_memory_is_returned_when_all_tasks_are_replaced(
    widths: tuple[int, int],
) -> None:
    budget = 48_000_000
    tables, before = TaskTables(row_length=20_000, width=255, budget=budget), resident_bytes()
    for classes in widths:
        slots = []
        while (slot := tables.allocate(classes)) is not None:
            tables.write(slot, task(20_000, 255, classes, 1.0))
            slots.append(slot)
        used, taken = tables.used, resident_bytes() - before
        assert 0.98 * budget < used <= budget
        assert taken < 1.1 * budget
        for slot in slots:
            tables.free(slot)
    assert resident_bytes() - before < 0.1 * budget


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
def test_a_released_page_holds_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the bank ends on the page on which the classifiers begin."""
    monkeypatch.setattr(table_memory, "SPARE", 0)
    tables = TaskTables(row_length=300, width=6, budget=40_000)
    rng, there = np.random.default_rng(2), dict[int, tuple[float, int]]()
    for value in map(float, range(1, 2000)):
        classes = int(rng.choice([1, 3, 40, 300]))
        while (slot := tables.allocate(classes)) is None:
            freed = int(rng.choice(list(there)))
            del there[freed]
            tables.free(freed)
        tables.write(slot, task(300, 6, classes, value))
        there[slot] = value, classes
        for slot, (value, classes) in there.items():
            first = int(tables.first[slot])
            assert (tables.bank[slot] == value).all()
            assert (tables.heads[first : first + classes] == value).all()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
def test_memory_stays_flat_under_churn_of_many_widths() -> None:
    budget = 32_000_000
    tables, before = TaskTables(row_length=10_000, width=255, budget=budget), resident_bytes()
    rng, slots = np.random.default_rng(0), list[int]()
    tasks: dict[int, TaskParameters] = {
        n: task(10_000, 255, n, 1.0) for n in (1, 3, 10, 37, 100, 500)
    }
    peak = 0
    for turn in range(4000):
        classes = int(rng.choice(list(tasks)))
        while (slot := tables.allocate(classes)) is None:
            tables.free(slots.pop(int(rng.integers(len(slots)))))
        tables.write(slot, tasks[classes])
        slots.append(slot)
        if turn % 100 == 0:
            peak = max(peak, resident_bytes() - before)
    assert peak < 1.1 * budget


def test_freeing_a_slot_keeps_the_pages_of_its_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = list[tuple[int, int]]()
    tables = TaskTables(row_length=1024, width=1023, budget=100 * 4096)
    keep: Callable[[int, int], None] = lambda start, end: released.append((start, end))  # noqa: E731
    monkeypatch.setattr(tables._memory, "release", keep)
    slots = [tables.allocate(2) for _ in range(3)]
    rows = [int(tables.first[slot]) for slot in slots if slot is not None]
    assert rows == [rows[2] + 4, rows[2] + 2, rows[2]]
    for slot in (slots[0], slots[2], slots[1]):
        assert slot is not None
        tables.free(slot)
    start = tables._start
    banks = [(start + 4096 * slot, start + 4096 * (slot + 1)) for slot in (0, 2, 1)]
    heads = [(start + 4096 * row, start + 4096 * (row + 2)) for row in (rows[0], rows[2], rows[1])]
    assert released[::2] == banks
    for (low, high), (start, end) in zip(released[1::2], heads, strict=True):
        # The pages of the freed rows, which need not begin with a page.
        assert low // mmap.PAGESIZE <= start // mmap.PAGESIZE and end <= high
        assert high - low <= end - start + 2 * mmap.PAGESIZE
