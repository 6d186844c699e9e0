"""CONNECT: its form, its flags, Client Identifiers (chapters 3.1 of both versions)."""

from __future__ import annotations

import string
from collections.abc import Callable

import pytest
import trio
import trio.testing

from mqtt_trio.broker.access import Credentials, Decision, Denied, Granted, Principal
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.connection import ClientConnection
from mqtt_trio.protocol.packets import Connect, Will
from mqtt_trio.testing import MemoryBroker, open_memory_broker
from tests.wire import (
    PINGREQ,
    V5,
    V31,
    V311,
    both_versions,
    connect,
    ill_formed,
    join,
    open_wire,
    publish,
    subscribe,
    text,
)


class Door:
    """Authenticator that notes what it is shown, and lets in whom `decide` does not refuse."""

    def __init__(self, code: ReasonCode | None = None) -> None:
        self.code = code
        self.seen: list[Credentials] = []

    def authenticate(self, credentials: Credentials) -> Decision:
        self.seen.append(credentials)
        if self.code is not None:
            return Denied(self.code)
        return Granted(Principal(credentials.client_id, credentials.user_name))


async def refused_bytes(memory: MemoryBroker, data: bytes) -> list[bytes]:
    """Send a CONNECT that is wrong and a retained message behind it; return what came back before the end, without
    the properties that a refusal of 5.0 may have. Nothing of it may have had an effect.
    """
    wire = await open_wire(memory, data, publish(V311, "behind", b"x", flags=1), PINGREQ)
    answer = [packet if packet[:2] == b"\x20\2" else packet[:1] + packet[2:4] for packet in await wire.until_closed()]
    metrics = memory.broker.metrics
    assert (metrics.sessions, metrics.retained_messages, metrics.messages_received_qos0) == (0, 0, 0)
    return answer


def refusal(version: ProtocolVersion, code: int) -> list[bytes]:
    """What a server says to a CONNECT that it cannot read: 3.1.1 nothing, 5.0 a CONNACK."""
    return [bytes([0x20, 0, code])] if version is V5 else []


@pytest.mark.spec("MQTT3-3.1.2-1", "MQTT5-3.1.2-1", "MQTT3-3.1.4-5", "MQTT5-3.1.4-6")
@both_versions
@pytest.mark.parametrize("name", [b"MQTX", b"mqtt", b"MQTT ", b"", b"MQIsdp", b"\xef\xbb\xbfMQTT"])
async def test_another_protocol_name(memory_broker: MemoryBroker, version: ProtocolVersion, name: bytes) -> None:
    answer = await refused_bytes(memory_broker, connect(version, name=name))
    assert answer in ([], [b"\x20\x02\x00\x01"], [b"\x20\x00\x84"])


@pytest.mark.spec("MQTT5-3.1.2-2", "MQTT3-3.1.2-2")
@pytest.mark.parametrize("level, answer", [(6, b"\x20\0\x84"), (2, b"\x20\2\0\1"), (0, b"\x20\2\0\1")])
async def test_another_protocol_version(memory_broker: MemoryBroker, level: int, answer: bytes) -> None:
    data = bytearray(connect(V5 if level > 5 else V311))
    data[8] = level
    assert await refused_bytes(memory_broker, bytes(data)) == [answer]


BAD_FLAGS = {
    "reserved": (0x03, ()),
    "Will QoS 1 without Will": (0x0A, ()),
    "Will QoS 2 without Will": (0x12, ()),
    "Will Retain without Will": (0x22, ()),
    "Will QoS 3": (0x1E, (b"?", text("w"), text("p"))),
    "a Will in the payload without its flag": (0x02, (b"?", text("w"), text("p"))),
    "Will Flag without Will": (0x06, ()),
    "Will Flag without Will Payload": (0x06, (b"?", text("w"))),
    "a user name without its flag": (0x02, (text("u"),)),
    "User Name Flag without user name": (0x82, ()),
    "a password without its flag": (0x82, (text("u"), text("p"))),
    "Password Flag without password": (0xC2, (text("u"),)),
}
"""Name -> (flags, payload behind the Client Identifier, where `?` is the block of Will Properties)."""


