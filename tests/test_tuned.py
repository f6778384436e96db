"""attach and merge on the architectures that people use: apply = fold, and nothing else changes."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
from torch import nn

from aoft_deploy import attach, merge
from aoft_deploy.backbone import image_size
from aoft_deploy.errors import (
    AttachError,
    BackboneError,
    CheckpointError,
    SettingError,
    UnknownNameError,
)
from aoft_deploy.methods import get_method, method_names
from aoft_deploy.sites import find_sites
from aoft_deploy.tuned import TunedModel

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_224": {},
    "vit_base_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "beit_base_patch16_224": {},
    "eva02_tiny_patch14_224": {"img_size": 28},
    "eva02_base_patch14_224": {"img_size": 28},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},
    "vit_giant_patch14_dinov2": {"img_size": 28, "embed_dim": 48, "num_heads": 4},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_relpos_small_patch16_224": {},
}
"""Plain, distilled, LayerScale, q and v biases outside the linear, separate q/k/v, registers,
gated MLP, pre-norm without patch bias, attention pooling, relative positions."""


@functools.cache
def made(name: str) -> nn.Module:
    """Two blocks with random weights in every parameter."""
    torch.manual_seed(0)
    args = {"img_size": 32, "depth": 2, **ARCHITECTURES[name]}
    model: nn.Module = timm.create_model(name, num_classes=5, **args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of an architecture's small model."""
    return copy.deepcopy(made(name)).to(dtype)


def tune(base: nn.Module, method: str, **settings: Any) -> TunedModel:
    """Attach a method and move every trained number away from its start."""
    dtype = next(base.parameters()).dtype
    tuned = attach(base, method, **settings).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.05, generator=generator))
    return tuned


def image(base: nn.Module, batch: int = 2) -> torch.Tensor:
    side = image_size(base)
    assert side is not None
    dtype = next(base.parameters()).dtype
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_equals_unmerged_and_is_the_plain_architecture(name: str, method: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        base = model(name, dtype)
        keys, types = list(base.state_dict()), [type(m) for m in base.modules()]
        x = image(base)
        with torch.no_grad():
            untouched = base(x)
            tuned = tune(base, method)
            unmerged = tuned(x)
            merged = merge(tuned)
            assert (merged(x) - unmerged).abs().max() <= tolerance
            assert (unmerged - untouched).abs().max() > 100 * tolerance
        assert list(merged.state_dict()) == keys
        assert [type(m) for m in merged.modules()] == types


@pytest.mark.parametrize("method", method_names())
def test_merging_leaves_the_tuned_model_bit_for_bit_as_it_is(method: str) -> None:
    for dtype in (torch.float64, torch.float32):
        tuned = tune(model("beit_base_patch16_224", dtype), method)
        before = {n: t.clone() for n, t in tuned.state_dict().items()}
        merge(tuned)
        after = tuned.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[n], before[n]) for n in before)


def test_frozen_weights_that_no_update_touches_are_shared_with_the_merged_model() -> None:
    tuned = tune(model("vit_tiny_patch16_224"), "aoft-lora")
    merged = merge(tuned)
    shared = merged.get_parameter("blocks.0.mlp.fc1.weight")
    assert shared is tuned.backbone.get_parameter("blocks.0.mlp.fc1.weight")
    head = merged.get_parameter("head.weight")
    assert head.data_ptr() != tuned.backbone.get_parameter("head.weight").data_ptr()


def test_keys_stay_the_pretrained_ones_because_only_q_and_v_rows_change() -> None:
    tuned = tune(model("vit_tiny_patch16_224"), "aoft-lora")
    width = 192
    base = tuned.backbone.get_submodule("blocks.0.attn.qkv").base.weight  # type: ignore[union-attr]
    merged = merge(tuned).get_parameter("blocks.0.attn.qkv.weight")
    assert torch.equal(merged[width : 2 * width], base[width : 2 * width])  # type: ignore[index]
    assert not torch.equal(merged[:width], base[:width])  # type: ignore[index]


@pytest.mark.parametrize("method", [m for m in method_names() if m not in ("aoft-lora", "rlrr")])
def test_a_fresh_update_starts_at_the_pretrained_function(method: str) -> None:
    base = model("vit_tiny_patch16_224")
    plain, x = copy.deepcopy(base), image(base)
    with torch.no_grad():
        expected = plain(x)
        assert torch.allclose(attach(base, method)(x), expected, atol=1e-6)


def test_rlrr_starts_at_the_pretrained_function_only_when_asked_to() -> None:
    for init, near in (("identity", True), ("published", False)):
        base = model("vit_tiny_patch16_224")
        plain, x = copy.deepcopy(base), image(base)
        with torch.no_grad():
            assert torch.allclose(attach(base, "rlrr", init=init)(x), plain(x), atol=1e-6) is near


def test_a_merged_model_takes_other_images_than_it_was_compared_on() -> None:
    base = model("vit_tiny_patch16_224", torch.float64)
    tuned = tune(base, "rlrr")
    merged = merge(tuned)
    for batch in (1, 3):
        x = image(base, batch)
        assert torch.allclose(merged(x), tuned(x), atol=1e-12)


def test_only_updates_and_classifier_are_trained() -> None:
    tuned = attach(model("vit_tiny_patch16_224"), "rlrr")
    trained = {id(p) for p in tuned.trained().values()}
    assert {id(p) for p in tuned.parameters() if p.requires_grad} == trained
    tuned(image(model("vit_tiny_patch16_224"))).sum().backward()
    assert all((p.grad is not None) == (id(p) in trained) for p in tuned.parameters())


