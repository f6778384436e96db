"""Full models, compared with references after the papers and the released code."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from aoft_deploy import attach, merge
from aoft_deploy.errors import CheckpointError
from aoft_deploy.tuning.merging import _absorb
from aoft_deploy.tuning.tuned_model import TunedModel

PLAIN: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 2,
        "depths": (2, 1, 1),
        "embed_dim": 24,
        "num_heads": (3, 6, 6),
    },
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 3, "embed_dim": 48},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28, "depth": 3, "embed_dim": 48},
    "vit_base_patch16_siglip_224": {
        "img_size": 32,
        "depth": 3,
        "embed_dim": 48,
        "num_heads": 2,
    },
}


@functools.cache
def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=4, **PLAIN[name]).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for path, buffer in model.named_buffers():
            if path.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer) * 0.2)
    return model


def image(name: str) -> Tensor:
    side = PLAIN[name].get("img_size", 32)
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, side, side, dtype=torch.float64, generator=generator)


def tune(name: str, method: str, **settings: Any) -> TunedModel:
    """A tuned model with randomised parameters, in float64."""
    tuned = attach(copy.deepcopy(made(name)), method, **settings).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return tuned


class RLRRLinear(nn.Module):
    """The released layer: W * scale_col * scale_line + W, and bias + shift_bias."""

    def __init__(self, base: nn.Linear, parameters: Callable[[str], nn.Parameter]) -> None:
        super().__init__()
        self.base = base
        self.scale_col, self.scale_line = parameters("scale_in"), parameters("scale_out")
        self.shift_bias = parameters("shift")

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight * self.scale_col * self.scale_line.reshape(-1, 1)
        bias = self.shift_bias if self.base.bias is None else self.base.bias + self.shift_bias
        return x @ (weight + self.base.weight).T + bias


class RLRRConv(nn.Module):
    """The released convolution: the same on the (O·k, I·k) view of the weight."""

    def __init__(self, base: nn.Conv2d, parameters: Callable[[str], nn.Parameter]) -> None:
        super().__init__()
        self.base = base
        self.scale_col, self.scale_line = parameters("scale_in"), parameters("scale_out")

    def forward(self, x: Tensor) -> Tensor:
        o, i, k, _ = self.base.weight.shape
        matrix = self.base.weight.reshape(o * k, i * k)
        matrix = matrix + matrix * self.scale_line.reshape(-1, 1) * self.scale_col.reshape(1, -1)
        weight, stride, padding = matrix.reshape(o, i, k, k), self.base.stride, self.base.padding
        result: Tensor = nn.functional.conv2d(x, weight, self.base.bias, stride, padding)
        return result


class SSFNorm(nn.Module):
    """A norm with SSF on its output."""

    def __init__(self, base: nn.Module, parameters: Callable[[str], nn.Parameter]) -> None:
        super().__init__()
        self.base, self.scale, self.shift = base, parameters("scale"), parameters("shift")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y * self.scale + self.shift


def reference_of(
    name: str, tuned: TunedModel, wrap: Callable[[str, nn.Module], Any]
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The plain model with layers of the released code, and copies of the parameters."""
    model = copy.deepcopy(made(name))
    copies = {n: nn.Parameter(p.detach().clone()) for n, p in tuned.trained().items()}
    for path, module in list(model.named_modules()):
        kind = wrap(path, module)
        if kind is not None:
            parameters = lambda part, path=path: copies.pop(f"update.{path}.{part}")  # noqa: E731
            model.set_submodule(path, kind(module, parameters))
    heads = [n for n in copies if n.startswith("head.")]
    for key in heads:
        model.get_parameter(key.removeprefix("head.")).data = copies.pop(key).data
    assert not copies, "the reference has no place for these"
    return model, dict(model.named_parameters())


def swin_layer(path: str, module: nn.Module) -> Any:
    """SSF on norm1, norm2 and the final norm; RLRR on fused qkv, proj, fc1, fc2, reduction."""
    leaf = path.rpartition(".")[2]
    if path == "norm" or leaf in ("norm1", "norm2"):
        return SSFNorm
    inside = path.startswith("layers.") and leaf in ("qkv", "proj", "fc1", "fc2", "reduction")
    return RLRRLinear if inside else None


def convolution(path: str, module: nn.Module) -> Any:
    return RLRRConv if isinstance(module, nn.Conv2d) else None


