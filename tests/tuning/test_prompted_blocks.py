"""Prompts in windows, compared with VPT's published layout, and as prompts in plain blocks.

``Published`` implements that layout: prompts before the tokens of every window, as queries too.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from specs import export_spec
from torch import Tensor, nn
from torch.nn import functional as F

from aoft_deploy import attach, merge
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import AttachError
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.backbones.identity import identify
from aoft_deploy.tuning.multitask import MixedModel
from aoft_deploy.tuning.prompted_blocks import FixedPrompts, Prompted
from aoft_deploy.tuning.task_layout import Layout, classifier_rows
from aoft_deploy.tuning.tuned_model import TunedModel

SWIN, SWIN_V2, VIT = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "aoft_vit_nano"
METHODS = ("aoft-vpt", "aoft-vpt-star", "vpt")
SMALL: dict[str, Any] = {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 3)}
SIDE = 32
"""Image side: 2 × 2 windows in the first stage, shifted in every second block, one in the last."""


def made(name: str, side: int = SIDE, **args: Any) -> nn.Module:
    """A model with random weights."""
    args = {**(SMALL if name in (SWIN, SWIN_V2) else {}), "img_size": side, **args}
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, **args).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for path, parameter in model.named_parameters():
            if path.endswith("logit_scale"):
                parameter[0] = 5.0  # above the limit of SwinV2
    return model


def tune(model: nn.Module, method: str, seed: int = 1, **settings: Any) -> TunedModel:
    """A copy of the model with a method attached and randomised parameters."""
    tuned = attach(copy.deepcopy(model), method, backbone=identify(model), rank=3, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return tuned.eval()


def images(batch: int, side: int = SIDE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(7)).to(dtype)


class Published(nn.Module):
    """The attention of Swin or SwinV2 on windows with prompts before their tokens."""

    def __init__(self, attention: Any, prompts: Tensor) -> None:
        super().__init__()
        self.attention, self.prompts = attention, prompts

    def positions(self) -> Tensor:
        own = self.attention
        if hasattr(own, "relative_position_bias_table"):
            table = own.relative_position_bias_table
        else:
            table = 16 * torch.sigmoid(own.cpb_mlp(own.relative_coords_table)).flatten(0, -2)
        gathered: Tensor = table[own.relative_position_index].permute(2, 0, 1)
        return gathered

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        own, count = self.attention, len(self.prompts)
        x = torch.cat([self.prompts.expand(len(x), -1, -1), x], dim=1)
        bias = getattr(own, "q_bias", None)
        if bias is not None:
            bias = torch.cat([own.q_bias, torch.zeros_like(own.q_bias), own.v_bias])
        qkv = own.qkv(x) if bias is None else own.qkv(x) + bias
        q, k, v = qkv.view(*x.shape[:2], 3, own.num_heads, -1).permute(2, 0, 3, 1, 4)
        if hasattr(own, "logit_scale"):
            scores = F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)
            scores = scores * own.logit_scale.exp().clamp(max=100)
        else:
            scores = q @ k.mT / q.shape[-1] ** 0.5
        scores[..., count:, count:] += self.positions()
        for window in range(len(x) if mask is not None else 0):
            assert mask is not None
            scores[window, :, count:, count:] += mask[window % len(mask)]
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return own.proj(y)[:, count:]  # type: ignore[no-any-return]


def published(tuned: TunedModel, plain: nn.Module) -> Any:
    """The plain model with a task's prompts and classifier, in the published layout."""
    model: Any = copy.deepcopy(plain)
    for name in tuned.classifier:
        model.get_parameter(name).data = tuned.backbone.get_parameter(name).data
    for site, update in tuned.updates.items():
        block = model.get_submodule(site)
        tokens: Any = update.delta()
        tokens = tokens.tokens
        normalised = tokens if "swinv2" in tuned.identity.name else block.norm1(tokens)
        block.attn = Published(block.attn, normalised)
    return model


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Swin": (SWIN, {}),
    "SwinV2": (SWIN_V2, {}),
    "Swin on padded windows": (SWIN, {"side": 40}),
    "SwinV2 on padded windows": (SWIN_V2, {"side": 40}),
    "Swin without fixed masks": (SWIN, {"strict_img_size": False}),
    "Swin of other windows by stage": ("swin_s3_tiny_224", {**SMALL, "window_size": (4, 2)}),
    "SwinV2 of other windows before": ("swinv2_base_window12to24_192to384", SMALL),
}
"""The last model's position bias was pre-trained with windows of another size."""

