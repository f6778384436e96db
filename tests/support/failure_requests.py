"""Requests that the tests of failures send."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from faulty_model import plain_images
from PIL import Image

TOKEN = "a token of more than sixteen bytes"

ADMIN = {"Authorization": f"Bearer {TOKEN}"}

INFER = "/v2/models/task/infer"

CLASSIFY = "/v2/models/task/classify"

POST = b"POST /v2/models/task/infer HTTP/1.1\r\nHost: a\r\n"

IMAGES = np.random.default_rng(3).normal(size=(2, 3, 16, 16)).astype(np.float32)

HARMLESS = plain_images(4, 2)


def entry(**changes: Any) -> dict[str, Any]:
    base = {
        "name": "pixel_values",
        "datatype": "FP32",
        "shape": [1, 3, 16, 16],
        "data": [0.5] * 768,
    }
    return {**base, **changes}


def body(*inputs: Any, **rest: Any) -> bytes:
    return json.dumps({"inputs": list(inputs) or [entry()], **rest}).encode()


def binary(
    size: int, tail: int, shape: Sequence[int] = (1, 3, 16, 16), **rest: Any
) -> tuple[bytes, dict[str, str]]:
    """A request that announces ``size`` bytes after its JSON and sends ``tail``."""
    image = entry(parameters={"binary_data_size": size}, shape=shape)
    del image["data"]
    text = json.dumps({"inputs": [image], **rest}).encode()
    return text + bytes(tail), {"Inference-Header-Content-Length": str(len(text))}


def encoded(format: str, size: tuple[int, int] = (20, 20), **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 40).convert("RGB").save(stream, format, **options)
    return stream.getvalue()


PNG = encoded("PNG")
