"""LoRA folders that PEFT itself trained and saved, against PEFT's own unmerged answers."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from safetensors_faults import FAULTS, faulty
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from aoft_deploy.artefacts.inspection import inspect_file
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.opening import load, open_checkpoint
from aoft_deploy.checkpoints.peft_adapter import read_peft_folder
from aoft_deploy.checkpoints.peft_config import AdapterConfig
from aoft_deploy.cli.export import main
from aoft_deploy.errors import CheckpointError, UnknownNameError
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel

VIT, EVA, BEIT = "peft_test_vit", "peft_test_eva", "peft_test_beit"
SIZE, WIDTH, CLASSES = 32, 32, 6
PREFIX = "base_model.model."
X = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

default_cfgs = generate_default_cfgs(
    {
        name: {"input_size": (3, SIZE, SIZE), "classifier": "head", "mean": (0.1, 0.2, 0.3)}
        for name in (VIT, EVA, BEIT)
    }
)  # timm's register_model reads this name

SHAPE: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": WIDTH,
    "depth": 2,
    "num_heads": 2,
}


@register_model
def peft_test_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """timm's ViT at a size that tests can afford; PEFT folders do not say any size."""
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, VIT, pretrained, **{**SHAPE, **kwargs}
    )
    return model


@register_model
def peft_test_eva(pretrained: bool = False, **kwargs: Any) -> Eva:
    """With q, k and v apart and a gated MLP, as eva02 has them."""
    shape = {**SHAPE, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True}
    model: Eva = build_model_with_cfg(Eva, EVA, pretrained, **{**shape, **kwargs})
    return model


@register_model
def peft_test_beit(pretrained: bool = False, **kwargs: Any) -> Beit:
    """Whose attention reads its fused weight without calling the layer."""
    model: Beit = build_model_with_cfg(Beit, BEIT, pretrained, **{**SHAPE, **kwargs})
    return model


@pytest.fixture(scope="session")
def peft() -> Any:
    return importlib.import_module("peft")


@torch.no_grad()
def randomised(module: nn.Module, seed: int, spread: float, only: str = "") -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = spread * torch.randn(parameter.shape, generator=generator)
        if only in name:
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(noise + 1 if is_scale else noise)
    return module


def base_model(name: str = VIT) -> nn.Module:
    model = timm.create_model(name, num_classes=CLASSES)
    return randomised(model, seed=1, spread=0.15).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From a backbone's name to a file with its weights and without a classifier."""
    folder = tmp_path_factory.mktemp("weights")

    def write(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        state = base_model(name).state_dict()
        save_file({n: t for n, t in state.items() if not n.startswith("head.")}, path)
        return path

    return write


@pytest.fixture(scope="session")
def adapted(peft: Any) -> Callable[..., Tensor]:
    """As if trained with PEFT and saved: from a folder and a LoraConfig's fields to the logits."""

    def make(folder: Path, name: str = VIT, half: bool = False, **config: Any) -> Tensor:
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv"], **config}
        config = {"modules_to_save": ["head"], **config}
        model = base_model(name)
        with torch.inference_mode():
            before = model(X)
        model = peft.get_peft_model(model, peft.LoraConfig(**config))
        randomised(model, seed=2, spread=0.15, only="lora_")
        randomised(model, seed=3, spread=0.2, only="modules_to_save")
        if half:
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16().float()
        model.eval()
        model.save_pretrained(folder)
        if half:
            path = folder / "adapter_model.safetensors"
            save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
            model = peft.PeftModel.from_pretrained(base_model(name), folder).eval()
        with torch.inference_mode():
            logits: Tensor = model(X)
        assert (logits - before).abs().max() > 0.1
        return logits

    return make


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 16},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "rank pattern": {
        "target_modules": ["qkv", "fc1", "fc2"],
        "rank_pattern": {"blocks.1.attn.qkv": 7, "fc2": 2},
        "alpha_pattern": {r"blocks\.\d\.mlp\.fc1": 5, "^blocks.0.attn.qkv": 1.5},
    },
    "rslora with patterns": {
        "target_modules": ["qkv", "proj"],
        "use_rslora": True,
        "rank_pattern": {"attn.proj": 3},
        "alpha_pattern": {"qkv": 6},
        "exclude_modules": ["patch_embed.proj"],
    },
    "one layer": {
        "target_modules": ["qkv", "fc1"],
        "layers_to_transform": [1],
        "layers_pattern": "blocks",
    },
    "one layer by number": {
        "target_modules": ["qkv"],
        "layers_to_transform": 0,
        "layers_pattern": ["layers", "blocks"],
    },
    "regular expression": {"target_modules": r"blocks\.(0\.attn\.(qkv|proj)|1\.mlp\.fc\d)"},
    "excluded": {"target_modules": ["qkv", "fc1"], "exclude_modules": r".*0\.mlp.*"},
    "whole names": {"target_modules": ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"]},
    "all linear": {"target_modules": "all-linear"},
    "rank above the width": {"r": 50, "target_modules": ["qkv", "fc2"]},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
}


