"""TunedModel: its trained parameters, and the checkpoints that store them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from small_models import NARROW, PROMPTS, REFUSED, identity, image, model, tune
from timm.data.config import resolve_model_data_config

from aoft_deploy import Prediction, attach, load_classifier, merge
from aoft_deploy.checkpoints.checkpoint import read_checkpoint, save
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError, ImageError, SettingError, UnknownNameError
from aoft_deploy.tuning.methods import method_names
from aoft_deploy.tuning.tuned_model import TunedModel


def test_load_trained_accepts_only_fitting_tensors() -> None:
    tuned = tune(model("vit_tiny_patch16_224"), "aoft-lora")
    good = {n: p.detach().clone() for n, p in tuned.trained().items()}
    name = "update.blocks.0.attn.qkv.q.q_up"
    bad: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in good.items() if k != name}, f"lacks {name}"),
        (
            {**good, name: torch.zeros(3)},
            r"has shape \(3,\) in the checkpoint, but the model needs",
        ),
        ({**good, name: good[name] * float("nan")}, "holds values that are not finite"),
        ({**good, "update.x": torch.zeros(1)}, r"holds update\.x, which the model has no place"),
    ]
    for tensors, message in bad:
        with pytest.raises(CheckpointError, match=message):
            tuned.load_trained(tensors)
    tuned.load_trained({n: v * 2 for n, v in good.items()})
    assert all(torch.equal(p, good[n] * 2) for n, p in tuned.trained().items())


CLASSES = ("a", "b", "c")


NAMES: dict[str, str] = {
    "aoft-lora": "attn.qkv.q.q_down attn.qkv.q.q_up attn.qkv.v.q_down attn.qkv.v.q_up",
    "aoft-lora-star": "attn.qkv.q.q_down attn.qkv.q.q_up attn.qkv.q.rank_scale attn.qkv.v.q_down "
    "attn.qkv.v.q_up attn.qkv.v.rank_scale",
    "aoft-adapter": "attn.proj.q_down attn.proj.q_up mlp.fc2.q_down mlp.fc2.q_up",
    "aoft-adapter-star": "attn.proj.q_down attn.proj.q_up attn.proj.rank_scale mlp.fc2.q_down "
    "mlp.fc2.q_up mlp.fc2.rank_scale",
    "aoft-vpt": "q",
    "aoft-vpt-star": "q rank_scale",
    "vpt": "tokens",
    "lora": "attn.qkv.q.a attn.qkv.q.b attn.qkv.v.a attn.qkv.v.b",
    "adapter": "attn.proj.a attn.proj.b mlp.fc2.a mlp.fc2.b",
    "rlrr": "norm1.scale norm1.shift norm2.scale norm2.shift attn.qkv.q.scale_in "
    "attn.qkv.q.scale_out attn.qkv.q.shift attn.qkv.k.scale_in attn.qkv.k.scale_out "
    "attn.qkv.k.shift attn.qkv.v.scale_in attn.qkv.v.scale_out attn.qkv.v.shift "
    "attn.proj.scale_in attn.proj.scale_out attn.proj.shift mlp.fc1.scale_in mlp.fc1.scale_out "
    "mlp.fc1.shift mlp.fc2.scale_in mlp.fc2.scale_out mlp.fc2.shift",
    "ssf": "norm1.scale norm1.shift norm2.scale norm2.shift attn.qkv.scale attn.qkv.shift "
    "attn.proj.scale attn.proj.shift mlp.fc1.scale mlp.fc1.shift mlp.fc2.scale mlp.fc2.shift",
    "bitfit": "norm1.shift norm2.shift attn.qkv.shift attn.proj.shift mlp.fc1.shift mlp.fc2.shift",
    "linear": "",
}
"""Names in a checkpoint of one block, without ``update.blocks.0.``. Files depend on them."""


OUTSIDE = {
    "rlrr": ("norm.scale", "norm.shift", "patch_embed.proj.scale", "patch_embed.proj.shift"),
    "ssf": ("norm.scale", "norm.shift", "patch_embed.proj.scale", "patch_embed.proj.shift"),
    "bitfit": ("norm.shift", "patch_embed.proj.shift"),
}


@pytest.mark.parametrize("method", NAMES)
def test_names_in_checkpoints_do_not_change(
    method: str, make_tuned: Callable[..., TunedModel]
) -> None:
    names = set(make_tuned(method).trained())
    expected = {f"update.blocks.0.{name}" for name in NAMES[method].split()}
    expected |= {f"update.{name}" for name in OUTSIDE.get(method, ())}
    assert names == expected | {"head.head.weight", "head.head.bias"}


@pytest.mark.parametrize("method", method_names())
def test_a_loaded_task_gives_the_same_logits(
    method: str,
    make_tuned: Callable[..., TunedModel],
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
) -> None:
    path = make_checkpoint(method)
    tuned, loaded = make_tuned(method), load(path, weights=backbone_weights)
    assert read_checkpoint(path).method == method
    assert loaded.settings == tuned.settings
    assert list(loaded.trained()) == list(tuned.trained())
    for name, parameter in tuned.trained().items():
        assert torch.equal(loaded.trained()[name], parameter), name
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(x), tuned(x))
        assert (merge(loaded)(x) - tuned(x)).abs().max() < 1e-5


def test_a_checkpoint_stores_settings_of_every_type(
    make_tuned: Callable[..., TunedModel],
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
) -> None:
    forms: list[tuple[str, dict[str, Any]]] = [
        ("lora", {"ranks": {"blocks.0.attn.qkv.k": 3, "blocks.0.mlp.fc1": 2}, "scale": 2}),
        ("rlrr", {"sides": "in", "residual": False, "fused_qkv": True, "norms": []}),
        ("aoft-adapter-star", {"rank": 5, "shared": True, "strict": True, "targets": ["fc2"]}),
        ("aoft-vpt", {"rank": 3, "deep": False, "scale": 0.5}),
    ]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for method, settings in forms:
        path = make_checkpoint(method, **settings)
        tuned, loaded = make_tuned(method, **settings), load(path, weights=backbone_weights)
        assert loaded.settings == tuned.settings
        assert {**loaded.settings, **settings} == loaded.settings
        with torch.no_grad():
            assert torch.equal(loaded(x), tuned(x))


def test_a_checkpoint_stores_the_roles_of_automatic_targets(
    make_checkpoint: Callable[..., Path],
) -> None:
    assert read_checkpoint(make_checkpoint("lora")).settings["targets"] == ["q", "v"]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_tasks_of_other_families_can_be_saved_and_loaded(name: str, tmp_path: Path) -> None:
    half = (0.5, 0.5, 0.5)
    tuned = tune(model(name), "lora", backbone=identity(name))
    path = tmp_path / "model.ckpt"
    preprocessing = Preprocessing(32, crop_pct=1.0, mean=half, std=half)
    save(tuned, path, classes=tuple("abcde"), preprocessing=preprocessing)
    checkpoint = read_checkpoint(path)
    again = attach(model(name), checkpoint.method, backbone=identity(name), **checkpoint.settings)
    again.load_trained(checkpoint.tensors)
    x = image(tuned.backbone)
    assert torch.equal(again.eval()(x), tuned.eval()(x))


def test_gradients_reach_exactly_the_trained_parameters() -> None:
    for name in ("swinv2_tiny_window8_256", "resnet18", "beit_base_patch16_224"):
        for method in ("rlrr", "ssf", "bitfit", "aoft-adapter-star", *PROMPTS):
            if method in PROMPTS and name in REFUSED:
                continue
            tuned = tune(model(name), method, backbone=identity(name))
            tuned(image(tuned.backbone)).square().sum().backward()
            wanted = {id(p) for p in tuned.trained().values()}
            for parameter in tuned.parameters():
                assert (parameter.grad is not None) == (id(parameter) in wanted), (name, method)


@pytest.mark.parametrize("method", ["rlrr", "full"])
def test_training_does_not_change_batch_norm_statistics(method: str) -> None:
    tuned = attach(timm.create_model("resnet10t", num_classes=3), method).train()
    before = {name: buffer.clone() for name, buffer in tuned.named_buffers()}
    tuned(torch.randn(4, 3, 32, 32))
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in tuned.named_buffers())


def test_full_fine_tuning_trains_and_saves_everything() -> None:
    tuned = attach(model(), "full")
    assert all(p.requires_grad for p in tuned.parameters())
    assert not tuned.updates
    names = set(tuned.trained())
    assert {n for n in names if n.startswith("head.")} == {"head.head.weight", "head.head.bias"}
    every = {n for n, _ in model().named_parameters()}
    assert {n.partition(".")[2] for n in names} == every
    merged = merge(tuned)
    for name in every:
        ours, base = merged.get_parameter(name), tuned.backbone.get_parameter(name)
        assert torch.equal(ours, base) and ours.data_ptr() != base.data_ptr()


def test_only_updates_and_classifier_are_trained() -> None:
    tuned = attach(model("vit_tiny_patch16_224"), "rlrr")
    trained = {id(p) for p in tuned.trained().values()}
    assert {id(p) for p in tuned.parameters() if p.requires_grad} == trained
    tuned(image(model("vit_tiny_patch16_224"))).sum().backward()
    assert all((p.grad is not None) == (id(p) in trained) for p in tuned.parameters())


def test_a_loaded_model_knows_its_task_and_saves_it_again(
    checkpoint: Path, backbone_weights: Path, classes: tuple[str, ...], tmp_path: Path
) -> None:
    tuned = load(str(checkpoint), weights=str(backbone_weights))
    written = read_checkpoint(checkpoint)
    assert (tuned.classes, tuned.activation) == (classes, "softmax")
    assert tuned.preprocessing == written.preprocessing
    save(tuned, str(tmp_path / "again.ckpt"))
    again = read_checkpoint(tmp_path / "again.ckpt")
    assert (again.classes, again.preprocessing) == (classes, written.preprocessing)
    assert all(torch.equal(t, written.tensors[name]) for name, t in again.tensors.items())


def test_a_model_predicts_as_its_artefact_does(
    checkpoint: Path, artefact: Path, backbone_weights: Path, photos: list[Path]
) -> None:
    tuned, classifier = load(checkpoint, weights=backbone_weights), load_classifier(artefact)
    for found, wanted in zip(tuned.predict(photos, 5), classifier.predict(photos, 5), strict=True):
        assert [type(p) for p in found] == [Prediction] * 5
        assert [p.label for p in found] == [p.label for p in wanted]
        np.testing.assert_allclose([p[1] for p in found], [p[1] for p in wanted], atol=2e-5)
    assert tuned.predict(str(photos[0]), 5) == tuned.predict([photos[0]], 5)[0]


def test_a_model_predicts_in_evaluation_mode_and_stays_in_its_mode(photos: list[Path]) -> None:
    tuned = attach(
        timm.create_model("vit_tiny_patch16_224", **{**NARROW, "drop_rate": 0.9}), "lora"
    )
    wanted = tuned.eval().predict(photos[0])
    assert tuned.train().predict(photos[0]) == wanted
    assert tuned.training and tuned.backbone.training
    with pytest.raises(ImageError):
        tuned.predict("missing.png")
    assert tuned.training
    assert tuned.double().predict(photos[0])[0].label == wanted[0].label


def test_an_attached_model_has_numbered_classes_and_its_backbones_preprocessing() -> None:
    tuned = attach(model("vit_tiny_patch16_224"), "lora")
    assert (tuned.classes, tuned.activation) == (("0", "1", "2", "3", "4"), "softmax")
    config = resolve_model_data_config(tuned.backbone)  # type: ignore[no-untyped-call]
    own = Preprocessing.from_timm(config)
    assert tuned.preprocessing == replace(own, size=32)
    tuned.activation = "sigmoid"
    tuned.classes = list("abcde")
    assert (tuned.classes, tuned.activation) == (tuple("abcde"), "sigmoid")
    with pytest.raises(SettingError, match="2 classes are named, but the model has 5 logits"):
        tuned.classes = ("a", "b")
    with pytest.raises(UnknownNameError, match="Unknown activation 'relu'"):
        tuned.activation = "relu"
    tuned.preprocessing = own
    assert tuned.preprocessing == own


def test_what_is_saved_with_a_model_is_the_models_own_afterwards(tmp_path: Path) -> None:
    tuned = attach(model("vit_tiny_patch16_224"), "lora")
    save(tuned, tmp_path / "a.ckpt", classes=list("abcde"), activation="none")
    save(tuned, tmp_path / "b.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()
    written = read_checkpoint(tmp_path / "b.ckpt")
    assert (written.classes, written.classes.activation) == (tuple("abcde"), "none")


def test_features_are_those_of_the_merged_model() -> None:
    tuned = tune(model("vit_tiny_patch16_224"), "lora").eval()
    x = image(tuned.backbone)
    with torch.no_grad():
        found, wanted = tuned.forward_features(x), merge(tuned).forward_features(x)  # type: ignore[operator]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_model_keeps_its_state_and_its_task_when_copied(photos: list[Path]) -> None:
    tuned = tune(model("vit_tiny_patch16_224"), "lora").eval()
    tuned.classes, tuned.activation = list("abcde"), "sigmoid"
    other = attach(model("vit_tiny_patch16_224"), "lora").eval()
    other.load_state_dict(tuned.state_dict())
    other.classes = tuned.classes
    for again in (other, copy.deepcopy(tuned)):
        assert again.predict(photos, 5) == tuned.predict(photos, 5)
