from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray

from aoft_deploy.flops import flops_per_image
from aoft_deploy.measurement import Subject, gemm_peaks, inputs_for, interleaved


class Sleeper:
    """An engine that takes a known time."""

    device = "cpu"

    def __init__(self, seconds: float, order: list[str], **info: str) -> None:
        self.seconds, self.order = seconds, order
        self.info: Mapping[str, str] = info
        self.takes_pixels = "pixels" in info
        self.takes_tasks = "tasks" in info

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        self.order.append(f"{self.info['name']}{len(images)}")
        time.sleep(self.seconds)
        return np.zeros((len(images), 1), np.float32)


def test_subjects_take_turns_and_every_other_round_goes_back() -> None:
    order: list[str] = []
    subjects = [Subject.of(n, Sleeper(0.0, order, name=n)) for n in "ab"]
    done: list[int] = []
    interleaved(subjects, [1, 2], 4, 2, done.append)
    once = ["a1", "b1", "a2", "b2"]
    turns = [turn for turn in once for _ in range(2)]
    assert order == once + turns + turns[::-1]
    assert done == [1, 2]


def test_medians_ratios_and_shares_are_those_of_the_rounds() -> None:
    order: list[str] = []
    slow = Subject.of("slow", Sleeper(0.04, order, name="s", flops="1000"))
    fast = Subject.of("fast", Sleeper(0.01, order, name="f", flops="1000", precision="int8"))
    timings = interleaved([slow, fast], [2], 4, 5)
    assert [timing.subject.name for timing in timings] == ["slow", "fast"]
    assert timings[0].ratio == 1
    assert 1.5 < timings[1].ratio < 5
    assert 0.04 <= timings[0].median
    assert timings[0].throughput == 2 / timings[0].median
    peaks = {"fp32": 1e6, "int8": 2e6}
    assert timings[0].share(peaks) == pytest.approx(2000 / timings[0].median / 1e6)
    assert timings[1].share(peaks) == pytest.approx(2000 / timings[1].median / 2e6)
    assert timings[1].share({"fp32": 1.0}) is None
    assert Subject.of("x", Sleeper(0, order, name="x")).flops is None
    assert timings[0].to_dict(peaks)["rounds"] == list(timings[0].seconds)


def test_inputs_are_in_the_engines_own_form() -> None:
    (images,) = inputs_for(Sleeper(0, [], name="p", pixels=""), 3, 8)
    assert images.dtype == np.uint8 and images.shape == (3, 8, 8, 3)
    images, task = inputs_for(Sleeper(0, [], name="t", tasks='["a", "b"]'), 3, 8)
    assert images.dtype == np.float32 and images.shape == (3, 3, 8, 8)
    assert task.tolist() == [0, 1, 0]


def test_the_peak_is_that_of_no_smaller_product_and_threads_stay() -> None:
    before = torch.get_num_threads()
    peaks = gemm_peaks(1, repeats=2)
    assert torch.get_num_threads() == before
    assert {"fp32", "int8"} <= set(peaks)
    assert all(1e9 < peak < 1e14 for peak in peaks.values())


def test_flops_are_those_of_the_products() -> None:
    # per token: qkv 3·d², projection d², MLP 8·d²; attention 2·n²·d; 17 tokens of width 192
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=7).eval()
    tokens, width = 17, 192
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    patches, classifier = 16 * 3 * 16 * 16 * width, 7 * width
    assert flops_per_image(model, 64) == 2 * (2 * block + patches + classifier)


def test_flops_of_a_model_that_needs_numbers_are_not_known() -> None:
    class Choosy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum() if x.sum().item() > 0 else x

    assert flops_per_image(Choosy(), 8) is None
