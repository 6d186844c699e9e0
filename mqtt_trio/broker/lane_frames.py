"""PUBLISH packets as the fast lane writes them anew: cut apart, in the other MQTT version, at a lower QoS.

All of it works on whole packets that the lane has measured, so nothing here checks a length.
"""

from __future__ import annotations


def body_of(frames: bytes, pos: int) -> tuple[int, int]:
    """Return where the body of the frame at `pos` begins, and its length."""
    length = frames[pos + 1]
    if length < 128:
        return pos + 2, length
    second = frames[pos + 2]
    if second < 128:
        return pos + 3, (length & 127) | second << 7
    return pos + 4, (length & 127) | (second & 127) << 7 | frames[pos + 3] << 14


def block_size(frames: bytes, at: int) -> int:
    """Return the bytes of the property block at `at`, its Property Length of one or two bytes included."""
    size = frames[at]
    return size + 1 if size < 128 else (size & 127 | frames[at + 1] << 7) + 2


def topic_of(frame: bytes) -> str:
    """Return the Topic Name."""
    body, _ = body_of(frame, 0)
    return frame[body + 2 : body + 2 + (frame[body] << 8 | frame[body + 1])].decode()


def first_frame(frames: bytes, pos: int) -> bytes:
    """Return the frame of a run that begins at `pos`."""
    body, length = body_of(frames, pos)
    return frames[pos : body + length]


def split_run(frames: bytes) -> list[bytes]:
    """Cut a run into its frames."""
    found = []
    pos, end = 0, len(frames)
    while pos < end:
        body, length = body_of(frames, pos)
        found.append(frames[pos : body + length])
        pos = body + length
    return found


def translate_run(frames: bytes, from_v5: bool) -> list[bytes]:
    """Write QoS 0 frames of one version in the other: 3.x has no properties, in 5.0 they may be none."""
    found = []
    pos, end = 0, len(frames)
    while pos < end:
        body, length = body_of(frames, pos)
        at = body + 2 + (frames[body] << 8 | frames[body + 1])
        stop = body + length
        if from_v5:
            cut = block_size(frames, at)
            found.append(b"".join((_header(0x30, length - cut), frames[body:at], frames[at + cut : stop])))
        else:
            found.append(b"".join((_header(0x30, length + 1), frames[body:at], b"\0", frames[at:stop])))
        pos = stop
    return found


def head_at(head: bytes, qos: int, growth: int) -> bytes:
    """Write what stands before the Packet Identifier of a QoS 1 or 2 frame for a copy at `qos`.

    `growth`: bytes by which the properties of the copy are longer.
    """
    body, length = body_of(head, 0)
    return _header(0x30 | qos << 1, length + growth - (0 if qos else 2)) + head[body:]


def _header(first: int, length: int) -> bytes:
    """Fixed header with a Remaining Length of up to three bytes (the fast lane's largest)."""
    if length < 128:
        return bytes((first, length))
    if length < 16_384:
        return bytes((first, length & 127 | 128, length >> 7))
    return bytes((first, length & 127 | 128, length >> 7 & 127 | 128, length >> 14))
