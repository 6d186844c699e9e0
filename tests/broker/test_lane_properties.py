"""Property blocks that the fast lane forwards are those that the full path would write the same way."""

from __future__ import annotations

import random

from mqtt_trio.broker.lane_properties import is_forwardable
from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.decode import decode_publish
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.properties import with_length
from tests.lane_streams import FORWARDABLE, OTHERS

V5 = ProtocolVersion.MQTT_5_0
PIECES = (
    b"\1\0", b"\1\1", b"\1\2", b"\2\0\0\0\1", b"\3\0\1t", b"\3\0\0", b"\3\0\2\xc3\xa9", b"\3\0\2\xc3\x28", b"\x08\0\1r",
    b"\x08\0\0", b"\x08\0\1+", b"\x08\0\1#", b"\x09\0\2\0\1", b"\x09\0\0", b"\x0b\1", b"\x23\0\1", b"\x26\0\1k\0\1v",
    b"\x26\0\0\0\0", b"\x26\0\1\0\0\0", b"\x26\0\0\0\1\xff", b"\x26\0\3\xed\xa0\x80\0\0", b"\x26\0\3\xef\xbb\xbf\0\0",
    b"\x77",
)  # fmt: skip


def written_the_same(block: bytes) -> bool:
    """Ask the full path itself."""
    body = b"\0\1t" + block + b"payload"
    try:
        packet = decode_publish(0, body, 0, len(body), V5)
    except RemoteProtocolError:
        return False
    if packet.topic_alias is not None or packet.subscription_identifiers:
        return False
    if packet.properties.message_expiry_interval is not None or packet.payload != b"payload":
        return False
    return encode(packet, V5).endswith(body)


def test_the_full_path_agrees() -> None:
    rng = random.Random(1)
    yes = 0
    for turn in range(20_000):
        pieces = rng.choices(PIECES, k=rng.randrange(1, 5))
        if turn % 4:
            pieces.sort()
        block = b"".join(pieces)
        if turn % 7 == 0:
            block = block[: rng.randrange(1, len(block) + 1)]
        elif turn % 7 == 1:
            position = rng.randrange(len(block))
            block = block[:position] + bytes((rng.randrange(256),)) + block[position + 1 :]
        elif turn % 7 == 2:
            block += b"\x26\0\1n" + b"\0\x96" + b"x" * 150
        block = with_length(block)
        forwardable = is_forwardable(block)
        assert forwardable == written_the_same(block), block
        yes += forwardable
    assert 2000 < yes < 10_000


def test_the_blocks_of_the_differential_test_are_what_they_say() -> None:
    assert all(is_forwardable(block) and written_the_same(block) for block in FORWARDABLE)
    assert not any(written_the_same(block) for block in OTHERS)
