"""The folder of a training run: its checkpoint, its metrics, and where to go on after a stop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump
from torch import Tensor

from aoft_deploy.errors import CheckpointError, OutputError, SettingError
from aoft_deploy.files import replacing

__all__ = ["Progress", "RunFolder", "check_same"]


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        lines: The metrics of each finished epoch, and at last those of the test.
        best: Figures of the chosen epoch; empty before the first.
        tensors: The trained numbers ``now.NAME``, the chosen ones ``best.NAME``, and the
            optimiser's averages ``first.NAME`` and ``second.NAME``.
        result: What a finished run returned; None before.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    result: dict[str, Any] | None = None

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with ``prefix`` and a dot, without these."""
        start = f"{prefix}."
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}


class RunFolder:
    """OUT of one run.

    Args:
        path: The folder; made where it is missing.
        run: What decides the run's numbers, JSON values; a run is continued only with the same.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self.run = json.loads(json.dumps(run))
        self.checkpoint = path / "model.ckpt"
        self.metrics = path / "metrics.jsonl"
        self.state = path / "resume.safetensors"

    def open(self, resume: bool) -> Progress:
        """The run's progress so far.

        Args:
            resume: Go on with what the folder holds; where it holds nothing, start.

        Raises:
            OutputError: The folder holds a run and ``resume`` is false.
            SettingError: The folder's run had other settings or data.
            CheckpointError: Its state cannot be read, or a finished run's checkpoint is gone.
        """
        found = [f for f in (self.checkpoint, self.metrics, self.state) if f.exists()]
        if not resume and found:
            raise OutputError(
                f"{self.path} holds a run already ({found[0].name}): continue it with --resume, "
                "or name another folder."
            )
        if not self.state.exists():
            if found:
                raise OutputError(
                    f"{self.path} holds {found[0].name} but no {self.state.name}, so it cannot be "
                    "continued: name another folder."
                )
            return Progress()
        return self._read()

    def _read(self) -> Progress:
        try:
            with safe_open(self.state, "pt") as file:
                state = json.loads((file.metadata() or {})["aoft-run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            progress = Progress(state["lines"], state["best"], tensors, state["result"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{self.state} cannot be read ({error}): start again in another folder."
            ) from error
        check_same(self.path, state["run"], self.run)
        if progress.result is not None and not self.checkpoint.exists():
            raise CheckpointError(
                f"The run in {self.path} is complete, but its {self.checkpoint.name} is gone: "
                "train again in another folder."
            )
        return progress

    def save(self, progress: Progress) -> None:
        """Write the progress, whole or not at all.

        Raises:
            OutputError: It cannot be written.
        """
        state = {
            "run": self.run,
            "lines": progress.lines,
            "best": progress.best,
            "result": progress.result,
        }
        tensors = {n: t.detach().cpu().contiguous() for n, t in progress.tensors.items()}
        with replacing(self.state) as temporary:
            temporary.write_bytes(dump(tensors, metadata={"aoft-run": json.dumps(state)}))

    def rewrite_metrics(self, progress: Progress) -> None:
        """Make the metrics file agree with the progress.

        Raises:
            OutputError: It cannot be written.
        """
        with replacing(self.metrics) as temporary:
            temporary.write_text("".join(map(_line, progress.lines)), "utf-8")

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line to the metrics file.

        Raises:
            OutputError: It cannot be written.
        """
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(_line(line))
        except OSError as error:
            raise OutputError(f"Cannot write {self.metrics}: {error.strerror}.") from error


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings or data than a folder's run was begun with.

    Args:
        path: The folder.
        before: What decided its numbers, JSON values.
        now: What would decide them now.

    Raises:
        SettingError: A value differs.
    """
    for key in sorted(now.keys() | before.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            raise SettingError(
                f"{path} was begun with {_phrase(key, old)}, but now it is "
                f"{_short(new)}: continue with the same, or name another folder."
            )


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def _phrase(key: str, value: Any) -> str:
    return f"{key.replace('_', ' ')} {_short(value)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
