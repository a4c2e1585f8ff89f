"""The report of runs over HTTP while they go on: read-only, and only for who has the token.

    /            the page, made again where the run has changed
    /plotly.js   plotly's script, which a browser keeps
    /files/PATH  a file of the run, as plain text; nothing outside of the run's directory, whatever links point there

Every request needs the token, once in the address and then as a cookie: a loopback address, too, is open to all users
of a login node. There, the Host header must also be a loopback name: else a page from elsewhere could ask through a
name of its own that leads here (DNS rebinding).
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from meditron_train import __version__
from meditron_train.errors import MeditronError, UserError
from meditron_train.files import open_regular
from meditron_train.flows.report.run_page import make_page
from meditron_train.log import get_logger
from meditron_train.report.page.html import plotly_script, render_html

_log = get_logger(__name__)

REFRESH_S = 30
_MIN_SECONDS_BETWEEN_PAGES = 5.0
_REQUEST_TIMEOUT_S = 30
_BLOCK_BYTES = 1 << 20


class ReportServer(ThreadingHTTPServer):
    """Serves the report of `run_dirs` on `host`:`port` (0: any free port).

    Attributes:
        token: what a request must show.
        is_loopback: whether only this machine can ask.
        cookie: the name of the cookie that keeps the token; browsers do not tell ports apart.

    Raises:
        UserError: a directory is not that of a run, or the address cannot be used.
    """

    daemon_threads = True

    def __init__(self, run_dirs: Sequence[Path], host: str, port: int) -> None:
        self._run_dirs = [Path(path) for path in run_dirs]
        self._page, self._made_at, self._lock = "", -1e9, threading.Lock()
        self.token, self.is_loopback = secrets.token_urlsafe(24), _is_loopback(host)
        self.plotly = plotly_script().encode()
        self.page()  # what is wrong with the runs is said before anything is served
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"{host}:{port} cannot be served: {error}; give another --host or --port"
            ) from None
        self.cookie = f"meditron_report_token_{self.server_address[1]}"

    @property
    def address(self) -> str:
        """Where to look, with the token."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/?token={self.token}"

    def page(self) -> bytes:
        """The page as it is now, at most a few seconds old."""
        with self._lock:
            if time.monotonic() - self._made_at > _MIN_SECONDS_BETWEEN_PAGES:
                made = make_page(self._run_dirs, refresh_s=REFRESH_S)
                self._page = render_html(made, plotly_address="/plotly.js")
                self._made_at = time.monotonic()
            return self._page.encode()

    def file(self, name: str) -> Path | None:
        """The file of a run that `name` leads to; None where it is none, or lies outside of the run's directory."""
        if "\0" in name:
            return None
        for run_dir in self._run_dirs:
            root = run_dir.resolve()
            path = (root / name).resolve()  # follows links
            if path.is_relative_to(root) and path.is_file():
                return path
        return None


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    server_version = f"meditron-train/{__version__}"
    sys_version = ""
    timeout = _REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        address = urlsplit(self.path)
        token = parse_qs(address.query).get("token", [""])[0]
        if self.server.is_loopback and not _is_loopback(self._host_name()):
            return self.send_error(HTTPStatus.FORBIDDEN, "This page is served for this machine alone")
        if _equal(token, self.server.token):
            return self._take_token(address.path)
        if not _equal(self._cookie(), self.server.token):
            return self.send_error(HTTPStatus.FORBIDDEN, "Open the address with the token")
        path = unquote(address.path, errors="replace")
        if path == "/":
            try:
                self._send(self.server.page(), "text/html; charset=utf-8", with_body)
            except (MeditronError, OSError) as error:  # the run was moved away meanwhile
                _log.warning("the report could not be made: %s", error)
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "There is no report of this run now")
        elif path == "/plotly.js":
            self._send(self.server.plotly, "text/javascript; charset=utf-8", with_body, cache="max-age=86400")
        elif path.startswith("/files/") and (file := self.server.file(path.removeprefix("/files/"))):
            self._send_file(file, with_body)
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "There is no such file in the run")

    def _take_token(self, path: str) -> None:
        """Keep the token as a cookie, so that it stays neither in the address bar nor in a history.

        SameSite=Lax, as a click on the address in webmail comes from another site; no request changes anything here.
        """
        self.send_response(HTTPStatus.SEE_OTHER)
        cookie = f"{self.server.cookie}={self.server.token}; HttpOnly; SameSite=Lax; Path=/"
        self.send_header("Set-Cookie", cookie)
        self.send_header("Location", "/" + path.lstrip("/"))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _cookie(self) -> str:
        try:
            found = SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def _host_name(self) -> str:
        try:
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        except ValueError:
            return ""

    def _send(self, body: bytes, kind: str, with_body: bool, *, cache: str = "no-store") -> None:
        self.send_response(HTTPStatus.OK)
        self._send_headers(kind, len(body), cache)
        if with_body:
            self.wfile.write(body)

    def _send_file(self, path: Path, with_body: bool) -> None:
        try:
            file = open_regular(path)
        except (OSError, ValueError):
            return self.send_error(HTTPStatus.NOT_FOUND, "There is no such file in the run")
        with file:
            self.send_response(HTTPStatus.OK)
            num_bytes = path.stat().st_size
            self._send_headers("text/plain; charset=utf-8", num_bytes, "no-store")
            while with_body and num_bytes > 0 and (block := file.read(min(_BLOCK_BYTES, num_bytes))):
                self.wfile.write(block)  # no more than was announced, as the file may be growing
                num_bytes -= len(block)

    def _send_headers(self, kind: str, num_bytes: int, cache: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(num_bytes))
        self.send_header("Cache-Control", cache)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not logged: the token is in one of them."""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
