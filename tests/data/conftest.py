from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from image_folders import fill


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Class folders without parts: 20 cats and 30 dogs."""
    for name, count in (("cat", 20), ("dog", 30)):
        fill(tmp_path / name, count)
    return tmp_path


@pytest.fixture
def parted(tmp_path: Path) -> Path:
    """Folders train, val and test, each with 3 cats and 3 dogs."""
    for part, name in itertools.product(("train", "val", "test"), ("cat", "dog")):
        fill(tmp_path / part / name, 3)
    return tmp_path
