"""What each step gets: where to write, the device, the time left, and the exported artefacts."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoft_deploy.errors import MissingExtraError, SettingError
from aoft_deploy.texts import one_line

__all__ = ["NotMeasured", "Run"]


class NotMeasured(Exception):
    """This machine or this version cannot give a figure; the message says why."""


@dataclass(frozen=True)
class Run:
    """One run of a step.

    Attributes:
        step: Name of the step.
        out: Folder of the results.
        scratch: Folder of checkpoints and artefacts, which all steps share.
        dry: Whether it runs on the CPU with a tiny model.
        end: Time at which the step is ended, on the clock of ``time.time``.
    """

    step: str
    out: Path
    scratch: Path
    dry: bool
    end: float

    @property
    def device(self) -> str:
        """The device of engines and of PyTorch."""
        return "cpu" if self.dry else "cuda:0"

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes of the measurements."""
        return (1, 2) if self.dry else (1, 8, 32, 128)

    @property
    def left(self) -> float:
        """Seconds until the step is ended."""
        return self.end - time.time()

    def note(self, row: str, **figures: Any) -> None:
        """Write one row of the results at once, as a JSON line."""
        line = json.dumps({"step": self.step, "row": row, **figures}, default=str)
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @contextmanager
    def row(self, name: str) -> Iterator[None]:
        """Record why a row has no figures, so that the step goes on with the next one."""
        try:
            yield
        except Exception as error:
            if self._lacks(error):
                self.note(name, not_measured=one_line(error, 300))
                return
            where = traceback.format_exc().strip().splitlines()[-7:-1]
            reason = f"{type(error).__name__}: {one_line(error, 400)}"
            self.note(name, failed=reason, where=[line.strip() for line in where])

    def _lacks(self, error: Exception) -> bool:
        """Whether the machine lacks something: a package or, in a dry run, a GPU's abilities."""
        if isinstance(error, ModuleNotFoundError):
            return not (error.name or "").startswith(("aoft_", "benchmarks"))
        kinds = (NotMeasured, MissingExtraError, *([SettingError] if self.dry else []))
        return isinstance(error, kinds)

    def publish(self, name: str, entry: dict[str, Any]) -> None:
        """Tell the other steps how the export of an artefact ended."""
        path = self._ready(name)
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(entry, default=str), "utf-8")
        draft.replace(path)

    def has_artefact(self, name: str) -> bool:
        """Whether the export of an artefact has ended, also without success."""
        return self._ready(name).is_file()

    def artefact(self, name: str) -> Path:
        """Wait for an artefact of ``artefacts.export_all``.

        Raises:
            NotMeasured: It was not exported, with the reason.
        """
        while not self.has_artefact(name):
            if self.left < 5:
                raise NotMeasured(f"{name} was not exported in time")
            time.sleep(0.1)
        entry = json.loads(self._ready(name).read_text("utf-8"))
        if "path" not in entry:
            raise NotMeasured(f"{name} was not exported: {entry['reason']}")
        return Path(entry["path"])

    def _ready(self, name: str) -> Path:
        return self.scratch / "ready" / f"{name}.json"
