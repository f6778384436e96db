"""The code that the view Race shows does what it says."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from aoft_demo.tasks.shared_fleet import bundled_checkpoints
from aoft_demo.views.race.snippets import python_snippet, shell_snippet
from aoft_deploy.cli import bench, export_options


def test_the_commands_parse() -> None:
    parsers = {"aoft-export": export_options.parser(), "aoft-bench": bench.parser()}
    name = """a "task's" $NAME"""
    lines = shell_snippet(name).strip().splitlines()
    assert len(lines) == 3
    for line in lines:
        program, *arguments = shlex.split(line)
        assert parsers[program].parse_args(arguments)
    assert f"{name}.ckpt" in shlex.split(lines[1])
    assert f"{name}.onnx" in shlex.split(lines[2])


@pytest.mark.slow
def test_the_script_measures_the_three_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in bundled_checkpoints()[:2]:
        shutil.copyfile(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    threads, names = torch.get_num_threads(), dict[str, object]()
    try:
        exec(python_snippet(threads=1, rank=4), names)
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert re.findall(r"^(.+): [\d.]+ ms$", printed, re.M) == [
        "one pass",
        "separate models",
        "PEFT",
    ]

    ways: dict[str, object] = names["ways"]  # type: ignore[assignment]
    mixed = ways["one pass"]()  # type: ignore[operator]
    separate = ways["separate models"]()  # type: ignore[operator]
    for i, answers in enumerate(separate):
        logits = np.stack([answer.logits for answer in mixed[i::2]])
        np.testing.assert_allclose(logits, answers, atol=1e-3)