@pytest.mark.spec(
    "MQTT3-3.1.2-3", "MQTT3-3.1.2-9", "MQTT3-3.1.2-11", "MQTT3-3.1.2-13", "MQTT3-3.1.2-14", "MQTT3-3.1.2-15",
    "MQTT3-3.1.2-18", "MQTT3-3.1.2-19", "MQTT3-3.1.2-20", "MQTT3-3.1.2-21", "MQTT3-3.1.4-1",
)  # fmt: skip
@pytest.mark.spec(
    "MQTT5-3.1.2-3", "MQTT5-3.1.2-9", "MQTT5-3.1.2-11", "MQTT5-3.1.2-12", "MQTT5-3.1.2-13", "MQTT5-3.1.2-16",
    "MQTT5-3.1.2-17", "MQTT5-3.1.2-18", "MQTT5-3.1.2-19", "MQTT5-3.1.4-1",
)  # fmt: skip
@both_versions
@pytest.mark.parametrize("flags, rest", BAD_FLAGS.values(), ids=BAD_FLAGS)
async def test_flags_and_payload_that_disagree(
    memory_broker: MemoryBroker, version: ProtocolVersion, flags: int, rest: tuple[bytes, ...]
) -> None:
    will_properties = b"\0" if version is V5 else b""
    payload = [will_properties if part == b"?" else part for part in rest]
    answer = await refused_bytes(memory_broker, connect(version, text("c"), *payload, flags=flags))
    assert answer == refusal(version, 0x81)


@pytest.mark.spec("MQTT3-3.1.2-22")
async def test_a_password_needs_a_user_name_in_3_1_1() -> None:
    door = Door()
    async with open_memory_broker(authenticator=door) as memory:
        assert await refused_bytes(memory, connect(V311, text("c"), text("p"), flags=0x42)) == []
        assert door.seen == []
        await join(memory, V5, "c", text("p"), flags=0x42)  # 5.0 allows it
        assert (door.seen[0].user_name, door.seen[0].password) == (None, b"p")


@pytest.mark.spec("MQTT3-3.1.3-1", "MQTT5-3.1.3-1", "MQTT3-3.1.3-3", "MQTT5-3.1.3-3", "MQTT3-3.1.2-9", "MQTT5-3.1.2-9")
@pytest.mark.spec("MQTT3-3.1.2-19", "MQTT5-3.1.2-17", "MQTT3-3.1.2-21", "MQTT5-3.1.2-19")
@both_versions
async def test_the_order_of_the_payload(version: ProtocolVersion) -> None:
    door = Door()
    properties = b"\x09\x03\0\x01t\x26\0\0\0\0" if version is V5 else b""
    payload = (text("id"), properties, text("topic"), text(b"\xff\0"), text("user"), text(b"\0\xff"))
    data = connect(version, *payload, flags=0xC6)
    async with open_memory_broker(authenticator=door) as memory:
        watcher = await memory.connect("watcher")
        await watcher.subscribe("#")
        wire = await open_wire(memory, data)
        assert (await wire.read())[3] == 0
        await wire.cut()
        shown = door.seen[1]
        assert (shown.client_id, shown.user_name, shown.password) == ("id", "user", b"\0\xff")
        message = await watcher.next_message()
        assert (message.topic_name, message.payload) == ("topic", b"\xff\0")
        assert message.properties.content_type == ("t" if version is V5 else None)


