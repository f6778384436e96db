from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.registry import exporter_names, get_exporter
from aoft_deploy.artefacts.sampling import share_shown
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.artefacts.verification import (
    BATCH_SIZES,
    SOFTMAX,
    Bar,
    Comparison,
    Report,
    random_pixels,
    verify,
)
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.classes import Classes
from aoft_deploy.cli.export import main
from aoft_deploy.errors import VerificationError
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions, bar_for

Logits = NDArray[np.float32]
Answer = Callable[[NDArray[Any], Logits], Any]
"""Maps a batch of inputs and the merged model's logits to the answer of a fake engine."""


def lookup(table: Logits) -> Callable[[NDArray[np.uint8]], Logits]:
    """A model that returns rows of ``table``. The red value of the first pixel is the row index."""
    return lambda batch: table[batch[:, 0, 0, 0]]


def numbered(count: int) -> NDArray[np.uint8]:
    pixels = np.zeros((count, 2, 2, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(count)
    return pixels


EXPECTED = np.array([[0, 1, 0.5], [4, 2, -8], [1, 0, 0], [0, 0, 3]], np.float32)


def test_equal_answers_give_a_report_of_zeros() -> None:
    report = verify(EXPECTED, lookup(EXPECTED), numbered(4), bar=Bar(1e-6))
    assert report == Report(4, (1, 2, 7), 0.0, 0.0, 1.0, 8e-6)
    assert report.to_dict()["batch_sizes"] == (1, 2, 7)


def test_the_report_follows_from_the_logits() -> None:
    answers = EXPECTED.copy()
    answers[1, 2] += 0.25
    answers[0] = [1.125, 1, 0.5]  # another top class, and the largest difference
    report = verify(EXPECTED, lookup(answers), numbered(4), bar=Bar(0.25))
    assert report.max_abs == 1.125
    assert report.relative == 1.125 / 8
    assert report.agreement == 0.75
    assert report.tolerance == 0.25 * 8
    assert report.images == 4


def test_the_tolerance_does_not_shrink_below_logits_of_one() -> None:
    small: Logits = EXPECTED / np.float32(800)
    report = verify(
        small, lookup(np.add(small, 9e-4, dtype=np.float32)), numbered(4), bar=Bar(1e-3)
    )
    assert report.tolerance == 1e-3
    with pytest.raises(VerificationError, match=r"at most 1\.00e-03 is allowed"):
        verify(
            small,
            lookup(np.add(small, 2e-3, dtype=np.float32)),
            numbered(4),
            bar=Bar(1e-3),
        )


TOLERANCES = {
    "aoti": 5e-5,
    "onnx": 5e-5,
    "openvino": 5e-5,
    "peft": 1e-5,
    "tensorrt": 1e-4,
    "timm": 5e-5,
    "triton": 5e-5,
    "triton-tensorrt": 1e-4,
}
"""Documented tolerance of every exporter at fp32, for logits up to 1."""


@pytest.mark.parametrize("largest", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("to", exporter_names())
def test_differences_just_beyond_the_tolerance_of_an_exporter_are_refused(
    to: str, largest: float
) -> None:
    bar = bar_for(get_exporter(to), "fp32", VerifyOptions())
    assert bar == Bar(TOLERANCES[to])
    allowed = TOLERANCES[to] * max(1.0, largest)
    expected = np.zeros((4, 3), np.float32)
    expected[2, 1] = -largest
    for place in ((0, 0), (3, 2)):
        for sign in (-1, 1):
            answers = expected.copy()
            answers[place] = sign * allowed * (1 - 1e-3)
            assert verify(expected, lookup(answers), numbered(4), bar=bar).tolerance
            answers[place] = sign * allowed * (1 + 1e-3)
            with pytest.raises(VerificationError, match=f"at most {allowed:.2e} is allowed"):
                verify(expected, lookup(answers), numbered(4), bar=bar)


@pytest.mark.parametrize(("agreeing", "holds"), [(100, True), (99, True), (98, False)])
def test_below_fp32_the_share_of_equal_top_classes_decides(agreeing: int, holds: bool) -> None:
    bar = bar_for(get_exporter("onnx"), "int8", VerifyOptions([Path("photos")]))
    expected = np.tile(np.array([[1, 0]], np.float32), (100, 1))
    answers = expected.copy()
    answers[agreeing:] = [0, 1e6]
    if holds:
        report = verify(expected, lookup(answers), numbered(100), bar=bar)
        assert report.agreement == agreeing / 100
        return
    with pytest.raises(VerificationError, match=r"decisions .* agree .* in 98\.00% \(98 of 100\)"):
        verify(expected, lookup(answers), numbered(100), bar=bar)


def test_each_label_of_a_sigmoid_is_a_decision() -> None:
    bar, labels = Bar(float("inf"), 0.9), Classes("ab", "sigmoid")
    expected = np.tile(np.array([[1, -1]], np.float32), (10, 1))
    answers = expected.copy()
    answers[:2] = [0.1, 0.1]  # the same top class, and another answer for b
    report = verify(expected, lookup(answers), numbered(10), bar=bar, classes=labels)
    assert report.agreement == 18 / 20
    assert verify(expected, lookup(answers), numbered(10), bar=bar).agreement == 1
    answers[2] = [1, 0.1]
    with pytest.raises(VerificationError, match=r"in 85\.00% \(17 of 20\), but at least 90\.00%"):
        verify(expected, lookup(answers), numbered(10), bar=bar, classes=labels)


def test_of_plain_values_only_the_differences_count() -> None:
    bar, values = Bar(float("inf"), 0.99), Classes("ab", "none")
    answers = EXPECTED[:, :2] + np.float32(0.03)  # largest value 4
    expected = EXPECTED[:, :2]
    report = verify(expected, lookup(answers), numbered(4), bar=bar, classes=values)
    assert report.agreement == pytest.approx(1 - 0.03 / 4, abs=1e-6)
    answers[1, 0] += 0.04
    with pytest.raises(VerificationError, match=r"by 1\.75% of the largest, but at most 1\.00% is"):
        verify(expected, lookup(answers), numbered(4), bar=bar, classes=values)


def test_logits_of_zero_have_no_relative_error() -> None:
    zeros = np.zeros((4, 3), np.float32)
    assert verify(zeros, lookup(zeros), numbered(4), bar=Bar(1e-6)).relative == 0.0


def test_the_report_states_the_share_shown_only_where_the_agreement_decides() -> None:
    run = lookup(EXPECTED)
    report = verify(EXPECTED, run, numbered(4), bar=Bar(float("inf"), 0.5))
    assert report.agreement_shown == share_shown(4, 4)
    assert verify(EXPECTED, run, numbered(4), bar=Bar(1e-6)).agreement_shown is None


def test_the_share_shown_of_a_fleet_is_that_of_the_task_that_agrees_least() -> None:
    comparison = Comparison(1.0, Bar(float("inf")))
    right, wrong = np.array([[1, 0]], np.float32), np.array([[0, 1]], np.float32)
    for image in range(20):
        comparison.add(right, right, 7, SOFTMAX, "task 0")
        comparison.add(wrong if image < 3 else right, right, 7, SOFTMAX, "task 1")
    report = comparison.report(20, BATCH_SIZES)
    assert report.agreement == 37 / 40
    assert report.agreement_shown == share_shown(17, 20)


def test_all_images_run_once_at_the_largest_batch_size_and_one_batch_at_the_others() -> None:
    seen: list[int] = []

    def candidate(batch: NDArray[np.uint8]) -> Logits:
        seen.append(len(batch))
        return EXPECTED[batch[:, 0, 0, 0] % 4]

    table = np.tile(EXPECTED, (3, 1))[:9]
    verify(table, candidate, numbered(9), bar=Bar(1e-6))
    assert BATCH_SIZES == (1, 2, 7)
    assert seen == [1, 2, 7, 2]


@pytest.mark.parametrize("size", BATCH_SIZES)
def test_a_difference_at_a_single_batch_size_is_found(size: int) -> None:
    table = np.tile(EXPECTED, (2, 1))[:7]

    def candidate(batch: NDArray[np.uint8]) -> Logits:
        return table[batch[:, 0, 0, 0]] + np.float32(0.1 * (len(batch) == size))

    with pytest.raises(VerificationError, match=f"At batch size {size} .* differ .* by 1.00e-01"):
        verify(table, candidate, numbered(7), bar=Bar(1e-3), batch_sizes=(size,))
    with pytest.raises(VerificationError, match="logits differ from the unmerged model's"):
        verify(table, candidate, numbered(7), bar=Bar(1e-3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_is_refused(value: float) -> None:
    answers = EXPECTED.copy()
    answers[2, 1] = value
    with pytest.raises(VerificationError, match="finite values are expected"):
        verify(EXPECTED, lookup(answers), numbered(4), bar=Bar(1e9))


@pytest.mark.parametrize(
    "answers",
    [EXPECTED[:, :2], EXPECTED[:, :1], np.tile(EXPECTED, (1, 2)), EXPECTED[:, :, None]],
    ids=["narrow", "one", "wide", "deep"],
)
def test_an_answer_of_another_shape_is_refused(answers: Logits) -> None:
    with pytest.raises(VerificationError, match="where \\(1, 3\\) and finite values are expected"):
        verify(EXPECTED, lookup(answers), numbered(4), bar=Bar(1e9))


def test_a_reference_that_is_not_finite_is_refused() -> None:
    nans = np.full_like(EXPECTED, np.nan)
    with pytest.raises(VerificationError, match="unmerged model's own logits are not finite"):
        verify(nans, lookup(nans), numbered(4), bar=Bar(1))


def test_random_images_are_distinct_repeatable_and_use_the_full_range() -> None:
    pixels = random_pixels(3, 20)
    assert pixels.shape == (3, 20, 20, 3)
    assert pixels.dtype == np.uint8
    assert (pixels.min((1, 2, 3)) == 0).all()
    assert (pixels.max((1, 2, 3)) == 255).all()
    assert not (pixels[0] == pixels[1]).all()
    np.testing.assert_array_equal(pixels, random_pixels(3, 20))
    assert (random_pixels(3, 20, seed=1) != pixels).any()


def test_random_images_have_structure_at_large_and_small_scales() -> None:
    grey = random_pixels(8, 64).astype(float).mean(3)
    blocks = grey.reshape(8, 4, 16, 4, 16)
    assert blocks.mean((2, 4)).std() > 10  # between blocks of 16 pixels
    assert blocks.std((2, 4)).mean() > 10  # within them


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_random_images_exist_at_every_size(size: int) -> None:
    assert random_pixels(2, size).shape == (2, size, size, 3)


class FakeEngine:
    """An engine with answers chosen by a test, and the functions of its exporter."""

    takes_pixels = takes_tasks = False
    device = "cpu"

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.info: dict[str, str] = {}

    def export(self, model: torch.nn.Module, path: Path, spec: ExportSpec) -> None:
        path.write_bytes(b"artefact")
        self.model = model

    def load(self, path: Path, options: EngineOptions) -> FakeEngine:
        assert path.read_bytes() == b"artefact"
        return self

    def run(self, images: NDArray[Any], task: NDArray[np.int64] | None = None) -> Any:
        with torch.no_grad():
            return self.answer(images, self.model(torch.from_numpy(images)).numpy())

    def exporter(self) -> Exporter:
        return Exporter(
            name="onnx",
            suffix=".onnx",
            precisions=("fp32",),
            engines=("onnxruntime",),
            tolerance=5e-5,
            export=self.export,
            load=self.load,
            describe=lambda path: None,
            platform="fake",
        )


def always(value: float) -> Answer:
    return lambda images, logits: np.full_like(logits, value)


def one_row(images: NDArray[Any], logits: Logits) -> Logits:
    return logits[:1]


def wrong_in_batches(images: NDArray[Any], logits: Logits) -> Logits:
    result: Logits = logits[::-1]
    return result


def mixing_samples(images: NDArray[Any], logits: Logits) -> Logits:
    result: Logits = logits + np.float32(1e-3) * (logits.mean(0) - logits)
    return result


def fixed_batch(images: NDArray[Any], logits: Logits) -> Logits:
    if len(images) != 2:
        raise RuntimeError("Got: 1\n Expected: 2")
    return logits


def ragged(images: NDArray[Any], logits: Logits) -> Logits:
    return logits if len(images) == 1 else logits[:, :-1]


def scalar(images: NDArray[Any], logits: Logits) -> Any:
    return logits.sum()


FAULTS: dict[str, tuple[Answer, str]] = {
    "zeros": (always(0), "At batch size 1 the artefact's logits differ"),
    "nan": (always(np.nan), "finite values are expected"),
    "inf": (always(np.inf), "finite values are expected"),
    "one row": (one_row, "At batch size 2 the artefact answers with shape \\(1, 5\\)"),
    "order": (wrong_in_batches, "At batch size 2 the artefact's logits differ"),
    "mixing": (mixing_samples, "At batch size 2 the artefact's logits differ"),
    "fixed batch": (fixed_batch, "At batch size 1 the artefact does not run .Got: 1 Expected: 2"),
    "ragged": (ragged, "At batch size 2 the artefact (answers with shape|does not run)"),
    "scalar": (scalar, "does not run"),
    "transposed": (lambda images, logits: logits.T, "does not run|answers with shape"),
    "slightly off": (lambda images, logits: logits + np.float32(1e-2), "logits differ"),
    "missing": (lambda images, logits: None, "does not run"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_artefact_is_refused_and_leaves_no_file(
    fault: str,
    checkpoint: Path,
    backbone_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    answer, message = FAULTS[fault]
    monkeypatch.setattr(
        "aoft_deploy.export.merged.get_exporter", lambda name: FakeEngine(answer).exporter()
    )
    with pytest.raises(VerificationError, match=message):
        export_merged(
            checkpoint, tmp_path / "a.onnx", backbone=BackboneSource(weights=backbone_weights)
        )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.onnx").write_text("old")
    (tmp_path / "a.onnx.json").write_text('{"sha256": "old"}')
    options = ["--merge", checkpoint, "--backbone-weights", backbone_weights, "--overwrite"]
    assert "is not written" in refused(main, *options, "-o", tmp_path / "a.onnx")


def test_an_exporter_without_a_fault_is_accepted(
    checkpoint: Path, backbone_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = FakeEngine(lambda images, logits: logits).exporter()
    monkeypatch.setattr("aoft_deploy.export.merged.get_exporter", lambda name: exporter)
    exported = export_merged(
        checkpoint, tmp_path / "a.onnx", backbone=BackboneSource(weights=backbone_weights)
    )
    assert exported.report.agreement == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "a.onnx.json"}


@pytest.mark.parametrize("method", ["aoft-lora", "aoft-lora-star", "lora", "rlrr"])
def test_an_artefact_of_the_unmodified_backbone_is_refused(
    method: str,
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    backbone_name: str,
    backbone_args: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = timm.create_model(backbone_name, num_classes=5, **backbone_args).eval()

    class Unmerged(FakeEngine):
        def export(self, model: torch.nn.Module, path: Path, spec: ExportSpec) -> None:
            head = {n: t for n, t in model.state_dict().items() if n.startswith("head.")}
            base.load_state_dict(load_file(backbone_weights) | head)
            super().export(base, path, spec)

    exporter = Unmerged(lambda images, logits: logits).exporter()
    monkeypatch.setattr("aoft_deploy.export.merged.get_exporter", lambda name: exporter)
    with pytest.raises(VerificationError, match="differ from the unmerged model's"):
        export_merged(
            make_checkpoint(method),
            tmp_path / "a.onnx",
            backbone=BackboneSource(weights=backbone_weights),
        )
    assert list(tmp_path.iterdir()) == []
