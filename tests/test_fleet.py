"""A live fleet: the right task answers, whatever comes and goes meanwhile."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from aoft_deploy.backbone import create_backbone
from aoft_deploy.checkpoint import open_checkpoint, save
from aoft_deploy.cli.export import main
from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError
from aoft_deploy.fleet import Fleet, _joined
from aoft_deploy.preprocessing import Preprocessing
from aoft_deploy.tuned import attach, merge

WIDTHS = (2, 5, 3, 4, 2, 9, 5, 1, 6, 3, 2, 7)
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def write(
    backbone_name: str, backbone_args: dict[str, Any], backbone_weights: Path
) -> Callable[..., Path]:
    """Write a task's checkpoint, no number of which is at its start."""

    def task(
        path: Path, classes: int, seed: int, method: str = "aoft-lora-star", **settings: Any
    ) -> Path:
        model, identity = create_backbone(
            backbone_name, num_classes=classes, weights=backbone_weights, **backbone_args
        )
        tuned = attach(model, method, backbone=identity, **settings)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.trained().values():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        names = [f"c{i}" for i in range(classes)]
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
    """Each task's merged model's logits of all images."""
    answers = {}
    for name, path in tasks.items():
        merged = merge(open_checkpoint(path, weights=backbone_weights)[0])
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
    answers: list[NDArray[np.float32]],
    names: list[str],
    chosen: list[int],
    expected: dict[str, NDArray[np.float32]],
) -> bool:
    return len(answers) == len(names) and all(
        answer.shape == expected[name][image].shape
        and bool(np.abs(answer - expected[name][image]).max() < 1e-4)
        for answer, name, image in zip(answers, names, chosen, strict=True)
    )


def test_tasks_added_one_by_one_answer_as_their_merged_models(
    artefact: Path,
    tasks: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
) -> None:
    fleet = Fleet(artefact, capacity=2, threads=1)
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


def test_a_removed_task_never_answers_again_and_its_room_is_used_again(
    artefact: Path,
    tasks: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
) -> None:
    fleet = Fleet(artefact, capacity=4, threads=1)
    bytes_before = fleet._bank.nbytes, fleet._heads.nbytes
    for round in range(30):
        name = f"t{2 + round % (len(tasks) - 2)}"
        fleet.add(tasks[name])
        assert right(fleet.predict(images[:2], [name, "t1"]), [name, "t1"], [0, 1], expected)
        fleet.remove(name)
        with pytest.raises(UnknownNameError, match=f"Unknown task '{name}'"):
            fleet.predict(images[:1], [name])
    assert (fleet._bank.nbytes, fleet._heads.nbytes) == bytes_before


@pytest.mark.slow
def test_no_answer_is_wrong_while_tasks_come_and_go(
    artefact: Path,
    tasks: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
) -> None:
    fleet = Fleet(artefact, capacity=2, threads=1)
    stop, wrong, served = threading.Event(), list[str](), [0] * 4

    def churn() -> None:
        rng, there = np.random.default_rng(7), set[str]()
        while not stop.is_set():
            name = f"t{rng.integers(2, len(tasks))}"
            if name in there:
                fleet.remove(name)
                there.remove(name)
            else:
                fleet.add(tasks[name])
                there.add(name)

    def ask(worker: int) -> None:
        rng = np.random.default_rng(worker)
        for _ in range(400):
            names = [f"t{i}" for i in rng.integers(0, len(tasks), 4)]
            chosen = rng.integers(0, 8, 4).tolist()
            try:
                answers = fleet.predict(images[chosen], names)
            except UnknownNameError:
                names = ["t0", "t1", "t1", "t0"]
                answers = fleet.predict(images[chosen], names)
            if not right(answers, names, chosen, expected):
                wrong.append(f"{names} {chosen}")
            served[worker] += 1

    changer = threading.Thread(target=churn)
    changer.start()
    workers = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    stop.set()
    changer.join()
    assert not wrong and served == [400] * 4


