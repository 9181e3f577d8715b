"""A page about runs that still go on, served to this machine alone.

    with metricfold.look.view("runs/1") as server:
        print(server.url)
        server.wait()

It listens on 127.0.0.1 alone, and answers GET alone, under an address with a secret in it, asked for by a name of this
machine: a page of somebody else that has its name point here (DNS rebinding) gets nothing, nor does another user
of the machine who does not know the address.
"""

from __future__ import annotations

import hmac
import http.server
import os
import secrets
import sys
import threading
import time
import urllib.parse
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any

from metricfold.look.html import live_html
from metricfold.look.payload import packed
from metricfold.look.place import LookError
from metricfold.look.reading import RunFile
from metricfold.look.report import opened

__all__ = ["View", "view"]

_OURS = ("127.0.0.1", "localhost", "[::1]")
"""What this machine may be called by a browser on it, or at the other end of ``ssh -L``."""
_BUSY = 10
"""Of so many seconds of a core at most one goes into reading and packing."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def view(
    runs: str | os.PathLike[str] | RunFile | Sequence[str | os.PathLike[str] | RunFile],
    *,
    port: int = 0,
) -> View:
    """Serve a page that follows `runs`, on 127.0.0.1 and in threads of its own.

    Args:
        runs: files or folders of runs, or what `read` returned.
        port: where to listen; 0 takes one that is free.

    Raises:
        LookError: a run cannot be read, or `port` is taken.
    """
    return View(opened(runs), port)


class View:
    """A page that is served until `close`; made by `view`.

    Args:
        runs: what is shown; read on while this lives.
        port: where to listen; 0 takes one that is free.
    """

    def __init__(self, runs: Sequence[RunFile], port: int = 0) -> None:
        self._followed = _Followed(runs)
        token = secrets.token_urlsafe(24)
        followed = self._followed

        class Handler(_Handler):
            secret = token
            data = followed

        try:
            self._server = _Server(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LookError(
                f"port {port} of 127.0.0.1 cannot be had ({reason}): give another --port, or none"
            ) from error
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/{token}/"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True
        )
        self._thread.start()

    def __repr__(self) -> str:
        return f"<View of {', '.join(run.label for run in self._followed.runs)} at {self.url}>"

    def wait(self) -> None:
        """Serve until Ctrl-C (KeyboardInterrupt) or `close`."""
        self._thread.join()

    def close(self) -> None:
        """Serve no longer; may be called twice."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> View:  # noqa: PYI034 - Self is Python 3.11's
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Followed:
    """The runs, and their data as it was last packed, for all who ask."""

    def __init__(self, runs: Sequence[RunFile]) -> None:
        self.runs = list(runs)
        self._lock = threading.Lock()
        self._data = b""
        self._version = 0
        self._life = secrets.token_hex(4)  # tells this server's versions from an earlier one's
        self._next = 0.0  # not before this is anything read again
        self._wait = 1.0
        self._problem = ""

    def newest(self) -> tuple[str, bytes, float, str]:
        """Return the version, the data, in how many seconds to ask again, and what is wrong."""
        with self._lock:
            now = time.monotonic()
            if now >= self._next:
                began = time.thread_time()
                self._read_on()
                self._wait = max(1.0, _BUSY * (time.thread_time() - began))
                self._next = now + self._wait / 2
            return f"{self._life}-{self._version}", self._data, self._wait, self._problem

    def _read_on(self) -> None:
        changed = not self._data
        problems = []
        for run in self.runs:
            try:
                update = run.update()
            except LookError as error:
                problems.append(str(error))
                continue
            changed |= bool(update.records) or update.reset
            if update.gone:
                problems.append(f"{Path(run.path).name} is gone; this is what was in it")
        if changed:
            self._data = packed(self.runs)
            self._version += 1
        self._problem = "; ".join(problems)


class _Server(http.server.ThreadingHTTPServer):
    """Says nothing of browsers that hang up, where the address stands."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET of the page, and of its data."""

    secret: str
    data: _Followed
    server_version = "metricfold"
    sys_version = ""
    timeout = 30  # seconds for a connection that says nothing

    def parse_request(self) -> bool:
        """Refuse what is no GET from a page of ours, whatever it asks for."""
        if not super().parse_request():
            return False
        if self.command != "GET":
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET\n", {"Allow": "GET"})
            return False
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or _host(hosts[0]) not in _OURS:
            self._answer(HTTPStatus.FORBIDDEN, b"this is served under 127.0.0.1 alone\n")
            return False
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self._answer(HTTPStatus.FORBIDDEN, b"this is for no page but its own\n")
            return False
        return True

    def do_GET(self) -> None:
        """Answer with the page or its data."""
        path, _, query = self.path.partition("?")
        token, _, what = path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.secret.encode()):
            self._answer(HTTPStatus.NOT_FOUND, b"the address is the one that was printed, whole\n")
        elif what == "":
            page = live_html(f"/{self.secret}/data")
            self._answer(HTTPStatus.OK, page, {"Content-Type": "text/html; charset=utf-8"})
        elif what == "data":
            self._newest(urllib.parse.parse_qs(query).get("have", [""])[0])
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"there is nothing of that name\n")

    def _newest(self, have: str) -> None:
        version, data, wait, problem = self.data.newest()
        headers = {"X-Version": version, "X-Wait": str(round(1000 * wait))}
        if problem:
            headers["X-Problem"] = urllib.parse.quote(problem)
        headers["Content-Type"] = "application/octet-stream"
        status = HTTPStatus.NO_CONTENT if have == version else HTTPStatus.OK
        self._answer(status, b"" if have == version else data, headers)

    def _answer(
        self, status: HTTPStatus, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        told = {"Content-Type": "text/plain; charset=utf-8"} | _HEADERS | (headers or {})
        if status != HTTPStatus.NO_CONTENT:
            told["Content-Length"] = str(len(body))
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing in the terminal, where the address stands."""


def _host(text: str) -> str:
    """Return a Host header without its port, which differs at the other end of a tunnel."""
    name, colon, port = text.rpartition(":")
    return (name if colon and port.isdigit() else text).lower()