def same_gradients(tuned: TunedModel, reference: nn.Module, x: Tensor) -> None:
    """Whether a loss has the same gradients for the trained parameters of both models."""
    torch.autograd.backward(tuned(x).square().sum())
    torch.autograd.backward(reference(x).square().sum())
    renamed = {"scale_in": "scale_col", "scale_out": "scale_line"}
    for name, parameter in tuned.trained().items():
        path = name.partition(".")[2]
        if name.startswith("update."):
            owner, _, part = path.rpartition(".")
            plain = isinstance(reference.get_submodule(owner), SSFNorm)
            released = {**renamed, "shift": "shift" if plain else "shift_bias"}.get(part, part)
            path = f"{owner}.{released}"
        ours, theirs = parameter.grad, reference.get_parameter(path).grad
        assert ours is not None and theirs is not None
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10), name


SWIN = "swin_tiny_patch4_window7_224"
SWIN_FORM: dict[str, Any] = {"fused_qkv": True, "norms": ["norm"]}


def test_rlrr_on_swin_is_the_released_parameterisation() -> None:
    tuned, x = tune(SWIN, "rlrr", **SWIN_FORM), image(SWIN)
    reference, _ = reference_of(SWIN, tuned, swin_layer)
    with torch.no_grad():
        expected = reference(x)
        assert (expected - made(SWIN)(x)).abs().max() > 0.01
        assert (tuned(x) - expected).abs().max() < 1e-12
        assert (merge(tuned)(x) - expected).abs().max() < 1e-12
    same_gradients(tuned, reference, x)


def test_rlrr_on_swin_does_not_update_the_patch_embedding_and_the_norms_of_merging() -> None:
    names = set(tune(SWIN, "rlrr", **SWIN_FORM).updates)
    assert not any("patch_embed" in n or "downsample.norm" in n for n in names)
    assert {n for n in names if "reduction" in n} == {
        f"layers.{i}.downsample.reduction" for i in (1, 2)
    }


@pytest.mark.parametrize("method", ["rlrr", "ssf"])
def test_a_shift_of_patch_merging_is_folded_into_the_norm_before_it(method: str) -> None:
    tuned, x = tune(SWIN, method, **(SWIN_FORM if method == "rlrr" else {})), image(SWIN)
    update = tuned.updates["layers.1.downsample.reduction"]
    update.get_parameter("shift").data += 1
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        tuned, x = tuned.to(dtype), x.to(dtype)
        merged = merge(tuned)
        with torch.no_grad():
            expected = tuned(x)
            scale = max(1.0, expected.abs().max().item())
            assert (merged(x) - expected).abs().max() <= tolerance * scale
        reduction = merged.get_submodule("layers.1.downsample.reduction")
        assert isinstance(reduction, nn.Linear) and reduction.bias is None
        norm = merged.get_parameter("layers.1.downsample.norm.bias")
        base = made(SWIN).get_parameter("layers.1.downsample.norm.bias")
        assert not torch.allclose(norm, base.to(dtype))


def singular_swin(kind: str) -> TunedModel:
    model = copy.deepcopy(made(SWIN))
    weight = model.get_parameter("layers.1.downsample.reduction.weight")
    weight.data[1] = 0 if kind == "zero row" else weight.data[0]
    return attach(model, "rlrr", init="identity", **SWIN_FORM).double()


@pytest.mark.parametrize("kind", ["zero row", "equal rows"])
def test_a_shift_of_a_singular_patch_merging_is_refused(kind: str) -> None:
    tuned = singular_swin(kind)
    tuned.updates["layers.1.downsample.reduction"].get_parameter("shift").data[1] = 1
    with pytest.raises(CheckpointError, match="singular or nearly singular, so the norm"):
        merge(tuned)


@pytest.mark.parametrize("kind", ["zero row", "equal rows"])
def test_a_singular_patch_merging_without_shift_is_folded(kind: str) -> None:
    tuned, x = singular_swin(kind), image(SWIN)
    assert torch.allclose(merge(tuned)(x), tuned(x), atol=1e-12)


def ill_conditioned(condition: float, direction: int) -> tuple[nn.LayerNorm, nn.Linear, Tensor]:
    """A norm, a map with singular values from 1 to 1/condition, and a shift along one direction.

    Direction 0 belongs to the largest singular value, -1 to the smallest.
    """
    source = np.random.default_rng(0)
    left = np.linalg.qr(source.normal(size=(16, 16)))[0]
    right = np.linalg.qr(source.normal(size=(32, 16)))[0]
    values = np.geomspace(1, 1 / condition, 16)
    norm, layer = nn.LayerNorm(32), nn.Linear(32, 16, bias=False).double()
    layer.weight.data = torch.from_numpy(left * values @ right.T)
    norm.bias.data = torch.from_numpy(source.normal(size=32)).float()
    return norm, layer, torch.from_numpy(left[:, direction].copy())


