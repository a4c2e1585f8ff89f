"""Uploads that fail say so in one line, with the command to try again."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from meditron_train.errors import MeditronError
from meditron_train.flows.publish.upload import upload, upload_command
from tests.flows.publish.hub import serve
from tests.refusal import refused


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "my model").mkdir()
    (tmp_path / "my model" / "README.md").write_text("# A model\n")
    return tmp_path / "my model"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are sent, and repeated without a pause."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)


def test_the_command_makes_no_public_repository_unasked(directory: Path) -> None:
    words = shlex.split(upload_command(directory, "lab/tiny", public=False))
    assert words == ["hf", "upload", "lab/tiny", str(directory), "--private"]
    assert shlex.split(upload_command(directory, "lab/tiny", public=True)) == words[:-1]


@pytest.mark.usefixtures("online")
def test_a_hub_that_is_down(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        hub.is_down = True
        command = upload_command(directory, "lab/tiny", public=False)
        with refused(
            "is complete, but its upload to lab/tiny failed: Server error '500", command, kind=MeditronError
        ):
            upload(directory, "lab/tiny", "hf_secret", public=False)
        assert hub.repos == {"lab/tiny": True} and hub.commits == []


@pytest.mark.usefixtures("online")
def test_a_hub_that_cannot_be_reached(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and not listening: a connection is refused
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with refused(
            "its upload to lab/tiny failed: ", "Connection refused", "--private", kind=MeditronError
        ):
            upload(directory, "lab/tiny", "hf_secret", public=False)
