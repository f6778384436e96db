"""Backbone weights in the layouts of other training codes load; unknown tensors are refused.

The reference is the timm model from which the weights come.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aoft_deploy.cli.export import main
from aoft_deploy.errors import BackboneError
from aoft_deploy.tuning.backbones.backbone import create_backbone, file_classifier
from aoft_deploy.tuning.backbones.weights_file import LEFT_OUT

VIT = "test_vit"
State = dict[str, Tensor]


def randomised(name: str, seed: int = 0, **args: Any) -> nn.Module:
    """A timm model with noise added to all parameters."""
    model = timm.create_model(name, **args).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@cache
def source() -> nn.Module:
    return randomised(VIT)


def weights(seed: int = 0) -> State:
    state: State = source().state_dict() if not seed else randomised(VIT, seed).state_dict()
    return dict(state)


def below(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@torch.no_grad()
def features(model: nn.Module, size: int) -> Tensor:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    found: Tensor = model.forward_features(x)  # type: ignore[operator]
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    def save(content: Any) -> Path:
        torch.save(content, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    return save


def loaded(path: Path, name: str = VIT, **args: Any) -> nn.Module:
    return create_backbone(name, num_classes=3, weights=path, **args)[0]


LAYOUTS: dict[str, Callable[[], Any]] = {
    "plain": weights,
    "a training run's": lambda: {
        "model": weights(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "args": argparse.Namespace(lr=1e-3),
        "max_accuracy": np.float64(83.2),
        "epoch": 3,
    },
    "EMA beside the model": lambda: {"model": weights(5), "model_ema": weights()},
    "EMA of timm": lambda: {"state_dict": weights(5), "state_dict_ema": weights()},
    "DINO": lambda: {
        "student": below("module.backbone.", weights(5)),
        "teacher": {
            **below("backbone.", weights()),
            "head.mlp.0.weight": torch.ones(4, 4),
            "head.last_layer.weight_g": torch.ones(4, 1),
        },
        "epoch": 100,
    },
    "DINO with wrappers": lambda: {
        "student": below("module.backbone.", weights(5)),
        "teacher": below("module.backbone.", weights()),
    },
    "MoCo v3": lambda: {
        "arch": "vit_small",
        "state_dict": {
            **below("module.base_encoder.", weights()),
            **below("module.momentum_encoder.", weights(5)),
            "module.predictor.0.weight": torch.ones(4, 4),
        },
    },
    "MoCo v3's projector": lambda: {
        "state_dict": below(
            "module.base_encoder.",
            {**weights(), "head.0.weight": torch.ones(4, 4), "head.1.running_mean": torch.ones(4)},
        )
    },
    "Lightning": lambda: {
        "state_dict": {**below("model.", weights()), "criterion.weight": torch.ones(5)},
        "pytorch-lightning_version": "2.5.0",
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    },
    "DDP": lambda: below("module.", weights()),
    "torch.compile": lambda: below("_orig_mod.", weights()),
    "DDP of torch.compile": lambda: below("module._orig_mod.", weights()),
    "torch.compile of DDP": lambda: below("_orig_mod.module.", weights()),
    "Lightning of torch.compile": lambda: {"state_dict": below("model._orig_mod.", weights())},
    "unknown words": lambda: {"net": {"trunk": weights()}, "loss": {"scale": torch.ones(1)}},
    "equal copies": lambda: {"a": weights(), "b": weights()},
    "MAE": lambda: {
        "model": {
            **weights(),
            "decoder_pos_embed": torch.ones(1, 5, 8),
            "decoder_embed.weight": torch.ones(8, 8),
            "decoder_blocks.0.norm1.weight": torch.ones(8),
            "decoder_pred.bias": torch.ones(8),
        }
    },
    "CLIP's text tower": lambda: {
        **weights(),
        "text.transformer.resblocks.0.ln_1.weight": torch.ones(8),
        "logit_scale": torch.ones(()),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_in_the_layout_of_other_codes_give_the_features_of_their_model(
    layout: str, saved: Callable[[Any], Path]
) -> None:
    model = loaded(saved(LAYOUTS[layout]()))
    expected = features(source(), 160)
    torch.testing.assert_close(features(model, 160), expected, atol=0, rtol=0)


def test_the_official_layout_of_deit_iii_loads(saved: Callable[[Any], Path]) -> None:
    # Its filter belongs to timm's entry point, because its class is that of the plain ViT.
    model = randomised("deit3_small_patch16_224", img_size=64, depth=2)
    state = model.state_dict()
    official = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): t for name, t in state.items()}
    assert official.keys() != state.keys()
    found = loaded(saved({"model": official}), "deit3_small_patch16_224", img_size=64, depth=2)
    torch.testing.assert_close(features(found, 64), features(model, 64), atol=0, rtol=0)


def test_a_prefix_before_names_that_timm_renames_is_found(
    saved: Callable[[Any], Path],
) -> None:
    model = randomised("deit3_small_patch16_224", img_size=64, depth=2)
    state = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", n): t for n, t in model.state_dict().items()}
    path = saved({"state_dict": below("model.", state)})
    found = loaded(path, "deit3_small_patch16_224", img_size=64, depth=2)
    torch.testing.assert_close(features(found, 64), features(model, 64), atol=0, rtol=0)


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".bin", ""])
def test_a_safetensors_file_loads_under_any_suffix(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(weights(), path)
    torch.testing.assert_close(features(loaded(path), 160), features(source(), 160))


def test_a_pickle_loads_under_the_suffix_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    torch.save(weights(), path)
    torch.testing.assert_close(features(loaded(path), 160), features(source(), 160))


def without(*names: str) -> State:
    return {name: tensor for name, tensor in weights().items() if name not in names}


def deeper() -> State:
    return dict(timm.create_model(VIT, depth=2 * len(source().blocks)).state_dict())  # type: ignore[arg-type]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "more blocks": (
        deeper,
        "holds blocks.6.norm1.weight, blocks.6.norm1.bias, blocks.6.attn.qkv.weight and 69 more, "
        "which the model has no place for.",
    ),
    "layer scale": (
        lambda: timm.create_model(VIT, init_values=1e-5).state_dict(),
        "holds blocks.0.ls1.gamma, blocks.0.ls2.gamma, blocks.1.ls1.gamma and 9 more, which",
    ),
    "norms of q and k": (
        lambda: timm.create_model(VIT, qk_norm=True).state_dict(),
        "holds blocks.0.attn.q_norm.weight",
    ),
    "registers": (
        lambda: {**weights(), "reg_token": torch.ones(1, 4, 64)},
        "holds reg_token, which the model has no place for.",
    ),
    "a norm before the classifier": (
        lambda: {**weights(), "head.norm.weight": torch.ones(64)},
        "holds head.norm.weight, which the model has no place for.",
    ),
    "more below a prefix": (
        lambda: {"state_dict": below("model.", deeper())},
        "holds a model below state_dict.model., which holds blocks.6.norm1.weight",
    ),
    "a buffer of another part": (
        lambda: {**weights(), "blocks.0.attn.bias_table": torch.ones(2)},
        "holds blocks.0.attn.bias_table, which",
    ),
    "one missing": (
        lambda: without("norm.weight"),
        "lacks norm.weight: it holds weights of another model.",
    ),
    "several missing": (
        lambda: without("norm.weight", "norm.bias", "cls_token", "blocks.0.norm1.bias"),
        "lacks cls_token, blocks.0.norm1.bias, norm.weight and 1 more: it holds",
    ),
    "missing below a prefix": (
        lambda: {"model": below("encoder.", without("norm.weight"))},
        "holds a model below model.encoder., which lacks norm.weight.",
    ),
    "another patch size": (
        lambda: timm.create_model(VIT, patch_size=8).state_dict(),
        "has patch_embed.proj.weight for another size of patches than the model's (64, 3, 16, 16).",
    ),
    "another width": (
        lambda: {**weights(), "norm.bias": torch.ones(1)},
        "has norm.bias of shape (1,), but the model needs (64,).",
    ),
    "8-bit integers": (
        lambda: {**weights(), "norm.weight": torch.ones(64, dtype=torch.int8)},
        "has norm.weight of type torch.int8, but quantised weights are not read.",
    ),
    "8-bit floats": (
        lambda: {**weights(), "norm.weight": torch.ones(64).to(torch.float8_e4m3fn)},
        "has norm.weight of type torch.float8_e4m3fn, but quantised weights are not read.",
    ),
    "two copies": (
        lambda: {"online": weights(), "target": weights(5)},
        "holds this model 2 times, below online. and target.: save only the one to use.",
    ),
    "another architecture": (
        lambda: timm.create_model("resnet10t").state_dict(),
        "has other names than the model, such as bn1.bias: it lacks cls_token",
    ),
    "names of transformers": (
        lambda: {
            "vit.embeddings.patch_embeddings.projection.weight": torch.ones(64, 3, 16, 16),
            "vit.encoder.layer.0.attention.attention.query.weight": torch.ones(64, 64),
        },
        "has the names of transformers (vit.embeddings.patch_embeddings.projection.weight), not "
        "timm's: give the file that timm publishes for this model.",
    ),
    "names of torchvision": (
        lambda: {"encoder.layers.encoder_layer_0.self_attention.in_proj_weight": torch.ones(3, 1)},
        "has the names of torchvision (encoder.layers.encoder_layer_0",
    ),
    "no tensors": (lambda: {"epoch": 3}, "holds no tensors."),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_weights_that_do_not_fill_the_model_exactly_are_refused(
    fault: str, saved: Callable[[Any], Path]
) -> None:
    make, message = REFUSED[fault]
    path = saved(make())
    with pytest.raises(BackboneError, match=re.escape(f"{path} {message}")):
        loaded(path)


def test_a_larger_convnext_does_not_load_into_a_smaller(saved: Callable[[Any], Path]) -> None:
    small: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 8, 8, 8)}
    large = timm.create_model("convnext_tiny", **{**small, "depths": (1, 1, 6, 1)}).state_dict()
    path = saved(dict(large))
    with pytest.raises(BackboneError, match=r"holds stages\.2\.blocks\.2\.gamma, .* no place for"):
        create_backbone("convnext_tiny", num_classes=3, weights=path, **small)


def test_only_positions_are_resampled(saved: Callable[[Any], Path]) -> None:
    found = loaded(saved(weights()), img_size=96)
    expected: Any = timm.create_model(VIT, img_size=96)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(weights(), expected)
    expected.load_state_dict(filtered)
    torch.testing.assert_close(features(found, 96), features(expected.eval(), 96))
    for name, tensor in found.state_dict().items():
        same = "head" in name or torch.equal(tensor, weights().get(name, tensor)[:])
        assert same or name == "pos_embed", name


def test_patches_are_resampled_for_a_given_patch_size(
    saved: Callable[[Any], Path],
) -> None:
    found = loaded(saved(weights()), patch_size=8)
    assert found.state_dict()["patch_embed.proj.weight"].shape == (64, 3, 8, 8)


def test_timms_own_weights_must_fill_the_model_too() -> None:
    # timm itself only logs missing and unexpected tensors if the classifier is new.
    more = r"timm's file for aoft_vit_nano lacks blocks\.6\.norm1\.weight, .* and 21 more"
    with pytest.raises(BackboneError, match=more):
        create_backbone("aoft_vit_nano", num_classes=3, depth=8)
    less = r"timm's file for aoft_vit_nano holds blocks\.4\..* no place for"
    with pytest.raises(BackboneError, match=less):
        create_backbone("aoft_vit_nano", num_classes=3, depth=4)
    assert create_backbone("aoft_vit_nano", num_classes=3)[1].origin == "timm"


def test_an_entry_point_creates_the_model_of_its_pretrained_weights(
    saved: Callable[[Any], Path],
) -> None:
    # fbnetc_100 has another epsilon if it is created as pre-trained.
    state = timm.create_model("fbnetc_100").state_dict()
    model = loaded(saved(dict(state)), "fbnetc_100")
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


def test_the_classifier_in_a_file_is_found_below_its_prefix(saved: Callable[[Any], Path]) -> None:
    found = file_classifier(VIT, saved({"state_dict": below("module.", weights())}))
    assert found.keys() == {"head.weight", "head.bias"}
    assert torch.equal(found["head.weight"], weights()["head.weight"])
    assert file_classifier(VIT, saved(without("head.weight", "head.bias"))) == {}


def test_a_checkpoint_given_as_backbone_weights_is_refused(
    checkpoint: Path, refused: Callable[..., str]
) -> None:
    line = refused(main, "--merge", checkpoint, "--backbone-weights", checkpoint)
    assert "is a checkpoint of aoft-train, which holds no weights of its backbone" in line


def test_timms_loader_is_restored_after_an_error(saved: Callable[[Any], Path]) -> None:
    before = timm.models._builder.load_pretrained
    with pytest.raises(BackboneError):
        loaded(saved({}))
    assert timm.models._builder.load_pretrained is before


@pytest.mark.parametrize("rule", LEFT_OUT)
def test_no_left_out_pattern_matches_a_tensor_of_the_trunk(rule: str) -> None:
    # Parameters of several families, all before the classifier.
    names = [
        *weights(),
        *timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)).state_dict(),
        *timm.create_model("convnext_tiny", depths=(1, 1, 1, 1)).state_dict(),
        *timm.create_model("eva02_tiny_patch14_224", depth=1).state_dict(),
        *timm.create_model("deit_tiny_distilled_patch16_224", depth=1).state_dict(),
    ]
    classifier = re.compile(r"(head|head\.fc|head_dist)\.(weight|bias)")
    matched = [n for n in names if re.fullmatch(rule, n) and not classifier.fullmatch(n)]
    assert matched == []
