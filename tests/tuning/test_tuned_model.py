"""attach and merge on the architectures that people use: apply = fold, and nothing else changes."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from aoft_deploy import attach, merge
from aoft_deploy.checkpoints.checkpoint import read_checkpoint, save
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.cli.export import main as export_main
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import (
    AttachError,
    BackboneError,
    CheckpointError,
    SettingError,
    UnknownNameError,
)
from aoft_deploy.tuning.backbones.identity import identify, image_size
from aoft_deploy.tuning.methods import method_names
from aoft_deploy.tuning.prompted_blocks import Prompted
from aoft_deploy.tuning.sites.discovery import find_sites
from aoft_deploy.tuning.tuned_model import TunedModel, UpdatedModule
from aoft_deploy.tuning.updates.scale_shift import ScaleShift, Shift

NARROW: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2}
SMALL: dict[str, Any] = {"img_size": 32, "depth": 2}
WINDOWS = {
    "img_size": 32,
    "window_size": 2,
    "depths": (2, 1),
    "embed_dim": 24,
    "num_heads": (3, 6),
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": SMALL,
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS,
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "vit_small_patch14_reg4_dinov2": {**NARROW, "img_size": 28, "depth": 2},
    "vit_small_patch16_224": NARROW,
    "vit_base_patch16_224": NARROW,
    "deit_tiny_distilled_patch16_224": NARROW,
    "deit3_small_patch16_224": NARROW,
    "beit_base_patch16_224": NARROW,
    "eva02_tiny_patch14_224": {**NARROW, "img_size": 28},
    "eva02_base_patch14_224": {**NARROW, "img_size": 28},
    "vit_giant_patch14_dinov2": {**NARROW, "img_size": 28},
    "vit_base_patch16_clip_224": NARROW,
    "vit_base_patch16_siglip_224": NARROW,
    "vit_relpos_small_patch16_224": NARROW,
}
"""Plain, shifted windows with biases inside and outside the linear, convolutions with either norm,
registers, distilled, LayerScale, separate q/k/v, gated MLP, pre-norm without patch bias, attention
pooling, relative positions; each shallow, most of them narrow."""

PROMPTS = ("aoft-vpt", "aoft-vpt-star", "vpt")

REFUSED: dict[str, str] = {
    "resnet18": "found no block in ResNet, which has batch_norm, conv",
    "convnext_atto": "found no block in ConvNeXt, which has conv, fc1, fc2, norm",
    "beit_base_patch16_224": r"Beit needs a fixed number of tokens \(timm.models.beit.Attention",
    "eva02_tiny_patch14_224": "Eva needs a fixed number of tokens",
    "eva02_base_patch14_224": "Eva needs a fixed number of tokens",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos needs a fixed number of tokens",
}
"""The architectures that cannot take prompts, and the reason they are told."""


@functools.cache
def made(name: str) -> nn.Module:
    """A shallow model with random weights in every parameter and buffer of statistics."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, **ARCHITECTURES[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for path, buffer in model.named_buffers():
            if path.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer) * 0.2)
    return model


@functools.cache
def identity(name: str) -> Any:
    return identify(made(name))


