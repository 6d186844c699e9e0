"""The first words of a Kafka connection, without kafka-python: versions, login, brokers. Only `precheck` uses it.

kafka-python reports whatever goes wrong here as a time-out. What is sent are the oldest versions of each request, which
every server of the last years understands.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Final, Protocol, TypeAlias

Address: TypeAlias = tuple[str, int]

CLIENT_ID: Final = b"mqtt-trio-precheck"
LARGEST_ANSWER: Final = 1024 * 1024

_METADATA: Final = 3
_SASL_HANDSHAKE: Final = 17
_API_VERSIONS: Final = 18
_SASL_AUTHENTICATE: Final = 36
UNSUPPORTED_MECHANISM: Final = 33


class NotKafkaError(Exception):
    """What came is no answer of Kafka. `start` is its first bytes."""

    def __init__(self, start: bytes) -> None:
        super().__init__("what came is no answer of Kafka")
        self.start = start


class ErrorCode(Exception):
    """Kafka answers with an error; `text` is its own, if it has one."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(f"error {code}")
        self.code = code
        self.text = text


class Mechanism(Protocol):
    """A login, as kafka-python's SaslMechanism has it."""

    def auth_bytes(self) -> bytes: ...
    def receive(self, auth_bytes: bytes) -> object: ...
    def is_done(self) -> bool: ...
    def is_authenticated(self) -> bool: ...


class Greeting:
    """Requests over a connected socket, one at a time.

    All methods raise OSError when the connection breaks, EOFError when the server closes it, TimeoutError at the
    deadline, `NotKafkaError` or struct.error for anything but Kafka and `ErrorCode` for its errors.
    """

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        """`deadline`: by the monotonic clock."""
        self._connection = connection
        self._deadline = deadline

    def api_versions(self) -> None:
        """Ask what the server understands; the answer is of no interest, only that there is one."""
        (code,) = struct.unpack_from(">h", self._ask(_API_VERSIONS, 0, b""))
        if code:
            raise ErrorCode(code)

    def mechanisms(self, wanted: str) -> list[str]:
        """Ask for a SASL mechanism; return those that the server has when it does not have that one, else nothing."""
        answer = self._ask(_SASL_HANDSHAKE, 1, _text(wanted))
        code, count = struct.unpack_from(">hi", answer)
        if code == UNSUPPORTED_MECHANISM:
            return _texts(answer, 6, count)
        if code:
            raise ErrorCode(code)
        return []

    def authenticate(self, mechanism: Mechanism) -> None:
        """Log in; raise `ErrorCode` when the server refuses. What `mechanism` raises passes."""
        while not mechanism.is_done():
            token = mechanism.auth_bytes()
            answer = self._ask(_SASL_AUTHENTICATE, 0, struct.pack(">i", len(token)) + token)
            code, length = struct.unpack_from(">hh", answer)
            end = 4 + max(length, 0)
            if code:
                raise ErrorCode(code, answer[4:end].decode("utf-8", "replace"))
            (size,) = struct.unpack_from(">i", answer, end)
            mechanism.receive(answer[end + 4 : end + 4 + size])
        if not mechanism.is_authenticated():
            raise ErrorCode(0)

    def brokers(self) -> list[Address]:
        """Return where the brokers say that they are."""
        answer = self._ask(_METADATA, 1, struct.pack(">i", 0))  # of no topic
        (count,) = struct.unpack_from(">i", answer)
        at, found = 4, []
        for _ in range(count):
            (length,) = struct.unpack_from(">h", answer, at + 4)
            host = answer[at + 6 : at + 6 + length].decode("utf-8", "replace")
            at += 6 + length
            port, rack = struct.unpack_from(">ih", answer, at)
            at += 6 + max(rack, 0)
            found.append((host, int(port)))
        return found

    def wait_for_end(self, seconds: float) -> None:
        """Read, at most for `seconds`, what a server says that nobody asked anything."""
        self._connection.settimeout(max(0.01, min(seconds, self._deadline - time.monotonic())))
        try:
            if not self._connection.recv(1):
                raise EOFError
        except TimeoutError:
            pass

    def _ask(self, api_key: int, version: int, body: bytes) -> bytes:
        head = struct.pack(">hhi", api_key, version, 1) + _text(CLIENT_ID.decode())
        self._set_timeout()
        self._connection.sendall(struct.pack(">i", len(head) + len(body)) + head + body)
        start = self._receive(4)
        (size,) = struct.unpack(">i", start)
        if not 4 <= size <= LARGEST_ANSWER:
            raise NotKafkaError(start + self._rest())
        answer = self._receive(size)
        if answer[:4] != b"\0\0\0\1":
            raise NotKafkaError(start + answer[:60])
        return answer[4:]

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            self._set_timeout()
            if not (more := self._connection.recv(count - len(data))):
                raise EOFError
            data += more
        return data

    def _rest(self) -> bytes:
        """Return what stands behind the start of something strange, if it is there already."""
        self._connection.settimeout(0.05)
        try:
            return self._connection.recv(60)
        except OSError:
            return b""

    def _set_timeout(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">h", len(data)) + data


def _texts(data: bytes, at: int, count: int) -> list[str]:
    found = []
    for _ in range(min(count, 64)):
        (length,) = struct.unpack_from(">h", data, at)
        found.append(data[at + 2 : at + 2 + length].decode("utf-8", "replace"))
        at += 2 + length
    return found
