"""Clients at the level of sockets, for measuring: those that read and those that do not."""

from __future__ import annotations

import selectors
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Final, Literal

from tests.wire import V5, ack, connect, publish, subscribe, text

Kind = Literal["tcp", "tls", "websocket"]
TOPIC: Final = "load"
PADDING: Final = b"." * 1000
STAMP: Final = 8
"""Bytes of the instant of sending, in nanoseconds, in front of the padding."""
RECEIVE_BUFFER: Final = 4096
"""Bytes of a frozen client's receive buffer: so what it does not read waits at the broker, not here."""
_PATIENCE: Final = 20.0
_UPGRADE: Final = (
    b"GET /mqtt HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
)


def stamped(packet_id: int) -> bytes:
    """Return a PUBLISH at QoS 1 that says when it was made."""
    payload = time.monotonic_ns().to_bytes(STAMP, "big") + PADDING
    return publish(V5, TOPIC, payload, flags=2, packet_id=packet_id)


SIZES: Final = (len(stamped(1)) - 2, len(stamped(1)))
"""Bytes of such a message as it reaches a client at QoS 0 and at QoS 1."""


def masked(data: bytes) -> bytes:
    """Return a WebSocket frame of a client; its mask of zeros leaves the bytes as they are."""
    assert len(data) < 126
    return bytes((0x82, 0x80 | len(data))) + bytes(4) + data


class Member:
    """A connected client; with Topic Filters it has subscribed at `qos`, and its SUBACK has come."""

    def __init__(
        self,
        port: int,
        client_id: str,
        *topic_filters: str,
        qos: int = 0,
        kind: Kind = "tcp",
        context: ssl.SSLContext | None = None,
        receive_buffer: int | None = None,
        expiry: int = 0,
    ) -> None:
        self.qos = qos
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(_PATIENCE)
        sock.connect(("127.0.0.1", port))
        if kind == "tls":
            assert context is not None
            sock = context.wrap_socket(sock, server_hostname="localhost")
        self.sock = sock
        wrap = masked if kind == "websocket" else bytes
        if kind == "websocket":
            sock.sendall(_UPGRADE)
            self._skip(b"\r\n\r\n")
        sock.sendall(wrap(connect(V5, text(client_id), properties=b"\x11" + expiry.to_bytes(4, "big"))))
        self._skip(b"\x20")
        if topic_filters:
            sock.sendall(wrap(subscribe(V5, 1, *[(topic_filter, qos) for topic_filter in topic_filters])))
            self._skip(b"\x00\x01\x00" + bytes((qos,)) * len(topic_filters))
        self._rest = b""
        self.latencies: list[float] = []

    def _skip(self, until: bytes) -> None:
        data = b""
        while until not in data:
            more = self.sock.recv(4096)
            assert more, f"the connection ended behind {data!r}"
            data += more

    def read(self) -> None:
        """Take what has come, note how long each message took, acknowledge."""
        data = self._rest + self.sock.recv(262_144)
        size, now, acks = SIZES[self.qos], time.monotonic_ns(), []
        whole = len(data) // size * size
        for at in range(0, whole, size):
            sent = at + size - len(PADDING) - STAMP
            self.latencies.append((now - int.from_bytes(data[sent : sent + STAMP], "big")) / 1e9)
            if self.qos:
                id_at = at + size - len(PADDING) - STAMP - 3
                acks.append(ack(0x40, int.from_bytes(data[id_at : id_at + 2], "big")))
        self._rest = data[whole:]
        if acks:
            self.sock.sendall(b"".join(acks))

    def flood(self, topic_name: str, payload: bytes, count: int) -> None:
        """Publish `count` messages at QoS 2, ten at a time, each to its PUBCOMP."""
        for first in range(1, count + 1, 10):
            ids = range(first, min(first + 10, count + 1))
            self.sock.sendall(b"".join(publish(V5, topic_name, payload, flags=4, packet_id=one) for one in ids))
            self._answers(len(ids))
            self.sock.sendall(b"".join(ack(0x62, one) for one in ids))
            self._answers(len(ids))

    def _answers(self, count: int) -> None:
        """Read so many PUBRECs or PUBCOMPs."""
        left = 4 * count
        while left:
            data = self.sock.recv(left)
            assert data
            left -= len(data)

    def close(self) -> None:
        self.sock.close()


def measure(publisher: Member, members: Sequence[Member], slow: Sequence[Member], count: int, interval: float) -> float:
    """Publish `count` messages, one each `interval` seconds; return the 99th percentile of the seconds they took to
    `members`, which all get all of them. `slow` members read a few bytes between two messages."""
    with selectors.DefaultSelector() as selector:
        for member in members:
            member.latencies.clear()
            selector.register(member.sock, selectors.EVENT_READ, member)
        sent, next_at = 0, time.monotonic()
        end = next_at + count * interval + _PATIENCE
        while sum(len(member.latencies) for member in members) < count * len(members):
            now = time.monotonic()
            assert now < end, "messages are missing"
            if sent < count and now >= next_at:
                publisher.sock.sendall(stamped(sent + 1))
                sent, next_at = sent + 1, next_at + interval
                for member in slow:
                    member.sock.recv(3)
            for key, _ in selector.select(max(0.0, next_at - time.monotonic()) if sent < count else 0.1):
                key.data.read()
    publisher.sock.recv(65_536)  # its PUBACKs
    latencies = sorted(latency for member in members for latency in member.latencies)
    return latencies[len(latencies) * 99 // 100]
