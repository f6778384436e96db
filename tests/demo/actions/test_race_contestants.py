"""The contestants answer alike, and each counts all of its weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import from_array
from peft_models import SIZE, VIT, base_model
from safetensors.torch import save_file

from aoft_demo.actions import race_contestants
from aoft_demo.actions.race_contestants import (
    Batch,
    lora_rank,
    mixed_batch,
    onnx_bytes,
    peft_batch,
    separate_models,
)
from aoft_demo.tasks.shared_fleet import SharedFleet
from aoft_deploy.errors import MissingExtraError
from aoft_deploy.fleet.task import TaskKind

LAYERS = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")
KIND = TaskKind(
    digest="",
    method="aoft-lora-star",
    settings={"rank": 4},
    preprocessing={},
    order=tuple((f"update.{layer}.q.q_down", (32,)) for layer in LAYERS),
    width=32,
    backbone=VIT,
)


@pytest.mark.parametrize("skills", [1, 2, 3, 5])
def test_the_skills_of_a_batch_take_turns_and_get_all_pictures(skills: int) -> None:
    pictures = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1)
    batch = Batch.of(pictures, skills, per_skill=4)
    assert batch.skill == tuple(range(skills)) * 4
    seen = {(skill, int(row.item())) for skill, row in zip(batch.skill, batch.images, strict=True)}
    assert seen == {(skill, picture) for skill in range(skills) for picture in range(3)}


class Recorder:
    """An engine that returns the sum of each image and its own number."""

    def __init__(self, number: int) -> None:
        self.number, self.shapes = number, list[tuple[int, ...]]()

    def run(self, images: np.ndarray) -> np.ndarray:
        self.shapes.append(images.shape)
        sums = images.sum((1, 2, 3))
        return np.stack([sums, np.full_like(sums, self.number)], axis=1)


def test_a_separate_model_gets_its_pictures_as_one_batch() -> None:
    images = np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1)
    engines = [Recorder(0), Recorder(1)]
    batch = Batch(images, (0, 1, 1, 0, 1, 0), 2)
    contestant = separate_models(engines, 17, batch)  # type: ignore[arg-type]
    assert np.array_equal(contestant.run(), [[i, skill] for i, skill in enumerate(batch.skill)])
    assert [engine.shapes for engine in engines] == [[(3, 1, 1, 1)]] * 2
    assert contestant.weights == 17


def test_the_weights_of_an_onnx_file(tmp_path: Path) -> None:
    tensors: list[np.ndarray] = [
        np.zeros((3, 5), np.float32),
        np.zeros(7, np.int64),
        np.array(1, np.float16),
    ]
    named = [from_array(tensor, str(i)) for i, tensor in enumerate(tensors)]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], named)), tmp_path / "m"
    )
    assert onnx_bytes(tmp_path / "m") == sum(tensor.nbytes for tensor in tensors)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(base_model().state_dict(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def test_peft_answers_each_picture_with_its_skills_adapter(weights: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randn(5, 3, SIZE, SIZE, generator=generator)
    batch = Batch.of(pictures.numpy(), skills=3, per_skill=2)
    threads = torch.get_num_threads()
    contestant = peft_batch(KIND, weights, 6, batch, threads=1)
    rows = np.stack(contestant.run())
    assert torch.get_num_threads() == threads

    model = race_contestants._peft_model(KIND, weights, 6, 3)
    changed = {
        name.partition(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name
    }
    assert changed == {f"base_model.model.{layer}" for layer in LAYERS}
    alone = []
    for i in range(3):
        model.set_adapter(f"skill{i}")
        with torch.inference_mode():
            alone.append(model(torch.from_numpy(batch.images)).numpy())
    for row, skill, *answers in zip(rows, batch.skill, *alone, strict=True):
        np.testing.assert_allclose(row, answers[skill], atol=1e-5)
        others = [answer for i, answer in enumerate(answers) if i != skill]
        assert min(np.abs(row - other).max() for other in others) > 1e-3

    backbone = sum(p.numel() for n, p in base_model().named_parameters() if "head" not in n)
    head, lora = 32 * 6 + 6, 2 * 4 * (32 + 96)
    assert contestant.weights == 4 * (backbone + head + 3 * (head + lora))


def test_the_rank_is_that_of_the_fleets_method() -> None:
    assert [lora_rank(x) for x in ({"rank": 64}, {}, {"rank": None})] == [64, 8, 8]


def test_layers_of_a_method_that_changes_no_linear_layer(weights: Path) -> None:
    other = TaskKind.from_dict({**json.loads(json.dumps(KIND.to_dict())), "order": []})
    model = race_contestants._peft_model(other, weights, 6, 1)
    adapted = {n.partition(".lora_")[0] for n, _ in model.named_parameters() if "lora_" in n}
    assert len(adapted) == 2 * 4 and not any("head" in name for name in adapted)


def test_peft_may_be_missing(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    batch = Batch(np.zeros((1, 3, SIZE, SIZE), np.float32), (0,), 1)
    with pytest.raises(MissingExtraError, match=r"peft is not installed: run pip install"):
        peft_batch(KIND, weights, 6, batch, threads=1)


def test_one_pass_answers_each_picture_with_its_own_skill(shared: SharedFleet) -> None:
    names = list(shared.tasks)[:2]
    rows = np.random.default_rng(0).normal(size=(3, *shape(shared))).astype(np.float32)
    batch = Batch.of(rows, skills=2, per_skill=3)
    contestant = mixed_batch(shared.fleet, names, batch, 17)
    expected = [
        shared.fleet.predict(image[None], [names[skill]])[0].logits
        for image, skill in zip(batch.images, batch.skill, strict=True)
    ]
    for row, other in zip(contestant.run(), expected, strict=True):
        np.testing.assert_allclose(row, other, atol=1e-4)
    assert contestant.weights == 17


def shape(shared: SharedFleet) -> tuple[int, int, int]:
    preprocessing = shared.fleet.preprocessing
    return 3, preprocessing.height, preprocessing.width
