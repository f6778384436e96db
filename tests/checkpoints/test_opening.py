"""open_checkpoint on PEFT LoRA folders: backbone, classifier and description of the task."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from peft_models import (
    BEIT,
    CLASSES,
    EVA,
    SIZE,
    VIT,
    X,
    base_model,
    check,
    options,
    randomised,
    with_head,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.opening import load, open_checkpoint
from aoft_deploy.cli.export import main
from aoft_deploy.errors import CheckpointError, UnknownNameError


def test_a_folder_of_peft_gets_its_description_from_timm(
    adapted: Callable[..., Tensor], weights: Callable[[str], Path], tmp_path: Path
) -> None:
    adapted(tmp_path / "a")
    _, task = open_checkpoint(tmp_path / "a", BackboneSource(VIT, weights(VIT)))
    assert task.classes == ("0", "1", "2", "3", "4", "5")
    assert (task.preprocessing.size, task.preprocessing.mean) == (SIZE, (0.1, 0.2, 0.3))
    assert task.backbone.name == VIT
    assert task.settings["ranks"] == {f"blocks.{i}.attn.qkv": 4 for i in range(2)}


def test_our_folder_saved_again_by_peft_loses_its_description(
    peft: Any,
    adapted: Callable[..., Tensor],
    weights: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    expected = adapted(tmp_path / "a")
    more = options(tmp_path / "a", weights(VIT), "--to", "peft", "-o", tmp_path / "b")
    assert main([str(option) for option in more]) == 0
    assert (
        load(tmp_path / "b", weights=weights(VIT)).identity.name == VIT
    )  # our folder contains the name
    model = peft.PeftModel.from_pretrained(base_model(), tmp_path / "b").eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "c")
    with pytest.raises(CheckpointError, match="name it with `backbone`"):
        load(tmp_path / "c", weights=weights(VIT))
    check(tmp_path / "c", VIT, weights(VIT), expected)


@pytest.mark.parametrize("targets", [["qkv"], "all-linear"])
def test_without_a_saved_classifier_the_pretrained_one_stays(
    targets: Any, adapted: Callable[..., Tensor], tmp_path: Path
) -> None:
    # all-linear then also adapts the classifier.
    expected = adapted(tmp_path / "a", target_modules=targets, modules_to_save=None)
    check(tmp_path / "a", VIT, with_head(tmp_path / "whole.safetensors"), expected)


def test_timms_own_weights_include_their_classifier(
    peft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = with_head(tmp_path / "whole.safetensors")
    known = importlib.import_module("timm.models._registry")._model_pretrained_cfgs
    config = replace(known[VIT], file=str(file), num_classes=CLASSES)
    monkeypatch.setitem(known, VIT, config)
    model = peft.get_peft_model(base_model(), peft.LoraConfig(target_modules=["qkv"])).eval()
    randomised(model, seed=2, spread=0.3, only="lora_")
    model.save_pretrained(tmp_path / "a")
    with torch.inference_mode():
        logits = load(tmp_path / "a", backbone=VIT)(X)
        torch.testing.assert_close(logits, model(X), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["file", "npz", "timm"])
def test_without_any_classifier_a_folder_is_refused(
    kind: str,
    adapted: Callable[..., Tensor],
    weights: Callable[[str], Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    adapted(tmp_path / "a", modules_to_save=None)
    if kind == "timm":
        line = refused(main, "--merge", tmp_path / "a", "--backbone", "aoft_vit_nano")
        assert "aoft_vit_nano none either" in line
    elif kind == "npz":
        np.savez(tmp_path / "a.npz", a=np.zeros(3))
        assert "a.npz" in refused(main, *options(tmp_path / "a", tmp_path / "a.npz"))
    else:
        line = refused(main, *options(tmp_path / "a", weights(VIT)))
        assert "holds no classifier (modules_to_save)" in line


def test_an_unknown_backbone_is_refused(adapted: Callable[..., Tensor], tmp_path: Path) -> None:
    adapted(tmp_path / "a")
    adapted(tmp_path / "b", modules_to_save=None)
    for folder in ("a", "b"):
        with pytest.raises(UnknownNameError, match="Unknown backbone 'peft_test_vlt'"):
            load(tmp_path / folder, backbone="peft_test_vlt")


def test_a_change_of_a_layer_that_timm_does_not_call_is_refused(
    adapted: Callable[..., Tensor],
    weights: Callable[[str], Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    expected = adapted(tmp_path / "a", BEIT, target_modules=["qkv", "fc1"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    line = refused(main, *options(tmp_path / "a", weights(BEIT), name=BEIT))
    assert "changes blocks.0.attn.qkv, whose weight Beit reads without calling" in line
    tensors = load_file(path)
    # PEFT's training leaves B of such a layer at zero, because the layer is never called.
    tensors = {n: t * ("qkv.lora_B" not in n) for n, t in tensors.items()}
    save_file(tensors, path)
    check(tmp_path / "a", BEIT, weights(BEIT), expected)


def test_a_folder_that_changes_only_the_classifier_is_refused(
    adapted: Callable[..., Tensor], tmp_path: Path, refused: Callable[..., str]
) -> None:
    adapted(tmp_path / "a", target_modules=["head"], modules_to_save=None)
    whole = with_head(tmp_path / "whole.safetensors")
    line = refused(main, *options(tmp_path / "a", whole))
    assert "changes the classifier only: there is nothing to merge" in line


def test_our_folder_on_other_backbone_weights_is_refused(
    adapted: Callable[..., Tensor],
    weights: Callable[[str], Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    adapted(tmp_path / "a")
    more = options(tmp_path / "a", weights(VIT), "--to", "peft", "-o", tmp_path / "b")
    assert main([str(option) for option in more]) == 0
    other = timm.create_model(VIT, num_classes=0).state_dict()
    save_file(other, tmp_path / "other.safetensors")
    arguments = options(tmp_path / "b", tmp_path / "other.safetensors", "--to", "timm")
    assert "give the right ones, or accept the difference with --force" in refused(main, *arguments)
    assert main([*map(str, arguments), "--force"]) == 0
    manifest = json.loads((tmp_path / "b.safetensors.json").read_text("utf-8"))
    assert manifest["forced"] is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model_name_or_path": "timm/vit_tiny_patch16_224.augreg_in21k"}, "was trained on v"),
        ({"base_model_name_or_path": EVA}, f"was trained on {EVA}, but {VIT} computes something"),
        (
            {"auto_mapping": {"base_model_class": "Eva", "parent_library": "timm.models.eva"}},
            "was trained on a Eva, but",
        ),
        ({"base_model_name_or_path": f"timm/{VIT}.tag"}, ""),
        ({"base_model_name_or_path": "/home/somebody/model"}, ""),
    ],
)
def test_a_backbone_that_the_folder_does_not_name_is_refused(
    fields: dict[str, Any],
    message: str,
    adapted: Callable[..., Tensor],
    weights: Callable[[str], Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    expected = adapted(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    if message:
        assert message in refused(main, *options(tmp_path / "a", weights(VIT)))
        tuned = load(tmp_path / "a", backbone=VIT, weights=weights(VIT), force=True)
        with torch.inference_mode():
            torch.testing.assert_close(tuned(X), expected, atol=1e-5, rtol=0)
    else:
        check(tmp_path / "a", VIT, weights(VIT), expected)


def test_a_classifier_below_a_prefix_of_the_weights_file_is_used(
    adapted: Callable[..., Tensor], tmp_path: Path
) -> None:
    expected = adapted(tmp_path / "a", modules_to_save=None)
    state = {f"module.{name}": tensor for name, tensor in base_model().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    check(tmp_path / "a", VIT, tmp_path / "w.pth", expected)
