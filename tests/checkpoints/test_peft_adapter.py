"""PEFT LoRA folders: the logits of PEFT itself, and what is refused."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from peft_models import CLASSES, EVA, PREFIX, VIT, WIDTH, X, base_model, check, options
from safetensors.torch import load_file, save_file
from safetensors_faults import FAULTS, faulty
from torch import Tensor

from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.checkpoints.peft_adapter import read_peft_folder
from aoft_deploy.cli.export import main
from aoft_deploy.cli.inspect import describe
from aoft_deploy.errors import CheckpointError

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


def check_onnx(folder: Path, name: str, weights: Path, expected: Tensor) -> None:
    """The ONNX artefact of the command gives PEFT's logits."""
    output = folder.parent / "a.onnx"
    assert main([str(o) for o in options(folder, weights, "-o", output, name=name)]) == 0
    logits = load_artefact(output).run(X.numpy())
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_of_peft_gives_pefts_unmerged_logits(
    config: dict[str, Any],
    adapted: Callable[..., Tensor],
    weights: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    expected = adapted(tmp_path / "a", **config)
    check(tmp_path / "a", VIT, weights(VIT), expected)


@pytest.mark.parametrize("kind", ["plain", "rslora", "rank pattern"])
def test_an_exported_folder_of_peft_gives_pefts_unmerged_logits(
    kind: str, adapted: Callable[..., Tensor], weights: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = adapted(tmp_path / "a", **CONFIGS[kind])
    check_onnx(tmp_path / "a", VIT, weights(VIT), expected)


def test_separate_q_k_and_v_and_a_gated_mlp_give_pefts_logits(
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


def test_inspect_describes_a_folder_of_peft(adapted: Callable[..., Tensor], tmp_path: Path) -> None:
    adapted(tmp_path / "a", use_rslora=True)
    found = describe(tmp_path / "a")
    assert found["kind"] == "PEFT LoRA folder"
    assert found["ranks"] == {f"blocks.{i}.attn.qkv": 4 for i in range(2)}
    assert found["factors"]["blocks.0.attn.qkv"] == 8 / math.sqrt(4)
    assert found["trained_parameters"] == 2 * 4 * (WIDTH + 3 * WIDTH) + CLASSES * (WIDTH + 1)
    assert found["manifest"] == "none"
    assert "method" not in found


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
        ("adapter_config.json", None, r"a PEFT adapter without adapter_config\.json"),
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
        describe(copy)


@pytest.mark.parametrize("length", [3, 9, 200, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    length: float, copy: Path, weights: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    path = copy / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: length if isinstance(length, int) else int(length * len(data))])
    assert "is no safetensors file" in refused(main, *options(copy, weights(VIT)))


@pytest.mark.parametrize("fault", ["twice", "path", "20,000 tensors"])
def test_a_faulty_header_is_refused(
    fault: str, saved: Path, copy: Path, weights: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    name = "adapter_model.safetensors"
    faulty(saved / name, copy / name, fault)
    assert re.search(FAULTS[fault][1], refused(main, *options(copy, weights(VIT))))


def test_a_pickled_adapter_is_refused_without_reading_it(
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
    folder = tmp_path / "all"
    one_of = f"give one of {folder / 'flowers'}, {folder / 'pets'}"
    assert line == f"{folder} is a folder of PEFT adapters: {one_of}."


def test_a_folder_without_matrices_is_refused(
    copy: Path, weights: Callable[[str], Path], refused: Callable[..., str]
) -> None:
    path = copy / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "lora" not in n}, path)
    assert "holds no LoRA matrices" in refused(main, *options(copy, weights(VIT)))


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
    # The linear maps of a class-attention pooling are no sites.
    name = "vit_tiny_patch16_224"
    size: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2, "global_pool": "map"}
    model = timm.create_model(name, num_classes=3, **size)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["kv"]))
    model.save_pretrained(tmp_path / "a")
    plain = timm.create_model(name, num_classes=3, **size)
    with pytest.raises(CheckpointError, match=r"changes attn_pool\.kv, which is no linear map of"):
        read_peft_folder(tmp_path / "a").placed(plain)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_can_be_read_after_the_conversion_that_its_refusal_advises(
    peft: Any, weights: Callable[[str], Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    # PEFT's conversion leaves out modules_to_save, which would lose the classifier.
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