@pytest.mark.spec("MQTT3-3.1.3-1", "MQTT5-3.1.3-1", "MQTT3-3.1.3-3", "MQTT5-3.1.3-3")
@both_versions
def test_the_order_in_which_our_client_writes(version: ProtocolVersion) -> None:
    will = Will(topic_name="topic", payload=b"payload")
    packet = Connect(client_id="id", protocol_version=version, will=will, user_name="user", password=b"word")
    block = b"\0" if version is V5 else b""
    fields = (text("id"), block, text("topic"), text("payload"), text("user"), text("word"))
    assert ClientConnection().encode(packet) == connect(version, *fields, flags=0xC6)


WITH_BAD_TEXT: dict[str, Callable[[bytes, bytes], tuple[int, tuple[bytes, ...]]]] = {
    "Client Identifier": lambda bad, _: (0x02, (text(bad),)),
    "Will Topic": lambda bad, block: (0x06, (text("c"), block, text(bad), text("p"))),
    "User Name": lambda bad, _: (0x82, (text("c"), text(bad))),
}


@pytest.mark.spec("MQTT3-3.1.3-4", "MQTT3-3.1.3-10", "MQTT3-3.1.3-11", "MQTT3-1.5.3-1", "MQTT3-1.5.3-2")
@pytest.mark.spec("MQTT5-3.1.3-4", "MQTT5-3.1.3-11", "MQTT5-3.1.3-12", "MQTT5-1.5.4-1", "MQTT5-1.5.4-2")
@both_versions
@ill_formed
@pytest.mark.parametrize("field", WITH_BAD_TEXT)
async def test_text_of_a_connect(memory_broker: MemoryBroker, version: ProtocolVersion, field: str, bad: bytes) -> None:
    flags, payload = WITH_BAD_TEXT[field](bad, b"\0" if version is V5 else b"")
    assert await refused_bytes(memory_broker, connect(version, *payload, flags=flags)) == refusal(version, 0x81)


# Client Identifiers