@pytest.mark.parametrize(("condition", "direction"), [(1e2, -1), (1e6, 0), (1e9, 0), (3e3, -1)])
def test_the_norm_absorbs_the_shift_of_an_ill_conditioned_map(
    condition: float, direction: int
) -> None:
    norm, layer, shift = ill_conditioned(condition, direction)
    before, weight = norm.bias.detach().clone().numpy(), layer.weight.detach().numpy()
    _absorb(norm, layer, shift)
    change = norm.bias.detach().numpy().astype(np.float64) - before
    # The reference is NumPy's pseudo-inverse; the bias is float32.
    np.testing.assert_allclose(
        change, np.linalg.pinv(weight, rcond=1e-12) @ shift.numpy(), rtol=1e-5, atol=1e-6
    )
    assert np.abs(weight @ change - shift.numpy()).max() < 1e-3


@pytest.mark.parametrize("condition", [1e8, 1e10, 1e20])
def test_an_ill_conditioned_map_with_too_large_a_shift_for_float32_is_refused(
    condition: float,
) -> None:
    norm, layer, shift = ill_conditioned(condition, -1)
    before = norm.bias.detach().clone()
    with pytest.raises(CheckpointError, match="singular or nearly singular"):
        _absorb(norm, layer, shift)
    assert torch.equal(norm.bias, before)


def test_a_shift_too_large_for_the_preceding_norm_is_refused() -> None:
    tuned = tune(SWIN, "rlrr", **SWIN_FORM).float()
    tuned.updates["layers.1.downsample.reduction"].get_parameter("shift").data.fill_(3e38)
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float32"):
        merge(tuned)


def test_rlrr_on_a_resnet_is_the_released_parameterisation() -> None:
    tuned, x = tune("resnet18", "rlrr", norms=[]), image("resnet18")
    reference, _ = reference_of("resnet18", tuned, convolution)
    with torch.no_grad():
        expected = reference(x)
        assert (expected - made("resnet18")(x)).abs().max() > 0.01
        assert (tuned(x) - expected).abs().max() < 1e-12
        assert (merge(tuned)(x) - expected).abs().max() < 1e-12
    same_gradients(tuned, reference, x)


VITS = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"]


def prompted(model: Any, prompts: list[Tensor], x: Tensor) -> Tensor:
    """VPT's forward: prompts after the prefix; those of a block replace the previous ones."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    prefix, count = model.num_prefix_tokens, len(prompts[0])
    for i, block in enumerate(model.blocks):
        rest = x[:, prefix:] if i == 0 else x[:, prefix + count :]
        before = x[:, prefix : prefix + count] if i else None
        own = prompts[i].expand(len(x), -1, -1) if i < len(prompts) else before
        x = block(torch.cat([x[:, :prefix], own, rest], dim=1))  # type: ignore[list-item]
    x = torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)
    logits: Tensor = model.forward_head(model.norm(x))
    return logits


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("method", ["vpt", "aoft-vpt", "aoft-vpt-star"])
@pytest.mark.parametrize("name", VITS)
def test_prompts_have_the_positions_of_vpt(name: str, method: str, deep: bool) -> None:
    tuned, x = tune(name, method, deep=deep, rank=4), image(name)
    assert len(tuned.updates) == (3 if deep else 1)
    tokens: list[Tensor] = [u.delta().tokens.detach() for u in tuned.updates.values()]  # type: ignore[union-attr]
    plain = copy.deepcopy(made(name))
    for key, parameter in tuned.trained().items():
        if key.startswith("head."):
            plain.get_parameter(key.removeprefix("head.")).data = parameter.data
    with torch.no_grad():
        expected = prompted(plain, tokens, x)
        assert (expected - plain(x)).abs().max() > 1e-4
        assert (tuned(x) - expected).abs().max() < 1e-12
        assert (merge(tuned)(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("method", ["adapter", "aoft-adapter", "aoft-adapter-star"])
@pytest.mark.parametrize("name", VITS)
def test_adapters_change_the_outputs_of_attention_and_mlp(name: str, method: str) -> None:
    tuned, x = tune(name, method), image(name)
    plain = copy.deepcopy(made(name))
    for key, parameter in tuned.trained().items():
        if key.startswith("head."):
            plain.get_parameter(key.removeprefix("head.")).data = parameter.data
    for site, update in tuned.updates.items():
        delta: Any = update.delta()
        branch = plain.get_submodule(site.rpartition(".")[0])

        def adapted(_: nn.Module, given: Any, y: Tensor, delta: Any = delta) -> Tensor:
            """y' = y + y A with a dense A."""
            dense = delta.left.mT @ delta.right
            if delta.scale is not None:
                dense = dense + delta.scale.diag()
            changed: Tensor = y + y @ dense.mT
            return changed

        branch.register_forward_hook(adapted)
    with torch.no_grad():
        expected = plain(x)
        assert (expected - made(name)(x)).abs().max() > 1e-3
        assert (tuned(x) - expected).abs().max() < 1e-12
        assert (merge(tuned)(x) - expected).abs().max() < 1e-12
