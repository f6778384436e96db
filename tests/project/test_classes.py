"""Class names and what a model's outputs mean."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from aoft_deploy.classes import ACTIVATIONS, Classes, Prediction, Value, check_classes
from aoft_deploy.errors import ArtefactError, UnknownNameError, VerificationError

LOGITS = np.random.default_rng(0).normal(0, 3, (50, 4)).astype(np.float32)


def logits(*rows: Sequence[float]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)


def test_scores_are_torchs_softmax_sigmoid_or_the_logits() -> None:
    given = torch.from_numpy(LOGITS)
    for activation, wanted in zip(
        ACTIVATIONS, (given.softmax(1), given.sigmoid(), given), strict=True
    ):
        found = Classes("abcd", activation).scores(LOGITS)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=0)


def test_large_logits_do_not_overflow() -> None:
    large = logits((1e4, 0.0, -1e4))
    np.testing.assert_array_equal(Classes("abc").scores(large), [[1, 0, 0]])
    np.testing.assert_array_equal(Classes("abc", "sigmoid").scores(large), [[1, 0.5, 0]])


def test_a_softmax_answers_with_the_most_probable_classes_and_ties_keep_their_order() -> None:
    classes, rows = Classes("abc"), logits((0.0, 2.0, 2.0))
    assert [[p.label for p in row] for row in classes.answers(rows, 3)] == [["b", "c", "a"]]
    assert [len(classes.answers(rows, top)[0]) for top in (None, 2, 99)] == [1, 2, 3]
    assert len(classes.answers(rows, usual=2)[0]) == 2
    first, second, third = classes.answers(rows, 3)[0]
    assert isinstance(first, Prediction)
    assert first[1] == second[1] > third[1]


def test_a_sigmoid_answers_with_the_labels_above_one_half_or_with_as_many_as_asked_for() -> None:
    classes, rows = Classes("abc", "sigmoid"), logits((-1, 2, 1), (-1, -2, 0))
    assert [[p.label for p in row] for row in classes.answers(rows)] == [["b", "c"], []]
    assert [[p.label for p in row] for row in classes.answers(rows, 1)] == [["b"], ["c"]]
    assert classes.answers(rows, usual=1) == classes.answers(rows)


def test_plain_values_are_all_given_in_their_order() -> None:
    (found,) = Classes(("age", "height"), "none").answers(logits((41.25, 170)), 1)
    assert found == [Value("age", 41.25), Value("height", 170.0)]


def test_an_answer_prints_as_a_percentage_or_as_a_value() -> None:
    assert str(Prediction("cat", 0.98076)) == "cat 98.1%"
    assert [str(Value("age", x)) for x in (41.25, 1e6, -0.00012)] == [
        "age 41.25",
        "age 1e+06",
        "age -0.00012",
    ]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(activation: str, value: float) -> None:
    rows = logits((1, 2, 3), (0, value, 1))
    with pytest.raises(VerificationError, match=f"answers with {value}, not with a number"):
        Classes("abc", activation).answers(rows)
    assert Classes("abc", activation).answers(rows[:1])


def test_classes_equal_their_names_and_keep_their_activation_when_copied() -> None:
    classes = Classes(["red", "round"], "sigmoid")
    assert tuple(classes) == classes == Classes(("red", "round"))
    again: Classes = pickle.loads(pickle.dumps(classes))
    for other in (Classes(classes), copy.deepcopy(classes), again):
        assert (other, other.activation) == (classes, "sigmoid")
    assert Classes(classes, "none").activation == "none"
    assert Classes(("red", "round")).activation == "softmax"


@pytest.mark.parametrize("activation", ["relu", "", 7, ["softmax"]])
def test_an_unknown_activation_is_refused(activation: str) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown activation .* none, sigmoid, softmax\."):
        Classes("ab", activation)


def test_two_models_agree_in_their_decisions() -> None:
    found, expected = logits((1, 2), (3, -1)), logits((0.5, 4), (-3, -1))
    assert Classes("ab").agreeing(found, expected).tolist() == [True, False]
    alike = Classes("ab", "sigmoid").agreeing(found, expected).tolist()
    assert alike == [[True, True], [False, True]]
    assert Classes("ab", "none").agreeing(found, expected).size == 0


def test_one_output_needs_another_activation_than_softmax() -> None:
    with pytest.raises(ArtefactError, match=r"a\.onnx has 1 output \('age'\), whose softmax is"):
        check_classes(("age",), "a.onnx", ArtefactError)
    check_classes(Classes(("age",), "none"), "a.onnx")
    check_classes(Classes(("ripe",), "sigmoid"), "a.onnx")
    with pytest.raises(ArtefactError, match=r"a\.onnx has no output, but a model has 1 or more"):
        check_classes(Classes((), "none"), "a.onnx", ArtefactError)
