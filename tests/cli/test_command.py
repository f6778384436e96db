"""What all commands share: one-line errors in terms of options, and modules of the user."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from aoft_deploy.cli.command import Parser, add_import_option, run, with_options
from aoft_deploy.errors import SettingError

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    options = Parser(prog="aoft-any")
    options.add_argument("checkpoint")
    options.add_argument("-o", "--output")
    options.add_argument("--to")
    options.add_argument("--lr", type=float)
    options.add_argument("--head-lr", type=float)
    options.add_argument("--min-agreement", type=float)
    options.add_argument("--backbone-weights")
    options.add_argument("--batches", nargs=3)
    options.add_argument("--force", action="store_true")
    options.add_argument("--suite", choices=["vtab", "fgvc"])
    add_import_option(options)
    return options


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`min_agreement` is 2.", "--min-agreement is 2."),
        ("name another with `output`", "name another with --output"),
        ('export with `to="openvino"` or timm', "export with --to openvino or timm"),
        ("accept it with `force=True`.", "accept it with --force."),
        ("`batches=(1, 8, 32)` fall", "--batches 1 8 32 fall"),
        ("give a file with `weights`", "give a file with --backbone-weights"),
        ("smaller rates than `lr` and `head_lr`", "smaller rates than --lr and --head-lr"),
        ("`checkpoint` is missing", "checkpoint is missing"),
        ("there is no `task=3` here", "there is no task=3 here"),
        ("a file called a`b and no parameter", "a file called a`b and no parameter"),
    ],
)
def test_parameters_are_replaced_with_options(
    parser: argparse.ArgumentParser, message: str, shown: str
) -> None:
    assert with_options(message, parser) == shown


def test_an_error_of_a_command_names_its_options(
    parser: argparse.ArgumentParser, capsys: Captured
) -> None:
    def body(options: argparse.Namespace) -> None:
        raise SettingError("`min_agreement` is 2, but must be from 0 to 1.")

    assert run(parser, body, ["model.ckpt"]) == 1
    assert capsys.readouterr().err == "error: --min-agreement is 2, but must be from 0 to 1.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: checkpoint"),
        (["--ouput", "x"], "Unknown option --ouput. Did you mean --output?"),
        (["--ouput=x", "c"], "Unknown option --ouput. Did you mean --output?"),
        (["c", "--zzz"], "Unknown option --zzz."),
        (["c", "-z"], "unrecognized arguments: -z"),
        (["c", "--lr", "x"], "--lr: invalid float value: 'x'"),
        (["c", "--batches", "1", "2"], "--batches: expected 3 arguments"),
        (["c", "-o"], "-o/--output: expected one argument"),
        (
            ["c", "--suite", "vtap"],
            "--suite: Unknown name 'vtap'. Did you mean vtab? Known: fgvc, vtab.",
        ),
    ],
)
def test_wrong_usage_is_one_line_that_leads_to_the_help(
    parser: Parser, arguments: list[str], message: str, capsys: Captured
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(parser, print, arguments)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"error: {message} (see aoft-any --help)\n")


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["c", "--out", "x"], "output", "x"),
        (["--", "--ouput"], "checkpoint", "--ouput"),
        (["--not an option"], "checkpoint", "--not an option"),
        (["c", "-o=x"], "output", "x"),
    ],
)
def test_abbreviations_and_words_after_two_dashes_are_as_argparse_has_them(
    parser: Parser, arguments: list[str], name: str, value: str
) -> None:
    assert getattr(parser.parse_args(arguments), name) == value


def test_a_module_of_the_user_is_imported_before_the_command_runs(
    parser: Parser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    (tmp_path / "my_first.py").write_text("print('first')")
    (tmp_path / "my_second.py").write_text("print('second')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    words = ["c", "--import", "my_first", "--import", "my_second"]
    assert run(parser, lambda options: print(options.checkpoint), words) == 0
    assert capsys.readouterr().out == "first\nsecond\nc\n"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("my_missing", None, "ModuleNotFoundError: No module named 'my_missing'"),
        ("my_syntax", "a b", "SyntaxError"),
        ("my_fault", "\n1 / 0", "ZeroDivisionError in {folder}/my_fault.py:2: division by zero"),
        ("my_needs", "import no_such", "ModuleNotFoundError in {folder}/my_needs.py:1: No module"),
    ],
)
def test_a_module_of_the_user_that_fails_is_one_line(
    name: str,
    text: str | None,
    reason: str,
    parser: Parser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    if text is not None:
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert run(parser, print, ["c", "--import", name]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: --import {name} fails ({reason.format(folder=tmp_path)}")
    assert shown.err.endswith("installed or in the current folder.\n")
    assert shown.out == "" and shown.err.count("\n") == 1


@pytest.mark.parametrize(("caught", "code"), [(True, 0), (False, 1)])
def test_an_interrupt_within_an_import_ends_with_the_commands_own_exit_code(
    caught: bool, code: int, tmp_path: Path
) -> None:
    """CPython 3.11 forgets that an interrupt of ``exec`` was handled, and ends with SIGINT."""
    script = f"""
import contextlib, sys
from aoft_deploy.cli.command import Parser, run

def body(options):
    with contextlib.suppress(*[KeyboardInterrupt] * {caught}):
        exec("raise KeyboardInterrupt")

sys.exit(run(Parser(prog="aoft-any"), body, []))
"""
    (tmp_path / "ended.py").write_text(script)
    command = [sys.executable, "-m", "ended"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == code
