"""Random numbers of the tests are the same in every run, alone and beside others."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
import timm
import torch


def numbers(seed: int) -> list[float]:
    """What the three generators of a process give after a seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = random.Random(seed).random(), np.random.RandomState(seed).rand()
    return [*drawn, float(torch.rand((), generator=generator))]


def drawn() -> list[float]:
    """The next numbers of the process."""
    return [random.random(), np.random.rand(), float(torch.rand(()))]


@pytest.fixture(scope="module")
def of_the_fixture() -> list[float]:
    return drawn()


@pytest.fixture(scope="session")
def of_the_session() -> list[float]:
    return drawn()


def test_a_fixture_draws_what_its_name_says(
    of_the_fixture: list[float], request: pytest.FixtureRequest
) -> None:
    assert of_the_fixture == numbers(zlib.crc32(b"tests/project/test_seeds.py::of_the_fixture[0]"))


def test_a_fixture_of_the_session_draws_what_its_name_says(of_the_session: list[float]) -> None:
    assert of_the_session == numbers(zlib.crc32(b"tests/project/test_seeds.py::of_the_session[0]"))


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_test_draws_what_its_name_says(which: str, request: pytest.FixtureRequest) -> None:
    assert drawn() == numbers(zlib.crc32(request.node.nodeid.encode()))


def test_a_models_weights_are_the_same_in_every_run(request: pytest.FixtureRequest) -> None:
    made = timm.create_model("test_vit", num_classes=2).get_parameter("head.weight")
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    again = timm.create_model("test_vit", num_classes=2).get_parameter("head.weight")
    assert torch.equal(made, again)
