"""The command aoft-demo."""

from __future__ import annotations

import pytest
from imported import heavy_libraries


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--port=x", 2), ("--port=70000", 2)])
def test_the_parser_imports_no_heavy_library(option: str, code: int) -> None:
    run = f"try:\n    main(['{option}'])\nexcept SystemExit as end:\n    assert end.code == {code}"
    assert heavy_libraries(f"from aoft_demo.cli import main\n{run}") == set()
