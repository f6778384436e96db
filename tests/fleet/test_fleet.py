"""A live fleet: the right task answers while others are added and removed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_model import metadata_of
from fleet_memories import OpenFleet, on_gpu, table_rows
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from aoft_deploy.checkpoints import file_format
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.cli.export import main
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ArtefactError, CheckpointError, SettingError, UnknownNameError
from aoft_deploy.fleet.checkpoint_folder import CheckpointFolder
from aoft_deploy.fleet.fleet import Fleet, TaskAnswer
from aoft_deploy.fleet.packed_tasks import PackedTasks, pack
from aoft_deploy.fleet.task import read_task
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.merging import merge

WIDTHS = (2, 5, 3, 4, 2, 9, 5, 8, 6, 3, 2, 7)
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def write(
    backbone_name: str, backbone_args: dict[str, Any], backbone_weights: Path
) -> Callable[..., Path]:
    """Write a task's checkpoint whose parameters all differ from their initial values."""

    def task(
        path: Path,
        classes: int,
        seed: int,
        method: str = "aoft-lora-star",
        called: str = "c",
        **settings: Any,
    ) -> Path:
        model, identity = create_backbone(
            backbone_name, num_classes=classes, weights=backbone_weights, **backbone_args
        )
        tuned = attach(model, method, backbone=identity, **settings)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.trained().values():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        names = [f"{called}{i}" for i in range(classes)]
        save(tuned, path, classes=names, preprocessing=Preprocessing(16, 1.0, HALF, HALF))
        return path

    return task


