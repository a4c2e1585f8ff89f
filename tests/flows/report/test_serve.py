from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from meditron_train.errors import UserError
from meditron_train.flows.report.serve import ReportServer
from tests.report.synthetic_run import write_run


@contextmanager
def served(run, host: str = "127.0.0.1") -> Iterator[ReportServer]:
    with ReportServer([run], host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: ReportServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


@pytest.fixture
def run(tmp_path):
    run = write_run(tmp_path / "run", num_steps=10)
    (tmp_path / "secret.txt").write_text("not of the run")
    (run / "logs").mkdir()
    (run / "logs/rank_00000.log").write_text("<b>a log</b>")
    (run / "link").symlink_to(tmp_path / "secret.txt")
    (run / "up").symlink_to(tmp_path)
    (tmp_path / "run-secret").mkdir()
    (tmp_path / "run-secret/secret.txt").write_text("not of the run")
    return run


def test_the_page_and_the_files_of_the_run(run):
    with served(run) as server:
        status, body, headers = ask(server, "/")
        assert status == 200 and b"finished" in body and b'src="/plotly.js"' in body
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        assert ask(server, "/plotly.js")[1].startswith(b"/*")
        status, body, headers = ask(server, "/files/logs/rank_00000.log")
        assert (status, body) == (200, b"<b>a log</b>") and headers["Content-Type"].startswith("text/plain")
        assert ask(server, "/", "HEAD")[:2] == (200, b"")
        assert server.address.startswith("http://127.0.0.1:") and "token" not in server.address


@pytest.mark.parametrize(
    "path",
    ["../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "link", "up/secret.txt", "/etc/passwd", "//etc/passwd",
     "../run-secret/secret.txt", "logs/../../secret.txt", "a%00b", "", "logs", "absent"],
)  # fmt: skip
def test_a_path_outside_of_the_run_is_refused(run, path):
    with served(run) as server:
        status, body, _ = ask(server, f"/files/{path}")
        assert status == 404 and b"not of the run" not in body and b"root:" not in body


def test_nothing_can_be_changed(run):
    with served(run) as server:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert ask(server, "/files/config.yaml", method)[0] == 501
    assert (run / "config.yaml").exists()


def test_another_name_for_this_machine_is_refused(run):
    with served(run) as server:
        assert ask(server, "/", Host="evil.example")[0] == 403
        assert ask(server, "/", Host=f"localhost:{server.server_address[1]}")[0] == 200


def test_beyond_this_machine_a_token_is_needed(run):
    with served(run, "0.0.0.0") as server:
        assert server.token is not None and len(server.token) >= 32
        assert f"?token={server.token}" in server.address
        for path in ("/", "/plotly.js", "/files/config.yaml", "/?token=wrong", "/?token=", "/?token=%00%ff"):
            assert ask(server, path)[0] == 403, path
        assert ask(server, "/", Cookie="meditron_report_token=wrong")[0] == 403
        query = urlsplit(server.address).query
        status, _, headers = ask(server, f"/?{query}")
        assert status == 303 and headers["Location"] == "/" and "HttpOnly" in headers["Set-Cookie"]
        assert ask(server, "//evil.example/?" + query)[2]["Location"] == "/evil.example/"
        cookie = headers["Set-Cookie"].partition(";")[0]
        assert ask(server, "/", Cookie=cookie)[0] == 200


def test_the_page_follows_the_run(run, monkeypatch):
    monkeypatch.setattr("meditron_train.flows.report.serve._MIN_SECONDS_BETWEEN_PAGES", -1.0)
    with served(run) as server:
        write_run(run, num_steps=20)
        assert b"20 of 20" in ask(server, "/")[1]
        (run / "status.json").rename(run.parent / "away.json")
        for name in ("config.yaml", "metrics.jsonl", "provenance.jsonl"):
            (run / name).unlink()
        (run / "logs/rank_00000.log").unlink()
        (run / "logs").rmdir()
        assert ask(server, "/")[0] == 503


def test_what_cannot_be_served_is_said(run, tmp_path):
    with served(run) as server, pytest.raises(UserError, match="cannot be served"):
        ReportServer([run], "127.0.0.1", server.server_address[1])
    with pytest.raises(UserError, match="there is no directory"):
        ReportServer([tmp_path / "absent"], "127.0.0.1", 0)
