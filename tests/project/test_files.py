"""Writing files: atomic replacement, permissions, JSON and digests."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aoft_deploy.errors import OutputError
from aoft_deploy.files import (
    file_digest,
    json_text,
    replacing,
    settle,
    writable_folder,
    write_json,
)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Context manager: simulate a full disk; a file cannot grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_file_appears_complete_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent.parent == tmp_path
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("fault", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_block_leaves_only_the_old_file(
    tmp_path: Path, fault: type[BaseException]
) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(fault), replacing(path) as temporary:
        temporary.write_text("half of the ne")
        raise fault
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_exception_without_an_old_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_block_that_writes_nothing_fails_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"Cannot write .*a: No such file or directory"):
        with replacing(path):
            pass
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_fails_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"Cannot write .*a: File too large"):
        with files_of_at_most(1000), replacing(path) as temporary:
            temporary.write_bytes(bytes(2000))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_missing_folders_are_created(tmp_path: Path) -> None:
    with replacing(tmp_path / "b" / "c" / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "b" / "c" / "a").read_text() == "new"


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("old")
    with pytest.raises(OutputError, match=r"Cannot write into .*b: (File exists|Not a directory)"):
        with replacing(tmp_path / "b" / "a"):
            pass
    assert (tmp_path / "b").read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc")
def test_an_unwritable_folder_is_an_error() -> None:
    with pytest.raises(OutputError, match="Cannot write into /proc"):
        with replacing(Path("/proc/a")):
            pass


def test_a_folder_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OutputError, match=f"Cannot write .*{name}: it exists and is no file"):
            with replacing(tmp_path / name):
                pass
    assert (tmp_path / "folder").is_dir()
    assert (tmp_path / "pipe").is_fifo()


def test_a_symbolic_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").read_text() == "new"
    assert (tmp_path / "target").read_text() == "old"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    code = (
        "import os, sys; os.umask(int(sys.argv[1]))\n"
        "from pathlib import Path\n"
        "from aoft_deploy.files import replacing\n"
        "path = Path(sys.argv[2])\n"
        "with replacing(path) as temporary:\n"
        "    temporary.touch(0o600); temporary.write_text('new')\n"
        "path.with_name('plain').write_text('new')\n"
    )
    path = tmp_path / "a"
    subprocess.run([sys.executable, "-c", code, str(umask), path], check=True)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == mode


def test_concurrent_writers_leave_complete_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = {f"{i}" * 50_000 for i in range(6)}
    seen: set[str] = set()
    running = threading.Event()
    running.set()

    def write(content: str) -> None:
        for _ in range(10):
            with replacing(path) as temporary:
                temporary.write_text(content)

    def read() -> None:
        while running.is_set():
            if path.exists():
                seen.add(path.read_text())

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    running.clear()
    reader.join()
    assert seen <= contents
    assert path.read_text() in contents
    assert os.listdir(tmp_path) == ["a"]


def test_settle_gives_a_private_file_default_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch(0o600)
    (tmp_path / "plain").touch()
    settle(path)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_writable_folder_is_removed_after_the_block(tmp_path: Path) -> None:
    with writable_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("text")
        assert folder.parent == tmp_path / "new"
    assert os.listdir(tmp_path / "new") == []


def test_json_round_trips(tmp_path: Path) -> None:
    value = {"classes": ["zürich", "日本"], "numbers": [1, 0.1, None, True]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert json.loads(text) == value
    assert "日本" in text


def test_json_keeps_file_names_that_are_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "a.json", {"name": name})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"name": name}
    assert json_text([name, "é"]) == r'["caf\udce9", "é"]'


def test_a_value_that_is_not_json_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "a.json", {"a": object()})
    assert os.listdir(tmp_path) == []


def test_the_digest_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