@pytest.fixture(scope="module")
def images() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def tasks(write: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    return {f"t{i}": write(folder / f"t{i}.ckpt", n, seed=i) for i, n in enumerate(WIDTHS)}


@pytest.fixture(scope="module")
def expected(
    tasks: dict[str, Path], images: NDArray[np.float32], backbone_weights: Path
) -> dict[str, NDArray[np.float32]]:
    """Logits of all images from each task's merged model."""
    answers = {}
    for name, path in tasks.items():
        merged = merge(open_checkpoint(path, BackboneSource(weights=backbone_weights))[0])
        with torch.inference_mode():
            answers[name] = merged(torch.from_numpy(images)).numpy()
    return answers


@pytest.fixture(scope="module")
def artefact(
    tasks: dict[str, Path], backbone_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A fleet file with the first two tasks."""
    path = tmp_path_factory.mktemp("fleet") / "fleet.onnx"
    options = ["--fleet", tasks["t0"], tasks["t1"], "--backbone-weights", backbone_weights]
    assert main([str(option) for option in [*options, "-o", path]]) == 0
    return path


def right(
    answers: list[TaskAnswer],
    names: list[str],
    chosen: list[int],
    expected: dict[str, NDArray[np.float32]],
) -> bool:
    return len(answers) == len(names) and all(
        answer.logits.shape == expected[name][image].shape
        and len(answer.classes) == len(answer.logits)
        and bool(np.abs(answer.logits - expected[name][image]).max() < 1e-4)
        for answer, name, image in zip(answers, names, chosen, strict=True)
    )


def test_tasks_added_one_by_one_answer_as_their_merged_models(
    open_fleet: OpenFleet,
    artefact: Path,
    tasks: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
) -> None:
    fleet = open_fleet(artefact)
    for name in list(tasks)[2:]:
        assert fleet.add(tasks[name]) == name
    assert {name: len(classes) for name, classes in fleet.tasks.items()} == dict(
        zip(tasks, WIDTHS, strict=True)
    )
    rng = np.random.default_rng(1)
    for _ in range(20):
        chosen = rng.integers(0, 8, 8).tolist()
        names = [f"t{i}" for i in rng.integers(0, len(tasks), 8)]
        assert right(fleet.predict(images[chosen], names), names, chosen, expected)
    assert fleet.predict(images[:0], []) == []


def test_a_removed_task_never_answers_again_and_its_slot_is_reused(
    open_fleet: OpenFleet,
    artefact: Path,
    tasks: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
) -> None:
    fleet = open_fleet(artefact)
    before = fleet.residency
    for round in range(30):
        name = f"t{2 + round % (len(tasks) - 2)}"
        fleet.add(tasks[name])
        assert right(fleet.predict(images[:2], [name, "t1"]), [name, "t1"], [0, 1], expected)
        with fleet._tasks.holding([name]) as held:
            assert held[name].slot == before.tasks
        fleet.remove(name)
        with pytest.raises(UnknownNameError, match=f"Unknown task '{name}'"):
            fleet.predict(images[:1], [name])
    assert (fleet.residency.tasks, fleet.residency.bytes) == (before.tasks, before.bytes)


def test_a_slot_is_not_reused_while_a_request_holds_it(
    open_fleet: OpenFleet, artefact: Path, tasks: dict[str, Path]
) -> None:
    fleet = open_fleet(artefact)
    fleet.add(tasks["t2"])
    with fleet._tasks.holding(["t2"]) as slots:
        row = read_task(tasks["t2"], fleet.kind).row
        fleet.remove("t2")
        fleet.add(tasks["t3"])
        assert np.array_equal(table_rows(fleet._tables.bank, slots["t2"].slot)[0], row)
    fleet.add(tasks["t4"])
    with fleet._tasks.holding(["t4"]) as later:
        assert later["t4"].slot == slots["t2"].slot


def test_invalid_calls_are_refused_and_the_fleet_continues(
    open_fleet: OpenFleet,
    artefact: Path,
    write: Callable[..., Path],
    tasks: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
    tmp_path: Path,
    with_metadata: Callable[..., Path],
) -> None:
    fleet = open_fleet(artefact)
    with pytest.raises(SettingError, match="has a task 't1': remove it first"):
        fleet.add(tasks["t1"])
    with pytest.raises(UnknownNameError, match=r"Unknown task 't11'\. Did you mean t1"):
        fleet.remove("t11")
    with pytest.raises(SettingError, match=r"Images of shape \(2, 3, 16, 16\) for 1 tasks"):
        fleet.predict(images[:2], ["t0"])
    junk = tmp_path / "junk.ckpt"
    junk.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="is no checkpoint of aoft-train"):
        fleet.add(junk)
    with pytest.raises(CheckpointError, match="There is no file"):
        fleet.add(tmp_path / "missing.ckpt")
    with pytest.raises(CheckpointError, match="has method lora, but the fleet's is aoft-lora-star"):
        fleet.add(write(tmp_path / "lora.ckpt", 3, 0, "lora"))
    with pytest.raises(CheckpointError, match="has settings"):
        fleet.add(write(tmp_path / "rank.ckpt", 3, 0, rank=3))
    foreign = with_metadata(
        tasks["t2"], tmp_path / "foreign.ckpt", lambda m: m["backbone"].update(digest="0" * 64)
    )
    with pytest.raises(CheckpointError, match="trained on backbone weights 000000000000"):
        fleet.add(foreign)
    none = with_metadata(tasks["t2"], tmp_path / "none.ckpt", lambda m: m.update(classes=[]))
    with pytest.raises(CheckpointError, match="has no output, but a model has 1 or more"):
        fleet.add(none)
    assert right(fleet.predict(images[:2], ["t1", "t0"]), ["t1", "t0"], [0, 1], expected)


NUMBER, HEAD = "update.blocks.0.attn.qkv.q.q_down", "head.head.weight"

UNFIT: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "number is nan": (lambda t, _: t[NUMBER].view(-1)[3].fill_(torch.nan), "q_down in .* finite"),
    "number is inf": (lambda t, _: t[NUMBER].view(-1)[3].fill_(torch.inf), "q_down in .* finite"),
    "classifier is nan": (lambda t, _: t[HEAD].view(-1)[0].fill_(torch.nan), "classifier in .* f"),
    "no classifier": (lambda t, _: [t.pop(n) for n in list(t) if "head" in n], "classifier in"),
    "no weight": (lambda t, _: t.pop(HEAD), "classifier in"),
    "fewer classes": (lambda _, m: m["classes"].pop(), "classifier in .* of shape"),
    "no number": (lambda t, _: t.pop(NUMBER), "q_down in"),
    "shape": (lambda t, _: t.update({NUMBER: t[NUMBER][:-1].clone()}), "q_down in .* of shape"),
    "other backbone": (lambda _, m: m["backbone"].update(digest="0" * 64), "weights 000000000000"),
    "other rank": (lambda _, m: m["settings"].update(rank=3), "has settings"),
    "other preprocessing": (lambda _, m: m["preprocessing"].update(crop_pct=0.5), "has preproc"),
    "newer format": (lambda _, m: m.update(format=2), "has format 2"),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_a_checkpoint_that_does_not_fit_replaces_no_task(
    open_fleet: OpenFleet,
    fault: str,
    artefact: Path,
    tasks: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
    tmp_path: Path,
) -> None:
    change, message = UNFIT[fault]
    tensors = load_file(tasks["t2"])
    with safe_open(tasks["t2"], "pt") as file:
        metadata = json.loads(file.metadata()["aoft"])
    change(tensors, metadata)
    save_file(tensors, tmp_path / "bad.ckpt", metadata={"aoft": json.dumps(metadata)})
    fleet = open_fleet(artefact)
    before = fleet.residency
    for name in ("t0", "new"):
        with pytest.raises(CheckpointError, match=message):
            fleet.add(tmp_path / "bad.ckpt", name, replace=True)
    assert fleet.residency == before and "new" not in fleet
    assert right(fleet.predict(images[:1], ["t0"]), ["t0"], [0], expected)


FLEETS: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], object], str]] = {
    "tasks nested too deeply": (lambda _, m: m.update(tasks="[" * 100_000), "no valid entry 't"),
    "tasks that are not a list": (lambda _, m: m.update(tasks="7"), "no valid entry 'tasks'"),
    "a row nested too deeply": (lambda _, m: m.update(row="[" * 100_000), "is no fleet of aoft"),
    "a missing task": (lambda t, _: t.update(bank=t["bank"][:1]), "is no fleet of aoft"),
    "a parameter that is nan": (
        lambda t, _: t["bank"].fill(np.nan),
        "'t0' has parameters that are",
    ),
    "a classifier that is inf": (lambda t, _: t["heads"].fill(np.inf), "'t0' has parameters that"),
    "shorter rows": (lambda t, _: t.update(bank=t["bank"][:, :-1]), "'t0' has parameters of shape"),
    "rows outside the table": (lambda t, _: t["first"].fill(10**6), "'t0' has parameters of shape"),
}


@pytest.mark.parametrize("fault", FLEETS)
def test_a_fleet_with_invalid_tasks_is_refused(
    open_fleet: OpenFleet, fault: str, artefact: Path, tmp_path: Path
) -> None:
    import onnx

    change, message = FLEETS[fault]
    proto = onnx.load(artefact)
    stored = {i.name: i for i in proto.graph.initializer if i.name in ("bank", "heads", "first")}
    tables = {name: onnx.numpy_helper.to_array(i).copy() for name, i in stored.items()}
    info = metadata_of(artefact)
    change(tables, info)
    for name, table in tables.items():
        stored[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(table), name))
    onnx.helper.set_model_props(proto, info)
    onnx.save(proto, tmp_path / "fleet.onnx")
    error = CheckpointError if message.startswith("'t0'") else ArtefactError
    with pytest.raises(error, match=message):
        open_fleet(tmp_path / "fleet.onnx")


def test_a_merged_model_is_refused_as_a_fleet(
    open_fleet: OpenFleet, artefact: Path, tasks: dict[str, Path], tmp_path: Path
) -> None:
    import onnx

    proto = onnx.load(artefact)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(ArtefactError, match="has no valid entry 'tasks' in its metadata"):
        open_fleet(tmp_path / "bare.onnx")
    proto.graph.initializer.remove(next(i for i in proto.graph.initializer if i.name == "bank"))
    onnx.save(proto, tmp_path / "merged.onnx")
    with pytest.raises(ArtefactError, match="is no fleet: export the checkpoints as a fleet"):
        open_fleet(tmp_path / "merged.onnx")
    with pytest.raises(ArtefactError, match="There is no file"):
        open_fleet(tmp_path / "missing.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"\xffjunk")
    with pytest.raises(ArtefactError, match="is no ONNX model"):
        open_fleet(tmp_path / "junk.onnx")


@pytest.fixture(scope="module")
def stores(
    artefact: Path, tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """All tasks as a folder and as a packed file."""
    packed = tmp_path_factory.mktemp("packed") / "tasks.pack"
    folder = tasks["t0"].parent
    pack(CheckpointFolder(folder, Fleet(artefact, threads=1).kind), packed)
    return {"folder": folder, "packed": packed}


def room_for(fleet: Fleet, widths: Sequence[int]) -> int:
    """Bytes of tasks of these widths beside the fleet's own."""
    return fleet.residency.bytes + sum(fleet._tables.size(width) for width in widths)


@pytest.mark.parametrize("form", ["folder", "packed"])
@pytest.mark.parametrize("room", [1, 3, 12])
def test_tasks_of_a_store_answer_as_their_merged_models_in_any_budget(
    open_fleet: OpenFleet,
    artefact: Path,
    stores: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
    form: str,
    room: int,
) -> None:
    budget = room_for(open_fleet(artefact), room * [max(WIDTHS)])
    fleet = open_fleet(artefact, store=stores[form], budget=budget)
    assert list(fleet.tasks) == ["t0", "t1"] and len(fleet.classes("t5")) == WIDTHS[5]
    rng = np.random.default_rng(1)
    for _ in range(20):
        chosen = rng.integers(0, 8, 8).tolist()
        names = [f"t{i}" for i in rng.integers(0, len(WIDTHS), 8)]
        assert right(fleet.predict(images[chosen], names), names, chosen, expected)
        assert fleet.residency.bytes <= budget and {"t0", "t1"} <= set(fleet.tasks)
    found = fleet.residency
    assert found.misses >= 10 and found.hits > 0 and (found.evictions > 0) is (room < 12)
    assert found.tasks == 2 + found.misses - found.evictions


def test_prefetched_tasks_are_in_memory(
    open_fleet: OpenFleet, artefact: Path, stores: dict[str, Path], images: NDArray[np.float32]
) -> None:
    fleet = open_fleet(artefact, store=stores["packed"])
    fleet.prefetch(["t5", "t0", "t5"])
    fleet.prefetch([])
    assert list(fleet.tasks) == ["t0", "t1", "t5"] and fleet.residency.misses == 1
    fleet.predict(images[:2], ["t5", "t0"])
    assert fleet.residency.misses == 1
    with pytest.raises(UnknownNameError, match="Unknown task 't99'"):
        fleet.prefetch(["t5", "t99"])
    room = room_for(open_fleet(artefact), [max(WIDTHS)])
    small = open_fleet(artefact, store=stores["packed"], budget=room)
    small.prefetch(["t2", "t3", "t5"])
    assert "t5" in small.tasks and "t2" not in small.tasks
    small.remove("t5")  # no request holds it any more
    assert small.residency.bytes <= room


def test_a_removed_task_of_the_store_does_not_answer_and_its_name_can_be_reused(
    open_fleet: OpenFleet,
    artefact: Path,
    tasks: dict[str, Path],
    stores: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
) -> None:
    fleet = open_fleet(artefact, store=stores["packed"])
    with pytest.raises(SettingError, match="has a task 't2': remove it first"):
        fleet.add(tasks["t2"])
    for name in ("t0", "t2", "t3"):
        if name != "t3":  # load it into memory first
            fleet.predict(images[:1], ["t2"])
        fleet.remove(name)
        with pytest.raises(UnknownNameError, match=f"Unknown task '{name}'"):
            fleet.predict(images[:1], [name])
        with pytest.raises(UnknownNameError, match=f"Unknown task '{name}'"):
            fleet.classes(name)
        if name == "t0":
            continue
        fleet.add(tasks["t9"], name)
        assert right(fleet.predict(images[:1], [name]), ["t9"], [0], expected)


@pytest.mark.slow
def test_answers_stay_right_while_tasks_are_added_removed_replaced_and_paged(
    open_fleet: OpenFleet,
    artefact: Path,
    tasks: dict[str, Path],
    stores: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
) -> None:
    budget = room_for(open_fleet(artefact), 4 * [max(WIDTHS)])
    fleet = open_fleet(artefact, store=stores["packed"], budget=budget)
    stop, wrong, served = threading.Event(), list[str](), [0] * 8
    meant: dict[str, list[tuple[float, float, str]]] = {"a": [], "b": []}  # (from, until, task)

    def churn() -> None:
        rng = np.random.default_rng(7)
        while not stop.is_set():
            name, task = "ab"[rng.integers(2)], f"t{rng.integers(len(tasks))}"
            if meant[name] and meant[name][-1][1] == float("inf"):
                start, _, old = meant[name][-1]
                fleet.remove(name)
                meant[name][-1] = start, time.monotonic(), old
            else:
                meant[name].append((time.monotonic(), float("inf"), task))
                fleet.add(tasks[task], name)

    def own(name: str, start: float, end: float) -> list[str]:
        """The tasks that a name may have had at some moment of a period."""
        spans = list(meant.get(name, [(start, end, name)]))
        return [task for begin, until, task in spans if begin <= end and until >= start]

    def ask(worker: int) -> None:
        rng = np.random.default_rng(worker)
        for _ in range(500):
            names = [f"t{i}" for i in rng.integers(0, len(tasks), 3)] + ["ab"[rng.integers(2)]]
            chosen = rng.integers(0, 8, 4).tolist()
            start = time.monotonic()
            try:
                answers = fleet.predict(images[chosen], names)
            except UnknownNameError:
                names, chosen = names[:3], chosen[:3]
                answers = fleet.predict(images[chosen], names)
            end = time.monotonic()
            for answer, name, image in zip(answers, names, chosen, strict=True):
                options = own(name, start, end)
                if not any(right([answer], [task], [image], expected) for task in options):
                    wrong.append(f"{name} {image} {options}")
            served[worker] += 1

    changer = threading.Thread(target=churn)
    changer.start()
    workers = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    stop.set()
    changer.join()
    assert not wrong and served == [500] * 8
    found = fleet.residency
    assert found.evictions > 500 and found.bytes <= budget
    assert min(len(spans) for spans in meant.values()) > 10


def test_a_store_that_does_not_fit_is_refused(
    open_fleet: OpenFleet,
    artefact: Path,
    stores: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
    write: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(
        CheckpointError, match="There is no folder of checkpoints or file of packed"
    ):
        open_fleet(artefact, store=tmp_path / "missing")
    (tmp_path / "cut.pack").write_bytes(stores["packed"].read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="no file of packed tasks, or a truncated one"):
        open_fleet(artefact, store=tmp_path / "cut.pack")
    store = PackedTasks(stores["packed"])
    store.kind = replace(store.kind, digest="0" * 64)
    with pytest.raises(CheckpointError, match="trained on backbone weights 000000000000, but the"):
        open_fleet(artefact, store=store)
    with pytest.raises(SettingError, match=r"A task of \d classes takes .* larger `budget`"):
        open_fleet(artefact, budget=open_fleet(artefact).residency.bytes - 1)
    with pytest.raises(SettingError, match="`budget` is 100 bytes, but one task takes"):
        open_fleet(artefact, budget=100)
    write(tmp_path / "tasks" / "lora.ckpt", 3, 0, "lora")
    fleet = open_fleet(artefact, store=str(tmp_path / "tasks"))
    with pytest.raises(CheckpointError, match="has method lora, but the fleet's is aoft-lora-star"):
        fleet.predict(images[:2], ["t0", "lora"])
    with pytest.raises(UnknownNameError, match=r"Unknown task 'lor'\. Did you mean lora"):
        fleet.predict(images[:1], ["lor"])
    assert right(fleet.predict(images[:2], ["t1", "t0"]), ["t1", "t0"], [0, 1], expected)


def test_a_checkpoint_older_than_a_setting_gets_its_default(
    open_fleet: OpenFleet,
    artefact: Path,
    tasks: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
    tmp_path: Path,
    with_metadata: Callable[..., Path],
    backbone_weights: Path,
) -> None:
    old = with_metadata(tasks["t2"], tmp_path / "t2.ckpt", lambda m: m["settings"].pop("strict"))
    fleet = open_fleet(artefact)
    fleet.add(old)
    assert right(fleet.predict(images[:1], ["t2"]), ["t2"], [0], expected)
    both = ["--fleet", old, tasks["t1"], "--backbone-weights", backbone_weights]
    assert main([str(option) for option in [*both, "-o", tmp_path / "both.onnx"]]) == 0
    other = with_metadata(
        tasks["t3"], tmp_path / "t3.ckpt", lambda m: m["settings"].update(strict=True)
    )
    with pytest.raises(CheckpointError, match="has settings"):
        fleet.add(other)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_a_fleet_needs_neither_torch_nor_timm(
    device: str, artefact: Path, tasks: dict[str, Path], stores: dict[str, Path]
) -> None:
    code = (
        "import sys\nimport numpy as np\nfrom aoft_deploy.fleet.fleet import Fleet\n"
        f"store, device = {str(stores['packed'])!r}, {device!r}\n"
        f"fleet = Fleet({str(artefact)!r}, store=store, device=device, threads=1)\n"
        f"fleet.add({str(tasks['t2'])!r}, 'mine')\n"
        "fleet.predict(np.zeros((2, 3, 16, 16), np.float32), ['mine', 't7'])\n"
        "assert not {'torch', 'timm'}.intersection(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_task_is_replaced_atomically(
    open_fleet: OpenFleet,
    artefact: Path,
    tasks: dict[str, Path],
    stores: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
) -> None:
    fleet = open_fleet(artefact, store=stores["packed"])
    assert fleet.names == set(tasks) and "t7" in fleet and "t77" not in fleet
    before = fleet.residency.tasks
    for name in ("t1", "t7", "t7", "new"):  # in the artefact, in the store, added, unknown
        fleet.add(tasks["t9"], name, replace=True)
        assert right(fleet.predict(images[:1], [name]), ["t9"], [0], expected)
    assert fleet.residency.tasks == before + 2 and "new" in fleet.names
    with pytest.raises(CheckpointError):
        fleet.add(tasks["t9"].parent / "missing.ckpt", "t1", replace=True)
    assert right(fleet.predict(images[:1], ["t1"]), ["t9"], [0], expected)
    fleet.remove("t7")
    assert "t7" not in fleet.names and "t7" not in fleet


@pytest.fixture(scope="module")
def versions(write: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three versions of a task; the last has more classes."""
    folder = tmp_path_factory.mktemp("versions")
    sizes = {"old": 3, "new": 3, "wider": 5}
    return [
        write(folder / f"{name}.ckpt", size, seed=40 + i, called=name)
        for i, (name, size) in enumerate(sizes.items())
    ]


def merged_answer(path: Path, images: NDArray[np.float32], weights: Path) -> tuple[Any, list[str]]:
    """Logits by PyTorch of the merged checkpoint, and its classes."""
    model, checkpoint = open_checkpoint(path, BackboneSource(weights=weights))
    with torch.inference_mode():
        return merge(model)(torch.from_numpy(images)).numpy(), list(checkpoint.classes)


@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("following", [1, 2])
def test_logits_and_classes_of_an_answer_are_of_the_same_version(
    open_fleet: OpenFleet,
    rows: int | None,
    following: int,
    artefact: Path,
    versions: list[Path],
    images: NDArray[np.float32],
    backbone_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = open_fleet(artefact)
    fleet.add(versions[0], "task")
    run, calls = fleet._engine.run, list[int]()

    def exchanging(chosen: Any, *rest: Any) -> Any:
        calls.append(len(chosen))
        if len(calls) == 1:  # during the engine's run: the held version is kept
            fleet.add(versions[following], "task", replace=True)
        return run(chosen, *rest)

    monkeypatch.setattr(fleet._engine, "run", exchanging)
    for version in (0, following):
        logits, classes = merged_answer(versions[version], images[:4], backbone_weights)
        answers = fleet.predict(images[:4], ["task"] * 4, rows=rows)
        for answer, wanted in zip(answers, logits, strict=True):
            assert list(answer.classes) == classes
            np.testing.assert_allclose(answer.logits, wanted, atol=1e-4, rtol=0)
    assert calls == [rows or 4] * (8 // (rows or 4))


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(
    open_fleet: OpenFleet,
    artefact: Path,
    versions: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet, path = open_fleet(artefact), tmp_path / "task.ckpt"
    shutil.copy(versions[0], path)
    shutil.copy(versions[1], tmp_path / "next")
    read = file_format._check_header

    def replacing(file: Path) -> None:
        read(file)
        (tmp_path / "next").replace(path)

    with monkeypatch.context() as patch:
        patch.setattr(file_format, "_check_header", replacing)
        with pytest.raises(ArtefactError, match="was changed while it was opened"):
            fleet.add(path)
    assert "task" not in fleet
    fleet.add(path)
    assert fleet.classes("task") == ("new0", "new1", "new2")
