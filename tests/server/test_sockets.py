"""Socket calls that keep the interpreter behave as Python's own, and are not delayed by busy threads."""

from __future__ import annotations

import errno
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from mqtt_trio.server.sockets import LONGEST, HoldingSocket, ReceiveBuffer


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection, the first one non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    ours.setblocking(False)
    theirs.settimeout(10)
    with ours, theirs:
        yield ours, theirs


def receive(sock: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        found += sock.recv(count - len(found))
    return found


def wait_for(sock: HoldingSocket, size: int) -> bytes:
    """Receive what is on its way."""
    limit = time.monotonic() + 10
    while True:
        try:
            return sock.recv(size)
        except BlockingIOError:
            assert time.monotonic() < limit


def fill(sock: HoldingSocket) -> None:
    """Send until the peer's window is full."""
    while True:
        sock.send(b"x" * LONGEST)


@pytest.mark.parametrize("length", [1, 1000, LONGEST, LONGEST + 1, 100_000])
def test_every_byte_arrives(pair: tuple[socket.socket, socket.socket], length: int) -> None:
    ours, theirs = pair
    sock = HoldingSocket(ours, ReceiveBuffer())
    data = random.Random(length).randbytes(length)
    for form in (bytes, bytearray):
        assert sock.send(form(data)) == length
        assert receive(theirs, length) == data
    for size in (LONGEST, 262_144):
        theirs.sendall(data)
        found = b""
        while len(found) < length:
            found += wait_for(sock, size)
        assert found == data


def test_zero_bytes_inside_are_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    assert HoldingSocket(ours, ReceiveBuffer()).send(b"\0a\0\0b\0") == 6
    assert receive(theirs, 6) == b"\0a\0\0b\0"


def test_what_was_received_does_not_change_with_the_next_read(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    sock = HoldingSocket(ours, ReceiveBuffer())
    theirs.sendall(b"first")
    first = wait_for(sock, LONGEST)
    theirs.sendall(b"other")
    assert wait_for(sock, LONGEST) == b"other"
    assert first == b"first"
    theirs.sendall(b"12345")
    assert [wait_for(sock, 2), wait_for(sock, 2), wait_for(sock, 2)] == [b"12", b"34", b"5"]


def test_errors_are_those_of_a_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    sock = HoldingSocket(ours, ReceiveBuffer())
    with pytest.raises(BlockingIOError):
        sock.recv(LONGEST)
    with pytest.raises(BlockingIOError):
        fill(sock)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    with pytest.raises(ConnectionResetError) as caught:
        sock.recv(LONGEST)
    assert (caught.value.errno, caught.value.strerror) == (errno.ECONNRESET, "Connection reset by peer")
    with pytest.raises(BrokenPipeError):
        sock.send(b"x")  # and no SIGPIPE ends the process
    sock.close()
    sock.close()
    assert sock.fileno() == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        sock.send(b"x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        sock.recv(LONGEST)


def test_the_end_is_no_bytes(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.shutdown(socket.SHUT_WR)
    assert wait_for(HoldingSocket(ours, ReceiveBuffer()), LONGEST) == b""


def test_no_thread_comes_between(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    held, before = HoldingSocket(ours, ReceiveBuffer()), sys.getswitchinterval()
    turns, over = 0, False

    def compute() -> None:
        nonlocal turns
        while not over:
            turns += 1
            theirs.getpeername()  # as any call of a socket, it lets others in

    def calls_until_a_turn(send: Callable[[bytes], int], most: int) -> int:
        seen = turns
        for number in range(most):
            send(b"x" * 100)
            if turns != seen:
                return number
            if number % 100 == 99:
                receive(theirs, 10_000)  # that lets others in
                seen = turns
        return most

    thread = threading.Thread(target=compute)
    sys.setswitchinterval(10)  # who has the interpreter is not asked for it
    try:
        thread.start()
        assert calls_until_a_turn(held.send, 2000) == 2000
        assert calls_until_a_turn(ours.send, 100_000) < 100_000, "the usual calls do let it in"
    finally:
        over = True
        sys.setswitchinterval(before)
        thread.join()
