"""Failures as messages on the page, without paths of the host."""

from __future__ import annotations

import asyncio
import errno
import importlib
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from aoft_demo.views.failures import failure_message, show_failures
from aoft_demo.views.page import Page
from aoft_deploy.errors import CheckpointError


def test_a_message_has_no_folders_and_an_unexpected_error_is_logged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = CheckpointError("/tmp/aoft-demo-x/uploads/ab/model.ckpt is no checkpoint (1/2 read).")
    assert failure_message(error) == "model.ckpt is no checkpoint (1/2 read)."
    assert "this is a bug" in failure_message(ValueError("secret"))
    assert "secret" in capsys.readouterr().err


def test_folders_with_unusual_names_are_removed_from_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("/tmp/a b/it's #1/aoft-demo-x", '/tmp/"é %41?/aoft-demo-x', "/home/me/aoft-x"):
        monkeypatch.setattr(tempfile, "tempdir", folder)
        path = f"{folder}/uploads/ab12/my cat's.png"
        for text in (f"Cannot read image {path!r}: it is empty.", f"{path} is no checkpoint."):
            message = failure_message(CheckpointError(text))
            assert "my cat" in message and "/" not in message, message
            assert "aoft" not in message and "uploads" not in message, message
    outside = CheckpointError("Cannot read '/srv/my tasks/pets.ckpt': 3/4 of it are missing.")
    assert failure_message(outside) == "Cannot read 'pets.ckpt': 3/4 of it are missing."
    full = failure_message(OSError(errno.ENOSPC, "No space left on device", "/srv/x"))
    assert full == "The demo's disk is full: free some space and try again."
    assert "/srv/x" in capsys.readouterr().err


def test_a_handlers_error_is_shown_in_place_of_its_result() -> None:
    @show_failures("Not done")
    def fails() -> str:
        raise CheckpointError("/a/b/c.ckpt is bad.")

    @show_failures("Not done", output=1, outputs=2)
    def generates() -> Iterator[tuple[Any, Any]]:
        yield 1, 2
        raise CheckpointError("late.")

    assert 'role="alert"' in fails() and "<p>c.ckpt is bad.</p>" in fails()
    first, (kept, shown) = generates()
    assert first == (1, 2) and "late." in shown and kept != shown


def test_an_error_outside_of_a_handler_is_shown_on_the_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By default Gradio shows nothing on the page, and only logs the error."""

    def returns_foreign_file() -> str:
        return "/etc/hostname"  # Gradio does not serve this file

    def raises() -> str:
        raise CheckpointError("/a/b/c.ckpt is bad.")

    gr: Any = importlib.import_module("gradio")

    async def collect() -> list[str]:
        page = Page()
        with page:
            button = gr.Button()
            button.click(returns_foreign_file, None, gr.Image())
            button.click(raises, None, gr.HTML())
        page.has_launched = True
        messages = []
        for number in page.fns:
            with pytest.raises(gr.Error) as refusal:
                await page.process_api(number, [], request=None)
            messages.append(refusal.value.message)
        return messages

    outside, inside = asyncio.run(collect())
    assert "this is a bug" in outside and inside == "c.ckpt is bad."
    assert "InvalidPathError" in capsys.readouterr().err
