"""adapter_config.json: the same modules, ranks and factors as in PEFT, and only plain LoRA."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft_models import VIT, options

from aoft_deploy.checkpoints.peft_adapter import read_peft_folder
from aoft_deploy.checkpoints.peft_config import AdapterConfig
from aoft_deploy.cli.export import main
from aoft_deploy.errors import CheckpointError

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
    ({"a_field_of_tomorrow": 0.5}, "a_field_of_tomorrow is 0.5: this field is unknown"),
    ({"a_field_of_tomorrow": "x" * 9999}, "a_field_of_tomorrow is 'xxx.*…: this field is unknown"),
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
def test_a_config_of_more_than_plain_lora_is_refused(
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


def test_every_config_field_of_the_installed_peft_is_known_or_off_by_default(peft: Any) -> None:
    plain = peft.LoraConfig(target_modules=["qkv"]).to_dict()
    plain = {key: list(v) if isinstance(v, set) else v for key, v in plain.items()}
    assert AdapterConfig.from_dict(plain | {"peft_type": "LORA"}).targets == ["qkv"]


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
def test_patterns_match_the_same_paths_as_in_peft(pattern: str, peft: Any) -> None:
    # Full names and parts of names, at the start, in the middle and at the end of a path.
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


def test_a_layers_pattern_that_peft_could_not_use_is_refused() -> None:
    fields = {"target_modules": ["qkv"], "layers_to_transform": [0]}
    with pytest.raises(CheckpointError, match="is no regular expression"):
        AdapterConfig.from_dict(
            {"peft_type": "LORA", **fields, "layers_pattern": [r"(?P<idx>blocks)"]}
        )