def model(name: str = "vit_tiny_patch16_224", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of an architecture's small model."""
    return copy.deepcopy(made(name)).to(dtype)


def trained(tuned: TunedModel, seed: int = 1) -> TunedModel:
    """The model with every trained number moved away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.05, generator=generator))
    return tuned


def tune(base: nn.Module, method: str, **settings: Any) -> TunedModel:
    """Attach a method and move every trained number away from its start."""
    dtype = next(base.parameters()).dtype
    return trained(attach(base, method, **settings).to(dtype))


def image(base: nn.Module, batch: int = 2) -> torch.Tensor:
    side = image_size(base) or 32
    dtype = next(base.parameters()).dtype
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(2)).to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def check_plain(merged: nn.Module, keys: list[str], types: list[type], method: str) -> None:
    """The merged model has the base's keys and module types, and prompts where they belong."""
    if method not in PROMPTS:
        assert list(merged.state_dict()) == keys
        assert [type(m) for m in merged.modules()] == types
        return
    blocks = [site.module for site in find_sites(merged) if site.role == "block"]
    prompts = [f"{block}.prompts.tokens" for block in blocks]
    assert set(merged.state_dict()) == {*keys, *prompts}
    assert [k for k in merged.state_dict() if k not in prompts] == keys
    others = [m for n, m in merged.named_modules() if not n.endswith(".prompts")]
    for module, kind in zip(others, types, strict=True):
        prompted = isinstance(module, Prompted)
        assert (type(module).__bases__[1] if prompted else type(module)) is kind
    assert sum(isinstance(m, Prompted) for m in others) == len(blocks)


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_equals_unmerged_and_is_the_plain_architecture(name: str, method: str) -> None:
    if method in PROMPTS and name in REFUSED:
        with pytest.raises(AttachError, match=REFUSED[name]):
            attach(model(name), method, backbone=identity(name))
        return
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        base = model(name, dtype)
        keys, types = list(base.state_dict()), [type(m) for m in base.modules()]
        x = image(base)
        with torch.no_grad():
            untouched = base(x)
            tuned = tune(base, method, backbone=identity(name))
            unmerged = tuned(x)
            merged = merge(tuned)
            scale = max(1.0, unmerged.abs().max().item()) if dtype is torch.float32 else 1.0
            assert (merged(x) - unmerged).abs().max() <= tolerance * scale
            assert (unmerged - untouched).abs().max() > 0.01
        check_plain(merged, keys, types, method)


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused rlrr": ("rlrr", {"fused_qkv": True, "norms": ["norm"]}),
    "rlrr of rank 3": ("rlrr", {"rank": 3, "norms": ["norm", "reduction_norm", "patch"]}),
    "rlrr on batch norm": ("rlrr", {"norms": ["batch_norm"]}),
    "rlrr without residual": ("rlrr", {"residual": False}),
    "rlrr of one side": ("rlrr", {"sides": "in"}),
    "fused lora": ("lora", {"targets": ["qkv", "proj"]}),
    "lora on all": ("lora", {"rank": 2, "targets": ["q", "k", "v", "proj", "fc1", "fc2"]}),
    "lora on reduction": ("lora", {"targets": ["reduction"]}),
    "lora on convolutions": ("lora", {"rank": 3, "targets": ["conv"]}),
    "aoft on convolutions": ("aoft-lora-star", {"rank": 3, "targets": ["conv"]}),
    "adapter after all": ("adapter", {"targets": ["q", "v", "proj", "fc1", "fc2"]}),
    "adapter after convolutions": ("adapter", {"targets": ["conv"]}),
    "strict shared adapter": ("aoft-adapter-star", {"strict": True, "shared": True}),
    "adapter without residual": ("aoft-adapter", {"residual": False}),
    "adapter after reduction": ("aoft-adapter", {"residual": False, "targets": ["reduction"]}),
    "shallow prompts": ("aoft-vpt-star", {"deep": False, "strict": True, "rank": 3}),
}


@pytest.mark.parametrize("form", FORMS)
def test_merged_equals_unmerged_in_every_form_of_a_method(form: str) -> None:
    method, settings = FORMS[form]
    taken = 0
    for name in list(ARCHITECTURES)[:5]:
        base = model(name, torch.float64)
        x = image(base)
        try:
            tuned = tune(base, method, backbone=identity(name), **settings)
        except AttachError:
            continue
        taken += 1
        with torch.no_grad():
            assert (merge(tuned)(x) - tuned(x)).abs().max() <= 1e-12, name
    assert taken >= 1


@pytest.mark.parametrize("method", method_names())
def test_merging_leaves_the_tuned_model_bit_for_bit_as_it_is_and_able_to_answer(
    method: str,
) -> None:
    name = "vit_tiny_patch16_224" if method in PROMPTS else "beit_base_patch16_224"
    for dtype in (torch.float64, torch.float32):
        tuned = tune(model(name, dtype), method, backbone=identity(name))
        x = image(tuned.backbone)
        before = {n: t.clone() for n, t in tuned.state_dict().items()}
        flags = [p.requires_grad for p in tuned.parameters()]
        answer = tuned(x)
        merged = merge(tuned)
        after = tuned.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[n], before[n]) for n in before)
        assert [p.requires_grad for p in tuned.parameters()] == flags
        assert torch.equal(tuned(x), answer)
        assert torch.equal(merge(tuned)(x), merged(x))


