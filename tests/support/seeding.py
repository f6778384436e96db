"""A pytest plugin that makes all random numbers of the tests reproducible."""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np
import pytest
import torch

__all__ = ["Seeding"]


class Seeding:
    """Seeds every fixture and every test with a hash of its name.

    So the random numbers do not depend on the tests that ran before. It is a plugin of its own
    because pytest does not call the hooks of tests/conftest.py for session fixtures.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> None:
        """Seed before a fixture runs."""
        _seed(f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param_index', 0)}]")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """Seed before a test runs."""
        _seed(item.nodeid)


def _seed(name: str) -> None:
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
