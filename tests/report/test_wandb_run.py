from __future__ import annotations

import http.server
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from meditron_train.report import wandb_run
from meditron_train.report.json_lines import encode_line
from meditron_train.report.wandb_run import WandbRun, choose_mode

needs_wandb = pytest.mark.skipif(
    wandb_run.importlib.util.find_spec("wandb") is None, reason="wandb is not installed"
)


@pytest.fixture
def warnings():
    """Messages at WARNING and above, whatever logging was set up by others."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("meditron_train.report.wandb_run")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def start(run_dir: Path, mode: str = "offline") -> WandbRun:
    return WandbRun(
        run_dir,
        mode=mode,
        project="project",
        name="the-name",
        tags=["pilot", "7b"],
        config={"train": {"steps": 3}},
    )


def start_in_place_of_wandb(run_dir: Path, monkeypatch, code: str) -> WandbRun:
    """A WandbRun whose other end runs `code` instead of the W&B client."""
    popen = subprocess.Popen

    def popen_code(command, **keywords):
        return popen([sys.executable, "-c", code], **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(wandb_run.subprocess, "Popen", popen_code)
        return start(run_dir)


@needs_wandb
def test_a_killed_trainer_and_its_resume_are_one_offline_run(tmp_path, warnings):
    trainer = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from meditron_train.report.wandb_run import WandbRun\n"
        "run = WandbRun(Path(sys.argv[1]), mode='offline', project='p', name='n', tags=[], config={})\n"
        'run.log(\'{"step": 1, "loss": 0.5}\')\n'
        "os.killpg(os.getpid(), signal.SIGTERM)\n"
    )
    process = subprocess.run([sys.executable, "-c", trainer, tmp_path], check=False, start_new_session=True)
    assert process.returncode == -signal.SIGTERM
    log_file = tmp_path / "logs" / "wandb.log"
    deadline = time.monotonic() + 100
    while (
        "You can sync this run" not in log_file.read_text()
    ):  # it saw the end of the pipe and finished by itself
        assert time.monotonic() < deadline
        time.sleep(0.1)

    run = start(tmp_path)
    run.log(encode_line({"step": 2, "loss": float("nan"), "validation_loss.pubmed": 3.0}))
    run.close(timeout_s=100)
    assert warnings == []
    assert log_file.read_text().count("W&B offline: as configured") == 2
    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    records = sorted(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(records) == 2
    record = records[1].read_bytes()
    assert all(word in record for word in (b"validation_loss.pubmed", b"the-name", b"pilot", b'"steps"'))


def test_a_hanging_wandb_holds_up_nothing(tmp_path, monkeypatch, warnings):
    run = start_in_place_of_wandb(tmp_path, monkeypatch, "import time; time.sleep(1000)")
    monkeypatch.setattr(wandb_run, "_MAX_PENDING_BYTES", 100_000)
    started = time.monotonic()
    for step in range(1000):
        run.log(encode_line({"step": step, "text": "x" * 1000}))
    process = run._process
    run.close(timeout_s=0.5)
    assert time.monotonic() - started < 20
    assert process.returncode == -signal.SIGKILL
    assert len(run._pending) < 110_000
    assert "does not keep up" in warnings[0]
    assert "did not finish within" in warnings[1]
    assert len(warnings) == 2


def test_a_dead_wandb_is_turned_off_with_its_last_words(tmp_path, monkeypatch, warnings):
    run = start_in_place_of_wandb(tmp_path, monkeypatch, "raise SystemExit('the server said no')")
    run._process.wait()
    run.log('{"step": 1}')
    run.log('{"step": 2}')
    run.close()
    assert warnings == ["W&B is off from now on, training goes on: the server said no"]


def test_a_wandb_that_fails_at_the_end_is_reported(tmp_path, monkeypatch, warnings):
    code = "import sys\nfor line in sys.stdin:\n    if line == 'finish\\n': sys.exit('upload failed')"
    run = start_in_place_of_wandb(tmp_path, monkeypatch, code)
    run.log('{"step": 1}')
    run.close()
    run.close()
    assert warnings == ["W&B ended with an error: upload failed"]


def test_without_the_package_there_is_one_warning(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name: None)
    run = start(tmp_path)
    run.log('{"step": 1}')
    run.close()
    assert warnings == ["W&B is off: the package wandb is not installed"]


def test_a_directory_that_cannot_be_written_turns_it_off(tmp_path, warnings):
    (tmp_path / "wandb").write_text("a file where the directory should be")
    run = start(tmp_path)
    run.log('{"step": 1}')
    run.close()
    assert len(warnings) == 1
    assert "W&B is off from now on" in warnings[0]


@pytest.fixture
def server():
    class Forbidden(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Forbidden) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_auto_is_online_only_with_a_key_and_a_network(tmp_path, server):
    home = {"HOME": str(tmp_path)}
    assert choose_mode("auto", {**home, "WANDB_BASE_URL": server}) == (
        "offline",
        "there is no API key (WANDB_API_KEY or `wandb login`)",
    )
    key = {**home, "WANDB_API_KEY": "secret"}
    assert choose_mode("auto", {**key, "WANDB_BASE_URL": server})[0] == "online"
    mode, reason = choose_mode("auto", {**key, "WANDB_BASE_URL": "http://127.0.0.1:9"})
    assert mode == "offline"
    assert "cannot be reached" in reason
    assert choose_mode("auto", {**key, "WANDB_BASE_URL": "no address"})[0] == "offline"


def test_auto_finds_the_key_of_wandb_login(tmp_path, server):
    environment = {"HOME": str(tmp_path), "WANDB_BASE_URL": server}
    (tmp_path / ".netrc").write_text("machine 127.0.0.1\n  login user\n  password secret\n")
    os.chmod(tmp_path / ".netrc", 0o600)
    assert choose_mode("auto", environment)[0] == "online"
    (tmp_path / ".netrc").write_text("machine elsewhere.example\n  login user\n  password secret\n")
    assert choose_mode("auto", environment)[0] == "offline"
    (tmp_path / ".netrc").write_text("not a netrc")
    assert choose_mode("auto", environment)[0] == "offline"


@pytest.mark.parametrize("wanted", ["online", "offline", "disabled"])
def test_auto_follows_the_environment_and_a_configured_mode_wins(wanted):
    assert choose_mode("auto", {"WANDB_MODE": wanted})[0] == wanted
    assert choose_mode("offline", {"WANDB_MODE": wanted}) == ("offline", "as configured")
