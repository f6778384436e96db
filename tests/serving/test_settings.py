"""A server's settings from a TOML file, and names of artefacts."""

from __future__ import annotations

from pathlib import Path

import pytest

from aoft_deploy.errors import SettingError
from aoft_deploy.serving.repository.names import artefact_name
from aoft_deploy.serving.settings import Settings, read_toml


def test_settings_are_read_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(
        'port = 9000\nmax-batch = 4\nmax_wait = 0\nrepository = "models"\nlog-requests = true\n'
        'artefacts = { pets = "pets.onnx" }\n'
    )
    found = read_toml(config)
    assert found.pop("artefacts") == [f"pets={tmp_path}/pets.onnx"]
    read_settings = Settings(**found)
    assert (read_settings.port, read_settings.max_batch, read_settings.host) == (
        9000,
        4,
        "127.0.0.1",
    )
    assert read_settings.repository == tmp_path / "models" and read_settings.log_requests
    config.write_text('artefacts = ["a.onnx", "/b/c.onnx"]')
    assert read_toml(config)["artefacts"] == [f"{tmp_path}/a.onnx", "/b/c.onnx"]


def test_devices_are_one_text_or_a_list(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    for text, devices in (('"cuda"', ("cuda",)), ('["cuda:0", "cuda:1"]', ("cuda:0", "cuda:1"))):
        config.write_text(f"device = {text}\nlanes = 4\n")
        found = Settings(**read_toml(config))
        assert (found.device, found.lanes) == (devices, 4)
    assert (Settings().device, Settings().lanes) == ((), None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = ", "cannot be read as TOML"),
        ("prot = 1", "unknown setting 'prot'. Known: admin-token-file, artefacts"),
        ("artefacts = 3", "must be a list of paths"),
        ('port = "1"', "`port` is '1': give a whole number"),
        ("port = true", "`port` is True: give a whole number"),
        ("port = 70000", "`port` is 70000: use from 0 to 65535"),
        ("max-batch = 0", "`max_batch` is 0: use from 1"),
        ("repository = 1", "`repository` is 1: give a path"),
        ("host = 1", "`host` is 1: give a text"),
        ("log-requests = 1", "`log_requests` is 1: give true or false"),
        ("max-wait = nan", "`max_wait` is nan"),
        ('http = "h2"', "use h11 or httptools"),
        ("device = 1", "`device` is 1: give a text or a list of texts"),
        ("device = [1]", "`device` has 1: use cpu, cuda"),
        ('device = ["cuda", "pets.onnx"]', "`device` has 'pets.onnx': use cpu, cuda, cuda:1"),
        ('device = ["cuda", "cuda:00"]', "`device` has cuda:0 twice: name each device once"),
        ('device = ["cpu", "cpu"]', "`device` has cpu twice"),
        ("lanes = 0", "`lanes` is 0: use from 1 to 64"),
    ],
)
def test_a_bad_setting_is_refused(text: str, words: str, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(text)
    with pytest.raises(SettingError, match=words):
        found = read_toml(config)
        found.pop("artefacts", None)
        Settings(**found)


def test_a_missing_settings_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read as TOML"):
        read_toml(tmp_path / "none.toml")


def test_an_artefact_is_named_after_its_file_or_explicitly(tmp_path: Path) -> None:
    assert artefact_name("a/b.onnx") == ("b", Path("a/b.onnx"))
    assert artefact_name("x=a/b.onnx") == ("x", Path("a/b.onnx"))
    assert artefact_name("a/x=b.onnx") == ("x=b", Path("a/x=b.onnx"))
