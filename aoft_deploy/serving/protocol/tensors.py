"""The protocol's tensors, converted from JSON or bytes to arrays and back.

The size of the data is checked before a shape from a client decides how much memory is allocated.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.texts import shortened

__all__ = [
    "DTYPES",
    "Tensor",
    "bytes_tensor",
    "from_binary",
    "from_json",
    "read_shape",
    "top_classes",
]

DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Tensor:
    """A model's input.

    Attributes:
        name: Its name.
        datatype: ``FP32`` or ``UINT8``.
        shape: Shape of one sample, without the batch axis.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def full_shape(self) -> list[int]:
        """The shape with −1 for the batch axis."""
        return [-1, *self.shape]


def read_shape(value: Any, tensor: Tensor) -> tuple[int, ...]:
    """Validate a shape from a client.

    Raises:
        Refusal: It is not a list of integers, or does not fit the model's input.
    """
    allowed = f"{tensor.full_shape} with a batch of 1 or more"
    if not isinstance(value, list) or not all(type(axis) is int for axis in value):
        raise Refusal(400, f"Shape of {tensor.name} is {shortened(value)}: give {allowed}.")
    if tuple(value[1:]) != tensor.shape or value[0] < 1:
        raise Refusal(400, f"Shape of {tensor.name} is {shortened(value)}: give {allowed}.")
    return tuple(value)


def from_binary(data: memoryview, shape: tuple[int, ...], tensor: Tensor) -> NDArray[Any]:
    """A view of a request's bytes as an array, without a copy.

    Raises:
        Refusal: The number of bytes does not fit the shape, or a value is not finite.
    """
    dtype = DTYPES[tensor.datatype]
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise Refusal(
            400, f"{tensor.name} has {len(data)} bytes: shape {list(shape)} takes {needed}."
        )
    array = np.frombuffer(data, dtype).reshape(shape)
    if dtype.kind == "f" and not _finite(array):
        raise Refusal(400, f"Data of {tensor.name} are not all finite.")
    return array


def from_json(data: Any, shape: tuple[int, ...], tensor: Tensor) -> NDArray[Any]:
    """Convert JSON numbers, either one flat list or lists nested like the shape.

    Raises:
        Refusal: The numbers do not fit the shape or the data type.
    """
    if not isinstance(data, list):
        raise Refusal(400, f"Data of {tensor.name} are {shortened(data)}: give a list of numbers.")
    flat = _flat(data, shape, tensor) if data and isinstance(data[0], list) else data
    if len(flat) != math.prod(shape):
        raise Refusal(
            400,
            f"Data of {tensor.name} are {len(flat)} numbers: shape {list(shape)} takes "
            f"{math.prod(shape)}.",
        )
    integer = tensor.datatype == "UINT8"
    if not set(map(type, flat)) <= ({int} if integer else {int, float}):
        kind = "whole numbers" if integer else "numbers"
        raise Refusal(400, f"Data of {tensor.name} are not all {kind}.")
    if not integer:
        values = np.array(flat, np.float64).reshape(shape)
        if not np.abs(values).max() <= LARGEST_FLOAT32:
            raise Refusal(400, f"Data of {tensor.name} are not all finite in {tensor.datatype}.")
        return values.astype(np.float32)
    if min(flat) < 0 or max(flat) > 255:
        raise Refusal(400, f"Data of {tensor.name} are not all from 0 to 255.")
    return np.array(flat, np.uint8).reshape(shape)


def top_classes(logits: NDArray[np.float32], classes: Iterable[str], top: int) -> list[list[str]]:
    """``score:index:label`` of each sample's ``top`` highest logits, highest first."""
    labels = list(classes)
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :top]
    return [
        [f"{row[i]:f}:{i}:{labels[i]}" for i in best.tolist()]
        for row, best in zip(logits, ranked, strict=True)
    ]


def bytes_tensor(texts: Iterable[str]) -> bytes:
    """Strings in the protocol's binary form: each one after its length in four bytes."""
    encoded = [text.encode() for text in texts]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)


def _finite(array: NDArray[np.float32]) -> bool:
    """Check the extremes only, since NaN propagates to them: this needs no array of booleans."""
    return bool(np.isfinite(array.max()) and np.isfinite(array.min()))


def _flat(data: list[Any], shape: tuple[int, ...], tensor: Tensor) -> list[Any]:
    level = [data]
    for axis, length in enumerate(shape):
        if not all(isinstance(part, list) and len(part) == length for part in level):
            raise Refusal(
                400, f"Data of {tensor.name} are not lists of {length} on axis {axis} of the shape."
            )
        level = list(chain.from_iterable(level))
    return level