TAKEN = [
    (name, method)
    for name in ("vit_tiny_patch16_224", "swinv2_tiny_window8_256", "resnet18")
    for method in method_names()
    if (name != "vit_tiny_patch16_224" if method not in PROMPTS else name not in REFUSED)
]
"""Prompts where they can be, and all other methods where there is most to fold."""


@pytest.mark.parametrize(("name", "method"), TAKEN)
def test_merging_in_place_gives_the_same_bits_and_spends_the_tuned_model(
    name: str, method: str
) -> None:
    tuned = tune(model(name), method, backbone=identity(name))
    expected = merge(tuned)
    merged = merge(tuned, in_place=True)
    assert list(merged.state_dict()) == list(expected.state_dict())
    for key, tensor in expected.state_dict().items():
        assert same_bits(merged.state_dict()[key], tensor), key
    assert [type(m) for m in merged.modules()] == [type(m) for m in expected.modules()]
    assert not any(p.requires_grad for p in merged.parameters())
    x = image(expected)
    assert torch.equal(merged(x), expected(x))
    uses: list[Callable[[], Any]] = [
        lambda: tuned(x),
        lambda: merge(tuned),
        lambda: merge(tuned, in_place=True),
        lambda: tuned.trained(),
        lambda: tuned.load_trained({}),
    ]
    for use in uses:
        with pytest.raises(
            CheckpointError, match="merged in place and cannot be used: load its check"
        ):
            use()


def test_merging_in_place_takes_the_weights_own_memory() -> None:
    tuned = tune(model(), "rlrr")
    base = tuned.backbone.get_submodule("blocks.0.mlp.fc1").base.weight  # type: ignore[union-attr]
    merged = merge(tuned, in_place=True)
    assert merged.get_parameter("blocks.0.mlp.fc1.weight").data_ptr() == base.data_ptr()  # type: ignore[operator]


def test_a_merge_in_place_that_fails_leaves_no_model_with_half_folded_weights() -> None:
    tuned = tune(model(), "lora")
    for parameter in tuned.updates["blocks.1.attn.qkv.v"].parameters():
        parameter.data.fill_(1e30)
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float32"):
        merge(tuned, in_place=True)
    with pytest.raises(CheckpointError, match="merged in place and cannot be used"):
        tuned(image(model()))


def test_a_merged_model_can_be_copied_and_its_state_loaded_into_the_plain_architecture() -> None:
    base = model()
    x = image(base)
    for method in ("rlrr", "aoft-vpt"):
        merged = merge(tune(model(), method))
        assert torch.equal(copy.deepcopy(merged)(x), merged(x))
        loaded = base.load_state_dict(merged.state_dict(), strict=False)
        assert not loaded.missing_keys
        assert bool(loaded.unexpected_keys) is (method == "aoft-vpt")
        assert torch.equal(base(x), merged(x)) is (method == "rlrr")


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


AT_THE_PRETRAINED_FUNCTION: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name in ("aoft-lora-star", "aoft-adapter-star", "lora", "adapter", "bitfit")
    },
    "linear": ("linear", {}),
    "full": ("full", {}),
    "ssf without spread": ("ssf", {"init_std": 0.0}),
    "rlrr identity": ("rlrr", {"init": "identity"}),
    "rlrr identity of rank 3": ("rlrr", {"init": "identity", "rank": 3}),
    "rlrr identity of the left side": ("rlrr", {"init": "identity", "sides": "out"}),
    "rlrr identity of the right side": ("rlrr", {"init": "identity", "sides": "in"}),
    "rlrr identity without residual": ("rlrr", {"init": "identity", "residual": False}),
    "rlrr zero": ("rlrr", {"init": "zero"}),
    "strict shared adapter": ("aoft-adapter-star", {"strict": True, "shared": True}),
}

ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("aoft-lora", "aoft-adapter", *PROMPTS, "rlrr", "ssf")},
    "star adapter without residual": ("aoft-adapter-star", {"residual": False}),
    **{f"rlrr {init}": ("rlrr", {"init": init}) for init in ("normal", "uniform", "constant")},
}


