"""attach: what is trained, where training starts, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from small_models import (
    AT_THE_PRETRAINED_FUNCTION,
    ELSEWHERE,
    identity,
    image,
    model,
    tune,
)
from torch import nn

from aoft_deploy import attach, merge
from aoft_deploy.errors import (
    AttachError,
    BackboneError,
    SettingError,
    UnknownNameError,
)
from aoft_deploy.tuning.methods import method_names
from aoft_deploy.tuning.updated_layers import UpdatedModule
from aoft_deploy.tuning.updates.scale_shift import ScaleShift, Shift


def test_the_start_of_every_method_is_tested() -> None:
    methods = {method for method, _ in (AT_THE_PRETRAINED_FUNCTION | ELSEWHERE).values()}
    assert methods == set(method_names())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("start", AT_THE_PRETRAINED_FUNCTION)
def test_training_starts_at_the_pretrained_function(start: str, name: str) -> None:
    method, settings = AT_THE_PRETRAINED_FUNCTION[start]
    base = model(name, torch.float64)
    plain, x = copy.deepcopy(base), image(base)
    with torch.no_grad():
        tuned = attach(base, method, backbone=identity(name), **settings).double()
        for answer in (tuned(x), merge(tuned)(x)):
            assert (answer - plain(x)).abs().max() <= 1e-13


@pytest.mark.parametrize("start", ELSEWHERE)
def test_other_initial_values_change_the_pretrained_function(start: str) -> None:
    method, settings = ELSEWHERE[start]
    base = model(dtype=torch.float64)
    plain, x = copy.deepcopy(base), image(base)
    with torch.no_grad():
        answer = attach(base, method, **settings).double()(x)
        assert (answer - plain(x)).abs().max() > 1e-5


def test_a_seed_reproduces_the_initial_values() -> None:
    starts = [
        attach(model("vit_tiny_patch16_224"), "aoft-lora", seed=s).trained() for s in (1, 1, 2)
    ]
    name = "update.blocks.0.attn.qkv.q.q_down"
    assert torch.equal(starts[0][name], starts[1][name])
    assert not torch.equal(starts[0][name], starts[2][name])


def test_targets_select_the_linear_maps() -> None:
    tuned = attach(model("vit_tiny_patch16_224"), "lora", targets=["fc2"], rank=2)
    sites = {n.rpartition(".")[0] for n in tuned.trained() if n.startswith("update.")}
    assert sites == {"update.blocks.0.mlp.fc2", "update.blocks.1.mlp.fc2"}


def test_linear_probing_needs_no_sites() -> None:
    base = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    tuned = tune(base, "linear")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(merge(tuned)(x), tuned(x), atol=1e-6)


def test_a_model_without_sites_is_refused() -> None:
    base = timm.create_model("mobilenetv3_small_050", num_classes=3)
    with pytest.raises(AttachError, match="MobileNetV3 has no transformer blocks"):
        attach(base, "rlrr")


def test_an_unknown_layout_of_fused_qkv_is_refused() -> None:
    name = "vit_base_patch16_224"
    base = timm.create_model(name, num_classes=3, depth=1, img_size=32)

    attention = base.get_submodule("blocks.0.attn")

    class Attention(type(attention)):  # type: ignore[misc]
        """A subclass, which may have another order of rows."""

    attention.__class__ = Attention
    with pytest.raises(AttachError, match="whose fused qkv layout is not known"):
        attach(base, "lora")
    assert attach(base, "linear").num_classes == 3


@pytest.mark.parametrize("method", ["rlrr", "ssf"])
def test_a_linear_map_of_unknown_role_in_a_block_is_refused(method: str) -> None:
    base = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=32)
    base.get_submodule("blocks.0.mlp").extra = nn.Linear(2, 2)
    with pytest.raises(AttachError, match=r"blocks\.0\.mlp\.extra is a .*map with no known role"):
        attach(base, method)


def test_a_model_without_classifier_is_refused() -> None:
    with pytest.raises(AttachError, match="has no classifier: create it with num_classes"):
        attach(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1), "lora")


def test_targets_without_a_site_in_the_model_are_refused() -> None:
    message = "lora found no gate or conv in VisionTransformer, which has .*fc1, fc2, k, norm"
    with pytest.raises(AttachError, match=message):
        attach(model("vit_tiny_patch16_224"), "lora", targets=["gate", "conv"])


def test_automatic_targets_without_a_site_name_the_preferred_targets() -> None:
    base = model()
    for i in range(2):
        base.set_submodule(f"blocks.{i}.mlp.fc2", nn.Identity())
        base.set_submodule(f"blocks.{i}.attn.proj", nn.Identity())
    with pytest.raises(AttachError, match="adapter found no proj or fc2 in VisionTransformer"):
        attach(base, "adapter")


@pytest.mark.parametrize(
    ("ranks", "error", "message"),
    [
        ({"blocks.0.attn.qq": 2}, UnknownNameError, r"Unknown site in ranks of lora 'blocks\.0"),
        ({"blocks.0.norm1": 1}, UnknownNameError, r"site in ranks of lora 'blocks\.0\.norm1'"),
        ({"blocks.0": 1}, UnknownNameError, "site in ranks of lora 'blocks.0'"),
        (
            {"blocks.0.attn.qkv": 2, "blocks.0.attn.qkv.q": 2},
            SettingError,
            "contains blocks.0.attn.qkv.q and the whole map: choose one",
        ),
        ({"blocks.0.attn.proj": 0}, SettingError, "rank is 0, but a 192 × 192 weight allows"),
    ],
)
def test_ranks_for_unsuitable_sites_are_refused(
    ranks: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attach(model(), "lora", ranks=ranks)


def test_ranks_select_sites_instead_of_the_targets() -> None:
    ranks = {"blocks.0.attn.qkv": 3, "blocks.1.attn.qkv.k": 2, "blocks.1.mlp.fc2": 5}
    base = model(dtype=torch.float64)
    tuned = tune(base, "lora", ranks=ranks)
    assert {name: len(u.get_parameter("a")) for name, u in tuned.updates.items()} == ranks
    x = image(tuned.backbone)
    assert (merge(tuned)(x) - tuned(x)).abs().max() < 1e-12


def test_a_model_without_a_recorded_name_is_refused() -> None:
    base = model("vit_tiny_patch16_224")
    base.pretrained_cfg = None  # type: ignore[assignment]
    with pytest.raises(BackboneError, match="does not record its timm name: pass `backbone`"):
        attach(base, "lora")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "aoft_lora"}, UnknownNameError, "Unknown method 'aoft_lora'.*aoft-lora"),
        ({"method": "lora", "rnk": 3}, UnknownNameError, "Unknown setting of lora 'rnk'.*rank"),
        ({"method": "lora", "rank": 999}, SettingError, "rank is 999, but a 192 × 192 weight"),
    ],
)
def test_a_refused_setting_changes_no_parameter(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    base = model("vit_tiny_patch16_224")
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(error, match=message):
        attach(base, **settings)
    assert [p.requires_grad for p in base.parameters()] == flags


def test_every_site_has_one_update_and_every_layer_one_wrapper() -> None:
    tuned = attach(model(), "rlrr")
    wrapped = [m for m in tuned.backbone.modules() if isinstance(m, UpdatedModule)]
    inside = [u for m in wrapped for u in m.updates]
    assert len(inside) == len(set(map(id, inside))) == len(tuned.updates)
    assert {id(u) for u in inside} == {id(u) for u in tuned.updates.values()}
    kinds = {type(u) for u in attach(model("beit_base_patch16_224"), "ssf").updates.values()}
    assert kinds == {ScaleShift, Shift}
