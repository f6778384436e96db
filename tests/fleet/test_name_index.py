"""An index of many task names without a Python object for each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aoft_deploy.errors import SettingError
from aoft_deploy.fleet.name_index import NameIndex


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)), st.text("abc"))
def test_find_gives_the_index_of_exactly_the_indexed_names(given: set[str], other: str) -> None:
    names = NameIndex.of(given)
    assert sorted(names) == sorted(given) and len(names) == len(given)
    assert all(names[names.find(name) or 0] == name for name in given)
    assert (other in names) == (other in given)
    assert set(names.closest(other, count=len(given) + 1)) == given


def test_slices_and_negative_indices_work() -> None:
    names = NameIndex.of(["b", "ab", "c"])
    assert (names[-1], names[:2]) == ("c", ["ab", "b"])
    with pytest.raises(IndexError):
        names[3]


def test_bytes_of_a_file_name_that_are_not_utf_8_are_kept() -> None:
    assert list(NameIndex.of(["\udcff.1", "a"])) == ["a", "\udcff.1"]
    assert NameIndex.of(["\udcff.1"]).find("\udcff.1") == 0


def test_a_misspelt_name_is_among_the_closest() -> None:
    names = NameIndex.of(
        f"{animal}-{i:05}" for animal in ("pets", "birds", "fish") for i in range(300)
    )
    for wrong in ("prts-00017", "pets-0017", "ets-00017", "pets-00017x", "pets-00071"):
        assert "pets-00017" in names.closest(wrong)
    assert "pets-00017" not in names.closest("pets-0017", without={"pets-00017"})
    assert len(names.closest("birds")) == 32 and NameIndex.of([]).closest("x") == []


def test_pairs_of_letters_across_two_names_do_not_count() -> None:
    assert NameIndex.of(["ax", "yb", "xy!"]).closest("xy", count=1) == ["xy!"]


def test_two_tasks_of_the_same_name_are_refused() -> None:
    with pytest.raises(SettingError, match="Two tasks are called 'a': rename one"):
        NameIndex.of(["a", "b", "a"])
