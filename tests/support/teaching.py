"""Pictures to teach a skill with, for tests of the demo."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from running_demo import DemoClient

__all__ = ["add_picture", "shades", "taught_classes"]


def shades(folder: Path, shade: int, count: int, side: int = 32) -> list[Path]:
    """Write noisy pictures of a brightness, and return their paths."""
    paths = [folder / f"{shade}-{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        noise = np.random.default_rng([shade, i]).integers(0, 30, (side, side, 3))
        Image.fromarray((shade + noise).astype(np.uint8)).save(path)
    return paths


def add_picture(client: DemoClient, id: Any, path: Any) -> str:
    """Add an uploaded file to the client's pictures, and return the demo's answer."""
    data = {"number": 1, "add": [{"id": id, "path": path, "name": "a.png"}], "remove": []}
    return client.call("teach-tiles", "pictures", event_data=data).text


def taught_classes(client: DemoClient, count: int, names: Sequence[str] = ("dark", "light")) -> str:
    """Add pictures of classes over HTTP, and return the classes as the page sends them.

    Args:
        client: The client, whose session gets the pictures.
        count: Number of pictures of each class.
        names: Names of the classes.
    """
    classes = []
    for shade, name in zip((20, 220, 90, 150), names, strict=False):
        ids = [secrets.token_hex(16) for _ in range(count)]
        for id, path in zip(ids, shades(client.demo.folder, shade, count), strict=True):
            status, uploaded = client.upload(f"teach-{id}.png", path.read_bytes())
            assert status == 200, uploaded
            assert id in add_picture(client, id, uploaded).partition("refused")[0]
            path.unlink()
        classes.append({"name": name, "pictures": [[id, 0] for id in ids]})
    return json.dumps(classes)
