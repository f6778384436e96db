"""Task stores: a folder of checkpoints and a packed file give the same parameters."""

from __future__ import annotations

import gc
import json
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors_faults import FAULTS, faulty

from aoft_deploy.classes import Classes
from aoft_deploy.errors import CheckpointError, OutputError, SettingError, UnknownNameError
from aoft_deploy.fleet import packed_tasks
from aoft_deploy.fleet.checkpoint_folder import CheckpointFolder
from aoft_deploy.fleet.name_index import NameIndex
from aoft_deploy.fleet.opening import open_store
from aoft_deploy.fleet.packed_tasks import ENTRY, TRAILER, PackedTasks, pack
from aoft_deploy.fleet.task import TaskKind, TaskParameters, read_task

KIND = TaskKind(
    digest="d" * 64,
    method="aoft-lora-star",
    settings={"rank": 2},
    preprocessing={"size": 16},
    order=(("update.a.q", (3,)), ("update.a.b", (2, 2))),
    width=4,
)


def write(path: Path, classes: Sequence[str] = ("x", "ü"), seed: int = 0, **changes: Any) -> Path:
    """A checkpoint of KIND; ``changes`` replace tensors (None: leave out) or metadata."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, NDArray[Any] | None] = {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in KIND.order
    }
    tensors["head.head.weight"] = rng.normal(size=(len(classes), 4)).astype(np.float32)
    tensors["head.head.bias"] = rng.normal(size=len(classes)).astype(np.float32)
    tensors |= changes.pop("tensors", {})
    metadata = {
        "format": 1,
        "training": {},
        "method": KIND.method,
        "settings": KIND.settings,
        "preprocessing": KIND.preprocessing,
        "backbone": {"name": "aoft_vit_nano", "digest": KIND.digest},
        "classes": classes,
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"aoft": json.dumps(metadata)})
    return path


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """Tasks as files and as folders, beside files that are not tasks."""
    root = tmp_path / "tasks"
    write(root / "cats.ckpt", seed=1)
    write(root / "dogs" / "model.ckpt", ["a", "b", "c"], seed=2)
    write(root / "zürich v1.0.ckpt", ["this", "that"], seed=3)
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("no task")
    write(root / "model.ckpt")
    return CheckpointFolder(root, KIND)


@pytest.fixture
def packed(folder: CheckpointFolder, tmp_path: Path) -> Path:
    pack(folder, tmp_path / "tasks.pack")
    return tmp_path / "tasks.pack"


def same(one: TaskParameters, other: TaskParameters) -> bool:
    arrays = np.array_equal(one.row, other.row) and np.array_equal(one.head, other.head)
    return arrays and one.classes == other.classes


def test_folder_and_packed_file_give_the_checkpoints_parameters(
    folder: CheckpointFolder, packed: Path
) -> None:
    files = ["cats.ckpt", "dogs/model.ckpt", "zürich v1.0.ckpt"]
    both = open_store(folder.path, KIND), open_store(packed, KIND)
    assert [type(store) for store in both] == [CheckpointFolder, PackedTasks]
    for store in both:
        assert list(store.names) == ["cats", "dogs", "zürich v1.0"]
        for name, file in zip(store.names, files, strict=True):
            assert name in store
            assert same(store.read(name), read_task(folder.path / file, KIND))
        assert store.read("zürich v1.0").head.shape == (2, 5)
        for name in ("empty", "notes", "model", "", "..", "../tasks/cats", "dogs/model", "x" * 999):
            assert name not in store
        with pytest.raises(UnknownNameError, match=r"Unknown task 'cat'\. Did you mean cats"):
            store.read("cat")


def test_a_store_keeps_what_the_outputs_of_its_tasks_mean(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, KIND)
    write(tmp_path / "age.ckpt", ["age"], activation="none")
    write(tmp_path / "labels.ckpt", ["ripe", "red"], activation="sigmoid")
    write(tmp_path / "old.ckpt")
    pack(folder, tmp_path / "tasks.pack")
    for store in (folder, PackedTasks(tmp_path / "tasks.pack", KIND)):
        found = {name: Classes(store.read(name).classes) for name in store.names}
        assert found == {"age": ("age",), "labels": ("ripe", "red"), "old": ("x", "ü")}
        assert [each.activation for each in found.values()] == ["none", "sigmoid", "softmax"]


def test_a_row_has_the_order_of_the_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", ["x", "y"], seed=5)
    rng = np.random.default_rng(5)
    q, b = rng.normal(size=3).astype(np.float32), rng.normal(size=(2, 2)).astype(np.float32)
    weight, bias = rng.normal(size=(2, 4)), rng.normal(size=2)
    numbers = read_task(path, KIND)
    assert numbers.row.tolist() == [*q, *b.ravel()]
    assert np.allclose(numbers.head, np.column_stack([weight, bias]))


def test_a_classifier_may_have_no_biases(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", tensors={"head.head.bias": None})
    assert not read_task(path, KIND).head[:, -1].any()


def test_a_checkpoint_added_later_is_found(folder: CheckpointFolder) -> None:
    assert "late" not in folder
    write(folder.path / "late.ckpt", seed=9)
    assert "late" in folder and "late" in list(folder.names)


def test_two_checkpoints_of_the_same_name_are_refused(folder: CheckpointFolder) -> None:
    write(folder.path / "cats" / "model.ckpt")
    with pytest.raises(SettingError, match=r"Two tasks are called 'cats', .*cats.ckpt and .*model"):
        folder.read("cats")
    with pytest.raises(SettingError, match="Two tasks are called 'cats': rename one"):
        _ = folder.names


def test_missing_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="There is no folder of checkpoints or file of packed"
    ):
        open_store(tmp_path / "missing", KIND)
    with pytest.raises(CheckpointError, match="There is no folder"):
        CheckpointFolder(tmp_path / "missing", KIND)
    with pytest.raises(CheckpointError, match="missing cannot be opened"):
        PackedTasks(tmp_path / "missing")


BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"method": "lora"}, "has method lora, but the fleet's is aoft-lora-star"),
    ({"settings": {"rank": 3}}, "has settings {'rank': 3}"),
    ({"preprocessing": {}}, "has preprocessing"),
    (
        {"backbone": {"name": "aoft_vit_nano", "digest": "0" * 64}},
        "trained on backbone weights 000000000000",
    ),
    ({"backbone": {"name": "aoft_vit_nano"}}, "trained on backbone weights None"),
    ({"backbone": {}}, "names no backbone"),
    ({"backbone": {"name": "vit", "args": "a"}}, "names no backbone"),
    ({"backbone": "vit"}, "lacks backbone as dict"),
    ({"settings": [1]}, "lacks settings as dict"),
    ({"classes": "ab"}, "lacks classes as list"),
    ({"format": 2}, "has format 2, but this version reads up to 1: upgrade aoft-deploy"),
    ({"format": None}, "lacks format as int"),
    ({"classes": []}, "has no output, but a model has 1 or more"),
    ({"classes": ["only"]}, r"has 1 output \('only'\), whose softmax is always 1"),
    ({"activation": "relu"}, r"Unknown activation 'relu'\. Known: none, sigmoid, softmax\. U"),
    (
        {"tensors": {"head.head.weight": np.zeros((3, 4)), "head.head.bias": np.zeros(3)}},
        r"classifier in .* finite numbers of shape \(2, 5\)",
    ),
    ({"tensors": {"update.a.q": None}}, r"update.a.q in .* finite numbers of shape \(3,\)"),
    ({"tensors": {"update.a.q": np.full(3, np.nan, np.float32)}}, "update.a.q in .* finite"),
    ({"tensors": {"update.a.q": np.full(3, 1e300)}}, "update.a.q in .* finite"),
    ({"tensors": {"update.a.b": np.zeros((3, 2))}}, r"update.a.b in .* shape \(2, 2\)"),
    ({"tensors": {"update.a.q": np.zeros(3, np.int64)}}, "update.a.q in .* finite"),
    ({"tensors": {"head.head.weight": np.full((2, 4), np.nan)}}, "classifier in .* finite"),
    ({"tensors": {"head.head.bias": np.full(2, -np.inf)}}, "classifier in .* finite"),
    ({"tensors": {"head.head.weight": None, "head.head.bias": None}}, "classifier in"),
    ({"tensors": {"update.b.q": np.zeros(3)}}, "classifier in"),
    ({"tensors": {"head.head.weight": None}}, "classifier in"),
    ({"tensors": {"head.head.bias": np.zeros(3)}}, "classifier in"),
    ({"tensors": {"head.head.more": np.zeros((2, 4))}}, "classifier in"),
    ({"tensors": {"head.head.more": np.zeros((2, 4, 1))}}, "classifier in"),
)


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_checkpoint_that_does_not_fit_is_refused_and_not_packed(
    folder: CheckpointFolder, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(folder.path / "bad.ckpt", **changes)
    with pytest.raises(CheckpointError, match=message):
        folder.read("bad")
    with pytest.raises(CheckpointError, match=message):
        pack(folder, tmp_path / "tasks.pack")
    assert not (tmp_path / "tasks.pack").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_with_a_faulty_header_is_refused_and_not_packed(
    folder: CheckpointFolder, tmp_path: Path, fault: str
) -> None:
    path = faulty(write(tmp_path / "good.ckpt"), folder.path / "bad.ckpt", fault)
    with pytest.raises(CheckpointError, match=FAULTS[fault][1]):
        read_task(path, KIND)
    with pytest.raises(CheckpointError, match=FAULTS[fault][1]):
        pack(folder, tmp_path / "tasks.pack")
    assert not (tmp_path / "tasks.pack").exists()


@pytest.mark.parametrize("text", ["", "text", "[1]", "null", "[" * 100_000, "9" * 5000])
def test_a_description_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "a.ckpt", metadata={"aoft": text})
    with pytest.raises(CheckpointError, match=r"The metadata of .*a\.ckpt"):
        read_task(tmp_path / "a.ckpt", KIND)


def test_files_that_are_not_checkpoints_are_refused(tmp_path: Path) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="is a file of weights, such as a backbone"):
        read_task(tmp_path / "a.ckpt", KIND)
    for content in (b"", b"text", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(50)):
        (tmp_path / "a.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is no checkpoint of|is an incomplete zip"):
            read_task(tmp_path / "a.ckpt", KIND)


class Given:
    """A store of given parameters."""

    def __init__(self, tasks: dict[str, TaskParameters], kind: TaskKind = KIND) -> None:
        self.kind, self.tasks = kind, tasks

    @property
    def names(self) -> NameIndex:
        return NameIndex.of(self.tasks)

    def __contains__(self, name: str) -> bool:
        return name in self.tasks

    def read(self, name: str) -> TaskParameters:
        return self.tasks[name]


def numbers(row: int = 7, head: tuple[int, ...] = (2, 5), classes: int = 2) -> TaskParameters:
    names = tuple(map(str, range(classes)))
    return TaskParameters(np.ones(row, np.float32), np.ones(head, np.float32), names)


@pytest.mark.parametrize(
    "task",
    [numbers(row=1), numbers(head=(2, 4)), numbers(head=(3, 5)), numbers(head=(2, 5), classes=3)],
)
def test_parameters_of_wrong_shapes_are_not_packed(task: TaskParameters, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Task 'bad' has parameters of shape"):
        pack(Given({"bad": task}), tmp_path / "tasks.pack")


@pytest.mark.parametrize("classes", [0, 1])
def test_a_softmax_of_fewer_than_two_classes_is_not_packed(classes: int, tmp_path: Path) -> None:
    task = numbers(head=(classes, 5), classes=classes)
    with pytest.raises(CheckpointError, match=r"Task 'bad' has (no|1) output"):
        pack(Given({"bad": task}), tmp_path / "tasks.pack")


def test_parameters_that_are_not_finite_are_not_packed(tmp_path: Path) -> None:
    task = numbers()
    task.head[1, 1] = np.inf
    with pytest.raises(CheckpointError, match="Task 'bad' has parameters that are not finite"):
        pack(Given({"bad": task}), tmp_path / "tasks.pack")


def test_an_empty_store_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There are no tasks to pack into"):
        pack(Given({}), tmp_path / "tasks.pack")


def test_a_file_that_cannot_be_written_raises_an_output_error(
    folder: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="it exists and is no file"):
        pack(folder, tmp_path)

    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_tasks, "_index", full)
    with pytest.raises(OutputError, match=r"Cannot write .*tasks.pack: No space left on device"):
        pack(folder, tmp_path / "tasks.pack")
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]


def test_every_truncation_and_every_damaged_byte_is_detected(packed: Path, tmp_path: Path) -> None:
    whole, hurt = packed.read_bytes(), tmp_path / "hurt.pack"
    expected = {name: PackedTasks(packed).read(name) for name in PackedTasks(packed).names}
    for length in range(0, len(whole), 7):
        hurt.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="no file of packed tasks, or a truncated one"):
            PackedTasks(hurt)
    for place in range(8, len(whole)):
        hurt.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"truncated one|is damaged: pack the file again"):
            store = PackedTasks(hurt)
            for name in store.names:
                assert same(store.read(name), expected[name])


def test_a_file_truncated_while_it_is_open_raises_an_error(packed: Path) -> None:
    store = PackedTasks(packed)
    with packed.open("r+b") as file:
        file.truncate(50)
    with pytest.raises(CheckpointError, match=r"Task 'cats' in .* is damaged: pack the file again"):
        store.read("cats")


def sealed(packed: Path, **changes: Any) -> Path:
    """Change a packed file's index or its first task, with valid checksums.

    Args:
        packed: The file.
        changes: ``kind``: its text; ``names``: their text; fields of the first task's entry;
            ``count``: of tasks; ``named``: the text of the first task's classes.
    """
    data = bytearray(packed.read_bytes())
    start, _, magic = TRAILER.unpack(data[-TRAILER.size :])
    index = bytes(data[start : -TRAILER.size])
    (length,) = struct.unpack_from("<Q", index)
    (count,) = struct.unpack_from("<Q", index, 8 + length)
    entries = np.frombuffer(index, ENTRY, count, 16 + length).copy()
    if "named" in changes:
        text = changes.pop("named")
        first = int(entries["start"][0])
        size = 4 * (KIND.row_length + int(entries["classes"][0]) * (KIND.width + 1))
        numbers = bytes(data[first : first + size])
        entries["start"][0], entries["text"][0] = start, len(text)
        entries["crc"][0] = zlib.crc32(numbers + text)
        data[start:] = numbers + text
        start = len(data)
    kind = changes.pop("kind", index[8 : 8 + length])
    names = changes.pop("names", index[16 + length + entries.nbytes :])
    count = changes.pop("count", count)
    for name, value in changes.items():
        entries[name][0] = value
    parts = struct.pack("<Q", len(kind)), kind, struct.pack("<Q", count), entries.tobytes(), names
    index = b"".join(parts)
    hurt = packed.with_name("hurt.pack")
    hurt.write_bytes(data[:start] + index + TRAILER.pack(start, zlib.crc32(index), magic))
    return hurt


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": b"[" * 100_000},
        {"kind": b"[]"},
        {"kind": b"{}"},
        {"kind": b"text"},
        {"names": b""},
        {"name_end": -1},
        {"name_end": 2**40},
        {"count": 2**63},
        {"count": 10**6},
    ],
    ids=str,
)
def test_an_invalid_index_with_a_valid_checksum_is_refused(
    packed: Path, changes: dict[str, Any]
) -> None:
    assert same(PackedTasks(sealed(packed)).read("cats"), PackedTasks(packed).read("cats"))
    with pytest.raises(CheckpointError, match="no file of packed tasks, or a truncated one"):
        PackedTasks(sealed(packed, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": 2**32 - 1},
        {"text": 2**32 - 1},
        {"start": 2**63},
        {"named": b"[" * 100_000},
        {"named": b"text"},
        {"named": b"\xff"},
        {"named": b"7"},
    ],
    ids=lambda changes: str(changes)[:30],
)
def test_an_invalid_task_with_a_valid_checksum_is_refused(
    packed: Path, changes: dict[str, Any]
) -> None:
    hurt = PackedTasks(sealed(packed, **changes))
    with pytest.raises(CheckpointError, match=r"Task 'cats' in .* is damaged: pack the file again"):
        hurt.read("cats")
    assert same(hurt.read("dogs"), PackedTasks(packed).read("dogs"))


def test_a_file_that_cannot_be_read_is_an_error(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    store = PackedTasks(packed)
    monkeypatch.setattr("os.preadv", broken)
    with pytest.raises(CheckpointError, match=r"tasks.pack cannot be read \(Input/output error\)"):
        store.read("cats")


def test_a_packed_file_of_another_kind_is_refused(packed: Path) -> None:
    assert PackedTasks(packed).kind == KIND
    with pytest.raises(CheckpointError, match="trained on backbone weights dddddddddddd, but"):
        PackedTasks(packed, replace(KIND, digest="e" * 64))
    with pytest.raises(CheckpointError, match="has settings"):
        PackedTasks(packed, replace(KIND, settings={"rank": 4}))
    with pytest.raises(CheckpointError, match="in another order than the fleet: pack it again"):
        PackedTasks(packed, replace(KIND, order=KIND.order[::-1]))


def test_a_file_may_be_packed_over_itself_while_others_read_it(
    packed: Path, folder: CheckpointFolder
) -> None:
    before = PackedTasks(packed)
    write(folder.path / "cats.ckpt", ["new", "newer"], seed=8)
    pack(folder, packed)
    pack(PackedTasks(packed), packed)
    assert same(PackedTasks(packed).read("cats"), folder.read("cats"))
    assert before.read("cats").classes == ("x", "ü")


@pytest.mark.slow
def test_a_hundred_thousand_tasks_open_fast_and_take_little_memory(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    class Many(Given):
        names = NameIndex.of(f"task-{i:06}" for i in range(100_000))

        def read(self, name: str) -> TaskParameters:
            return TaskParameters(np.full(7, int(name[5:]), np.float32), numbers().head, ("a", "b"))

    pack(Many({}), tmp_path / "many.pack")
    gc.collect()
    before = len(gc.get_objects())
    start = time.perf_counter()
    store = PackedTasks(tmp_path / "many.pack", KIND)
    record_property("seconds to open", time.perf_counter() - start)
    assert len(store.names) == 100_000 and len(gc.get_objects()) - before < 100
    for place in (0, 31_415, 99_999):
        assert (store.read(f"task-{place:06}").row == place).all()
    with pytest.raises(UnknownNameError, match=r"Did you mean task-03"):
        store.read("task-03141")
