import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aoft_deploy.checkpoint import read_checkpoint
from aoft_deploy.cli.train import main, parser
from aoft_deploy.hyperparameters import TrainingSettings
from aoft_deploy.tasks import load_task, write_folder

SHAPES = load_task("shape", train=30, val=12, test=12)
SMALL = ["--img-size", "16", "--epochs", "1", "--batch-size", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "shapes"
    write_folder(SHAPES, path)
    return path


def test_help_comes_without_torch() -> None:
    code = (
        "import sys\n"
        "from aoft_deploy.cli.train import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(n in sys.modules for n in ('torch', 'numpy', 'PIL', 'timm', 'accelerate')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_costs_less_than_a_third_of_a_second() -> None:
    command = [sys.executable, "-m", "aoft_deploy.cli.train", "--help"]
    before = os.times()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = os.times()  # of the processor, which other programs do not lengthen
    assert done.stdout.startswith("usage: aoft-train")
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 0.3


def test_options_default_to_the_settings_of_the_library() -> None:
    options = vars(parser().parse_args(["--data", "digits", "--out", "x"]))
    fields = vars(TrainingSettings())
    for name in fields.keys() & options.keys():
        assert options[name] == fields[name], name
    assert fields.keys() - options.keys() == {"method_settings"}


def test_a_folder_becomes_a_checkpoint_metrics_and_a_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "lora", "--rank", "3", "--targets", "k", "fc1", "--set", "scale=0.5"]
    assert main(["--data", str(folder), "--out", str(tmp_path / "run"), *SMALL, *options]) == 0
    printed = capsys.readouterr()
    checkpoint = read_checkpoint(tmp_path / "run" / "model.ckpt")
    assert checkpoint.settings == {"rank": 3, "scale": 0.5, "targets": ["k", "fc1"]}
    assert checkpoint.classes == SHAPES.classes
    for name in ("method", "trained numbers", "chosen epoch", "val accuracy", "test accuracy"):
        assert re.search(rf"^{name} +\S", printed.out, re.MULTILINE)
    assert "epoch 1/1" in printed.err


def test_quiet_shows_the_table_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--train-on", "train+val", "--method", "linear", "--quiet"]
    assert main(["--data", str(folder), "--out", str(tmp_path), *SMALL, *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert re.search(r"^val accuracy +none$", printed.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "aoft-lora-start"], "Unknown method 'aoft-lora-start'. Did you mean"),
        (["--rank", "999"], "rank is 999, but a 192 × 192 weight allows 1 to 192"),
        (["--method", "linear", "--rank", "4"], "Unknown setting of linear 'rank'"),
        (["--targets", "qq"], "Unknown target of aoft-lora-star 'qq'"),
        (["--set", "rank=many"], "rank of aoft-lora-star is 'many', but must be of type int"),
        (["--data", "digitz"], "Unknown folder or task 'digitz'. Did you mean digits?"),
        (["--backbone", "aoft_vit_nono"], "Unknown backbone 'aoft_vit_nono'. Did you mean"),
        (["--lr", "-1"], "lr is -1.0: use a number above 0"),
        (["--workers", "-1"], "workers is -1: use a whole number from 0"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    given = ["--data", str(folder), "--out", str(tmp_path / "run"), *SMALL, *options]
    assert main(given) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [["--set", "rank"], ["--set", "=3"], ["--augment", "blur"], ["--precision", "fp16"]],
)
def test_wrong_usage_exits_with_2(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--data", "digits", "--out", "x", *options])


def test_data_and_out_are_needed() -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
