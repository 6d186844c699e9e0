"""The vectors of `tests/protocol` sent to a whole broker: what a client sees on the wire [MQTT5-4.13.1-1].

5.0 gets the reason code of the specification in CONNACK or DISCONNECT and then the end of the connection; 3.x gets
the end of the connection without a word. Another client, connected meanwhile, sees nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import trio

from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.testing import MemoryBroker
from tests.protocol import derived_vectors as d
from tests.protocol import vector_tables as t
from tests.protocol.derived_vectors import MALFORMED, PROTOCOL, Vector
from tests.protocol.vector_tables import unhex

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
CONNECT = {
    V31: unhex("10 0f 0006 4d5149736470 03 02 0000 0001 63"),
    V311: unhex("10 0d 0004 4d515454 04 02 0000 0001 63"),
    V5: unhex("10 13 0004 4d515454 05 02 0000 05 11 0000000a 0001 63"),
}
PING, PONG = b"\xc0\0", b"\xd0\0"


async def answer(memory: MemoryBroker, version: ProtocolVersion, data: bytes, *, connect: bool) -> list[bytes]:
    """Send `data`, behind a CONNECT or not, and return the packets that came back until the end of the connection.

    A good packet leaves the connection open: a ping behind it is answered, and the end follows from our side.
    """
    stream = await memory.open_stream()
    received = b""
    with trio.fail_after(5):
        await stream.send_all((CONNECT[version] if connect else b"") + data + PING)
        while not received.endswith(PONG):
            if not (chunk := await stream.receive_some(65_536)):
                break
            received += chunk
    await trio.aclose_forcefully(stream)
    frames = list(split(received))
    if connect:
        assert frames[0][:1] == b"\x20"
        assert frames[0][3] == 0
        del frames[0]
    return frames


def split(data: bytes) -> Iterator[bytes]:
    """Cut short packets apart: all that a broker says here has a Remaining Length of one byte."""
    while data:
        assert data[1] < 128
        yield data[: 2 + data[1]]
        data = data[2 + data[1] :]


def code_of(frames: list[bytes]) -> int | None:
    """Reason code of the refusal that came last, None when the connection stayed."""
    if frames and frames[-1] == PONG:
        return None
    last = frames[-1]
    if last[0] == 0x20:
        assert last[2] == 0
        return last[3]
    assert last[0] == 0xE0
    return last[2]


async def check(memory: MemoryBroker, vectors: Iterable[Vector]) -> None:
    witness = await memory.connect("witness")
    wrong = []
    for vector in vectors:
        connect = vector.packet_type != t.CONNECT
        found = code_of(await answer(memory, V5, vector.frame, connect=connect))
        if found != vector.code and vector.packet_type == t.DISCONNECT and vector.code is None:
            continue  # a good DISCONNECT is answered by the end of the connection
        if found != vector.code:
            wrong.append((vector.name, vector.frame.hex(" "), found, vector.code))
    assert not wrong
    assert await witness.nothing_waits()
    await witness.disconnect()


SERVED = [
    owner for owner in t.WITH_PROPERTIES if owner in (t.WILL, *t.FROM_CLIENT) and owner not in (t.DISCONNECT, t.AUTH)
]


@pytest.mark.spec("MQTT5-4.13.1-1")
@pytest.mark.parametrize("owner", SERVED)
async def test_properties(memory_broker: MemoryBroker, owner: int | str) -> None:
    vectors = (*d.property_vectors(owner, to_server=True), *d.length_vectors(owner))
    methods = b"\x15\x00\x01\x6d" if owner == t.CONNECT else b"never"
    # Without a known Authentication Method such a CONNECT is refused for that.
    await check(memory_broker, (v for v in vectors if not (v.code is None and methods in v.frame)))


@pytest.mark.spec("MQTT5-4.13.1-1", "MQTT5-2.1.3-1")
@pytest.mark.parametrize("packet_type", [kind for kind in t.FROM_CLIENT if kind not in (t.DISCONNECT, t.AUTH)])
async def test_flags(memory_broker: MemoryBroker, packet_type: int) -> None:
    vectors = list(d.flag_vectors(packet_type))
    if packet_type == t.CONNECT:
        # What is no CONNECT by its first byte has no version to be refused in: closed without a word.
        for vector in vectors:
            frames = await answer(memory_broker, V5, vector.frame, connect=False)
            assert bool(frames) == (vector.code is None), vector
        return
    await check(memory_broker, vectors)


@pytest.mark.spec("MQTT5-4.13.1-1")
@pytest.mark.parametrize("name", [name for name, row in d.SHAPES.items() if row[0] in t.FROM_CLIENT and name != "AUTH"])
async def test_truncations(memory_broker: MemoryBroker, name: str) -> None:
    vectors = list(d.truncation_vectors(name))
    if name == "CONNECT":
        # Cut before its Protocol Version a CONNECT has no version to be refused in.
        for vector in vectors[1:8]:
            assert await answer(memory_broker, V5, vector.frame, connect=False) == []
        del vectors[1:8]
    if name == "DISCONNECT":
        vectors = [vector for vector in vectors if vector.code is not None]
    await check(memory_broker, vectors)


WRONG_WAY = {
    "CONNACK": "20 03 00 00 00",
    "SUBACK": "90 04 0001 00 00",
    "UNSUBACK": "b0 04 0001 00 00",
    "PINGRESP": "d0 00",
}


@pytest.mark.spec("MQTT5-4.13.1-1", "MQTT5-3.1.0-2")
async def test_wrong_direction(memory_broker: MemoryBroker) -> None:
    second = Vector("second CONNECT", t.PINGREQ, CONNECT[V5], PROTOCOL)
    reserved = Vector("type 0", t.PINGREQ, b"\0\0", MALFORMED)
    auth = Vector("AUTH without method", t.PINGREQ, unhex("f0 06 18 04 15 0001 6d"), PROTOCOL)
    others = [Vector(name, t.PINGREQ, unhex(text), PROTOCOL) for name, text in WRONG_WAY.items()]
    await check(memory_broker, (second, reserved, auth, *others))


@pytest.mark.spec("MQTT5-3.1.0-1", "MQTT3-3.1.0-1")
@pytest.mark.parametrize("packet_type", [kind for kind in range(16) if kind != t.CONNECT])
async def test_nothing_but_connect_begins(memory_broker: MemoryBroker, packet_type: int) -> None:
    good = t.with_block(packet_type, b"") if packet_type in t.WITH_PROPERTIES else t.frame(packet_type, b"")
    assert await answer(memory_broker, V5, good, connect=False) == []


BAD_IN_3: dict[str, str] = {
    "type 0": "00 00",
    "type 15": "f0 00",
    "second CONNECT": CONNECT[V311].hex(),
    "CONNACK": "20 02 00 00",
    "SUBACK": "90 03 0001 00",
    "UNSUBACK": "b0 02 0001",
    "PINGRESP": "d0 00",
    "PUBLISH with QoS 3": "36 05 0001 61 0001",
    "PUBLISH id 0": "32 05 0001 61 0000",
    "PUBLISH without topic": "30 02 0000",
    "PUBLISH ends in its topic": "30 03 0002 61",
    "PUBLISH ends in its id": "32 04 0001 61 00",
    "PUBLISH to a wildcard": "30 03 0001 23",
    "PUBLISH with U+0000": "30 03 0001 00",
    "PUBLISH with a surrogate": "30 05 0003 eda080",
    "PUBACK of 3 bytes": "40 03 0001 00",
    "PUBACK of 1 byte": "40 01 00",
    "PUBACK id 0": "40 02 0000",
    "PUBREC of 3 bytes": "50 03 0001 00",
    "PUBREL of 1 byte": "62 01 00",
    "PUBCOMP of 0 bytes": "70 00",
    "SUBSCRIBE without filter": "82 02 0001",
    "SUBSCRIBE without QoS": "82 05 0001 0001 61",
    "SUBSCRIBE QoS 3": "82 06 0001 0001 61 03",
    "SUBSCRIBE ends in its filter": "82 05 0001 0002 61",
    "SUBSCRIBE to a bad filter": "82 07 0001 0002 612b 00",
    "UNSUBSCRIBE without filter": "a2 02 0001",
    "UNSUBSCRIBE ends in its filter": "a2 05 0001 0002 61",
    "PINGREQ with a body": "c0 01 00",
    "DISCONNECT with a body": "e0 01 00",
    "Remaining Length of five bytes": "30 80 80 80 80 01",
}
ONLY_3_1_1: dict[str, str] = {
    "SUBSCRIBE with reserved bits": "82 06 0001 0001 61 04",
    "QoS 0 with DUP": "38 03 0001 61",
    **{
        f"flags {flags:04b} of {name}": f"{packet_type:x}{flags:x} {rest}"
        for name, packet_type, rest, right in (
            ("PUBACK", t.PUBACK, "02 0001", 0),
            ("PUBREC", t.PUBREC, "02 0001", 0),
            ("PUBREL", t.PUBREL, "02 0001", 2),
            ("PUBCOMP", t.PUBCOMP, "02 0001", 0),
            ("SUBSCRIBE", t.SUBSCRIBE, "06 0001 0001 61 00", 2),
            ("UNSUBSCRIBE", t.UNSUBSCRIBE, "05 0001 0001 61", 2),
            ("PINGREQ", t.PINGREQ, "00", 0),
            ("DISCONNECT", t.DISCONNECT, "00", 0),
        )
        for flags in range(16)
        if flags != right
    },
}


@pytest.mark.spec("MQTT3-4.8.0-1", "MQTT3-2.2.2-2", "MQTT3-3.1.0-2")
@pytest.mark.parametrize("version", [V31, V311])
async def test_3_closes_without_a_word(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    bad = BAD_IN_3 | (ONLY_3_1_1 if version is V311 else {})
    said = {name: await answer(memory_broker, version, unhex(text), connect=True) for name, text in bad.items()}
    assert {name: frames for name, frames in said.items() if frames} == {}


GOOD_IN_3 = {
    "PUBLISH": ("30 05 0001 61 68 69", []),
    "PUBLISH QoS 1": ("32 05 0001 61 0001", ["40 02 0001"]),
    "PUBLISH QoS 2": ("34 05 0001 61 0001", ["50 02 0001"]),
    "PUBREL": ("62 02 0001", ["70 02 0001"]),
    "SUBSCRIBE": ("82 06 0001 0001 61 02", ["90 03 0001 02"]),
    "UNSUBSCRIBE": ("a2 05 0001 0001 61", ["b0 02 0001"]),
    "PUBACK of nothing": ("40 02 0001", []),
    "PUBREL with a byte to spare in its Remaining Length": ("62 82 00 0001", ["70 02 0001"]),
}


@pytest.mark.parametrize("version", [V31, V311])
@pytest.mark.parametrize("name", GOOD_IN_3)
async def test_3_takes_what_is_good(memory_broker: MemoryBroker, version: ProtocolVersion, name: str) -> None:
    text, expected = GOOD_IN_3[name]
    frames = await answer(memory_broker, version, unhex(text), connect=True)
    assert frames == [*map(unhex, expected), PONG]
