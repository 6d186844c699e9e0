"""A plain socket whose short calls keep the interpreter, for a poller beside busy threads (Linux).

Python's own socket lets go of the GIL around each `recv` and `send`, even one that never blocks. A thread that waits
for it, such as those of a Kafka client, may take it then and keep it for a whole switch interval, and a wake that
serves ten clients gives it twenty chances. Calls through `ctypes.PyDLL` keep the GIL. They cost 0.5 µs more, so they
are for processes with such threads only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from typing import Final

LONGEST: Final = 32_768
"""Bytes of the longest call that keeps the interpreter: some microseconds. Others go the usual way."""
RECEIVE_FLAGS: Final = int(socket.MSG_DONTWAIT)
SEND_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

_libc = ctypes.PyDLL(None, use_errno=True)
_recv = _libc.recv
_recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_recv.restype = ctypes.c_ssize_t
_send = _libc.send
_send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
_send.restype = ctypes.c_ssize_t


class ReceiveBuffer:
    """Where the sockets of one thread receive, one after the other."""

    __slots__ = ("_bytes", "address", "view")

    def __init__(self) -> None:
        self._bytes = (ctypes.c_char * LONGEST)()
        self.address = ctypes.addressof(self._bytes)
        self.view = memoryview(self._bytes).cast("B")


class HoldingSocket:
    """What `SocketLink` needs of a non-blocking socket; all calls in the thread that `buffer` belongs to."""

    __slots__ = ("_address", "_fd", "_sock", "_view")

    def __init__(self, sock: socket.socket, buffer: ReceiveBuffer) -> None:
        self._sock = sock
        self._fd = sock.fileno()
        self._address = buffer.address
        self._view = buffer.view

    def fileno(self) -> int:
        """Return the file descriptor; -1 when closed."""
        return self._fd

    def recv(self, size: int) -> bytes:
        """Return up to `size` bytes; none: the peer sends no more.

        Raises:
          OSError: as `socket.recv` does; BlockingIOError when nothing is there.
        """
        if size > LONGEST:
            return self._sock.recv(size)
        count = _recv(self._fd, self._address, size, RECEIVE_FLAGS)
        if count < 0:
            if (number := ctypes.get_errno()) == errno.EINTR:
                return self._sock.recv(size)
            raise OSError(number, os.strerror(number))
        return bytes(self._view[:count])

    def send(self, data: bytes | bytearray) -> int:
        """Send what the socket takes of `data`; return how many bytes that were.

        Raises:
          OSError: as `socket.send` does; BlockingIOError when it takes nothing.
        """
        if len(data) > LONGEST or type(data) is not bytes:
            return self._sock.send(data)
        count: int = _send(self._fd, data, len(data), SEND_FLAGS)
        if count < 0:
            if (number := ctypes.get_errno()) == errno.EINTR:
                return self._sock.send(data)
            raise OSError(number, os.strerror(number))
        return count

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._fd = -1
        self._sock.close()