def update_parameters(name: str, method: str) -> int:
    """Trained numbers of a method's updates, without making the backbone's weights."""
    with torch.device("meta"):
        base = timm.create_model(name, num_classes=1)
    chosen, generator = get_method(method), torch.Generator()
    assert chosen.build is not None
    updates = [chosen.build(site, chosen.settings({}), generator) for site in find_sites(base)]
    return sum(p.numel() for u in updates if u is not None for p in u.parameters())


@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [
        ("vit_base_patch16_224", "rlrr", 288_768),
        ("vit_large_patch16_224", "rlrr", 765_952),
        ("vit_base_patch16_224", "lora", 12 * 2 * 2 * 768 * 8),
        ("vit_base_patch16_224", "aoft-lora", 12 * 2 * 2 * 768),
        ("vit_base_patch16_224", "aoft-lora-star", 12 * 2 * (2 * 768 + 8)),
    ],
)
def test_methods_have_the_published_number_of_parameters(
    name: str, method: str, expected: int
) -> None:
    assert update_parameters(name, method) == expected


def test_seeds_reproduce_the_updates_start() -> None:
    starts = [
        attach(model("vit_tiny_patch16_224"), "aoft-lora", seed=s).trained() for s in (1, 1, 2)
    ]
    name = "update.blocks.0.attn.qkv.q.q_down"
    assert torch.equal(starts[0][name], starts[1][name])
    assert not torch.equal(starts[0][name], starts[2][name])


def test_targets_choose_the_linear_maps() -> None:
    tuned = attach(model("vit_tiny_patch16_224"), "lora", targets=["fc2"], rank=2)
    sites = {n.rpartition(".")[0] for n in tuned.trained() if n.startswith("update.")}
    assert sites == {"update.blocks.0.mlp.fc2", "update.blocks.1.mlp.fc2"}


def test_linear_probing_works_on_models_without_transformer_blocks() -> None:
    tuned = tune(timm.create_model("resnet18", num_classes=3).eval(), "linear")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(merge(tuned)(x), tuned(x), atol=1e-6)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(AttachError, match="ResNet has no transformer blocks"):
        attach(timm.create_model("resnet18", num_classes=3), "rlrr")


def test_an_unknown_layout_of_fused_qkv_is_refused_and_not_guessed() -> None:
    name = "vit_base_patch16_224"
    base = timm.create_model(name, num_classes=3, depth=1, img_size=32)

    attention = base.get_submodule("blocks.0.attn")

    class Attention(type(attention)):  # type: ignore[misc]
        """Perhaps another order of rows."""

    attention.__class__ = Attention
    with pytest.raises(AttachError, match="whose fused qkv layout is not known"):
        attach(base, "lora")
    assert attach(base, "linear").num_classes == 3


def test_a_linear_map_of_unknown_role_in_a_block_is_refused() -> None:
    base = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=32)
    base.get_submodule("blocks.0.mlp").extra = nn.Linear(2, 2)
    with pytest.raises(AttachError, match=r"blocks\.0\.mlp\.extra is a linear map with no known"):
        attach(base, "rlrr")


def test_a_model_without_classifier_is_refused() -> None:
    with pytest.raises(AttachError, match="has no classifier: create it with num_classes"):
        attach(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1), "lora")


def test_targets_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(AttachError, match=r"lora found none of its targets \['gate'\]"):
        attach(model("vit_tiny_patch16_224"), "lora", targets=["gate"])


def test_a_model_that_does_not_know_its_name_is_refused() -> None:
    base = model("vit_tiny_patch16_224")
    base.pretrained_cfg = None  # type: ignore[assignment]
    with pytest.raises(BackboneError, match="does not know its timm name: give it with backbone="):
        attach(base, "lora")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "aoft_lora"}, UnknownNameError, "Unknown method 'aoft_lora'.*aoft-lora"),
        ({"method": "lora", "rnk": 3}, UnknownNameError, "Unknown setting of lora 'rnk'.*rank"),
        ({"method": "lora", "targets": ["Q"]}, UnknownNameError, "Unknown target of lora 'Q'"),
        ({"method": "lora", "targets": []}, SettingError, "targets of lora is empty"),
        ({"method": "lora", "rank": 2.5}, SettingError, "rank of lora is 2.5, but must be of type"),
        ({"method": "lora", "rank": True}, SettingError, "rank of lora is True, but must be"),
        ({"method": "lora", "scale": float("nan")}, SettingError, "scale of lora is nan, but must"),
        ({"method": "rlrr", "init": "ones"}, UnknownNameError, "Unknown init of rlrr 'ones'"),
        ({"method": "lora", "rank": 999}, SettingError, "rank is 999, but a 192 × 192 weight"),
    ],
)
def test_wrong_settings_are_named_with_what_is_allowed(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    base = model("vit_tiny_patch16_224")
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(error, match=message):
        attach(base, **settings)
    assert [p.requires_grad for p in base.parameters()] == flags


def test_numbers_too_large_to_fold_are_refused() -> None:
    tuned = tune(model("vit_tiny_patch16_224"), "lora")
    for parameter in tuned.trained().values():
        parameter.data.fill_(1e30)
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float32"):
        merge(tuned)


def test_trained_numbers_are_taken_over_only_when_they_fit() -> None:
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
