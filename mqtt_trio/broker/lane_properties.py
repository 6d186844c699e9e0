"""Property blocks that the fast lane may forward as they are."""

from __future__ import annotations

from typing import Final

BLOCKS: Final = 2048
"""Property blocks that the broker remembers."""
BLOCK_SIZE: Final = 512
"""Bytes of the largest block that is remembered; larger ones are looked at each time."""
FAILURES: Final = 8
"""Blocks in a row that a client's lane looks at in vain before it leaves most of the next ones unlooked at."""


def is_forwardable(block: bytes) -> bool:
    """Whether the full path would read `block` (with its Property Length) and write the same bytes to a receiver.

    That is so for valid properties of a PUBLISH in the order of their identifiers, without Message Expiry Interval,
    which counts down, and without Topic Alias and Subscription Identifier, which belong to one connection.
    """
    end = len(block)
    at = 1 if block[0] < 128 else 2
    last = 0
    try:
        while at < end:
            identifier = block[at]
            # Increasing, that is also: none twice; User Properties come last and as often as they like.
            if identifier <= last and identifier != 0x26:
                return False
            last = identifier
            if identifier == 0x26:  # User Property
                name = at + 3 + (block[at + 1] << 8 | block[at + 2])
                value = name + 2 + (block[name] << 8 | block[name + 1])
                if value > end or not (_is_text(block[at + 3 : name]) and _is_text(block[name + 2 : value])):
                    return False
                at = value
            elif identifier == 0x03 or identifier == 0x08 or identifier == 0x09:
                start = at + 3
                at = start + (block[at + 1] << 8 | block[at + 2])
                if at > end:
                    return False
                if identifier == 0x03:  # Content Type
                    if not _is_text(block[start:at]):
                        return False
                elif identifier == 0x08 and not _is_topic_name(block[start:at]):  # Response Topic
                    return False
            elif identifier == 0x01:  # Payload Format Indicator; nobody checks what it says about the payload
                if block[at + 1] > 1:
                    return False
                at += 2
            else:
                return False
    except IndexError:
        return False
    return True


def _is_text(raw: bytes) -> bool:
    """Whether `raw` is a UTF-8 Encoded String [MQTT5-1.5.4-1], [MQTT5-1.5.4-2]."""
    if 0 in raw:
        return False
    if raw.isascii():
        return True
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_topic_name(raw: bytes) -> bool:
    """Whether a Response Topic is a Topic Name [MQTT5-3.3.2-14]."""
    return raw != b"" and b"+" not in raw and b"#" not in raw and _is_text(raw)
