"""An artefact on a GPU that does not exist, for commands that load it in a subprocess."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.errors import SettingError

DEVICE_SECONDS = 0.0125
"""What the engine measures on its device."""


class GpuEngine:
    """An engine that answers zeros."""

    device, takes_pixels, takes_tasks = "cuda:0", False, False

    def __init__(self, info: Mapping[str, str]) -> None:
        self.info = info

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits, after a millisecond."""
        time.sleep(0.001)
        return np.zeros((len(images), 5), np.float32)

    def device_seconds(self, images: NDArray[Any], task: NDArray[np.int64] | None = None) -> float:
        """The GPU's part of a batch."""
        return DEVICE_SECONDS


def write(path: Path, info: Mapping[str, str]) -> Path:
    """Write a folder that looks like one of the exporter tensorrt."""
    path.mkdir()
    (path / "model.plan").write_text(json.dumps(dict(info)))
    return path


def load(path: Path, options: EngineOptions = EngineOptions()) -> Engine:
    """As ``load_artefact``, which has no GPU here: folders of ``write`` are opened too."""
    if not path.is_dir():
        return load_artefact(path, options)
    if options.threads is not None:
        raise SettingError(f"{path} runs on a GPU, which has no threads to choose.")
    return GpuEngine(json.loads((path / "model.plan").read_text()))