def test_every_method_is_known_to_start_at_the_pretrained_function_or_elsewhere() -> None:
    methods = {method for method, _ in (AT_THE_PRETRAINED_FUNCTION | ELSEWHERE).values()}
    assert methods == set(method_names())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("start", AT_THE_PRETRAINED_FUNCTION)
def test_a_fresh_update_starts_at_the_pretrained_function(start: str, name: str) -> None:
    method, settings = AT_THE_PRETRAINED_FUNCTION[start]
    base = model(name, torch.float64)
    plain, x = copy.deepcopy(base), image(base)
    with torch.no_grad():
        tuned = attach(base, method, backbone=identity(name), **settings).double()
        for answer in (tuned(x), merge(tuned)(x)):
            assert (answer - plain(x)).abs().max() <= 1e-13


@pytest.mark.parametrize("start", ELSEWHERE)
def test_other_starts_are_away_from_the_pretrained_function(start: str) -> None:
    method, settings = ELSEWHERE[start]
    base = model(dtype=torch.float64)
    plain, x = copy.deepcopy(base), image(base)
    with torch.no_grad():
        answer = attach(base, method, **settings).double()(x)
        assert (answer - plain(x)).abs().max() > 1e-5


@pytest.mark.parametrize(
    "start", [s for s in AT_THE_PRETRAINED_FUNCTION if "without residual" not in s]
)
@pytest.mark.parametrize("in_place", [False, True])
def test_merging_an_update_of_zero_changes_no_bit(start: str, in_place: bool) -> None:
    method, settings = AT_THE_PRETRAINED_FUNCTION[start]
    for name in ("swin_tiny_patch4_window7_224", "beit_base_patch16_224", "convnext_atto"):
        base = model(name)
        for parameter in base.parameters():
            parameter.data.view(-1)[::7] = -0.0
        expected = {n: t.clone() for n, t in base.state_dict().items()}
        tuned = attach(base, method, backbone=identity(name), **settings)
        merged = merge(tuned, in_place=in_place).state_dict()
        for key, tensor in expected.items():
            assert same_bits(merged[key], tensor), key


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


def test_linear_probing_needs_no_sites() -> None:
    base = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    tuned = tune(base, "linear")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(merge(tuned)(x), tuned(x), atol=1e-6)


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


def test_a_model_without_sites_is_refused() -> None:
    base = timm.create_model("mobilenetv3_small_050", num_classes=3)
    with pytest.raises(AttachError, match="MobileNetV3 has no transformer blocks"):
        attach(base, "rlrr")


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


@pytest.mark.parametrize("method", ["rlrr", "ssf"])
def test_a_linear_map_of_unknown_role_in_a_block_is_refused(method: str) -> None:
    base = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=32)
    base.get_submodule("blocks.0.mlp").extra = nn.Linear(2, 2)
    with pytest.raises(AttachError, match=r"blocks\.0\.mlp\.extra is a .*map with no known role"):
        attach(base, method)


def test_a_model_without_classifier_is_refused() -> None:
    with pytest.raises(AttachError, match="has no classifier: create it with num_classes"):
        attach(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1), "lora")


def test_targets_that_the_model_does_not_have_are_refused() -> None:
    message = "lora found no gate or conv in VisionTransformer, which has .*fc1, fc2, k, norm"
    with pytest.raises(AttachError, match=message):
        attach(model("vit_tiny_patch16_224"), "lora", targets=["gate", "conv"])


