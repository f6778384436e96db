"""Runs that keep the features of a frozen backbone, and runs that keep few activations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aoft_deploy.checkpoints.opening import load
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.errors import SettingError
from aoft_deploy.training.learner import Learner
from aoft_deploy.training.run import train
from aoft_deploy.training.run_folder import RunFolder
from aoft_deploy.training.settings import RunOptions, TrainingSettings
from aoft_deploy.tuning.tuned_model import TunedModel

LINEAR = TrainingSettings(method="linear", img_size=16, epochs=3, batch_size=16, precision="fp32")
DIGITS = load_task("digits", train=40, val=20, test=20)


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in clock and v is not None} for line in lines]


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images of each call of the backbone's blocks."""
    counts: list[int] = []
    create = Learner.__init__

    def counted(self: Learner, accelerator: Any, tuned: TunedModel, *rest: Any) -> None:
        create(self, accelerator, tuned, *rest)
        last: Any = tuned.backbone.get_submodule("patch_embed")
        last.register_forward_hook(lambda module, args, out: counts.append(len(args[0])))

    monkeypatch.setattr(Learner, "__init__", counted)
    return counts


def test_a_linear_probe_computes_each_image_once(
    images: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(DIGITS, tmp_path / "kept", LINEAR)
    checks = 16 + 16 + 16  # the first batch of each list is computed by the whole model too
    assert sum(images) == 40 + 20 + 20 + checks
    images.clear()
    monkeypatch.setattr(Learner, "has_constant_features", lambda self, augment: False)
    train(DIGITS, tmp_path / "whole", LINEAR)
    assert sum(images) == 3 * (40 + 20) + 20
    for ours, theirs in zip(metrics(tmp_path / "kept"), metrics(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_an_interrupted_and_resumed_linear_probe_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(DIGITS, tmp_path / "whole", LINEAR)
    write = RunFolder.append_metrics

    def interrupted(self: RunFolder, line: Any) -> None:
        if line.get("epoch") == 2:
            raise KeyboardInterrupt
        write(self, line)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "append_metrics", interrupted)
        train(DIGITS, tmp_path / "parts", LINEAR)
    assert [line["epoch"] for line in metrics(tmp_path / "parts")] == [1]
    train(DIGITS, tmp_path / "parts", LINEAR, RunOptions(resume=True))
    whole, parts = (
        load(tmp_path / name / "model.ckpt").state_dict() for name in ("whole", "parts")
    )
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes",
    [{"augment": "flip"}, {"mixup": 0.2}, {"drop_path": 0.1}, {"method": "aoft-lora", "epochs": 1}],
)
def test_images_that_vary_or_change_with_training_are_computed_each_time(
    changes: dict[str, Any], images: list[int], tmp_path: Path
) -> None:
    settings = replace(LINEAR, **{"epochs": 2, **changes})
    train(DIGITS, tmp_path / "run", settings)
    assert sum(images) >= settings.epochs * 40 + 20


def test_a_backbone_whose_classifier_reads_something_else_is_computed_each_time(
    images: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TunedModel.forward

    def doubled(self: TunedModel, x: Tensor) -> Tensor:
        return 2 * forward(self, x)

    monkeypatch.setattr(TunedModel, "forward", doubled)
    train(DIGITS, tmp_path / "run", replace(LINEAR, epochs=1, warmup_epochs=0))
    assert sum(images) >= 2 * (40 + 20)


def test_checkpointing_changes_no_bit_of_a_run(tmp_path: Path) -> None:
    settings = replace(LINEAR, method="aoft-lora-star", drop_path=0.2, epochs=1)
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        train(DIGITS, out, settings, RunOptions(checkpointing=checkpointing))
    files = [(tmp_path / name / "model.ckpt").read_bytes() for name in ("False", "True")]
    assert files[0] == files[1]
    assert torch.is_grad_enabled()


def test_checkpointing_is_refused_before_training(tmp_path: Path) -> None:
    settings = replace(LINEAR, method="vpt", method_settings={})
    with pytest.raises(SettingError, match="`checkpointing` needs timm's VisionTransformer"):
        train(DIGITS, tmp_path / "run", settings, RunOptions(checkpointing=True))
    assert not (tmp_path / "run" / "model.ckpt").exists()
