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
    """As somebody who has the token."""
    return ask_with(server, path, method, Cookie=f"{server.cookie}={server.token}", **headers)


def ask_with(
    server: ReportServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    host, port = server.server_address[:2]
    connection = http.client.HTTPConnection("127.0.0.1" if host == "0.0.0.0" else host, port, timeout=20)
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
        assert server.address.startswith("http://127.0.0.1:")


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
        for name in ("evil.example", "192.0.2.1", "127.0.0.1.evil.example", "", "[::1"):
            assert ask(server, "/", Host=name)[0] == 403, name
            assert ask_with(server, f"/?token={server.token}", Host=name)[0] == 403, name
        port = server.server_address[1]
        for name in (f"localhost:{port}", "LOCALHOST", f"127.0.0.2:{port}", f"[::1]:{port}"):
            assert ask(server, "/", Host=name)[0] == 200, name


def test_every_loopback_address_can_be_listened_on(run):
    with served(run, "127.0.0.2") as server:
        assert server.address.startswith("http://127.0.0.2:")
        assert ask(server, "/plotly.js")[0] == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_every_request_needs_the_token(run, host):
    """On 127.0.0.1, too: it is open to all users of a login node."""
    with served(run, host) as server:
        assert len(server.token) >= 32
        assert server.address.endswith(f"/?token={server.token}")
        for path in ("/", "/plotly.js", "/files/config.yaml", "/?token=wrong", "/?token=", "/?token=%00%ff"):
            assert ask_with(server, path)[0] == 403, path
        assert ask_with(server, "/", Cookie=f"{server.cookie}=wrong")[0] == 403
        query = urlsplit(server.address).query
        status, _, headers = ask_with(server, f"/?{query}")
        assert status == 303 and headers["Location"] == "/" and "HttpOnly" in headers["Set-Cookie"]
        assert ask_with(server, "//evil.example/?" + query)[2]["Location"] == "/evil.example/"
        cookie = headers["Set-Cookie"].partition(";")[0]
        assert ask_with(server, "/", Cookie=cookie)[0] == 200


def test_two_reports_keep_two_cookies_and_a_link_in_webmail_works(run):
    with served(run) as one, served(run) as other:
        answers = [ask_with(server, f"/?token={server.token}") for server in (one, other)]
        set_cookies = [headers["Set-Cookie"] for _, _, headers in answers]
        assert all("SameSite=Lax" in text for text in set_cookies)
        jar = "; ".join(text.partition(";")[0] for text in set_cookies)  # a browser sends those of all ports
        assert [ask_with(server, "/", Cookie=jar)[0] for server in (one, other)] == [200, 200]
        names = [text.partition("=")[0] for text in set_cookies]
        assert [name.rpartition("_")[2] for name in names] == [
            str(server.server_address[1]) for server in (one, other)
        ]


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
