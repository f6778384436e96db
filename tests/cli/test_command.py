"""Messages of the library name parameters, and commands replace them with options."""

from __future__ import annotations

import argparse

import pytest

from aoft_deploy.cli.command import run, with_options
from aoft_deploy.errors import SettingError


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser()
    options.add_argument("checkpoint")
    options.add_argument("-o", "--output")
    options.add_argument("--to")
    options.add_argument("--lr", type=float)
    options.add_argument("--head-lr", type=float)
    options.add_argument("--min-agreement", type=float)
    options.add_argument("--backbone-weights")
    options.add_argument("--batches", nargs=3)
    options.add_argument("--force", action="store_true")
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
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(options: argparse.Namespace) -> None:
        raise SettingError("`min_agreement` is 2, but must be from 0 to 1.")

    assert run(parser, body, ["model.ckpt"]) == 1
    assert capsys.readouterr().err == "error: --min-agreement is 2, but must be from 0 to 1.\n"
