"""The random numbers of a test do not depend on the tests that ran before."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
import timm
import torch


def first_numbers(seed: int) -> list[float]:
    """The first number of each global generator after a seed."""
    generator = torch.Generator().manual_seed(seed)
    first = random.Random(seed).random(), np.random.RandomState(seed).rand()
    return [*first, float(torch.rand((), generator=generator))]


def next_numbers() -> list[float]:
    """The next number of each global generator."""
    return [random.random(), np.random.rand(), float(torch.rand(()))]


@pytest.fixture(scope="module")
def module_numbers() -> list[float]:
    return next_numbers()


@pytest.fixture(scope="session")
def session_numbers() -> list[float]:
    return next_numbers()


def test_the_numbers_of_a_fixture_depend_on_its_name(
    module_numbers: list[float],
) -> None:
    assert module_numbers == first_numbers(
        zlib.crc32(b"tests/project/test_seeds.py::module_numbers[0]")
    )


def test_the_numbers_of_a_session_fixture_depend_on_its_name(session_numbers: list[float]) -> None:
    assert session_numbers == first_numbers(
        zlib.crc32(b"tests/project/test_seeds.py::session_numbers[0]")
    )


@pytest.mark.parametrize("which", ["first", "second"])
def test_the_numbers_of_a_test_depend_on_its_name(
    which: str, request: pytest.FixtureRequest
) -> None:
    assert next_numbers() == first_numbers(zlib.crc32(request.node.nodeid.encode()))


def test_the_weights_of_a_model_are_the_same_in_every_run(request: pytest.FixtureRequest) -> None:
    model = timm.create_model("test_vit", num_classes=2).get_parameter("head.weight")
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    again = timm.create_model("test_vit", num_classes=2).get_parameter("head.weight")
    assert torch.equal(model, again)