@pytest.mark.spec("MQTT3-3.1.3-5", "MQTT5-3.1.3-5")
@both_versions
async def test_short_client_identifiers_are_allowed(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    letters = string.digits + string.ascii_letters
    identifiers = [*letters, letters[:23], letters[23:46], letters[39:]]
    wires = [await join(memory_broker, version, client_id) for client_id in identifiers]
    assert set(memory_broker.broker.connections.sessions) == set(identifiers)
    assert all([await wire.until_pong() == [] for wire in wires]), "all of them at once"


@pytest.mark.spec("MQTT5-3.1.3-6", "MQTT5-3.1.3-7", "MQTT5-3.2.2-16", "MQTT5-3.1.3-2")
async def test_an_assigned_client_identifier(memory_broker: MemoryBroker) -> None:
    await memory_broker.connect("auto-1")  # what the broker would assign first is in use
    clients = [await memory_broker.connect(session_expiry_interval=60) for _ in range(3)]
    assigned = [client.connack.assigned_client_identifier for client in clients if client.connack is not None]
    assert assigned == ["auto-2", "auto-3", "auto-4"]
    assert all([await client.nothing_waits() for client in clients])
    await clients[1].subscribe("t", qos=1)
    await clients[1].cut()
    await clients[0].publish("t", b"owed", qos=1)
    again = await memory_broker.connect("auto-3", clean_start=False)
    assert again.connack is not None
    assert again.connack.session_present
    assert again.connack.assigned_client_identifier is None
    assert (await again.next_message()).payload == b"owed"


@pytest.mark.spec("MQTT3-3.1.3-6", "MQTT3-3.1.3-7")
async def test_an_empty_client_identifier_of_3_1_1(memory_broker: MemoryBroker) -> None:
    await memory_broker.connect("auto-1", version=V311)
    first, second = [await join(memory_broker, V311, "") for _ in range(2)]
    assert set(memory_broker.broker.connections.sessions) == {"auto-1", "auto-2", "auto-3"}
    await first.send(subscribe(V311, 1, ("t", 0)))
    assert await first.read() == b"\x90\x03\0\x01\0"
    await second.send(publish(V311, "t", b"x"))
    assert await first.read() == publish(V311, "t", b"x")


@pytest.mark.spec("MQTT3-3.1.3-7", "MQTT3-3.1.3-8", "MQTT3-3.1.3-9", "MQTT3-3.2.2-5", "MQTT3-3.2.2-4", "MQTT3-3.1.4-5")
@pytest.mark.parametrize("version, flags", [(V311, 0), (V31, 0), (V31, 2)])
async def test_an_empty_client_identifier_refused(
    memory_broker: MemoryBroker, version: ProtocolVersion, flags: int
) -> None:
    name = b"MQIsdp" if version is V31 else b"MQTT"
    answer = await refused_bytes(memory_broker, connect(version, text(""), flags=flags, name=name))
    assert answer == [b"\x20\x02\x00\x02"]


# What a check of ours refuses


@pytest.mark.spec("MQTT3-3.1.3-9", "MQTT3-3.2.2-4", "MQTT3-3.2.2-5", "MQTT3-3.1.4-5")
@pytest.mark.spec("MQTT5-3.1.3-8", "MQTT5-3.1.4-2", "MQTT5-3.1.4-6", "MQTT5-3.2.2-6", "MQTT5-3.2.2-7", "MQTT5-4.13.2-1")
@pytest.mark.parametrize(
    "code, number",
    [
        (ReasonCode.CLIENT_IDENTIFIER_NOT_VALID, 2),
        (ReasonCode.SERVER_UNAVAILABLE, 3),
        (ReasonCode.BAD_USER_NAME_OR_PASSWORD, 4),
        (ReasonCode.NOT_AUTHORIZED, 5),
    ],
)
async def test_a_refused_client(code: ReasonCode, number: int) -> None:
    async with open_memory_broker(authenticator=Door(code)) as memory:
        assert await refused_bytes(memory, connect(V311)) == [bytes([0x20, 2, 0, number])]
        assert await refused_bytes(memory, connect(V5)) == [bytes([0x20, 0, code])]


@pytest.mark.spec("MQTT3-3.2.2-6")
@pytest.mark.parametrize("code", [ReasonCode.UNSPECIFIED_ERROR, ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR])
async def test_a_refusal_that_3_1_1_cannot_say(code: ReasonCode) -> None:
    async with open_memory_broker(authenticator=Door(code)) as memory:
        assert await refused_bytes(memory, connect(V311)) == []
        assert await refused_bytes(memory, connect(V5)) == [bytes([0x20, 0, code])]


# Keep Alive


@pytest.mark.spec("MQTT3-3.1.2-23", "MQTT3-3.1.2-24", "MQTT5-3.1.2-20", "MQTT5-3.1.2-22", "MQTT5-3.2.2-22")
@both_versions
async def test_keep_alive_is_the_clients(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, version: ProtocolVersion
) -> None:
    """A client that pings within its Keep Alive stays; one that does not is cut off after one and a half of it."""
    wire = await open_wire(memory_broker, connect(version, keep_alive=10))
    assert b"\x13" not in (await wire.read())[4:], "no Server Keep Alive, which would be 0x13"
    for _ in range(10):
        await trio.sleep(10)
        assert await wire.until_pong() == []
    start = trio.current_time()
    assert await wire.until_closed() == ([b"\xe0\x01\x8d"] if version is V5 else [])
    assert trio.current_time() - start == 15.0


@pytest.mark.spec("MQTT5-3.1.2-28")
@pytest.mark.parametrize("wanted", [None, 0, 1])
async def test_response_information_only_where_it_is_wanted(wanted: int | None) -> None:
    async with open_memory_broker(response_information=lambda principal: f"answers/{principal.client_id}") as memory:
        client = await memory.connect("c", request_response_information=wanted)
        assert client.connack is not None
        assert client.connack.response_information == ("answers/c" if wanted else None)
