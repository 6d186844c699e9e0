"""A headless Chromium with tests/browser/page.html, driven by nothing but the page's own requests."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from tests.lines import LineProcess, require_tool

FOLDER: Final = Path(__file__).resolve().parent.parent / "browser"
BUNDLES: Final = {
    "/mqtt.min.js": FOLDER / "node_modules" / "mqtt" / "dist" / "mqtt.min.js",
    "/paho-mqtt-min.js": FOLDER / "node_modules" / "paho-mqtt" / "paho-mqtt-min.js",
}
REPORT_LIMIT: Final = 40.0
"""Seconds for one step of the page, the first of which waits for Chromium to start."""
JOB_WAIT: Final = 1.0
"""Seconds that a request for a job is kept open."""
OPTIONS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-proxy-server",
)


class Server(ThreadingHTTPServer):
    """Serves the page, hands out jobs, collects reports."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: the browser goes away in the middle of a request when the tests are done."""


class Handler(BaseHTTPRequestHandler):
    """One request of the page."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/job":
            try:
                self.answer(200, "application/json", json.dumps(self.server.jobs.get(timeout=JOB_WAIT)).encode())
            except queue.Empty:
                self.answer(204, "application/json", b"")
        elif path == "/":
            self.answer(200, "text/html; charset=utf-8", (FOLDER / "page.html").read_bytes())
        elif path in BUNDLES:
            self.answer(200, "text/javascript; charset=utf-8", BUNDLES[path].read_bytes())
        else:
            self.answer(404, "text/plain", b"not here\n")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.reports.put(json.loads(body))
        self.answer(200, "text/plain", b"")

    def answer(self, status: int, content_type: str, body: bytes) -> None:
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Cache-Control", "no-store")
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""


class Page:
    """The page in the browser."""

    def __init__(self, server: Server, browser: LineProcess) -> None:
        self._server = server
        self._browser = browser
        self._number = 0
        self._kept: list[dict[str, Any]] = []
        """Reports of other jobs, which nobody has asked for yet."""
        self.origin = f"http://127.0.0.1:{server.server_port}"

    def start(self, job: dict[str, Any]) -> int:
        """Give the page a job; return its number."""
        self._number += 1
        self._server.jobs.put({"id": self._number, **job})
        return self._number

    def wait_for(self, job: int, kind: str) -> dict[str, Any]:
        """Return the next report of `job`, which must be `kind`, waiting for it; reports of other jobs are kept.

        Raises:
          AssertionError: the page reports something else, a failure perhaps, or nothing in time.
        """
        report = next((kept for kept in self._kept if kept["job"] == job), None)
        if report is not None:
            self._kept.remove(report)
        while report is None:
            try:
                report = self._server.reports.get(timeout=REPORT_LIMIT)
            except queue.Empty:
                text = f"the page said nothing for {REPORT_LIMIT} s; Chromium said:\n{self._browser.text}"
                raise AssertionError(text) from None
            if report["job"] != job:
                self._kept.append(report)
                report = None
        assert report["kind"] == kind, report
        return report


@contextmanager
def open_page(profile: Path, options: Sequence[str] = ()) -> Iterator[Page]:
    """Start the server and Chromium on its page; end both afterwards. `profile`: an empty folder for the browser;
    `options`: more of Chromium's."""
    chromium = require_tool("chromium", "chromium-browser", "google-chrome")
    for bundle in BUNDLES.values():
        if not bundle.exists():
            pytest.fail(f"{bundle.relative_to(FOLDER)} is missing in tests/browser; `scripts/test` installs it")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="page server")
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/"
        browser = LineProcess([chromium, *OPTIONS, *options, f"--user-data-dir={profile}", address])
        try:
            yield Page(server, browser)
        finally:
            end_browser(browser)
            server.shutdown()
            thread.join()


def end_browser(browser: LineProcess) -> None:
    """Ask Chromium to end, so that it takes its helper processes along; insist after a while."""
    if browser.process.poll() is None:
        browser.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            browser.process.wait(10)
    browser.kill()
