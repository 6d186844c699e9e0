"""WebSocket frames after the upgrade (RFC 6455, section 5): MQTT bytes in binary messages, no extensions.

MQTT sees a stream of bytes: neither frames nor messages need to align with packets [MQTT5-6.0.0-2].
"""

from __future__ import annotations

import enum
from typing import Final

from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.protocol.codes import ReasonCode

_from_bytes: Final = int.from_bytes


class Opcode(enum.IntEnum):
    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


class CloseCode(enum.IntEnum):
    """The status codes that matter here (RFC 6455, 7.4.1)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    NO_STATUS = 1005
    """Stands for a close frame without a code; never sent."""
    INVALID_PAYLOAD = 1007
    POLICY_VIOLATION = 1008
    MESSAGE_TOO_BIG = 1009
    INTERNAL_ERROR = 1011


class WebSocketError(RemoteProtocolError):
    """The peer broke RFC 6455 or sent text.

    Attributes:
      close_code: what the close frame to it says.
      received: MQTT bytes of good frames in front of the bad one, in the same read: handle them first.
    """

    def __init__(self, text: str, close_code: CloseCode = CloseCode.PROTOCOL_ERROR) -> None:
        super().__init__(text, ReasonCode.PROTOCOL_ERROR)
        self.close_code = close_code
        self.received = b""


class FrameDecoder:
    """Takes frames apart. Payload goes on as it comes, so at most one frame header or control frame is kept.

    Attributes:
      replies: pong and close frames to send.
      closed: the peer's close code once its close frame came (NO_STATUS: without one), or the code of our complaint;
        nothing is read after that.
    """

    __slots__ = (
        "_kept",
        "_mask",
        "_masked",
        "_maximum_size",
        "_message_size",
        "_open",
        "_remaining",
        "closed",
        "replies",
    )

    def __init__(self, maximum_size: int, *, masked: bool = True) -> None:
        """`maximum_size`: bytes of the largest message, fragmented or not. `masked`: the peer is a client."""
        self.replies: list[bytes] = []
        self.closed: int | None = None
        self._maximum_size = maximum_size
        self._masked = masked
        self._kept = b""
        self._open = False
        """A message has begun and its last frame has not."""
        self._message_size = 0
        """Bytes of the frames of that message."""
        self._remaining = 0
        """Payload bytes of the current frame that are still to come."""
        self._mask = b""
        """Masking key, turned so that it begins with the next payload byte."""

    def take_replies(self) -> bytes:
        """Return what waits to be sent and forget it."""
        replies, self.replies = b"".join(self.replies), []
        return replies

    def feed(self, data: bytes) -> bytes:
        """Take one read; return the MQTT bytes in it.

        Raises:
          WebSocketError: send its `close_code` and close.
        """
        if self.closed is not None:
            return b""
        out: list[bytes] = []
        at = 0
        try:
            if self._remaining:
                at = self._go_on(data, out)
            elif self._kept:
                data = self._kept + data
                self._kept = b""
            while at < len(data) and self.closed is None:
                if data[at] == 0x82 and self._masked and (stop := self._whole_frames(data, at, out)) > at:
                    at = stop
                    continue
                if (stop := self._frame(data, at, out)) < 0:
                    self._kept = data[at:]
                    break
                at = stop
        except WebSocketError as exc:
            self.closed = exc.close_code
            exc.received = b"".join(out)
            raise
        return out[0] if len(out) == 1 else b"".join(out)

    def _go_on(self, data: bytes, out: list[bytes]) -> int:
        """Take the next part of a frame whose beginning came earlier; return how much of the read it was."""
        chunk = data[: self._remaining]
        self._remaining -= len(chunk)
        if self._mask:
            out.append(apply_mask(chunk, self._mask))
            turn = len(chunk) & 3
            self._mask = self._mask[turn:] + self._mask[:turn]
        else:
            out.append(chunk)
        return len(chunk)

    def _whole_frames(self, data: bytes, at: int, out: list[bytes]) -> int:
        """Take the run of frames at `at` that hold a whole binary message of up to 65,535 bytes each, as nearly all
        do; return where it ends. Judges nothing: what it does not take, `_frame` looks at."""
        end = len(data) - 6
        if self._open:
            return at
        bodies: list[bytes] = []
        keys: list[bytes] = []
        while at <= end and data[at] == 0x82:
            size = data[at + 1] - 128  # negative without a mask
            body = at + 6
            if size > 125:
                if size == 127 or (size := data[at + 2] << 8 | data[at + 3]) < 126:
                    break
                body = at + 8
            stop = body + size
            if stop > end + 6 or not 0 <= size <= self._maximum_size:
                break
            bodies.append(data[body:stop])
            keys.append((data[body - 4 : body] * ((size >> 2) + 1))[:size])
            at = stop
        if bodies:
            # One XOR for the run: two integers made, one written, however many frames it has.
            masked = b"".join(bodies)
            key = _from_bytes(b"".join(keys), "little")
            out.append((_from_bytes(masked, "little") ^ key).to_bytes(len(masked), "little"))
        return at

    def _frame(self, data: bytes, at: int, out: list[bytes]) -> int:
        """Handle the frame at `at`; return where the next one starts, or -1 while more bytes are needed."""
        available = len(data) - at
        if available < 2:
            return -1
        first, size = data[at], data[at + 1]
        opcode = first & 15
        if first & 0x70:
            raise WebSocketError("reserved bits of a frame are set")
        if (size > 127) is not self._masked:
            raise WebSocketError("a client masks its frames, a server does not")
        size &= 127
        if opcode >= 8:
            return self._control(data, at, first, size)
        body = at + 2
        if size > 125:
            width = 2 if size == 126 else 8
            if available < 2 + width:
                return -1
            body += width
            size = int.from_bytes(data[at + 2 : body], "big")
            if size < (126 if width == 2 else 65_536):
                raise WebSocketError("a frame length has more bytes than it needs")
        self._check_data_frame(opcode, size)
        if self._masked:
            body += 4
            if body > len(data):
                return -1
        self._open = first < 128
        self._message_size = self._message_size + size if self._open else 0
        stop = body + size
        mask = data[body - 4 : body] if self._masked else b""
        chunk = data[body:stop]
        if stop > len(data):
            self._remaining = stop - len(data)
            turn = len(chunk) & 3
            self._mask = mask[turn:] + mask[:turn]
            stop = len(data)
        if chunk:
            out.append(apply_mask(chunk, mask) if mask else chunk)
        return stop

    def _check_data_frame(self, opcode: int, size: int) -> None:
        if opcode == Opcode.TEXT:
            raise WebSocketError("MQTT comes in binary frames", CloseCode.UNSUPPORTED_DATA)  # [MQTT5-6.0.0-1]
        if opcode == Opcode.CONTINUATION:
            if not self._open:
                raise WebSocketError("a continuation of no message")
        elif opcode != Opcode.BINARY:
            raise WebSocketError(f"opcode {opcode} is reserved")
        elif self._open:
            raise WebSocketError("a new message inside a fragmented one")
        if self._message_size + size > self._maximum_size:
            text = f"a message of at least {self._message_size + size} bytes; the maximum is {self._maximum_size}"
            raise WebSocketError(text, CloseCode.MESSAGE_TOO_BIG)

    def _control(self, data: bytes, at: int, first: int, size: int) -> int:
        opcode = first & 15
        if opcode > Opcode.PONG:
            raise WebSocketError(f"opcode {opcode} is reserved")
        if first < 128 or size > 125:
            raise WebSocketError("a control frame is whole and has 125 bytes at most")
        body = at + (6 if self._masked else 2)
        stop = body + size
        if stop > len(data):
            return -1
        payload = data[body:stop]
        if self._masked:
            payload = apply_mask(payload, data[body - 4 : body])
        if opcode == Opcode.PING:
            self._reply(Opcode.PONG, payload)
        elif opcode == Opcode.CLOSE:
            self.closed = _close_code(payload)
            self._reply(Opcode.CLOSE, payload[:2])
        return stop

    def _reply(self, opcode: Opcode, payload: bytes) -> None:
        if self._masked:
            self.replies.append(bytes((0x80 | opcode, len(payload))) + payload)
        else:
            self.replies.append(client_frame(payload, opcode))


def _close_code(payload: bytes) -> int:
    """Check the payload of a close frame (RFC 6455, 5.5.1 and 7.4); return its code."""
    if not payload:
        return CloseCode.NO_STATUS
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise WebSocketError("a close frame without a valid code")
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        raise WebSocketError("the reason of a close frame is no UTF-8", CloseCode.INVALID_PAYLOAD) from None
    return code


def apply_mask(payload: bytes, mask: bytes) -> bytes:
    """Mask or unmask with one XOR of long integers."""
    size = len(payload)
    key = (mask * ((size >> 2) + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")


def frame_head(size: int, first_byte: int = 0x82, mask_bit: int = 0) -> bytes:
    """Return the header of a frame with `size` payload bytes, by default a whole binary one."""
    if size < 126:
        return bytes((first_byte, mask_bit | size))
    if size < 65_536:
        return bytes((first_byte, mask_bit | 126)) + size.to_bytes(2, "big")
    return bytes((first_byte, mask_bit | 127)) + size.to_bytes(8, "big")


def frame(data: bytes) -> bytes:
    """Return one binary frame of a server."""
    return frame_head(len(data)) + data


def close_frame(code: int, reason: str = "") -> bytes:
    """Return a close frame of a server; `reason` is cut to the 123 bytes that fit."""
    text = reason.encode()[:123].decode(errors="ignore").encode()
    payload = code.to_bytes(2, "big") + text
    return bytes((0x80 | Opcode.CLOSE, len(payload))) + payload


def client_frame(
    data: bytes, opcode: int = Opcode.BINARY, *, fin: bool = True, mask: bytes = b"\x37\xfa\x21\x3d"
) -> bytes:
    """Return one frame of a client. A fixed key will do where nothing untrusted chooses the payload: in tests."""
    return frame_head(len(data), (0x80 if fin else 0) | opcode, 0x80) + mask + apply_mask(data, mask)
