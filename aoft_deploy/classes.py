"""Class names that know what a model's outputs mean, and that turn logits into answers.

This is the only module that applies a softmax or a sigmoid to logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

from aoft_deploy.errors import AoftError, CheckpointError, UnknownNameError, VerificationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ACTIVATIONS", "Answer", "Classes", "Prediction", "Value", "check_classes"]

ACTIVATIONS = ("softmax", "sigmoid", "none")
"""What outputs mean: one class of several, independent labels, or plain values."""


class Prediction(NamedTuple):
    """A label and its probability."""

    label: str
    probability: float

    def __str__(self) -> str:
        return f"{self.label} {self.probability:.1%}"


class Value(NamedTuple):
    """A label and its value, from a model whose outputs are plain values."""

    label: str
    value: float

    def __str__(self) -> str:
        return f"{self.label} {self.value:.6g}"


Answer = Prediction | Value


class Classes(tuple[str, ...]):
    """The names of a model's outputs, in the order of its logits.

    Equal to the plain tuple of the names.

    Attributes:
        activation: One of ``ACTIVATIONS``.

    Args:
        names: The names.
        activation: As the attribute; None takes that of ``names``, or softmax for plain names.

    Raises:
        UnknownNameError: The activation is unknown.
    """

    activation: str

    def __new__(cls, names: Iterable[str], activation: str | None = None) -> Self:  # noqa: D102
        found = super().__new__(cls, names)
        given = getattr(names, "activation", "softmax") if activation is None else activation
        if given not in ACTIVATIONS:
            raise UnknownNameError("activation", str(given)[:60], ACTIVATIONS)
        found.activation = given
        return found

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The probabilities or values of logits, (batch, classes).

        Raises:
            VerificationError: A logit is not finite.
        """
        import numpy as np

        invalid = ~np.isfinite(logits)
        if invalid.any():
            raise VerificationError(
                f"The model answers with {logits[invalid][0]}, not with a number for each class: "
                "export it with a higher `precision`, or train it with a lower learning rate."
            )
        if self.activation == "none":
            return logits
        result: NDArray[np.float32]
        if self.activation == "sigmoid":
            result = np.divide(1 + np.tanh(logits / 2), 2, dtype=np.float32)  # exp could overflow
            return result
        odds = np.exp(logits - logits.max(1, keepdims=True))
        result = odds / odds.sum(1, keepdims=True)
        return result

    def answers(
        self, logits: NDArray[np.float32], top: int | None = None, *, usual: int = 1
    ) -> list[list[Answer]]:
        """The answers of each row of logits, (batch, classes).

        Args:
            logits: The logits.
            top: The number of most probable classes or labels. None: ``usual`` of a softmax, and
                of a sigmoid the labels above 0.5. Plain values are all given, in their order.
            usual: The number of classes of a softmax if ``top`` is None.

        Returns:
            For each row predictions, best first, or values.

        Raises:
            VerificationError: A logit is not finite.
        """
        kind = Value if self.activation == "none" else Prediction
        return [
            [kind(self[i], float(row[i])) for i in self._chosen(row, top, usual)]
            for row in self.scores(logits)
        ]

    def _chosen(self, row: NDArray[np.float32], top: int | None, usual: int) -> Iterable[int]:
        if self.activation == "none":
            return range(len(self))
        best: NDArray[np.int64] = (-row).argsort(kind="stable")
        if self.activation == "sigmoid" and top is None:
            return best[row[best] > 0.5]
        return best[: top or usual]

    def agreeing(
        self, logits: NDArray[np.float32], expected: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Whether two models decide alike, for each decision: a class, or yes or no for a label.

        Args:
            logits: A model's logits, (batch, classes).
            expected: The other model's.

        Returns:
            (batch,) for a softmax, (batch, classes) for a sigmoid, and nothing for plain values.
        """
        if self.activation == "none":
            same: NDArray[np.bool_] = (logits == expected)[:0]
        elif self.activation == "sigmoid":
            same = (logits > 0) == (expected > 0)
        else:
            same = logits.argmax(1) == expected.argmax(1)
        return same


def check_classes(
    classes: Sequence[str], owner: str, error: type[AoftError] = CheckpointError
) -> None:
    """Refuse a model without outputs, and a softmax of one output, which is always 1.

    Args:
        classes: The model's class names.
        owner: The model's path or name, for the message.
        error: Class of the error to raise.

    Raises:
        AoftError: There are too few classes.
    """
    if not classes:
        raise error(f"{owner} has no output, but a model has 1 or more: name its classes.")
    if len(classes) == 1 and Classes(classes).activation == "softmax":
        raise error(
            f"{owner} has 1 output ({classes[0]!r}), whose softmax is always 1: save its checkpoint"
            ' with `activation="sigmoid"` if it means yes or no, or with `activation="none"` if it '
            "is a value, or train it with a class for each answer."
        )
