"""Number of processors that a process may use: CPU affinity and quotas of control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from installed import program

from aoft_deploy.processors import limited, processors


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine with eight processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


def machine(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """Write the files of /proc and /sys that describe control groups; return their root."""
    for name, content in {
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": mounts,
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


VERSION_2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
VERSION_1 = (
    "30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 30 0:28 {top} /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("1000 100000\n", 1),
        ("350000 50000\n", 7),
        ("6400000 100000\n", 8),
        ("", 8),
        ("junk", 8),
        ("100000 0\n", 8),
    ],
)
def test_a_quota_of_version_2(tmp_path: Path, text: str, count: int) -> None:
    root = machine(tmp_path, "0::/\n", VERSION_2, {"sys/fs/cgroup/cpu.max": text})
    assert processors(root) == count


@pytest.mark.parametrize(
    ("quotas", "count"),
    [
        ({"a/b/c": "max 100000", "a/b": "300000 100000", "a": "max 100000"}, 3),
        ({"a/b/c": "200000 100000", "a/b": "300000 100000"}, 2),
        ({"a/b/c": "400000 100000", "a/b": "300000 100000", "a": "100000 100000"}, 1),
        ({"x": "100000 100000"}, 8),
    ],
)
def test_the_smallest_quota_of_nested_groups_counts(
    tmp_path: Path, quotas: dict[str, str], count: int
) -> None:
    files = {f"sys/fs/cgroup/{name}/cpu.max": text for name, text in quotas.items()}
    assert processors(machine(tmp_path, "0::/a/b/c\n", VERSION_2, files)) == count


def test_the_mount_of_a_container_starts_at_its_own_group(tmp_path: Path) -> None:
    mounts = VERSION_2.replace("0:26 / ", "0:26 /docker/abc ")
    root = machine(
        tmp_path, "0::/docker/abc/in\n", mounts, {"sys/fs/cgroup/in/cpu.max": "100000 50000"}
    )
    assert processors(root) == 2
    (root / "proc/self/cgroup").write_text("0::/../elsewhere\n")
    (root / "sys/fs/cgroup/cpu.max").write_text("300000 100000")
    assert processors(root) == 3


@pytest.mark.parametrize(
    ("top", "folder"),
    [("/", "cpu,cpuacct/docker/abc"), ("/docker/abc", "cpu,cpuacct"), ("/", "cpu,cpuacct")],
)
@pytest.mark.parametrize(
    ("quota", "period", "count"), [("250000", "100000", 3), ("-1", "100000", 8), ("", "", 8)]
)
def test_a_quota_of_version_1(
    tmp_path: Path, top: str, folder: str, quota: str, period: str, count: int
) -> None:
    cgroup = "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/elsewhere\n0::/\n"
    place = f"sys/fs/cgroup/{folder}"
    files = {
        f"{place}/cpu.cfs_quota_us": quota,
        f"{place}/cpu.cfs_period_us": period,
        f"{place}/elsewhere/cpu.cfs_quota_us": "100000",
        f"{place}/elsewhere/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/docker/abc/cpu.cfs_quota_us": "1",
        "sys/fs/cgroup/memory/docker/abc/cpu.cfs_period_us": "1",
    }
    assert processors(machine(tmp_path, cgroup, VERSION_1.format(top=top), files)) == count


def test_the_name_of_a_mount_may_contain_spaces(tmp_path: Path) -> None:
    mounts = VERSION_2.replace("/sys/fs/cgroup", r"/sys/the\040groups")
    files = {"sys/the groups/cpu.max": "100000 100000"}
    assert processors(machine(tmp_path, "0::/\n", mounts, files)) == 1


def test_without_control_groups_the_affinity_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert processors(tmp_path) == 8 and limited() in (None, processors())
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    assert processors(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processors(tmp_path) == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processors(tmp_path) == 1


def output_of(code: str, *before: str) -> str:
    """Output of Python code in a subprocess, started by the command ``before``."""
    done = subprocess.run(
        [*before, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={name: v for name, v in os.environ.items() if name != "OMP_NUM_THREADS"},
    )
    return done.stdout.strip()


OURS = "from aoft_deploy.processors import processors; print(processors())"
JAVA = """
public class Count {
  public static void main(String[] given) {
    System.out.println(Runtime.getRuntime().availableProcessors());
  }
}
"""


@pytest.mark.parametrize("before", [[], ["taskset", "-c", "0"]])
def test_java_counts_the_same_number(tmp_path: Path, before: list[str]) -> None:
    java = program(["java"], ["openjdk-17-jdk-headless"])
    source = tmp_path / "Count.java"
    source.write_text(JAVA)
    done = subprocess.run([*before, java, str(source)], capture_output=True, text=True, check=True)
    assert output_of(OURS, *before) == done.stdout.strip()


GROUP = Path("/sys/fs/cgroup/cpu/aoft-tests")


def test_java_counts_the_same_number_under_a_quota(tmp_path: Path) -> None:
    """Uses a real control group if this process may create one (root, version 1)."""
    java = program(["java"], ["openjdk-17-jdk-headless"])
    source = tmp_path / "Count.java"
    source.write_text(JAVA)
    inside: list[str] = []
    try:
        try:
            GROUP.mkdir()
            (GROUP / "cpu.cfs_quota_us").write_text("50000")
            inside = ["sh", "-c", f'echo $$ > {GROUP}/cgroup.procs && exec "$0" "$@"']
        except OSError:
            pass
        command = [*inside, java, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert output_of(OURS, *inside) == done.stdout.strip()
        assert not inside or done.stdout.strip() == "1"
    finally:
        if inside:
            GROUP.rmdir()


ENGINES = """
from pathlib import Path
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.serving.settings import Settings
engine = load_artefact(Path(PATH))
print(Settings().decoders, engine._session.get_session_options().intra_op_num_threads)
"""


def test_threads_and_decoders_follow_the_affinity(artefact: Path) -> None:
    code = ENGINES.replace("PATH", repr(str(artefact)))
    assert output_of(code, "taskset", "-c", "0") == "1 1"


def test_torch_follows_the_affinity() -> None:
    code = (
        "import argparse\n"
        "from aoft_deploy.cli.command import run\n"
        "def body(options):\n"
        "    import torch\n"
        "    print(torch.get_num_threads())\n"
        "run(argparse.ArgumentParser(), body, [])\n"
    )
    assert output_of(code, "taskset", "-c", "0") == "1"


def test_only_one_module_counts_processors(root: Path) -> None:
    users = [
        str(path.relative_to(root))
        for folder in ("aoft_deploy", "exporters", "demo", "benchmarks", "tools")
        for path in (root / folder).rglob("*.py")
        if "os.cpu_count(" in path.read_text("utf-8")
        or "ThreadPoolExecutor()" in path.read_text("utf-8")
    ]
    assert users == ["aoft_deploy/processors.py"]
