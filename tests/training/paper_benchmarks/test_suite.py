from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from forked import run_python

from aoft_deploy.errors import DataError, SettingError, UnknownNameError
from aoft_deploy.training.paper_benchmarks.suite import run_suite
from aoft_deploy.training.paper_benchmarks.tasks import VTAB
from aoft_deploy.training.settings import RunOptions

GIVEN = {
    "backbone": "aoft_vit_nano",
    "img_size": 16,
    "epochs": 2,
    "method": "linear",
    "head_lr": 0.03,
    "precision": "fp32",
}
TASKS = ["cifar", "kitti", "eurosat"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_vtab: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("vtab")
    for name in TASKS:
        write_vtab(folder, name, classes=3)
    return folder


def run(root: Path, out: Path, **changes: Any) -> None:
    options = {"tasks": TASKS, "seeds": 2, "given": GIVEN, "any_size": True, **changes}
    run_suite("vtab", root, out, **options)


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of three tasks with two seeds."""
    out = tmp_path_factory.mktemp("finished") / "suite"
    run(root, out)
    return out


def results(out: Path) -> dict[str, Any]:
    """results.json without measured times."""
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    for outcome in found["outcomes"]:
        del outcome["seconds"]
    return found


def stamps(out: Path) -> dict[Path, int]:
    """Modification time of each file of each run."""
    paths = out.glob("*/seed-*/**/*")
    return {path.relative_to(out): path.stat().st_mtime_ns for path in paths}


def test_every_task_and_seed_has_its_folder_and_the_table_has_all(finished: Path) -> None:
    folders = {f"{path.parent.name}/{path.name}" for path in finished.glob("*/seed-*")}
    assert folders == {f"{task}/seed-{seed}" for task in TASKS for seed in (0, 1)}
    found = results(finished)
    assert found["runs"] == {"finished": 6, "wanted": 6}
    for task in TASKS:
        shares = [
            json.loads(
                (finished / task / f"seed-{seed}/metrics.jsonl").read_text().splitlines()[-1]
            )
            for seed in (0, 1)
        ]
        mean = 100 * fmean(share["test_accuracy"] for share in shares)
        assert found["test_accuracy"][task]["mean"] == pytest.approx(mean)
        assert found["test_accuracy"][task]["runs"] == 2
    assert "mean of 3 of 19 tasks" in found
    text = (finished / "table.md").read_text()
    assert "* vtab/cifar: train has 8 images instead of 800\n" in text
    assert {o["seed"] for o in found["outcomes"]} == {0, 1}


def test_finished_runs_are_not_repeated_and_the_table_is_rewritten(
    root: Path, finished: Path
) -> None:
    table, before = (finished / "table.md").read_bytes(), stamps(finished)
    (finished / "table.md").unlink()
    run(root, finished)
    assert (finished / "table.md").read_bytes() == table
    assert stamps(finished) == before


def test_a_suite_grows_by_seeds_and_tasks(root: Path, finished: Path, tmp_path: Path) -> None:
    run(root, tmp_path, tasks=TASKS[:1], seeds=1)
    before = stamps(tmp_path)
    run(root, tmp_path)
    assert before.items() <= stamps(tmp_path).items()
    assert results(tmp_path) == results(finished)


def test_a_suite_is_overwritten_on_request(root: Path, tmp_path: Path) -> None:
    changed = {"tasks": TASKS[:1], "seeds": 1, "options": RunOptions(overwrite=True)}
    run(root, tmp_path, **changed)
    before = stamps(tmp_path)
    run(root, tmp_path, **changed, given={**GIVEN, "head_lr": 0.1})
    after = stamps(tmp_path)
    assert before.keys() == {Path(str(path).replace("lr-0.1", "lr-0.03")) for path in after}
    assert not before.items() & after.items()


def test_a_run_that_fails_leaves_the_table_of_those_before(
    root: Path, finished: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "eurosat" / "seed-0"
    blocked.mkdir(parents=True)
    (blocked / "model.ckpt").touch()
    with pytest.raises(OSError, match="so it cannot be resumed: start a new run"):
        run(root, tmp_path)
    assert results(tmp_path)["runs"] == {"finished": 1, "wanted": 6}
    assert "1 of 6 runs are finished" in (tmp_path / "table.md").read_text()
    (blocked / "model.ckpt").unlink()
    run(root, tmp_path)
    assert results(tmp_path) == results(finished)


def test_progress_is_printed_after_each_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(root, tmp_path, tasks=["kitti"], seeds=1, options=RunOptions(progress=True))
    assert "vtab/kitti, seed 0: " in capsys.readouterr().err


def test_other_settings_are_refused_before_anything_runs(root: Path, finished: Path) -> None:
    before = stamps(finished)
    with pytest.raises(SettingError, match="seed-0 was started with epochs 2, but now it is 3"):
        run(root, finished, given={**GIVEN, "epochs": 3})
    assert stamps(finished) == before


def test_a_fault_in_the_last_tasks_data_is_found_before_the_first_run(
    root: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*smallnorb_ele with VTAB-1k's"):
        run(root, tmp_path / "out", tasks=["cifar", "smallnorb_ele"])
    with pytest.raises(DataError, match=r"train800\.txt lists 8 images instead of the benchmark's"):
        run(root, tmp_path / "out", any_size=False)
    assert not (tmp_path / "out").exists()


def test_unknown_names_and_no_seeds_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown benchmark 'vtap'\. Did you mean vtab\?"):
        run_suite("vtap", root, tmp_path)
    with pytest.raises(UnknownNameError, match=r"Unknown task of vtab 'kity'\. Did you mean kitti"):
        run(root, tmp_path, tasks=["kity"])
    with pytest.raises(SettingError, match="`seeds` is 0, but must be a whole number from 1"):
        run(root, tmp_path, seeds=0)


@pytest.mark.slow
def test_a_process_killed_in_a_suite_and_started_again_gives_the_same_table(
    root: Path, finished: Path, tmp_path: Path
) -> None:
    command = ["-m", "aoft_deploy.cli.train", "--suite", "vtab", "--any-size"]
    command += ["--data", str(root), "--out", str(tmp_path / "out"), "--seeds", "2", "--quiet"]
    command += ["--tasks", *TASKS, "--backbone", "aoft_vit_nano", "--img-size", "16"]
    command += ["--epochs", "2", "--method", "linear", "--head-lr", "0.03", "--precision", "fp32"]
    dying = (
        "import os, sys; sys.addaudithook(lambda event, given: os.kill(os.getpid(), 9) "
        "if event == 'os.mkdir' and 'cifar/seed-1/search' in str(given[0]) else None); "
        "from aoft_deploy.cli.train import main; sys.exit(main())"
    )
    killed = run_python("-c", dying, *command[2:])
    assert killed.returncode == -signal.SIGKILL
    assert 3 <= results(tmp_path / "out")["runs"]["finished"] < 6
    assert run_python(*command).returncode == 0
    assert results(tmp_path / "out") == results(finished)
    assert (tmp_path / "out/table.md").read_bytes() == (finished / "table.md").read_bytes()


@pytest.mark.slow
def test_all_19_tasks_run_and_have_both_averages(
    tmp_path: Path, write_vtab: Callable[..., Path]
) -> None:
    for task in VTAB.tasks:
        write_vtab(tmp_path / "data", task.name, train=4, val=2, test=4)
    summary = run_suite(
        "vtab", tmp_path / "data", tmp_path / "out", seeds=1, given=GIVEN, any_size=True
    )
    found = results(tmp_path / "out")
    columns = [found["test_accuracy"][task.name]["mean"] for task in VTAB.tasks]
    assert found["mean of 19 tasks"] == pytest.approx(sum(columns) / 19)
    groups = [sum(columns[:7]) / 7, sum(columns[7:11]) / 4, sum(columns[11:]) / 8]
    assert found["mean of 3 group means"] == pytest.approx(sum(groups) / 3)
    assert summary.mean_groups == found["mean of 3 group means"]
    assert found["parameters_millions"] == {"without_head": 0, "with_head": 193 * 940 / 19 / 1e6}
