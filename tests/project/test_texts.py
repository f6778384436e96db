"""Texts for messages."""

from __future__ import annotations

import pytest

from aoft_deploy.texts import decoded, one_line, shortened


def test_an_error_is_one_line_of_limited_length() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError("x" * 300)) == "x" * 200
    assert one_line(ValueError("x" * 300), 100) == "x" * 100
    assert one_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(("length", "cut"), [(58, False), (59, True)])
def test_a_long_value_is_cut_to_the_limit(length: int, cut: bool) -> None:
    text = shortened("y" * length)
    assert len(text) == 60
    assert text.endswith("…") is cut


@pytest.mark.parametrize(
    ("text", "value"), [("[1, 2]", [1, 2]), ("fp32", "fp32"), ("[" * 100_000, "[" * 100_000)]
)
def test_what_is_no_json_stays_text(text: str, value: object) -> None:
    assert decoded(text) == value
