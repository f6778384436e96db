"""What training changed in a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aoft_demo.actions.changes import SIDE, change_of
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.tasks.shared_fleet import bundled_checkpoints, open_shared_fleet
from aoft_deploy import load, merge
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.trained_backbone import trained_backbone


def test_the_change_is_that_of_the_merged_model(session: Session) -> None:
    path = bundled_checkpoints()[0]
    change, tuned = change_of(session, path.stem), load(path)
    heads = sum(tuned.backbone.get_parameter(name).numel() for name in tuned.classifier)
    trained = sum(parameter.numel() for parameter in tuned.trained().values())
    assert (change.trained, change.classifier) == (trained - heads, heads)
    merged = merge(tuned)
    assert change.total == sum(p.numel() for p in merged.parameters()) - heads
    assert change.layer is not None and 0 < change.layer.ratio
    module, _, part = change.layer.name.rpartition(".")
    weight = merged.get_parameter(f"{module}.weight").detach().numpy()
    rows, columns = change.layer.shape
    start = {"q": 0, "k": 1, "v": 2}[part] * rows
    shown = weight[start : start + SIDE, :SIDE]
    assert weight.shape == (3 * rows, columns)
    assert change.layer.before + change.layer.change == pytest.approx(shown, abs=1e-6)
    assert np.abs(change.layer.change).max() > 0
    plain, _ = trained_backbone(path, read_checkpoint(path), BackboneSource())
    ratios = {}
    for name, before in plain.named_parameters():
        if not name.endswith("attn.qkv.weight"):
            continue
        parts = zip(
            before.detach().chunk(3), merged.get_parameter(name).detach().chunk(3), strict=True
        )
        for role, (old, new) in zip("qkv", parts, strict=True):
            ratios[f"{name.removesuffix('.weight')}.{role}"] = float(
                (new - old).norm() / old.norm()
            )
    assert max(ratios, key=lambda name: ratios[name]) == change.layer.name
    assert change.layer.ratio == pytest.approx(max(ratios.values()), rel=1e-4)


@pytest.mark.parametrize("method", ["vpt", "rlrr"])
def test_prompts_change_no_weights(
    method: str, make_checkpoint: Callable[..., Path], backbone_weights: Path, tmp_path: Path
) -> None:
    shared = open_shared_fleet([make_checkpoint(method)], tmp_path, weights=backbone_weights)
    sessions = SessionRegistry(shared)
    try:
        session = sessions.get("a")
        change = change_of(session, next(iter(session.tasks)))
        assert (change.layer is None) is (method == "vpt") and change.trained > 0
    finally:
        sessions.close()
