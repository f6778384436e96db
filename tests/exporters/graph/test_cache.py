"""A backbone's graph is traced once; the cached graph has no weights and agrees with the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch

from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.export.fleet import export_fleet
from aoft_deploy.export.merged import export_merged
from aoft_exporters.graph import cache
from aoft_exporters.graph.cache import graph_of
from aoft_exporters.onnx import exporter


def fail_if_traced(*arguments: Any) -> Any:
    raise AssertionError("traced again")


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AOFT_CACHE_DIR", str(tmp_path / "cache_dir"))
    return tmp_path / "cache_dir"


def example(side: int = 32) -> dict[str, tuple[torch.Tensor, str]]:
    return {"pixel_values": (torch.zeros(2, 3, side, side), "batch")}


def logits(proto: Any, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    ort: Any = onnxruntime
    session = ort.InferenceSession(proto.SerializeToString())
    result: np.ndarray = session.run(None, {"pixel_values": x})[0]
    return result


def test_a_second_task_of_a_backbone_is_exported_without_tracing(
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = make_checkpoint("lora")
    export_merged(first, tmp_path / "a.onnx", backbone=BackboneSource(weights=backbone_weights))
    assert len(list(cache_dir.iterdir())) == 1
    monkeypatch.setattr(cache, "trace", fail_if_traced)
    for method in ("rlrr", "aoft-adapter"):  # merged, all are the plain backbone
        other = make_checkpoint(method)
        exported = export_merged(
            other, tmp_path / f"{method}.onnx", backbone=BackboneSource(weights=backbone_weights)
        )
        assert exported.report.agreement == 1.0
    with pytest.raises(AssertionError, match="traced again"):
        prompts = make_checkpoint("vpt")
        export_merged(
            prompts, tmp_path / "p.onnx", backbone=BackboneSource(weights=backbone_weights)
        )
    with pytest.raises(AssertionError, match="traced again"):
        export_merged(
            first,
            tmp_path / "u.onnx",
            uint8=True,
            backbone=BackboneSource(weights=backbone_weights),
        )
    again = export_merged(
        first, tmp_path / "c.onnx", backbone=BackboneSource(weights=backbone_weights)
    )
    assert again.report.agreement == 1.0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()


def test_a_cached_graph_has_no_weights_and_gives_the_models_logits(cache_dir: Path) -> None:
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)
        models.append(model.eval())
    x = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    graph_of(models[0], example(), {"name": "tiny"})
    file = next(cache_dir.iterdir())
    assert 10_000 < file.stat().st_size < 300_000 < sum(p.numel() for p in models[0].parameters())
    filled, direct = (graph_of(models[1], example(), kind) for kind in ({"name": "tiny"}, None))
    assert [n.op_type for n in filled.graph.node] == [n.op_type for n in direct.graph.node]
    onnx.checker.check_model(filled)
    with torch.no_grad():
        expected = models[1](torch.from_numpy(x)).numpy()
    assert np.abs(logits(filled, x) - expected).max() < 1e-5
    assert not any(tensor.doc_string for tensor in filled.graph.initializer)


@pytest.mark.parametrize(("method", "form"), [("lora", "folded"), ("rlrr", "mixed")])
def test_a_fleets_graph_is_cached_too(
    method: str,
    form: str,
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = BackboneSource(weights=backbone_weights)
    task = make_checkpoint(method)
    first = export_fleet([task], tmp_path / "a.onnx", form=form, backbone=backbone)
    monkeypatch.setattr(cache, "trace", fail_if_traced)
    second = export_fleet([task], tmp_path / "b.onnx", form=form, backbone=backbone)
    assert second.report.agreement == 1
    assert (first.size, first.report.max_abs) == (second.size, second.report.max_abs)


@pytest.mark.parametrize(("name", "is_cached"), [("test_resnet", False), ("test_convnext", True)])
def test_a_graph_is_cached_only_without_weights_in_folded_constants(
    name: str, is_cached: bool, cache_dir: Path
) -> None:
    model = timm.create_model(name, num_classes=4).eval()
    x = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.rand_like(tensor))
            expected = model(torch.from_numpy(x)).numpy()
        computed = logits(graph_of(model, example(64), {"name": name}), x)
        assert np.abs(computed - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    # BatchNorm is folded, LayerScale is stored in another shape
    assert (next(cache_dir.iterdir()).stat().st_size > 0) == is_cached


class Scaled(torch.nn.Module):
    """A model with a parameter without axes, which constant folding replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.linear(pixel_values.mean((2, 3))) * (self.scale + 1)  # type: ignore[no-any-return]


def test_a_folded_parameter_without_axes_prevents_caching_only(cache_dir: Path) -> None:
    model, x = Scaled().eval(), np.ones((2, 3, 8, 8), np.float32)
    computed = logits(graph_of(model, example(8), {"name": "scaled"}), x)
    with torch.no_grad():
        np.testing.assert_allclose(computed, model(torch.from_numpy(x)), atol=1e-5)
    assert next(cache_dir.iterdir()).stat().st_size == 0


def test_models_without_a_kind_are_not_cached(cache_dir: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    for heads in (3, 6):  # repr and shapes are equal
        torch.manual_seed(heads)
        name: Any = "vit_tiny_patch16_224"
        model = timm.create_model(name, img_size=32, depth=1, num_heads=heads, num_classes=4)
        computed = logits(graph_of(model.eval(), example(), None), x)
        with torch.no_grad():
            assert np.abs(computed - model(torch.from_numpy(x)).numpy()).max() < 1e-5
    assert not cache_dir.exists()


def test_a_damaged_cached_graph_is_traced_again(
    checkpoint: Path, backbone_weights: Path, cache_dir: Path, tmp_path: Path
) -> None:
    export_merged(
        checkpoint, tmp_path / "a.onnx", backbone=BackboneSource(weights=backbone_weights)
    )
    file = next(cache_dir.iterdir())
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    export_merged(
        checkpoint, tmp_path / "b.onnx", backbone=BackboneSource(weights=backbone_weights)
    )
    assert file.read_bytes() == content
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_nothing_is_cached_if_the_cache_is_disabled_or_not_writable(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AOFT_CACHE_DIR", "")
    export_merged(
        checkpoint, tmp_path / "a.onnx", backbone=BackboneSource(weights=backbone_weights)
    )
    (tmp_path / "file").touch()
    monkeypatch.setenv("AOFT_CACHE_DIR", str(tmp_path / "file"))
    export_merged(
        checkpoint, tmp_path / "b.onnx", backbone=BackboneSource(weights=backbone_weights)
    )
    assert exporter.load(tmp_path / "b.onnx").info == exporter.load(tmp_path / "a.onnx").info
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("package", ["aoft_deploy", "aoft_exporters"])
def test_a_change_of_source_code_changes_the_cache_key(
    package: str, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / package / "room" / "inner"
    room.mkdir(parents=True)
    (tmp_path / package / "__init__.py").touch()
    formula = room / "formula.py"
    formula.write_text("SCALE = 1\n")
    monkeypatch.setattr(f"{package}.__file__", str(tmp_path / package / "__init__.py"))
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4).eval()

    def graphs() -> int:
        graph_of(model, example(), {"identity": "same"})
        return len(list(cache_dir.iterdir()))

    assert graphs() == 1
    assert graphs() == 1
    formula.write_text("SCALE = 2\n")
    assert graphs() == 2
