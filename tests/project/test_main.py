"""Versions and the list of commands."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import distribution

import pytest
from imported import heavy_libraries

import aoft_deploy

COMMANDS = distribution("aoft-deploy").entry_points.select(group="console_scripts")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda entry: entry.name)
def test_every_command_tells_its_version(
    command: importlib.metadata.EntryPoint, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.load()(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{command.name} {aoft_deploy.__version__}\n"


def test_the_version_is_that_of_the_installed_package() -> None:
    assert distribution("aoft-deploy").version == aoft_deploy.__version__


def test_the_package_lists_its_commands_with_a_sentence_for_each() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aoft_deploy"], capture_output=True, text=True, check=True
    )
    first, *lines, last = done.stdout.splitlines()
    assert first == f"aoft-deploy {aoft_deploy.__version__}"
    assert last == "COMMAND --help shows the options of a command."
    names = [line.split()[0] for line in lines if line[2] != " "]
    assert names == sorted(entry.name for entry in COMMANDS)
    assert max(map(len, lines)) <= 80
    assert sum(line.endswith(".") for line in lines) == len(names)


def test_the_list_needs_no_heavy_library() -> None:
    assert heavy_libraries("from aoft_deploy.__main__ import main; main()") == set()
