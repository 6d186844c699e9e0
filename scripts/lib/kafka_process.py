"""Processes and ports of Kafka nodes, and as much of Kafka's protocol as it takes to ask whether a node serves."""

from __future__ import annotations

import contextlib
import fcntl
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

HOST: Final = "127.0.0.1"


class KafkaError(Exception):
    """Something to tell the user in one line; exit code 1."""


# --- Processes ---


def start_time(pid: int) -> int | None:
    """When process `pid` started, in ticks since boot; None if it is gone. With the pid it names one process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    # A killed process is a zombie while its other threads still end, and they hold its ports until they have.
    return None if fields[0] in "ZX" and int(fields[17]) <= 1 else int(fields[19])


def is_paused(pid: int) -> bool:
    """Tell whether process `pid` is stopped by SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def wait_gone(pid: int, started: int, timeout: float) -> bool:
    """Wait at most `timeout` seconds until the process has ended."""
    deadline = time.monotonic() + timeout
    while start_time(pid) == started:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel releases it whatever happens to us."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- Kafka's protocol ---


def receive_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := connection.recv(count - len(data))):
            raise OSError("connection closed")
        data += more
    return data


def request(connection: socket.socket, api_key: int, version: int, body: bytes) -> bytes:
    """Send one request with the header that carries a client id; return the response behind the correlation id."""
    client_id = b"mqtt-trio-scripts"
    head = struct.pack(">hhih", api_key, version, 7, len(client_id)) + client_id
    connection.sendall(struct.pack(">i", len(head) + len(body)) + head + body)
    (size,) = struct.unpack(">i", receive_exactly(connection, 4))
    if not 4 <= size <= 1 << 20:
        raise OSError(f"this is not Kafka: a response of {size} bytes")
    return receive_exactly(connection, size)[4:]


def live_brokers(port: int, timeout: float = 1.0) -> set[int]:
    """Return the ids of the brokers that serve (are not fenced) as the node on `port` knows them; none: no answer."""
    try:
        with socket.create_connection((HOST, port), timeout) as connection:
            if struct.unpack_from(">h", request(connection, 18, 0, b""))[0] != 0:  # ApiVersions
                return set()
            metadata = request(connection, 3, 1, struct.pack(">i", 0))  # of no topic: brokers and controller only
            (count,) = struct.unpack_from(">i", metadata)
            position, found = 4, set()
            for _ in range(count):
                broker_id, length = struct.unpack_from(">ih", metadata, position)
                found.add(broker_id)
                position += 6 + length + 4
                (length,) = struct.unpack_from(">h", metadata, position)  # of the rack, -1 for none
                position += 2 + max(length, 0)
            return found
    except (OSError, struct.error):
        return set()


# --- Ports ---


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port(*taken: int) -> int:
    """Choose a port below the range from which the kernel takes the near ends of connections.

    Within that range a client that keeps trying to reach a dead node can end up connected to itself.
    """
    try:
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        low = 32768
    candidates = range(20001, low) if low > 22000 else range(20001, 65536)
    for _ in range(1000):
        port = random.choice(candidates)
        if port not in taken and is_free(port):
            return port
    raise KafkaError("found no free port above 20000")
