"""A small, strict schema registry: it refuses what a real one would, and tells what it was asked."""

from __future__ import annotations

import base64
import http.server
import json
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs

MEDIA_TYPE = "application/vnd.schemaregistry.v1+json"


@attrs.define
class FakeRegistry:
    """What it has, what it answers instead, and what it was asked."""

    url: str
    login: tuple[str, str] | None = None
    """User and password that it wants."""
    subjects: dict[str, dict[str, int]] = attrs.field(factory=dict)
    """Subject -> schema -> id."""
    incompatible: bool = False
    """No subject takes a second schema."""
    status: int = 200
    answer: bytes = b""
    """What everybody gets instead, unless `status` is 200 and this is empty."""
    headers: dict[str, str] = attrs.field(factory=dict)
    asked: list[str] = attrs.field(factory=list)
    """Method and path of each request."""
    gate: threading.Event = attrs.field(factory=threading.Event)
    """Unset: no request gets an answer."""

    def handle(self, method: str, path: str, authorization: str | None, body: bytes) -> tuple[int, object]:
        """Answer one request as Confluent's registry does."""
        self.asked.append(f"{method} {path}")
        if self.login is not None:
            wanted = "Basic " + base64.b64encode(":".join(self.login).encode()).decode()
            if authorization != wanted:
                return 401, {"error_code": 401, "message": "Unauthorized"}
        if (method, path) == ("GET", "/schemas/types"):
            return 200, ["JSON", "AVRO"]
        parts = [urllib.parse.unquote(part) for part in path.split("/")[1:]]
        if method == "GET" and parts[:2] == ["schemas", "ids"]:
            return self.schema(int(parts[2]))
        if method == "POST" and parts[0] == "subjects" and (len(parts) == 2 or parts[2:] == ["versions"]):
            table = json.loads(body)
            assert set(table) == {"schema"}, "old registries refuse what they do not know"
            return (
                self.register(parts[1], table["schema"]) if len(parts) == 3 else self.look_up(parts[1], table["schema"])
            )
        return 404, {"error_code": 404, "message": "HTTP 404 Not Found"}

    def schema(self, schema_id: int) -> tuple[int, object]:
        for schemas in self.subjects.values():
            for text, known in schemas.items():
                if known == schema_id:
                    return 200, {"schema": text}
        return 404, {"error_code": 40403, "message": "Schema not found"}

    def look_up(self, subject: str, text: str) -> tuple[int, object]:
        if subject not in self.subjects:
            return 404, {"error_code": 40401, "message": f"Subject '{subject}' not found."}
        if text not in self.subjects[subject]:
            return 404, {"error_code": 40403, "message": "Schema not found"}
        return 200, {"subject": subject, "version": 1, "id": self.subjects[subject][text], "schema": text}

    def register(self, subject: str, text: str) -> tuple[int, object]:
        schemas = self.subjects.setdefault(subject, {})
        if self.incompatible and schemas and text not in schemas:
            return 409, {"error_code": 409, "message": "Schema being registered is incompatible\nwith an earlier one"}
        numbers = {known: number for each in self.subjects.values() for known, number in each.items()}
        schemas[text] = numbers.get(text, len(numbers) + 1)
        return 200, {"id": schemas[text]}


@contextmanager
def serve_registry(context: ssl.SSLContext | None = None) -> Iterator[FakeRegistry]:
    """Serve one on loopback."""
    served: FakeRegistry

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            served.gate.wait()
            status, table = served.handle(self.command, self.path, self.headers["Authorization"], body)
            if self.command == "POST" and self.headers["Content-Type"] != MEDIA_TYPE:
                status, table = 415, {"error_code": 415, "message": "Unsupported Media Type"}
            answer = json.dumps(table).encode()
            if served.status != 200 or served.answer:
                status, answer = served.status, served.answer
            self.send_response(status)
            for name, value in served.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # clients that do not trust its certificate, or did not wait

    with Server(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        served = FakeRegistry(f"http{'s' if context else ''}://127.0.0.1:{server.server_address[1]}")
        served.gate.set()
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield served
        finally:
            served.gate.set()
            server.shutdown()
            thread.join()
