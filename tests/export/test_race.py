"""The criterion of aoft-export --to auto."""

from __future__ import annotations

import json

import pytest

from aoft_deploy.export.race import Candidate, Race, criterion


def race(*ratios: tuple[str, float, float]) -> Race:
    """A race of candidates named ``exporter precision``, at batch sizes 1 and 8."""
    names = {name: name.partition(" ") for name, _, _ in ratios}
    return Race.of(
        [Candidate(names[n][0], names[n][2], {1: one, 8: eight}) for n, one, eight in ratios]
    )


@pytest.mark.parametrize(
    ("ratios", "wanted"),
    [
        # 3.1 · 0.84 is far above 1, but at batch 8 it is slower
        ([("onnx int8", 3.1, 0.84)], "onnx fp32"),
        ([("onnx int8", 0.99, 5)], "onnx fp32"),
        ([("onnx int8", 1, 1.01)], "onnx int8"),
        ([("openvino fp32", 4, 0.9)], "onnx fp32"),
        ([("openvino fp32", 1.1, 1.2)], "openvino fp32"),
        # slower than the other runtime's fp32
        ([("openvino fp32", 2, 2), ("openvino int8", 6, 1.9)], "openvino fp32"),
        ([("openvino fp32", 2, 2), ("openvino int8", 2.1, 2)], "openvino int8"),
        # the other runtime's fp32 is slower at batch 1, so int8 is not compared with it
        ([("openvino fp32", 0.9, 3), ("onnx int8", 1.5, 2)], "onnx int8"),
        ([("onnx int8", 2, 3), ("openvino bf16", 3, 1.9)], "onnx int8"),
        ([("onnx int8", 2, 2), ("openvino bf16", 3, 1.9)], "openvino bf16"),
    ],
)
def test_the_choice_is_not_slower_than_fp32_at_any_batch_size(
    ratios: list[tuple[str, float, float]], wanted: str
) -> None:
    assert race(("onnx fp32", 1, 1), *ratios).chosen.name == wanted


def test_the_first_timed_candidate_replaces_one_that_was_left_out() -> None:
    left_out = Candidate("onnx", "fp32", reason="onnxruntime is not installed")
    timed = [Candidate("openvino", "fp32", {4: 1.0}), Candidate("openvino", "int8", {4: 0.5})]
    result = Race.of([left_out, *timed])
    assert result.chosen == timed[0]
    assert result.batches == (4,)
    assert [each.name for each in result.candidates] == [c.name for c in (left_out, *timed)]


def test_the_manifest_holds_criterion_figures_and_the_fastest_at_each_batch_size() -> None:
    result = race(("onnx fp32", 1, 1), ("onnx int8", 1.53, 0.84)).to_dict()
    assert result["criterion"] == criterion([1, 8])
    assert result["fastest"] == {1: "onnx int8", 8: "onnx fp32"}
    assert result["among"][1] == {
        "exporter": "onnx",
        "precision": "int8",
        "ratios": {1: 1.53, 8: 0.84},
        "slower_than_fp32_at": [8],
    }
    assert json.loads(json.dumps(result))["among"][0]["ratios"] == {"1": 1, "8": 1}


def test_the_criterion_names_the_batch_sizes() -> None:
    assert criterion([1]) == "the verified artefact that is fastest at batch 1"
    assert "fastest on average at batch 1 and 8, and slower than fp32 at none" in criterion([1, 8])
