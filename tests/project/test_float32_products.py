"""Products of float32 are computed in float32, whatever the process has set."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import backends

from aoft_deploy.float32_products import float32_products

SWITCHES = (
    backends.cuda.matmul,
    backends.cudnn.conv,  # type: ignore[attr-defined]
    backends.mkldnn.matmul,  # type: ignore[attr-defined]
    backends.mkldnn.conv,  # type: ignore[attr-defined]
)
EXACT = ["ieee"] * 4
TF32 = ["tf32", "tf32", "ieee", "ieee"]


def switches() -> list[str]:
    return [switch.fp32_precision for switch in SWITCHES]


@pytest.fixture(autouse=True)
def default_switches() -> Iterator[None]:
    before = switches()
    yield
    for switch, precision in zip(SWITCHES, before, strict=True):
        switch.fp32_precision = precision


def test_pytorch_allows_tf32_for_convolutions_by_default_and_a_block_does_not() -> None:
    assert switches()[1] == "tf32"
    with float32_products():
        assert switches() == EXACT
    assert switches()[1] == "tf32"


def test_a_block_that_wants_tf32_gets_it_on_a_gpu_only() -> None:
    with float32_products(tf32=True):
        assert switches() == TF32


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_settings_of_the_process_return_after_a_block(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = switches()
    with pytest.raises(ZeroDivisionError), float32_products():
        assert switches() == EXACT
        _ = 1 / 0
    assert switches() == before
    torch.set_float32_matmul_precision("highest")


def test_the_settings_hold_until_the_last_of_several_blocks_ends() -> None:
    before = switches()
    first, second = float32_products(), float32_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert switches() == EXACT
    second.__exit__(None, None, None)
    assert switches() == before


def test_threads_with_both_settings_see_their_own() -> None:
    before = switches()

    def look(number: int) -> bool:
        tf32 = number % 3 == 0
        with float32_products(tf32):
            time.sleep(0.001)  # other threads run
            return switches() == (TF32 if tf32 else EXACT)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(200)))
    assert switches() == before


def test_a_block_with_the_other_setting_gets_its_turn() -> None:
    stop = threading.Event()

    def keep_on() -> None:
        while not stop.is_set():
            with float32_products():
                time.sleep(0.002)

    def other() -> list[str]:
        with float32_products(tf32=True):
            return switches()

    with ThreadPoolExecutor(5) as pool:
        for _ in range(4):
            pool.submit(keep_on)
        try:
            assert pool.submit(other).result(timeout=20) == TF32
        finally:
            stop.set()
