"""Messages of the library name parameters; commands show their options."""

from __future__ import annotations

import argparse

import pytest

from aoft_deploy.cli.command import run, with_options
from aoft_deploy.errors import SettingError


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("checkpoint")
    made.add_argument("-o", "--output")
    made.add_argument("--to")
    made.add_argument("--lr", type=float)
    made.add_argument("--head-lr", type=float)
    made.add_argument("--min-agreement", type=float)
    made.add_argument("--backbone-weights")
    made.add_argument("--batches", nargs=3)
    made.add_argument("--force", action="store_true")
    return made


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
def test_options_stand_in_the_place_of_parameters(
    parser: argparse.ArgumentParser, message: str, shown: str
) -> None:
    assert with_options(message, parser) == shown


def test_a_command_shows_its_options(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(options: argparse.Namespace) -> None:
        raise SettingError("`min_agreement` is 2, but must be from 0 to 1.")

    assert run(parser, body, ["model.ckpt"]) == 1
    assert capsys.readouterr().err == "error: --min-agreement is 2, but must be from 0 to 1.\n"
