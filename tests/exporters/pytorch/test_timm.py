from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from specs import export_spec

from aoft_deploy.cli.export import main
from aoft_deploy.errors import ArtefactError, OutputError, SettingError
from aoft_deploy.export.merged import export_merged
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.methods import method_names
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.pytorch import timm_exporter as exporter

HALF = (0.5, 0.5, 0.5)
SPEC = export_spec(16, False, HALF, HALF, {})


@pytest.fixture(scope="module")
def artefact(
    checkpoint: Path, backbone_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("timm") / "task.safetensors"
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    assert main([*map(str, options), "--to", "timm", "-o", str(path)]) == 0
    return path


PROMPTS = ("aoft-vpt", "aoft-vpt-star", "vpt")


@pytest.mark.parametrize("method", PROMPTS)
def test_prompts_are_refused(
    method: str,
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    refused: Callable[..., str],
) -> None:
    options = ["--merge", make_checkpoint(method), "--backbone-weights", backbone_weights]
    assert "Prompts are tokens of the graph" in refused(main, *options, "--to", "timm")


@pytest.mark.parametrize("method", [m for m in method_names() if m not in PROMPTS])
def test_timm_loads_every_methods_export_strictly_and_gives_the_unmerged_logits(
    method: str,
    make_checkpoint: Callable[..., Path],
    make_tuned: Callable[..., TunedModel],
    backbone_name: str,
    backbone_args: dict[str, Any],
    backbone_weights: Path,
) -> None:
    checkpoint = make_checkpoint(method)
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    assert main([*map(str, options), "--to", "timm"]) == 0
    artefact = checkpoint.with_suffix(".safetensors")
    # timm's create_model loads strictly: it raises for any missing or additional tensor.
    model = timm.create_model(
        backbone_name, num_classes=5, checkpoint_path=str(artefact), **backbone_args
    ).eval()
    assert list(load_file(artefact)) == sorted(model.state_dict())
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tuned = make_tuned(method)
    with torch.inference_mode():
        logits, expected = model(x), tuned(x)
        base = timm.create_model(backbone_name, num_classes=5, **backbone_args).eval()
        head = {n: t for n, t in load_file(artefact).items() if n.startswith("head.")}
        base.load_state_dict(load_file(backbone_weights) | head)
        unchanged = base(x)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    assert ((unchanged - expected).abs().max() > 1e-2) == (method != "linear")


def test_unchanged_weights_keep_every_bit(
    backbone_weights: Path, make_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = make_checkpoint("lora", targets=["v"])
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    assert main([*map(str, options), "--to", "timm"]) == 0
    merged, base = load_file(checkpoint.with_suffix(".safetensors")), load_file(backbone_weights)
    changed = {n for n, t in base.items() if not torch.equal(t, merged[n])}
    assert changed == {"blocks.0.attn.qkv.weight"}
    name = changed.pop()
    assert torch.equal(merged[name][:64], base[name][:64])


def test_the_metadata_describe_the_task(artefact: Path, classes: tuple[str, ...]) -> None:
    with safe_open(artefact, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == list(classes)
    assert json.loads(metadata["backbone"])["name"] == "aoft_vit_nano"
    assert json.loads(metadata["preprocessing"])["size"] == 16


def test_the_engine_gives_the_unmerged_logits_of_the_model(
    artefact: Path, make_tuned: Callable[..., TunedModel]
) -> None:
    engine = exporter.load(artefact)
    assert not engine.takes_pixels
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = make_tuned("rlrr")(x).numpy()
    np.testing.assert_allclose(engine.run(x.numpy()), expected, atol=2e-5, rtol=0)


def test_the_exported_model_is_not_changed(
    make_tuned: Callable[..., TunedModel], tmp_path: Path
) -> None:
    model = merge(make_tuned("rlrr"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    exporter.export(model, tmp_path / "a.safetensors", SPEC)
    after = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_pixels_as_input_are_refused(make_tuned: Callable[..., TunedModel], tmp_path: Path) -> None:
    spec = export_spec(16, True, HALF, HALF, {})
    with pytest.raises(SettingError, match="`uint8` needs a graph: export to onnx"):
        exporter.export(merge(make_tuned()), tmp_path / "a.safetensors", spec)


def test_a_file_that_cannot_be_written_is_refused(
    make_tuned: Callable[..., TunedModel], tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=r"a\.safetensors could not be written"):
        exporter.export(merge(make_tuned()), tmp_path / "missing" / "a.safetensors", SPEC)


def tampered(source: Path, target: Path, **metadata: object) -> Path:
    with safe_open(source, "pt") as file:
        values = dict(file.metadata())
    changes = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    save_file(load_file(source), target, {**values, **changes})
    return target


@pytest.mark.parametrize(
    "metadata",
    [
        {"backbone": "no JSON"},
        {"backbone": [1]},
        {"backbone": {"name": "aoft_vit_nano"}},
        {"backbone": {"name": "no_such_model", "digest": "", "origin": "", "args": {}}},
        {"backbone": {"name": "resnet10t", "digest": "", "origin": "", "args": {}}},
        {"classes": "7"},
        {"classes": ["a", "b"]},
    ],
    ids=str,
)
def test_a_file_with_tampered_metadata_is_refused(
    metadata: dict[str, Any], artefact: Path, tmp_path: Path
) -> None:
    path = tampered(artefact, tmp_path / "a.safetensors", **metadata)
    with pytest.raises(
        ArtefactError, match=r"is no (state dict of the timm exporter|safetensors file)"
    ):
        exporter.load(path)


def test_metadata_cannot_make_timm_read_another_file(artefact: Path, tmp_path: Path) -> None:
    args = {"img_size": 16, "pretrained_cfg": {"file": str(tmp_path / "other.pth")}}
    backbone = {"name": "aoft_vit_nano", "digest": "", "origin": "", "args": args}
    path = tampered(artefact, tmp_path / "a.safetensors", backbone=backbone)
    with pytest.raises(ArtefactError, match="must not be made with pretrained_cfg"):
        exporter.load(path)


def test_a_state_dict_of_another_program_is_refused(backbone_weights: Path) -> None:
    with pytest.raises(
        ArtefactError, match=r"is no (state dict of the timm exporter|safetensors file)"
    ):
        exporter.load(backbone_weights)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept: float, artefact: Path, tmp_path: Path) -> None:
    data = artefact.read_bytes()
    path = tmp_path / "a.safetensors"
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(
        ArtefactError, match=r"is no (state dict of the timm exporter|safetensors file)"
    ):
        exporter.load(path)


def test_the_file_loads_into_timms_own_architecture(artefact: Path) -> None:
    size: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 8,
        "depth": 1,
        "embed_dim": 32,
        "num_heads": 2,
    }
    timm.create_model("vit_tiny_patch16_224", num_classes=5, checkpoint_path=str(artefact), **size)


def test_the_bundled_backbone_is_known_in_a_process_that_only_predicts(
    root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "light.safetensors"
    export_merged(root / "demo" / "aoft_demo" / "bundled" / "light.ckpt", path, to="timm")
    code = (
        "import sys; from pathlib import Path\n"
        "from aoft_deploy.artefacts.prediction import load_classifier\n"
        "print(len(load_classifier(Path(sys.argv[1])).classes))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "2\n"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_below_fp32_weights_and_arithmetic_are_in_the_precision(
    precision: str,
    dtype: torch.dtype,
    checkpoint: Path,
    backbone_weights: Path,
    backbone_name: str,
    backbone_args: dict[str, Any],
    photos: list[Path],
    make_tuned: Callable[..., TunedModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "half.safetensors"
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    options += ["--to", "timm", "--precision", precision, "-o", path]
    options += ["--images", *photos, "--min-agreement", "0"]
    assert main([str(option) for option in options]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith(f"checkpoint_path='{path}').to(torch.{str(dtype).partition('.')[2]})")
    merged = merge(make_tuned("rlrr")).state_dict()
    stored = load_file(path)
    assert all(torch.equal(stored[name], tensor.to(dtype)) for name, tensor in merged.items())
    model = timm.create_model(
        backbone_name, num_classes=5, checkpoint_path=str(path), **backbone_args
    )
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.to(dtype).eval()(x.to(dtype)).float()
    assert torch.equal(torch.from_numpy(exporter.load(path).run(x.numpy())), expected)
    manifest = json.loads(path.with_name("half.safetensors.json").read_text("utf-8"))
    assert manifest["precision"] == precision
    assert manifest["verification"]["arithmetic"] == f"{precision} by torch on CPU"


def test_a_precision_of_a_later_version_is_refused(artefact: Path, tmp_path: Path) -> None:
    path = tampered(artefact, tmp_path / "a.safetensors", precision="fp4")
    with pytest.raises(
        ArtefactError, match="is in the precision 'fp4', but must be in one of fp32"
    ):
        exporter.load(path)
