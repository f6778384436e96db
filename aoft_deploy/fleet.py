"""A live fleet: tasks come and go while requests run, on one graph and one backbone.

The graph of ``aoft-export --fleet`` takes the tasks' numbers as tables. Here the tables are arrays
of this process that the runtime reads in place: adding a task writes one row, removing it frees the
row, switching to it is an index. Needs neither torch nor timm.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from aoft_deploy.engines import get_exporter
from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError
from aoft_deploy.preprocessing import Preprocessing

__all__ = ["Fleet"]

Tensors = Mapping[str, NDArray[Any]]


class Fleet:
    """Many tasks on one backbone, each image of a batch answered by its own.

    All methods may be called from any thread. A request that has begun is answered by the tasks it
    began with; no request that begins after ``remove`` returns is answered by the removed one.

    Attributes:
        preprocessing: How an image becomes a row of ``pixel_values``, the same for all tasks.

    Args:
        path: What ``aoft-export --fleet`` wrote; its tasks are there from the start.
        capacity: Tasks that room is reserved for. The system gives memory to rows when they are
            first written, so room costs nothing; beyond it the tables double.
        threads: Threads within an operator; None lets the runtime choose.

    Raises:
        CheckpointError: The file is no fleet.
    """

    def __init__(self, path: Path, *, capacity: int = 4096, threads: int | None = None) -> None:
        exporter: Any = get_exporter("onnx")
        self._engine = exporter.load_fleet(Path(path), threads=threads)
        info, tables = self._engine.info, self._engine.tables
        try:
            named = [(str(t["name"]), tuple(t["classes"])) for t in json.loads(info["tasks"])]
            self._order = [(str(name), tuple(shape)) for name, shape in json.loads(info["row"])]
            decoded = {k: json.loads(info[k]) for k in ("settings", "preprocessing")}
            self._same = {"method": info["method"], **decoded}
            self._digest = str(json.loads(info["backbone"])["digest"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no fleet of aoft-export ({error}).") from error
        self.preprocessing = Preprocessing.from_dict(self._same["preprocessing"])
        self._lock = threading.Lock()
        capacity = max(capacity, len(named))
        rows = len(tables["heads"])
        self._bank = _roomy(tables["bank"], capacity)
        self._heads = _roomy(tables["heads"], max(rows, 16 * capacity))
        self._first = _roomy(tables["first"], capacity)
        self._count = _roomy(tables["count"], capacity)
        self._classes = dict(named)
        self._slots = {name: slot for slot, (name, _) in enumerate(named)}
        self._free = list(range(capacity - 1, len(named) - 1, -1))
        self._next_row, self._free_rows = rows, list[tuple[int, int]]()
        self._running: Counter[int] = Counter()
        self._leaving: set[int] = set()

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """Names of the tasks and their classes."""
        with self._lock:
            return dict(self._classes)

    def add(self, checkpoint: Path, name: str | None = None) -> str:
        """Take a task in, from its ``model.ckpt``.

        Args:
            checkpoint: Trained on the fleet's backbone, with its method, settings and
                preprocessing.
            name: What to call it; None takes the file's name, or its folder's for ``model.ckpt``.

        Returns:
            The task's name.

        Raises:
            CheckpointError: The file is damaged or does not belong to this fleet.
            SettingError: A task of that name is there already.
        """
        path = Path(checkpoint)
        if name is None:
            name = path.resolve().parent.name if path.name == "model.ckpt" else path.stem
        row, head, classes = self._read(path)
        with self._lock:
            if name in self._slots:
                raise SettingError(f"The fleet has a task {name!r}: remove it first.")
            slot, first = self._take_slot(), self._take_rows(len(head))
            self._bank[slot] = row
            self._heads[first : first + len(head)] = head
            self._first[slot], self._count[slot] = first, len(head)
            self._slots[name], self._classes[name] = slot, classes
        return name

    def remove(self, name: str) -> None:
        """Let a task go. Its room is used again when the requests under way have ended.

        Raises:
            UnknownNameError: There is no such task.
        """
        with self._lock:
            slot = self._slot(name)
            del self._slots[name], self._classes[name]
            if self._running[slot]:
                self._leaving.add(slot)
            else:
                self._give_back(slot)

    def predict(
        self, images: NDArray[np.float32], tasks: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """Logits of each image by its own task.

        Args:
            images: Normalised, float32 (batch, 3, H, W).
            tasks: Name of each image's task.

        Returns:
            For each image its task's logits, (classes,).

        Raises:
            UnknownNameError: There is no such task.
            SettingError: Numbers of images and tasks differ, or the images have another shape.
        """
        size = self.preprocessing.size
        if images.shape != (len(tasks), 3, size, size):
            raise SettingError(
                f"Images of shape {images.shape} for {len(tasks)} tasks: give "
                f"({len(tasks)}, 3, {size}, {size})."
            )
        if not tasks:
            return []
        with self._pinned(tasks) as (slots, counts, tables):
            logits = self._engine.run(images, slots, tables)
        return [row[:count] for row, count in zip(logits, counts.tolist(), strict=True)]

    @contextmanager
    def _pinned(
        self, tasks: Sequence[str]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Tensors]]:
        """The slots of tasks, which are not used again for others before the end."""
        with self._lock:
            slots = np.array([self._slot(name) for name in tasks], np.int64)
            counts = self._count[slots]
            tables = {
                "bank": self._bank,
                "heads": self._heads,
                "first": self._first,
                "count": self._count,
                "columns": np.arange(counts.max(), dtype=np.int64),
            }
            self._running.update(slots.tolist())
        try:
            yield slots, counts, tables
        finally:
            with self._lock:
                self._running.subtract(slots.tolist())
                for slot in self._leaving.intersection(slots.tolist()):
                    if not self._running[slot]:
                        self._leaving.remove(slot)
                        self._give_back(slot)

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            raise UnknownNameError("task", name, self._slots)
        return self._slots[name]

    def _take_slot(self) -> int:
        if not self._free:
            room = len(self._bank)
            self._bank, self._first, self._count = (
                _roomy(table, 2 * room) for table in (self._bank, self._first, self._count)
            )
            self._free = list(range(2 * room - 1, room - 1, -1))
        return self._free.pop()

    def _take_rows(self, count: int) -> int:
        """First of ``count`` free rows of the classifiers' table."""
        for i, (first, length) in enumerate(self._free_rows):
            if length >= count:
                self._free_rows[i] = (first + count, length - count)
                if length == count:
                    del self._free_rows[i]
                return first
        first = self._next_row
        if first + count > len(self._heads):
            self._heads = _roomy(self._heads, max(2 * len(self._heads), first + count))
        self._next_row += count
        return first

    def _give_back(self, slot: int) -> None:
        first, count = int(self._first[slot]), int(self._count[slot])
        self._free.append(slot)
        self._free_rows = _joined([*self._free_rows, (first, count)])

    def _read(self, path: Path) -> tuple[NDArray[Any], NDArray[Any], tuple[str, ...]]:
        """A checkpoint's numbers in the bank's order, its classifier's rows, its classes."""
        try:
            with safe_open(path, "np") as file:
                metadata = json.loads((file.metadata() or {})["aoft"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            classes = tuple(str(name) for name in metadata["classes"])
            digest = metadata["backbone"]["digest"]
            found = {key: metadata[key] for key in self._same}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no checkpoint of aoft-train ({error}).") from error
        if digest != self._digest:
            raise CheckpointError(
                f"{path} was trained on backbone weights {str(digest)[:12]}, but the fleet's are "
                f"{self._digest[:12]}."
            )
        for key, value in self._same.items():
            if found[key] != value:
                raise CheckpointError(f"{path} has {key} {found[key]}, but the fleet's is {value}.")
        rest = dict(tensors)
        parts = [_checked(path, name, shape, rest.pop(name, None)) for name, shape in self._order]
        weights = [rest.pop(name) for name in sorted(rest) if name.startswith("head.")]
        weight = next((w for w in weights if w.ndim == 2), np.empty((0, 0)))
        bias = next((w for w in weights if w.ndim == 1), np.zeros(len(weight)))
        shape = (len(classes), self._heads.shape[1])
        if (
            rest
            or not classes
            or (len(bias), weight.shape[1] + 1, len(weight))
            != (
                shape[0],
                shape[1],
                shape[0],
            )
        ):
            raise CheckpointError(
                f"{path} has no classifier of {shape[1] - 1} features for {len(classes)} classes."
            )
        head = _checked(path, "classifier", shape, np.column_stack([weight, bias]))
        return np.concatenate([p.ravel() for p in parts] or [np.empty(0)]), head, classes


def _roomy(table: NDArray[Any], rows: int) -> NDArray[Any]:
    """A table with more rows; new ones take no memory before they are written."""
    larger = np.zeros((rows, *table.shape[1:]), table.dtype)
    larger[: len(table)] = table
    return larger


def _joined(segments: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Free segments, neighbours made one. Each is its first row and its length."""
    joined: list[tuple[int, int]] = []
    for first, length in sorted(segments):
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((first, length))
    return joined


def _checked(
    path: Path, name: str, shape: tuple[int, ...], tensor: NDArray[Any] | None
) -> NDArray[Any]:
    if tensor is None or tensor.shape != tuple(shape) or not np.isfinite(tensor).all():
        raise CheckpointError(f"{name} in {path} must be finite numbers of shape {tuple(shape)}.")
    return tensor