def options(folder: Path, weights: Path, *more: object, name: str = VIT) -> list[object]:
    return ["--merge", folder, "--backbone", name, "--backbone-weights", weights, *more]


def check(folder: Path, name: str, weights: Path, expected: Tensor) -> TunedModel:
    """Unmerged and merged in PyTorch, our model gives PEFT's logits."""
    tuned = load(folder, backbone=name, weights=weights)
    with torch.inference_mode():
        torch.testing.assert_close(tuned(X), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(merge(tuned)(X), expected, atol=1e-5, rtol=0)
    return tuned


def check_onnx(folder: Path, name: str, weights: Path, expected: Tensor) -> None:
    """The command's ONNX artefact gives PEFT's logits."""
    output = folder.parent / "a.onnx"
    assert main([str(o) for o in options(folder, weights, "-o", output, name=name)]) == 0
    logits = load_artefact(output).run(X.numpy())
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_of_peft_gives_its_unmerged_logits(
    config: dict[str, Any],
    adapted: Callable[..., Tensor],
    weights: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    expected = adapted(tmp_path / "a", **config)
    check(tmp_path / "a", VIT, weights(VIT), expected)


@pytest.mark.parametrize("kind", ["plain", "rslora", "rank pattern"])
def test_a_folder_of_peft_exported_by_the_command_gives_its_unmerged_logits(
    kind: str, adapted: Callable[..., Tensor], weights: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = adapted(tmp_path / "a", **CONFIGS[kind])
    check_onnx(tmp_path / "a", VIT, weights(VIT), expected)


def test_separate_q_k_and_v_and_a_gated_mlp_too(
    adapted: Callable[..., Tensor], weights: Callable[[str], Path], tmp_path: Path
) -> None:
    names = ["q_proj", "v_proj", "fc1_g", "fc1_x"]
    expected = adapted(tmp_path / "a", EVA, target_modules=names, rank_pattern={"v_proj": 2})
    tuned = check(tmp_path / "a", EVA, weights(EVA), expected)
    assert len(tuned.updates) == 8
    check_onnx(tmp_path / "a", EVA, weights(EVA), expected)


def test_half_precision_matrices_are_read(
    adapted: Callable[..., Tensor], weights: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = adapted(tmp_path / "a", half=True)
    check(tmp_path / "a", VIT, weights(VIT), expected)


def test_the_description_of_a_strangers_task_comes_from_timm(
    adapted: Callable[..., Tensor], weights: Callable[[str], Path], tmp_path: Path
) -> None:
    adapted(tmp_path / "a")
    _, task = open_checkpoint(tmp_path / "a", BackboneSource(VIT, weights(VIT)))
    assert task.classes == ("0", "1", "2", "3", "4", "5")
    assert (task.preprocessing.size, task.preprocessing.mean) == (SIZE, (0.1, 0.2, 0.3))
    assert task.backbone.name == VIT
    assert task.settings["ranks"] == {f"blocks.{i}.attn.qkv": 4 for i in range(2)}


def test_inspect_describes_a_strangers_folder(
    adapted: Callable[..., Tensor], tmp_path: Path
) -> None:
    adapted(tmp_path / "a", use_rslora=True)
    found = inspect_file(tmp_path / "a")
    assert found["kind"] == "PEFT LoRA folder"
    assert found["ranks"] == {f"blocks.{i}.attn.qkv": 4 for i in range(2)}
    assert found["factors"]["blocks.0.attn.qkv"] == 8 / math.sqrt(4)
    assert found["trained_numbers"] == 2 * 4 * (WIDTH + 3 * WIDTH) + CLASSES * (WIDTH + 1)
    assert found["manifest"] == "none"
    assert "method" not in found


def test_our_folder_saved_again_by_peft_is_a_strangers(
    peft: Any,
    adapted: Callable[..., Tensor],
    weights: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    expected = adapted(tmp_path / "a")
    more = options(tmp_path / "a", weights(VIT), "--to", "peft", "-o", tmp_path / "b")
    assert main([str(option) for option in more]) == 0
    assert load(tmp_path / "b", weights=weights(VIT)).identity.name == VIT  # ours names it itself
    model = peft.PeftModel.from_pretrained(base_model(), tmp_path / "b").eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "c")
    with pytest.raises(CheckpointError, match="name it with `backbone`"):
        load(tmp_path / "c", weights=weights(VIT))
    check(tmp_path / "c", VIT, weights(VIT), expected)


def with_head(path: Path) -> Path:
    save_file(base_model().state_dict(), path)
    return path


@pytest.mark.parametrize("targets", [["qkv"], "all-linear"])
def test_without_a_saved_classifier_the_pretrained_one_stays(
    targets: Any, adapted: Callable[..., Tensor], tmp_path: Path
) -> None:
    # all-linear then adapts the classifier itself.
    expected = adapted(tmp_path / "a", target_modules=targets, modules_to_save=None)
    check(tmp_path / "a", VIT, with_head(tmp_path / "whole.safetensors"), expected)


def test_timms_own_weights_bring_their_classifier(
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


def test_a_layer_that_timm_does_not_call_is_refused_where_it_was_changed(
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
    # PEFT's training leaves B of such a layer at zero, since it never takes part.
    tensors = {n: t * ("qkv.lora_B" not in n) for n, t in tensors.items()}
    save_file(tensors, path)
    check(tmp_path / "a", BEIT, weights(BEIT), expected)


@pytest.fixture(scope="module")
def saved(adapted: Callable[..., Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain folder of PEFT, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("saved") / "a"
    adapted(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "a"))


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "OFT"}, "peft_type is 'OFT', but only LORA can be merged"),
    ({"peft_type": None}, "peft_type is None"),
    ({"use_dora": True}, "use_dora is True: DoRA also divides every row"),
    ({"bias": "all"}, "bias is 'all': it trains biases"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"bias": None}, "bias is None"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication is \[\[0, 2\]"),
    ({"target_parameters": ["x.weight"]}, "target_parameters is"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is"),
    ({"use_qalora": True}, "use_qalora is True"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
    ({"velora_config": {"scale": 1.0}}, "velora_config is"),
    ({"monteclora_config": {"num_samples": 8}}, "monteclora_config is"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is"),
    ({"arrow_config": {"top_k": 3}}, "arrow_config is"),
    ({"kasa_config": {"beta": 1}}, "kasa_config is"),
    ({"megatron_config": {"a": 1}}, "megatron_config is"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying is True"),
    ({"a_field_of_tomorrow": 0.5}, "a_field_of_tomorrow is 0.5: it is not known"),
    ({"a_field_of_tomorrow": "x" * 9999}, "a_field_of_tomorrow is 'xxx.*…: it is not known"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': this changes the"),
    ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ({"init_lora_weights": "LoftQ"}, "init_lora_weights is 'loftq'"),
    ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    ({"init_lora_weights": ["pissa"]}, "init_lora_weights is"),
    ({"use_rslora": 1}, "use_rslora is 1, but must be a bool"),
    ({"r": 0}, "r is 0, but must be a whole number of 1 or more"),
    ({"r": 4.0}, "r is 4.0"),
    ({"r": True}, "r is True"),
    ({"r": 10**400}, "r is 1000"),
    ({"r": 5}, r"lora_A has shape \(4, 32\) in .*, but r = 5"),
    ({"lora_alpha": "8"}, "lora_alpha is '8', but must be a finite number"),
    ({"lora_alpha": math.nan}, "lora_alpha is nan"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"rank_pattern": {"qkv": 5}}, "but r = 5"),
    ({"rank_pattern": {"qkv": "5"}}, "rank_pattern is '5'"),
    ({"rank_pattern": [4]}, r"rank_pattern is \[4\], but must map patterns to numbers"),
    ({"alpha_pattern": {"qkv": None}}, "alpha_pattern is None"),
    ({"alpha_pattern": {"(": 1}}, r"'\(' is no regular expression"),
    ({"target_modules": "("}, "is no regular expression"),
    ({"exclude_modules": "(" * 100_000}, "is no regular expression"),
    ({"target_modules": 3}, "target_modules is 3, but must be a text or a list"),
    ({"target_modules": [3]}, r"target_modules is \[3\]"),
    ({"target_modules": None}, r"blocks\.0\.attn\.qkv, but target_modules does not name it"),
    ({"target_modules": "all-linear"}, "target_modules does not name it"),
    ({"target_modules": ["qkv", "fc1"]}, r"lacks matrices for blocks\.0\.mlp\.fc1"),
    ({"exclude_modules": ["qkv"]}, "target_modules does not name it"),
    (
        {"layers_to_transform": [1], "layers_pattern": "blocks"},
        r"holds matrices for blocks\.0\.attn\.qkv",
    ),
    ({"layers_to_transform": ["1"]}, "layers_to_transform is"),
    ({"layers_to_transform": 1.5}, "layers_to_transform is 1.5"),
    ({"modules_to_save": None}, r"head\.(weight|bias), but modules_to_save does not name"),
    ({"modules_to_save": ["head", "blocks.1.norm1"]}, r"lacks blocks\.1\.norm1\.weight, whose"),
    ({"modules_to_save": {"head": 1}}, "modules_to_save is"),
]


@pytest.mark.parametrize(("changes", "message"), FIELDS, ids=lambda v: str(v)[:60])
def test_a_config_that_says_more_than_plain_lora_is_refused(
    changes: dict[str, Any],
    message: str,
    copy: Path,
    weights: Callable[[str], Path],
    refused: Callable[..., str],
) -> None:
    config = copy / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | changes), "utf-8")
    line = refused(main, *options(copy, weights(VIT)))
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(line)


def test_fields_that_change_nothing_are_accepted(copy: Path) -> None:
    config = copy / "adapter_config.json"
    harmless = {
        "lora_dropout": 0.9,
        "inference_mode": False,
        "runtime_config": {"ephemeral_gpu_offload": True},
        "eva_config": {"rho": 2.0},
        "loftq_config": {"loftq_bits": 4},
        "init_lora_weights": "EVA",
        "a_field_of_tomorrow": None,
        "another": {},
        "exclude_modules": ["nothing"],
    }
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | harmless), "utf-8")
    assert len(read_peft_folder(copy).pairs) == 2


def test_every_field_of_this_pefts_config_is_known_or_off_by_default(peft: Any) -> None:
    plain = peft.LoraConfig(target_modules=["qkv"]).to_dict()
    plain = {key: list(v) if isinstance(v, set) else v for key, v in plain.items()}
    assert AdapterConfig.from_dict(plain | {"peft_type": "LORA"}).targets == ["qkv"]


QKV = f"{PREFIX}blocks.0.attn.qkv"
TENSORS: list[tuple[dict[str, Tensor | None], str]] = [
    ({f"{QKV}.lora_B.weight": None}, r"lacks blocks\.0\.attn\.qkv\.lora_B"),
    ({f"{QKV}.lora_A.weight": None, f"{QKV}.lora_B.weight": None}, "lacks matrices for blocks.0"),
    ({f"{QKV}.lora_A.weight": torch.ones(4, 33)}, r"lora_A has shape \(4, 33\) .* \(4, 32\)"),
    ({f"{QKV}.lora_B.weight": torch.ones(96, 3)}, r"lora_B has shape \(96, 3\) .* \(96, 4\)"),
    ({f"{QKV}.lora_A.weight": torch.ones(4, 32, 1, 1)}, r"lora_A has shape \(4, 32, 1, 1\)"),
    ({f"{QKV}.lora_A.weight": torch.full((4, 32), math.nan)}, "lora_A in .* not finite"),
    ({f"{QKV}.lora_B.weight": torch.full((96, 4), math.inf)}, "lora_B in .* not finite"),
    ({f"{QKV}.lora_B.weight": torch.ones(96, 4).long()}, "is torch.int64, but must be a float"),
    (
        {f"{QKV}.lora_B.weight": torch.ones(96, 4).to(torch.float8_e5m2)},
        "float8_e5m2, but must be a float",
    ),
    ({f"{QKV}.lora_B.bias": torch.ones(96)}, "a plain LoRA of linear maps does not have"),
    ({f"{QKV}.lora_magnitude_vector": torch.ones(96)}, "plain LoRA of linear maps does not have"),
    ({f"{QKV}.lora_A.other.weight": torch.ones(4, 32)}, "lora_A.other.weight, which a plain LoRA"),
    ({f"{PREFIX}pos_embed.lora_embedding_A": torch.ones(4, 32)}, "lora_embedding_A, which a plain"),
    ({"blocks.0.attn.qkv.lora_A.weight": torch.ones(4, 32)}, "which a plain LoRA"),
    (
        {
            f"{PREFIX}blocks.9.fc.lora_A.weight": torch.ones(4, 32),
            f"{PREFIX}blocks.9.fc.lora_B.weight": torch.ones(9, 4),
        },
        r"changes blocks\.9\.fc, which the backbone lacks",
    ),
    (
        {
            f"{PREFIX}blocks.1.mlp.fc1.lora_A.weight": torch.ones(4, 32),
            f"{PREFIX}blocks.1.mlp.fc1.lora_B.weight": torch.ones(128, 4),
        },
        r"holds matrices for blocks\.1\.mlp\.fc1, but target_modules",
    ),
    ({f"{PREFIX}head.weight": None}, r"lacks head\.weight, whose module modules_to_save names"),
    ({f"{PREFIX}head.weight": torch.ones(CLASSES, 31)}, r"head\.weight has shape \(6, 31\)"),
    ({f"{PREFIX}head.bias": torch.ones(CLASSES + 1)}, "more than one classifier"),
    ({f"{PREFIX}head.bias": torch.tensor(1.0)}, "more than one classifier"),
    ({f"{PREFIX}head.bias": torch.full((CLASSES,), math.nan)}, r"head\.head\.bias .*not finite"),
    (
        {f"{PREFIX}blocks.0.norm1.weight": torch.ones(CLASSES)},
        r"modules_to_save of .* holds blocks\.0\.norm1\.weight, which is not of the classifier",
    ),
]


@pytest.mark.parametrize(("changes", "message"), TENSORS, ids=lambda v: str(v)[:60])
def test_tensors_that_do_not_fit_are_refused(
    changes: dict[str, Tensor | None],
    message: str,
    copy: Path,
    weights: Callable[[str], Path],
    refused: Callable[..., str],
) -> None:
    path = copy / "adapter_model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    line = refused(main, *options(copy, weights(VIT)))
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(line)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", None, r"There is no file .*adapter_config\.json"),
        ("adapter_config.json", b"text", "is no JSON file"),
        ("adapter_config.json", b"\xff\xfe", "is no JSON file"),
        ("adapter_config.json", b"[" * 100_000, "is no JSON file"),
        ("adapter_config.json", b"[1]", "holds no JSON object"),
        ("adapter_config.json", b"{}", "peft_type is None"),
        ("adapter_model.safetensors", None, r"has no adapter_model\.safetensors"),
        ("adapter_model.safetensors", b"", "is no safetensors file"),
        ("adapter_model.safetensors", b"\x80\x04 a pickle", "is no safetensors file"),
    ],
)
def test_a_missing_or_damaged_file_is_refused(
    name: str,
    content: bytes | None,
    message: str,
    copy: Path,
    weights: Callable[[str], Path],
    refused: Callable[..., str],
) -> None:
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    line = refused(main, *options(copy, weights(VIT)))
    with pytest.raises(CheckpointError, match=message):
        raise CheckpointError(line)
    with pytest.raises(CheckpointError, match=message):
        inspect_file(copy)


@pytest.mark.parametrize("kept", [3, 9, 200, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    kept: float, copy: Path, weights: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    path = copy / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    assert "is no safetensors file" in refused(main, *options(copy, weights(VIT)))


@pytest.mark.parametrize("fault", ["twice", "path", "200,000 tensors"])
def test_a_faulty_header_is_refused(
    fault: str, saved: Path, copy: Path, weights: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    name = "adapter_model.safetensors"
    faulty(saved / name, copy / name, fault)
    assert re.search(FAULTS[fault][1], refused(main, *options(copy, weights(VIT))))


def test_a_pickled_adapter_is_refused_and_not_read(
    copy: Path, weights: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    line = refused(main, *options(copy, weights(VIT)))
    assert "adapter_model.bin is a pickle: save it again with safe_serialization=True" in line


def test_several_adapters_in_one_folder_are_refused(
    saved: Path, tmp_path: Path, weights: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    for name in ("pets", "flowers"):
        shutil.copytree(saved, tmp_path / "all" / name)
    line = refused(main, *options(tmp_path / "all", weights(VIT)))
    assert "holds several adapters: name the folder of one (flowers, pets)" in line


def test_a_folder_without_matrices_is_refused(
    copy: Path, weights: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    path = copy / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "lora" not in n}, path)
    assert "holds no LoRA matrices" in refused(main, *options(copy, weights(VIT)))


def test_a_folder_that_changes_the_classifier_alone_is_refused(
    adapted: Callable[..., Tensor], tmp_path: Path, refused: Callable[..., str]
) -> None:
    adapted(tmp_path / "a", target_modules=["head"], modules_to_save=None)
    whole = with_head(tmp_path / "whole.safetensors")
    line = refused(main, *options(tmp_path / "a", whole))
    assert "changes the classifier only: there is nothing to merge" in line


def test_a_convolution_is_refused(
    adapted: Callable[..., Tensor],
    weights: Callable[[str], Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    adapted(tmp_path / "a", target_modules=["qkv", "patch_embed.proj"])
    line = refused(main, *options(tmp_path / "a", weights(VIT)))
    assert "changes patch_embed.proj, a Conv2d: only LoRA of linear maps is read" in line


def test_a_linear_map_outside_the_blocks_is_refused(
    peft: Any, tmp_path: Path, refused: Callable[..., str]
) -> None:
    # A class-attention pooling has linear maps that are no site.
    name = "vit_tiny_patch16_224"
    size: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2, "global_pool": "map"}
    model = timm.create_model(name, num_classes=3, **size)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["kv"]))
    model.save_pretrained(tmp_path / "a")
    plain = timm.create_model(name, num_classes=3, **size)
    with pytest.raises(CheckpointError, match=r"changes attn_pool\.kv, which is no linear map of"):
        read_peft_folder(tmp_path / "a").placed(plain)


def test_a_folder_on_other_weights_than_it_was_written_for_is_refused(
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


PATHS = [
    "qkv",
    "attn.qkv",
    "blocks.0.attn.qkv",
    "blocks.1.attn.qkv",
    "blocks.10.attn.qkv",
    "blocks.0.attn.qkv_norm",
    "blocks.0.attn.qkv.linear",
    "blocks.0.attn.pre_qkv",
    "blocks.0.mlp.fc1",
    "blocks.0.mlp.fc1_g",
    "blocks.0.mlp.fc1.base",
    "fc1.blocks.0.mlp",
    "stages.1.blocks.0.mlp.fc1",
    "layers.0.blocks.1.attn.qkv",
    "head",
    "head.fc",
    "heads.0.fc",
    "x.head.fc",
]
PATTERNS = [
    "qkv",
    "attn.qkv",
    "attn",
    "blocks.0",
    "blocks.1.attn.qkv",
    "0.attn.qkv",
    r"blocks\.\d\.attn",
    r"blocks\.\d+\..*",
    "^blocks.0.attn.qkv",
    "mlp.fc1",
    "fc1|qkv",
    "fc.",
    ".*mlp.*",
    "kv",
    "head",
    "(layers|blocks)",
    "(stages|blocks)",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_where_pefts_do(pattern: str, peft: Any) -> None:
    # At the start, in the middle and at the end of a path, whole names and parts of names.
    other = importlib.import_module("peft.utils.other")
    tuners = importlib.import_module("peft.tuners.tuners_utils")
    for second in ("fc1", "blocks.0.attn.qkv"):
        ranks, alphas = {pattern: 3, second: 5}, {second: 7, pattern: 11}
        fields: dict[str, Any] = {"r": 2, "lora_alpha": 6, "rank_pattern": ranks}
        for more in ({}, {"use_rslora": True}, {"alpha_pattern": alphas}):
            given = {"peft_type": "LORA", **fields, **more}
            config = AdapterConfig.from_dict(given)
            for path in PATHS:
                rank = ranks.get(other.get_pattern_key(ranks, path), 2)
                known: Any = more.get("alpha_pattern", {})
                alpha = known.get(other.get_pattern_key(known, path), 6)
                root = math.sqrt(rank) if more.get("use_rslora") else rank
                assert config.rank_of(path) == rank, path
                assert config.scaling(path) == alpha / root, path
    for fields in (
        {"target_modules": [pattern]},
        {"target_modules": pattern},
        {"target_modules": ["qkv", "fc1", "fc"], "exclude_modules": [pattern]},
        {"target_modules": ["qkv", "fc1", "fc"], "exclude_modules": pattern},
        {"target_modules": ["qkv", "fc1", "fc"], "modules_to_save": [pattern]},
        {"target_modules": [pattern], "layers_to_transform": [0]},
        {"target_modules": ["qkv", "fc1"], "layers_to_transform": [1], "layers_pattern": [pattern]},
        {"target_modules": ["qkv", "fc1"], "layers_to_transform": [0], "layers_pattern": "blocks"},
    ):
        ours = AdapterConfig.from_dict({"peft_type": "LORA", **fields})
        theirs = peft.LoraConfig(**fields)
        if isinstance(theirs.target_modules, set):
            theirs.target_modules = sorted(theirs.target_modules)
        for path in PATHS:
            found = tuners.check_target_module_exists(theirs, path)
            expected = bool(found) and not isinstance(found, tuners._ExcludedModule)
            assert ours.adapts(path) is expected, (fields, path)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_is_read_as_its_refusal_advises(
    peft: Any, weights: Callable[[str], Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    # PEFT's conversion leaves modules_to_save out, so that the classifier would be lost.
    config = peft.LoraConfig(
        r=4, target_modules=["qkv"], modules_to_save=["head"], init_lora_weights="pissa"
    )
    model = peft.get_peft_model(base_model(), config)
    start = tmp_path / "start"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(start)
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.mul_(1.3)
    model.eval()
    with torch.inference_mode():
        expected = model(X)
    model.save_pretrained(tmp_path / "trained")
    line = refused(main, *options(tmp_path / "trained", weights(VIT)))
    assert "path_initial_model_for_weight_conversion, and copy the tensors of modules_to" in line
    plain = tmp_path / "plain"
    model.save_pretrained(plain, path_initial_model_for_weight_conversion=str(start))
    tensors = load_file(plain / "adapter_model.safetensors")
    whole = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert not any("head" in name for name in tensors)
    save_file(base_model().state_dict(), tmp_path / "w.safetensors")
    line = refused(main, *options(plain, tmp_path / "w.safetensors"))
    assert "lacks head.weight" in line
    assert "PEFT's conversion of PiSSA or OLoRA leaves out" in line
    tensors |= {name: tensor for name, tensor in whole.items() if "head" in name}
    save_file(tensors, plain / "adapter_model.safetensors")
    check(plain, VIT, weights(VIT), expected)


@pytest.mark.parametrize(
    ("fields", "told"),
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
    told: str,
    adapted: Callable[..., Tensor],
    weights: Callable[[str], Path],
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    expected = adapted(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    if told:
        assert told in refused(main, *options(tmp_path / "a", weights(VIT)))
        tuned = load(tmp_path / "a", backbone=VIT, weights=weights(VIT), force=True)
        with torch.inference_mode():
            torch.testing.assert_close(tuned(X), expected, atol=1e-5, rtol=0)
    else:
        check(tmp_path / "a", VIT, weights(VIT), expected)


def test_a_classifier_below_a_prefix_of_the_weights_file_stays(
    adapted: Callable[..., Tensor], tmp_path: Path
) -> None:
    expected = adapted(tmp_path / "a", modules_to_save=None)
    state = {f"module.{name}": tensor for name, tensor in base_model().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    check(tmp_path / "a", VIT, tmp_path / "w.pth", expected)


def test_a_layers_pattern_that_peft_could_not_use_is_refused() -> None:
    fields = {"target_modules": ["qkv"], "layers_to_transform": [0]}
    with pytest.raises(CheckpointError, match="is no regular expression"):
        AdapterConfig.from_dict(
            {"peft_type": "LORA", **fields, "layers_pattern": [r"(?P<idx>blocks)"]}
        )
