"""Lists of tasks to choose from."""

from __future__ import annotations

from typing import Any

from aoft_demo.views.task_lists import refreshed_dropdown, task_dropdown


def test_a_dropdown_keeps_its_choice_while_the_task_exists() -> None:
    kept: dict[str, Any] = {"choices": ["a", "b", "new"]}  # without a value, the choice stays
    for chosen, expected in (
        ("b", kept),
        ("a", kept),
        ("gone", kept | {"value": None}),
        (None, kept),
    ):
        assert refreshed_dropdown(chosen, ["a", "b", "new"]).constructor_args == expected
    assert refreshed_dropdown("a", []).constructor_args == {"choices": [], "value": None}


def test_only_names_reach_the_handlers() -> None:
    dropdown: Any = task_dropdown(["a", "b"], label="x")
    assert dropdown.value == "a" and task_dropdown([], label="x").value is None
    assert dropdown.preprocess("gone") == "gone"  # the handler reports it
    assert [dropdown.preprocess(odd) for odd in (["a"], {"a": 1}, 7, None)] == [None] * 4
