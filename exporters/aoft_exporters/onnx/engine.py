"""Run ONNX files with ONNX Runtime on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.onnx_metadata import checking
from aoft_exporters.onnx.inputs import OnnxFile, OnnxInputs
from aoft_exporters.onnx.precisions import check_device
from aoft_exporters.onnx.sessions import library, session

__all__ = ["OnnxEngine"]


class OnnxEngine(OnnxFile):
    """An ONNX file in an ONNX Runtime session on the CPU.

    Attributes:
        device: ``cpu``.

    Args:
        path: The file.
        threads: Threads within an operator; None lets ONNX Runtime choose.

    Raises:
        ArtefactError: The file is missing, refers to other files, or cannot be read.
        SettingError: ONNX Runtime computes the file's precision on a GPU only.
        MissingExtraError: ONNX Runtime is not installed.
    """

    device = "cpu"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        with checking(path) as info:
            check_device(info, "cpu", path)
            self._session = session(path, threads, "cpu", path)
        self.info: Mapping[str, str] = info
        self._run_options = library().RunOptions()
        self._inputs = OnnxInputs.of(self._session, self.info, path)

    def _run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        feed = self._inputs.feed(images, task)
        logits: Any = self._session.run(["logits"], feed, self._run_options)[0]
        return np.asarray(logits, np.float32)

    def stop(self) -> None:
        """Abort the current runs between two operators; later runs are not affected."""
        options, self._run_options = self._run_options, library().RunOptions()
        options.terminate = True