def test_a_slot_is_not_given_to_another_task_while_a_request_uses_it(
    artefact: Path, tasks: dict[str, Path]
) -> None:
    fleet = Fleet(artefact, capacity=3, threads=1)
    fleet.add(tasks["t2"])
    with fleet._pinned(["t2"]) as (slots, _, tables):
        before = tables["bank"][slots[0]].copy()
        fleet.remove("t2")
        fleet.add(tasks["t3"])
        assert np.array_equal(tables["bank"][slots[0]], before)
    fleet.add(tasks["t4"])
    assert fleet._slots["t4"] == slots[0]


def test_what_does_not_belong_is_refused_and_the_fleet_goes_on(
    artefact: Path,
    write: Callable[..., Path],
    tasks: dict[str, Path],
    images: NDArray[np.float32],
    expected: dict[str, NDArray[np.float32]],
    tmp_path: Path,
    with_metadata: Callable[..., Path],
) -> None:
    fleet = Fleet(artefact, threads=1)
    with pytest.raises(SettingError, match="has a task 't1': remove it first"):
        fleet.add(tasks["t1"])
    with pytest.raises(UnknownNameError, match=r"Unknown task 't11'\. Did you mean t1"):
        fleet.remove("t11")
    with pytest.raises(SettingError, match=r"Images of shape \(2, 3, 16, 16\) for 1 tasks"):
        fleet.predict(images[:2], ["t0"])
    junk = tmp_path / "junk.ckpt"
    junk.write_bytes(b"no checkpoint")
    for path in (junk, tmp_path / "missing.ckpt"):
        with pytest.raises(CheckpointError, match="is no checkpoint of aoft-train"):
            fleet.add(path)
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
    with pytest.raises(CheckpointError, match="no classifier of 32 features for 0 classes"):
        fleet.add(none)
    assert right(fleet.predict(images[:2], ["t1", "t0"]), ["t1", "t0"], [0, 1], expected)


def test_numbers_that_are_not_finite_are_refused(
    artefact: Path, tasks: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(tasks["t2"])
    tensors["update.blocks.0.attn.qkv.q.q_down"][3] = float("nan")
    with safe_open(tasks["t2"], "pt") as file:
        save_file(tensors, tmp_path / "nan.ckpt", metadata=file.metadata())
    with pytest.raises(CheckpointError, match=r"q_down in .* must be finite"):
        Fleet(artefact, threads=1).add(tmp_path / "nan.ckpt")


def test_a_merged_model_is_no_fleet(artefact: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    import onnx

    proto = onnx.load(artefact)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(CheckpointError, match="is no fleet of aoft-export"):
        Fleet(tmp_path / "bare.onnx")
    proto.graph.initializer.remove(next(i for i in proto.graph.initializer if i.name == "bank"))
    onnx.save(proto, tmp_path / "merged.onnx")
    with pytest.raises(CheckpointError, match="is no fleet: export one with aoft-export --fleet"):
        Fleet(tmp_path / "merged.onnx")
    with pytest.raises(CheckpointError, match="There is no file"):
        Fleet(tmp_path / "missing.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"\xffjunk")
    with pytest.raises(CheckpointError, match="is no ONNX model"):
        Fleet(tmp_path / "junk.onnx")


def test_free_neighbours_become_one() -> None:
    assert _joined([(4, 2), (0, 3), (6, 1), (9, 1), (3, 1)]) == [(0, 7), (9, 1)]


def test_a_fleet_needs_neither_torch_nor_timm(artefact: Path, tasks: dict[str, Path]) -> None:
    code = (
        "import sys\nimport numpy as np\nfrom aoft_deploy.fleet import Fleet\n"
        f"fleet = Fleet({str(artefact)!r}, threads=1)\nfleet.add({str(tasks['t2'])!r})\n"
        "fleet.predict(np.zeros((1, 3, 16, 16), np.float32), ['t2'])\n"
        "assert not {'torch', 'timm'}.intersection(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
