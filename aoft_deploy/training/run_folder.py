"""The folder of a training run: its checkpoint, its metrics, and the state to resume from."""

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
from aoft_deploy.files import replacing, writable_folder

__all__ = ["LEFT_OUT", "Progress", "RunFolder", "check_same", "existing_run", "unreadable"]

LEFT_OUT = "unreadable.json"
"""File in a run's folder with the images that were left out, and the reason of each."""

_AFRESH = "start a new run with `overwrite=True`, or in another folder"


@dataclass
class Progress:
    """State of a run after its last finished epoch.

    Attributes:
        lines: The metrics of each finished epoch, followed by those of the test.
        best: Metrics of the best epoch; empty before the first.
        tensors: The trained parameters ``now.NAME``, those of the best epoch ``best.NAME``, and
            the optimiser's moments ``first.NAME`` and ``second.NAME``.
        result: The result of a finished run; None before.
        run: Everything that determines the results, as JSON values; empty before the first epoch.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    run: dict[str, Any] = field(default_factory=dict)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named ``prefix.NAME``, by NAME."""
        start = f"{prefix}."
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}


class RunFolder:
    """The output folder of one run.

    Args:
        path: The folder; created with the first file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "model.ckpt"
        self.metrics = path / "metrics.jsonl"
        self.state = path / "resume.safetensors"

    def open(self, *, resume: bool = False, overwrite: bool = False) -> Progress:
        """The progress of the run so far; nothing is changed.

        Args:
            resume: Continue the run in the folder; start a new one if there is none.
            overwrite: Start a new run even if there is one.

        Raises:
            OutputError: The folder holds a run and both arguments are false, or ``path`` is a
                file or below one.
            CheckpointError: The state cannot be read, or the checkpoint of a finished run is
                missing.
        """
        existing = next(
            each for each in (self.path, *self.path.absolute().parents) if each.exists()
        )
        if not existing.is_dir():
            raise OutputError(f"{existing} is a file: give a folder as `out`.")
        found = [f for f in (self.checkpoint, self.metrics, self.state) if f.exists()]
        if overwrite or not found:
            return Progress()
        if not resume:
            raise existing_run(self.path, found[0])
        if not self.state.exists():
            raise OutputError(
                f"{self.path} holds {found[0].name} but no {self.state.name}, so it cannot be "
                f"resumed: {_AFRESH}."
            )
        return self._read()

    def prepare(self, left_out: Mapping[str, str]) -> None:
        """Make the folder ready for a new run: delete the old one, and write what is left out.

        Args:
            left_out: Names of the images that are left out, and the reason of each.

        Raises:
            OutputError: The folder cannot be written to.
        """
        with writable_folder(self.path):
            for path in (self.checkpoint, self.metrics, self.state, self.path / LEFT_OUT):
                path.unlink(missing_ok=True)
        if left_out:
            with replacing(self.path / LEFT_OUT) as temporary:  # ASCII: names may not be UTF-8
                temporary.write_text(json.dumps(dict(left_out), indent=2) + "\n", "ascii")

    def left_out(self) -> dict[str, str]:
        """The images that the run leaves out, and the reason of each.

        Raises:
            CheckpointError: The list in the folder is damaged.
        """
        path = self.path / LEFT_OUT
        try:
            found = json.loads(path.read_text("ascii")) if path.exists() else {}
            return {str(name): str(fault) for name, fault in found.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise unreadable(path, error) from error

    def _read(self) -> Progress:
        try:
            with safe_open(self.state, "pt") as file:
                state = json.loads((file.metadata() or {})["aoft-run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            values = state["lines"], state["best"], tensors, state["result"], state["run"]
            progress = Progress(*values)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise unreadable(self.state, error) from error
        if progress.result is not None and not self.checkpoint.exists():
            raise CheckpointError(
                f"The run in {self.path} is complete, but its {self.checkpoint.name} is missing: "
                f"{_AFRESH}."
            )
        return progress

    def save(self, progress: Progress) -> None:
        """Write the progress, completely or not at all.

        Raises:
            OutputError: It cannot be written.
        """
        state = {
            "run": progress.run,
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


def existing_run(folder: Path, file: Path) -> OutputError:
    """The error for a folder that holds a run, of which ``file`` is the evidence."""
    return OutputError(
        f"{folder} already holds a run ({file.name}): continue it with `resume=True`, replace it "
        "with `overwrite=True`, or give another folder as `out`."
    )


def unreadable(file: Path, error: Exception) -> CheckpointError:
    """The error for a file of a run that cannot be read."""
    return CheckpointError(f"{file} cannot be read ({error}): {_AFRESH}.")


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings or data than it started with.

    Args:
        path: The folder of the run.
        before: What determined the results when the run started, as JSON values.
        now: What would determine them now.

    Raises:
        SettingError: A value differs.
    """
    for key in sorted(now.keys() | before.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            name, images, _ = key.rpartition("_images")
            what = f"other images in {name}"
            if not images:
                what = f"{key.replace('_', ' ')} {_short(old)}, but now it is {_short(new)}"
            raise SettingError(
                f"{path} was started with {what}: continue with the same, or {_AFRESH}."
            )


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
