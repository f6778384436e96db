"""Separate maps of q, k and v in fleets give the logits of the packed map."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch

from aoft_deploy.artefacts.engine import FleetTables
from aoft_deploy.artefacts.spec import ExportSpec, InputSpec
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.multitask import MixedModel
from aoft_deploy.tuning.task_layout import Layout, classifier_rows
from aoft_exporters.graph.models import fleet_graph

TASKS, CLASSES = 3, 4
HALF = (0.5, 0.5, 0.5)


def fleet(method: str, **settings: Any) -> tuple[MixedModel, FleetTables]:
    """A fleet of random tasks on a small backbone with random weights and biases."""
    torch.manual_seed(0)
    backbone = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=CLASSES
    ).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tuned = attach(backbone, method, **settings).eval()
    rng = np.random.default_rng(1)
    heads = classifier_rows(tuned).detach().numpy()
    tables = FleetTables(
        bank=0.1 * rng.standard_normal((TASKS, Layout(tuned.updates).row_length), np.float32),
        heads=np.tile(heads, (TASKS, 1)),
        first=CLASSES * np.arange(TASKS, dtype=np.int64),
        count=np.full(TASKS, CLASSES, np.int64),
        columns=np.arange(CLASSES, dtype=np.int64),
    )
    return MixedModel(tuned), tables


def logits(proto: Any, tables: FleetTables) -> Any:
    """Logits of a batch of four images of three tasks."""
    import onnxruntime

    ort: Any = onnxruntime
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(2).standard_normal((4, 3, 32, 32), np.float32)
    task = np.array([2, 0, 1, 2])
    feed = {"pixel_values": images, "task": task, **tables.by_name()}
    taken = {value.name for value in session.get_inputs()}
    return session.run(["logits"], {name: feed[name] for name in taken})[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings", "thin"),
    [
        ("aoft-lora-star", {"rank": 4}, "qv"),
        ("bitfit", {}, None),
    ],
)
def test_only_the_maps_with_task_parameters_get_a_thin_product(
    method: str, settings: dict[str, Any], thin: str | None
) -> None:
    model, tables = fleet(method, **settings)
    spec = ExportSpec(InputSpec(32, 32, False, HALF, HALF), {})
    packed = fleet_graph(model, spec, tables)
    separate = fleet_graph(model, spec, tables, separate=True)
    onnx.checker.check_model(separate, full_check=True)
    expected = logits(packed, tables)
    assert np.ptp(expected) > 0.1
    assert np.abs(expected[0] - logits(packed, _shuffled(tables))[0]).max() > 1e-3
    np.testing.assert_allclose(logits(separate, tables), expected, atol=2e-5, rtol=0)
    names = {node.output[0] for node in separate.graph.node}
    found = {letter for letter in "qkv" if f"attention_0/split/{letter}_thin" in names}
    assert found == set(thin or "")
    weights = {tensor.name for tensor in separate.graph.initializer}
    for letter in "qkv":
        for name in ("weight", "bias"):
            stored = f"blocks.0.attn.qkv.{name}.{letter}" in weights
            assert stored == (thin is not None)


def _shuffled(tables: FleetTables) -> FleetTables:
    """The tables with the tasks' parameters in another order."""
    return FleetTables(**{**tables.by_name(), "bank": tables.bank[::-1].copy()})