def test_automatic_targets_that_no_site_matches_name_the_preferred_ones() -> None:
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
def test_ranks_of_sites_that_cannot_have_them_are_refused(
    ranks: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attach(model(), "lora", ranks=ranks)


def test_ranks_choose_sites_and_their_ranks_whatever_the_targets() -> None:
    ranks = {"blocks.0.attn.qkv": 3, "blocks.1.attn.qkv.k": 2, "blocks.1.mlp.fc2": 5}
    base = model(dtype=torch.float64)
    tuned = tune(base, "lora", ranks=ranks)
    assert {name: len(u.get_parameter("a")) for name, u in tuned.updates.items()} == ranks
    x = image(tuned.backbone)
    assert (merge(tuned)(x) - tuned(x)).abs().max() < 1e-12


def test_a_model_that_does_not_know_its_name_is_refused() -> None:
    base = model("vit_tiny_patch16_224")
    base.pretrained_cfg = None  # type: ignore[assignment]
    with pytest.raises(BackboneError, match="does not record its timm name: pass `backbone`"):
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


def test_prompts_too_large_for_their_type_are_refused() -> None:
    tuned = attach(model(), "aoft-vpt-star")
    for update in tuned.updates.values():
        for parameter in update.parameters():
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
"""Names in a checkpoint of one block, without ``update.blocks.0.``; others depend on them."""

OUTSIDE = {
    "rlrr": ("norm.scale", "norm.shift", "patch_embed.proj.scale", "patch_embed.proj.shift"),
    "ssf": ("norm.scale", "norm.shift", "patch_embed.proj.scale", "patch_embed.proj.shift"),
    "bitfit": ("norm.shift", "patch_embed.proj.shift"),
}


@pytest.mark.parametrize("method", NAMES)
def test_names_in_checkpoints_stay_as_they_are(
    method: str, make_tuned: Callable[..., TunedModel]
) -> None:
    names = set(make_tuned(method).trained())
    expected = {f"update.blocks.0.{name}" for name in NAMES[method].split()}
    expected |= {f"update.{name}" for name in OUTSIDE.get(method, ())}
    assert names == expected | {"head.head.weight", "head.head.bias"}


@pytest.mark.parametrize("method", method_names())
def test_a_saved_task_answers_alike_when_loaded(
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


def test_settings_of_every_type_survive_a_checkpoint(
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


def test_a_checkpoint_says_which_targets_automatic_ones_were(
    make_checkpoint: Callable[..., Path],
) -> None:
    assert read_checkpoint(make_checkpoint("lora")).settings["targets"] == ["q", "v"]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_tasks_of_other_families_are_saved_and_loaded_by_their_names(
    name: str, tmp_path: Path
) -> None:
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


def test_attaching_takes_every_site_once_and_wraps_each_layer_once() -> None:
    tuned = attach(model(), "rlrr")
    wrapped = [m for m in tuned.backbone.modules() if isinstance(m, UpdatedModule)]
    inside = [u for m in wrapped for u in m.updates]
    assert len(inside) == len(set(map(id, inside))) == len(tuned.updates)
    assert {id(u) for u in inside} == {id(u) for u in tuned.updates.values()}
    kinds = {type(u) for u in attach(model("beit_base_patch16_224"), "ssf").updates.values()}
    assert kinds == {ScaleShift, Shift}


def test_gradients_reach_every_trained_number_and_nothing_else() -> None:
    for name in ("swinv2_tiny_window8_256", "resnet18", "beit_base_patch16_224"):
        for method in ("rlrr", "ssf", "bitfit", "aoft-adapter-star", *PROMPTS):
            if method in PROMPTS and name in REFUSED:
                continue
            tuned = tune(model(name), method, backbone=identity(name))
            tuned(image(tuned.backbone)).square().sum().backward()
            wanted = {id(p) for p in tuned.trained().values()}
            for parameter in tuned.parameters():
                assert (parameter.grad is not None) == (id(parameter) in wanted), (name, method)


def test_an_exported_graph_with_prompts_answers_as_the_tuned_model(
    make_tuned: Callable[..., TunedModel],
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "task.onnx"
    options: list[Any] = ["--merge", make_checkpoint("aoft-vpt"), "--backbone-weights"]
    assert export_main([str(option) for option in [*options, backbone_weights, "-o", path]]) == 0
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tuned = make_tuned("aoft-vpt")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(answer) - tuned(x)).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["rlrr", "full"])
def test_training_leaves_the_statistics_of_batch_norms_as_they_are(method: str) -> None:
    tuned = attach(timm.create_model("resnet10t", num_classes=3), method).train()
    before = {name: buffer.clone() for name, buffer in tuned.named_buffers()}
    tuned(torch.randn(4, 3, 32, 32))
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in tuned.named_buffers())