FORMS = [
    *((variant, "vpt", False) for variant in VARIANTS),
    *((variant, "vpt", True) for variant in VARIANTS if "V2" not in variant),
    *((name, method, False) for name in ("Swin", "SwinV2") for method in METHODS[:2]),
]


def fuse(model: nn.Module, fused: bool) -> nn.Module:
    """A copy that uses or does not use the fused attention operator, where it exists."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = fused
    return model


@pytest.mark.parametrize(("variant", "method", "fused"), FORMS)
def test_prompts_in_windows_give_the_output_of_the_published_layout(
    variant: str, method: str, fused: bool
) -> None:
    name, args = VARIANTS[variant]
    plain = fuse(made(name, **args), fused).double()
    tuned = tune(plain, method).double()
    assert len(tuned.updates) == 4
    assert any(any(getattr(module, "shift_size", ())) for module in plain.modules())
    x = images(3, args.get("side", SIDE))
    with torch.no_grad():
        expected = published(tuned, plain)(x)
        assert (expected - plain(x)).abs().max() > 1e-3
        assert (tuned(x) - expected).abs().max() < 1e-12
        assert (merge(tuned)(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_gradients_of_prompts_equal_the_published_layout_and_finite_differences(
    name: str,
) -> None:
    plain = made(name).double()
    tuned, x = tune(plain, "vpt").double(), images(2)
    parameters = [update.get_parameter("tokens") for update in tuned.updates.values()]
    ours = torch.autograd.grad(tuned(x).square().sum(), parameters)
    theirs = torch.autograd.grad(published(tuned, plain)(x).square().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-6
        assert (one - other).abs().max() < 1e-10
    step = 1e-6
    for gradient, tokens in zip(ours, parameters, strict=True):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                tokens[0, 0] += sign * step
                ends.append(float(tuned(x).square().sum()))
                tokens[0, 0] -= sign * step
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope - float(gradient[0, 0])) < 1e-6 * max(1, abs(slope))


@pytest.mark.parametrize(
    ("name", "method", "fused"),
    [(SWIN, "vpt", True), *((name, m, False) for name in (SWIN, SWIN_V2) for m in METHODS)],
)
@torch.no_grad()
def test_every_sample_of_a_mixed_batch_uses_the_prompts_of_its_task(
    name: str, method: str, fused: bool
) -> None:
    plain = fuse(made(name), fused)
    tasks = [tune(plain, method, seed) for seed in (1, 2, 3)]
    merged = [merge(task) for task in tasks]
    layout = Layout(tasks[0].updates)
    first, count = torch.tensor([0, 5, 10]), torch.tensor([5, 5, 5])
    bank = torch.stack([layout.row(task.trained()) for task in tasks])
    heads = torch.cat([classifier_rows(task) for task in tasks])
    mixed, x = MixedModel(tasks[0]), images(6, dtype=torch.float32)
    for order in ([2, 0, 1, 1, 0, 2], [0, 0, 0, 2, 2, 1]):
        chosen = torch.tensor(order)
        logits = mixed(x, chosen, bank, heads, first, count, torch.arange(5))
        for sample, task in enumerate(order):
            expected = merged[task](x[sample : sample + 1])[0]
            assert (logits[sample] - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
            other = merged[(task + 1) % 3](x[sample : sample + 1])[0]
            assert (logits[sample] - other).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [(SWIN, "aoft-vpt-star"), (SWIN_V2, "vpt")])
def test_an_exported_graph_with_prompts_in_windows_gives_the_logits_of_the_tuned_model(
    name: str, method: str, tmp_path: Path
) -> None:
    tuned, path = tune(made(name), method), tmp_path / "task.onnx"
    exporter = importlib.import_module("aoft_exporters.onnx.exporter")
    exporter.export(merge(tuned), path, export_spec(SIDE, False, (0.0,) * 3, (1.0,) * 3, {}))
    engine = exporter.load(path)
    for batch in (1, 2, 5):
        x = images(batch, dtype=torch.float32)
        with torch.no_grad():
            expected = tuned(x)
        difference = (torch.from_numpy(engine.run(x.numpy())) - expected).abs().max()
        assert difference < 5e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    tuned, x = tune(made(name), "vpt"), images(2, dtype=torch.float32)
    parameters = [update.get_parameter("tokens") for update in tuned.updates.values()]
    kept = torch.autograd.grad(tuned(x).square().sum(), parameters)
    tuned.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    again = torch.autograd.grad(tuned(x).square().sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_a_task_has_one_parameter_per_prompt_and_channel_of_its_stage() -> None:
    channels = 2 * 96 + 2 * 192 + 6 * 384 + 2 * 768
    for name in (SWIN, SWIN_V2):
        for method, count in (("vpt", 8 * channels), ("aoft-vpt", channels)):
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=2)
            tuned = attach(model, method, backbone=identify(made(name)), rank=8)
            found = sum(p.numel() for u in tuned.updates.values() for p in u.parameters())
            assert found == count


def test_prompts_of_every_stage_start_within_the_published_bound() -> None:
    tuned = attach(made(SWIN), "vpt", rank=24)
    bound = (6 / (3 * 4**2 + SMALL["embed_dim"])) ** 0.5
    for update in tuned.updates.values():
        assert 0.98 * bound < float(update.get_parameter("tokens").detach().abs().max()) <= bound


def test_a_model_without_prompts_keeps_its_classes_and_every_bit_of_its_output() -> None:
    for name in (SWIN, SWIN_V2):
        plain, x = made(name), images(2, dtype=torch.float32)
        before, kinds = plain(x), [type(module) for module in plain.modules()]
        tune(plain, "vpt")(x)
        assert [type(module) for module in plain.modules()] == kinds
        assert torch.equal(plain(x), before)


def test_prompts_in_only_the_first_of_several_stages_are_refused() -> None:
    for name in (SWIN, SWIN_V2):
        for method in METHODS:
            with pytest.raises(AttachError, match=r"in layers\.0\.blocks\.0 only .*deep=True"):
                tune(made(name), method, deep=False)


def test_windows_of_another_class_are_refused() -> None:
    model = made(SWIN)
    attention = model.get_submodule("layers.0.blocks.0.attn")
    attention.__class__ = type("WindowAttention", (type(attention),), {"__module__": "other"})
    with pytest.raises(AttachError, match=r"needs a fixed number of tokens \(other\.Window"):
        tune(model, "vpt")


@pytest.mark.parametrize("name", [VIT, SWIN])
def test_prompts_in_a_model_that_already_has_some_are_refused(name: str) -> None:
    merged = merge(tune(made(name), "vpt"))
    with pytest.raises(AttachError, match=r"blocks\.0 has prompts already: attach the method to a"):
        tune(merged, "aoft-vpt")


@pytest.mark.parametrize("name", [VIT, SWIN, SWIN_V2])
def test_models_with_prompts_can_be_copied_and_pickled(name: str) -> None:
    tuned, x = tune(made(name), "aoft-vpt-star"), images(2, dtype=torch.float32)
    for model in (tuned, merge(tuned)):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for again in (loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
            assert list(again.state_dict()) == list(model.state_dict())
            assert torch.equal(again(x), model(x))
    blocks = [m for m in merge(tuned).modules() if isinstance(m, Prompted)]
    assert blocks and all(isinstance(m.get_submodule("prompts"), FixedPrompts) for m in blocks)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [SWIN, SWIN_V2])
def test_a_loaded_task_with_prompts_in_windows_gives_the_same_logits(
    name: str, method: str, tmp_path: Path
) -> None:
    args: dict[str, Any] = {"img_size": SIDE, "window_size": 2, "embed_dim": 24}
    weights = tmp_path / "backbone.safetensors"
    save_file(timm.create_model(name, num_classes=0, **args).state_dict(), weights)
    model, identity = create_backbone(name, num_classes=5, weights=weights, **args)
    tuned = attach(model, method, backbone=identity, rank=3, seed=4).eval()
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(SIDE, crop_pct=1.0, mean=half, std=half)
    save(tuned, tmp_path / "model.ckpt", classes=tuple("abcde"), preprocessing=preprocessing)
    loaded, x = load(tmp_path / "model.ckpt", weights=weights), images(2, dtype=torch.float32)
    assert [n for n in loaded.trained() if n.startswith("update.layers.2.blocks.5.")]
    assert torch.equal(loaded(x), tuned(x))
    assert (merge(loaded)(x) - tuned(x)).abs().max() < 1e-5
