"""What CONNECT asks for and CONNACK answers, by version; the ways in which either side says goodbye."""

from __future__ import annotations

import string
from typing import Any

import pytest
import trio
import trio.testing

from mqtt_trio.broker.access import Principal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.protocol.codes import SERVER_DISCONNECT_CODES, ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import ConnAck, Connect, Disconnect, PingReq, PubAck, Publish, PubRec, Will
from mqtt_trio.testing import MemoryBroker, open_memory_broker
from tests.connecting import begin, refusal

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
VERSIONS = [V31, V311, V5]


async def sent_back(memory: MemoryBroker, text: str) -> bytes:
    """Send bytes, given as hex; return all that comes until the broker closes, or until it waits for more."""
    stream = await memory.open_stream()
    await stream.send_all(bytes.fromhex(text))
    received = b""
    while True:
        with trio.move_on_after(1) as scope:
            data = bytes(await stream.receive_some(1000))
        if scope.cancelled_caught:
            return received + b" and waits"
        if not data:
            return received
        received += data


# Client Identifiers


@pytest.mark.spec("MQTT5-3.1.3-6", "MQTT5-3.1.3-7", "MQTT5-3.2.2-16", "MQTT3-3.1.3-6", "MQTT3-3.1.3-7", "MQTT3-3.1.3-8")
@pytest.mark.parametrize(
    "version, clean_start, accepted",
    [
        (V31, True, False),
        (V31, False, False),
        (V311, True, True),
        (V311, False, False),
        (V5, True, True),
        (V5, 0, True),
    ],
)
async def test_an_empty_client_identifier(
    memory_broker: MemoryBroker, version: ProtocolVersion, clean_start: bool, accepted: bool
) -> None:
    client = await begin(memory_broker, version, clean_start=clean_start)
    sessions = memory_broker.broker.connections.sessions
    if not accepted:
        assert await refusal(client) == ConnAck(reason_code=ReasonCode.CLIENT_IDENTIFIER_NOT_VALID)
        assert not sessions
        return
    connack = await client.expect(ConnAck)
    assert connack.reason_code == ReasonCode.SUCCESS
    assert connack.assigned_client_identifier == ("auto-1" if version == V5 else None)
    assert list(sessions) == ["auto-1"]


@pytest.mark.spec("MQTT5-3.2.2-16")
async def test_an_assigned_identifier_is_nobody_elses(memory_broker: MemoryBroker) -> None:
    squatter = await memory_broker.connect("auto-1")
    client = await memory_broker.connect()
    assert client.connack is not None
    assert client.connack.assigned_client_identifier == "auto-2"
    assert await squatter.nothing_waits()


@pytest.mark.spec("MQTT5-3.1.3-5", "MQTT3-3.1.3-5")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [1, 23, 24, 65_535])
async def test_client_identifiers_of_any_length(
    memory_broker: MemoryBroker, version: ProtocolVersion, size: int
) -> None:
    """3.1 allows a server to refuse more than 23 characters; as mosquitto, this one does not."""
    characters = string.digits + string.ascii_letters
    client_id = (characters * (size // len(characters) + 1))[:size]
    client = await memory_broker.connect(client_id, version=version)
    assert client.connack is not None
    assert client.connack.reason_code == ReasonCode.SUCCESS
    assert client.connack.assigned_client_identifier is None
    assert list(memory_broker.broker.connections.sessions) == [client_id]


# Bytes that differ between the versions

NAMES = {V31: "0006 4d5149736470 03", V311: "0004 4d515454 04", V5: "0004 4d515454 05"}


def connect_bytes(version: ProtocolVersion, flags: str, payload: str) -> str:
    body = bytes.fromhex(NAMES[version] + flags + "0000" + ("00" if version == V5 else "") + payload)
    return bytes((0x10, len(body))).hex() + body.hex()


FLAGS = [
    # name, flags, payload, versions that accept it, statements
    ("reserved bit", "03", "0001 63", {V31}, ("MQTT5-3.1.2-3", "MQTT3-3.1.2-3")),
    ("Will QoS without Will", "0a", "0001 63", {V31}, ("MQTT5-3.1.2-11", "MQTT3-3.1.2-13")),
    ("Will Retain without Will", "22", "0001 63", {V31}, ("MQTT5-3.1.2-13", "MQTT3-3.1.2-15")),
    ("Will QoS 3", "1e", "0001 63 0001 74 0000", set(), ("MQTT5-3.1.2-12", "MQTT3-3.1.2-14")),
    ("password without user name", "42", "0001 63 0001 70", {V5}, ("MQTT3-3.1.2-22",)),
    ("user name and password", "c2", "0001 63 0001 75 0001 70", set(VERSIONS), ("MQTT5-3.1.2-17", "MQTT5-3.1.2-19")),
    ("user name that is not there", "82", "0001 63", {V31}, ("MQTT5-3.1.2-17", "MQTT3-3.1.2-19")),
    ("password that is not there", "c2", "0001 63 0001 75", {V31}, ("MQTT5-3.1.2-19", "MQTT3-3.1.2-21")),
    ("user name without its flag", "02", "0001 63 0001 75", set(), ("MQTT5-3.1.2-16", "MQTT3-3.1.2-18")),
    ("password without its flag", "82", "0001 63 0001 75 0001 70", set(), ("MQTT5-3.1.2-18", "MQTT3-3.1.2-20")),
]


@pytest.mark.parametrize(
    "version, flags, payload, accepted",
    [
        pytest.param(version, flags, payload, version in who, id=f"{name}-{version}", marks=pytest.mark.spec(*ids))
        for name, flags, payload, who, ids in FLAGS
        for version in VERSIONS
    ],
)
@pytest.mark.spec("MQTT5-3.1.4-1", "MQTT3-3.1.4-1")
async def test_connect_flags(
    memory_broker: MemoryBroker,
    autojump_clock: trio.testing.MockClock,
    version: ProtocolVersion,
    flags: str,
    payload: str,
    accepted: bool,
) -> None:
    will_properties = "00" if version == V5 and flags == "1e" else ""
    payload = payload[:7] + will_properties + payload[7:]
    answer = await sent_back(memory_broker, connect_bytes(version, flags, payload))
    if accepted:
        assert answer.endswith(b" and waits")
        assert answer[0] == 0x20
        assert answer[3] == 0
    elif version == V5:
        assert answer[0] == 0x20
        assert answer[3] in (0x81, 0x82)
    else:
        assert answer == b""


@pytest.mark.spec("MQTT5-3.1.2-2", "MQTT3-3.1.2-2", "MQTT3-3.1.2-1")
@pytest.mark.parametrize(
    "head, answer",
    [
        ("0006 4d5149736470 04", "2002 0001"),
        ("0004 4d515454 03", "2002 0001"),
        ("0004 4d515454 02", "2002 0001"),
        ("0004 6d717474 04", "2002 0001"),
    ],
)
async def test_versions_that_are_not_known(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock, head: str, answer: str
) -> None:
    body = bytes.fromhex(head + "02 0000 0001 63")
    assert await sent_back(memory_broker, bytes((0x10, len(body))).hex() + body.hex()) == bytes.fromhex(answer)


@pytest.mark.parametrize("version", [V31, V311])
async def test_3_gets_no_disconnect(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    client = await memory_broker.connect("c", version=version)
    await memory_broker.connect("c", version=version)
    assert await client.closed() is None


@pytest.mark.spec("MQTT5-3.1.0-2", "MQTT5-3.2.0-2", "MQTT3-3.1.0-2")
@pytest.mark.parametrize("version", VERSIONS)
async def test_a_second_connect(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    client = await memory_broker.connect("c", version=version)
    await client.send(Connect(client_id="c", protocol_version=version))
    farewell = await client.closed()
    assert (farewell.reason_code if isinstance(farewell, Disconnect) else None) == (
        ReasonCode.PROTOCOL_ERROR if version == V5 else None
    )


@pytest.mark.spec("MQTT5-3.1.4-6", "MQTT3-3.1.4-5")
@pytest.mark.parametrize("version", [V311, V5])
async def test_nothing_behind_a_refused_connect_is_looked_at(version: ProtocolVersion) -> None:
    async with open_memory_broker(Limits(sessions=1)) as memory:
        watcher = await memory.connect("watcher")
        await watcher.subscribe("t")
        stream = await memory.open_stream()
        connect = Connect(client_id="c", protocol_version=version)
        await stream.send_all(encode(connect, version) + encode(Publish("t", b"behind"), version))
        answer = bytes(await stream.receive_some(100))
        assert answer[3] == (ReasonCode.QUOTA_EXCEEDED if version == V5 else 3)
        assert await stream.receive_some(100) == b""
        assert await watcher.nothing_waits()


# Sessions


@pytest.mark.spec("MQTT5-3.1.2-4", "MQTT5-3.1.2-5", "MQTT5-3.1.2-6", "MQTT5-3.2.2-2", "MQTT5-3.2.2-3", "MQTT5-3.1.4-4")
@pytest.mark.spec("MQTT3-3.1.2-4", "MQTT3-3.1.2-6", "MQTT3-3.2.2-1", "MQTT3-3.2.2-2", "MQTT3-3.2.2-3", "MQTT3-3.1.4-3")
@pytest.mark.parametrize("version", [V311, V5])
async def test_clean_start_and_session_present(memory_broker: MemoryBroker, version: ProtocolVersion) -> None:
    expiry = {"session_expiry_interval": 60} if version == V5 else {}
    fields: dict[str, Any] = {"version": version, **expiry}
    for clean_start, present, subscribed in ((False, 0, 0), (False, 1, 1), (True, 0, 0), (False, version == V5, 1)):
        client = await memory_broker.connect("c", clean_start=clean_start, **fields)
        assert client.connack is not None
        assert client.connack.session_present == bool(present)
        found = len(memory_broker.broker.connections.sessions["c"].subscriptions)
        assert found == (subscribed if present else 0)
        await client.subscribe("t")
        await client.disconnect()


async def test_3_1_is_not_told_of_its_session(
    memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock
) -> None:
    """The byte of Session Present is reserved in 3.1."""
    for _ in range(2):
        assert await sent_back(memory_broker, connect_bytes(V31, "00", "0001 63")) == b"\x20\x02\x00\x00 and waits"
    assert memory_broker.broker.metrics.sessions == 1


@pytest.mark.parametrize("asked, limit, told", [(None, 100, None), (60, 100, None), (600, 100, 100), (60, 0, 0)])
async def test_session_expiry_as_granted(asked: int | None, limit: int, told: int | None) -> None:
    async with open_memory_broker(Limits(session_expiry_interval=limit)) as memory:
        client = await memory.connect("c", session_expiry_interval=asked)
        assert client.connack is not None
        assert client.connack.session_expiry_interval == told
        assert memory.broker.connections.sessions["c"].expiry_interval == min(asked or 0, limit)


# What else a CONNACK says


@pytest.mark.spec("MQTT5-3.2.2-9")
async def test_the_connack_of_a_default_broker(memory_broker: MemoryBroker) -> None:
    """What is absent is available: QoS 2, retained messages, wildcards, Subscription Identifiers."""
    client = await memory_broker.connect("c", keep_alive=60)
    connack = client.connack
    assert connack is not None
    limits = memory_broker.broker.limits
    assert (connack.receive_maximum, connack.maximum_packet_size) == (
        limits.receive_maximum,
        limits.maximum_packet_size,
    )
    absent = (connack.maximum_qos, connack.retain_available, connack.wildcard_subscription_available)
    assert absent == (None, None, None)
    assert (connack.subscription_identifier_available, connack.server_keep_alive) == (None, None)
    assert (connack.response_information, connack.authentication_method, connack.reason_string) == (None, None, None)


@pytest.mark.spec("MQTT5-3.1.2-21", "MQTT5-3.2.2-21", "MQTT5-3.2.2-22")
@pytest.mark.parametrize("asked, told", [(0, 60), (30, None), (60, None), (61, 60)])
async def test_server_keep_alive_where_the_client_asks_for_more(asked: int, told: int | None) -> None:
    async with open_memory_broker(Limits(keep_alive=60)) as memory:
        client = await memory.connect("c", keep_alive=asked)
        assert client.connack is not None
        assert client.connack.server_keep_alive == told
        old = await memory.connect("old", version=V311, keep_alive=asked)
        links = {link.session.client_id: link for link in memory.clients.links if link.session is not None}
        assert links["c"].silence_limit == 1.5 * (told or asked)
        assert links["old"].silence_limit == (1.5 * asked or None)
        assert await old.nothing_waits()


@pytest.mark.spec("MQTT5-3.1.2-28")
@pytest.mark.parametrize("wanted, told", [(None, None), (0, None), (1, "reply/u/")])
async def test_response_information(wanted: int | None, told: str | None) -> None:
    def prefix(principal: Principal) -> str:
        return f"reply/{principal.user_name}/"

    async with open_memory_broker(response_information=prefix) as memory:
        client = await memory.connect("c", user_name="u", request_response_information=wanted)
        assert client.connack is not None
        assert client.connack.response_information == told


async def test_no_response_information_unless_there_is_some(memory_broker: MemoryBroker) -> None:
    client = await memory_broker.connect("c", request_response_information=1)
    assert client.connack is not None
    assert client.connack.response_information is None


@pytest.mark.spec("MQTT5-3.1.2-29")
@pytest.mark.parametrize("wanted", [None, 0, 1])
async def test_problem_information(memory_broker: MemoryBroker, wanted: int | None) -> None:
    """CONNACK, DISCONNECT and PUBLISH may carry text in any case, and do."""
    client = await memory_broker.connect("c", request_problem_information=wanted)
    link = next(iter(memory_broker.clients.links))
    for packet in (PubAck(1, ReasonCode.NOT_AUTHORIZED, "why", (("a", "b"),)), PubRec(1, reason_string="why")):
        link.outbox.put(link.connection.encode(packet))
        memory_broker.broker.flush()
        received = await client.next_packet()
        assert received == (packet if wanted != 0 else type(packet)(1, packet.reason_code))
    await client.send(PingReq())
    await client.next_packet()
    await client.send(Connect(client_id="c"))
    farewell = await client.closed()
    assert isinstance(farewell, Disconnect)
    assert farewell.reason_string == "CONNECT while CONNECTED"
    refused = await begin(
        memory_broker, client_id="d", request_problem_information=wanted, authentication_method="nobody knows it"
    )
    assert (await refusal(refused)).reason_string == "the Authentication Method is not known"


async def test_a_malformed_connect_is_told_why(memory_broker: MemoryBroker) -> None:
    stream = await memory_broker.open_stream()
    await stream.send_all(bytes.fromhex(connect_bytes(V5, "03", "0001 63")))
    assert b"the reserved bit of the Connect Flags is set" in bytes(await stream.receive_some(200))


# DISCONNECT


@pytest.mark.spec("MQTT5-3.14.2-1")
@pytest.mark.parametrize("code", sorted(SERVER_DISCONNECT_CODES))
async def test_codes_that_only_a_server_may_send(memory_broker: MemoryBroker, code: ReasonCode) -> None:
    watcher = await memory_broker.connect("watcher")
    await watcher.subscribe("gone")
    client = await memory_broker.connect("c", will=Will(topic_name="gone", qos=QoS(1)))
    await client.send(Disconnect(code))
    farewell = await client.closed()
    assert isinstance(farewell, Disconnect)
    assert farewell.reason_code == ReasonCode.PROTOCOL_ERROR
    assert (await watcher.next_message()).topic_name == "gone"


@pytest.mark.parametrize("code", [0x00, 0x04, 0x80, 0x81, 0x82, 0x83, *range(0x90, 0x91), *range(0x93, 0x9A)])
async def test_codes_that_a_client_may_send(memory_broker: MemoryBroker, code: int) -> None:
    client = await memory_broker.connect("c")
    await client.send(Disconnect(ReasonCode(code)))
    assert await client.closed() is None
    assert memory_broker.broker.metrics.protocol_errors == 0


@pytest.mark.spec("MQTT5-3.1.2-23")
@pytest.mark.parametrize(
    "before, after, kept", [(60, None, 60), (60, 10, 10), (10, 60, 60), (60, 0, 0), (60, 900, 100)]
)
async def test_disconnect_changes_the_session_expiry(
    autojump_clock: trio.testing.MockClock, before: int, after: int | None, kept: int
) -> None:
    async with open_memory_broker(Limits(session_expiry_interval=100)) as memory:
        for stay, present in ((kept - 1, True), (kept, False)) if kept else ((0, False),):
            client = await memory.connect("c", session_expiry_interval=before)
            await client.disconnect(session_expiry_interval=after)
            await trio.sleep(stay)
            await trio.testing.wait_all_tasks_blocked()
            client = await memory.connect("c", clean_start=False)
            assert client.connack is not None
            assert client.connack.session_present is present
            await client.disconnect()


async def test_a_session_that_ended_with_its_connection_cannot_be_kept(memory_broker: MemoryBroker) -> None:
    client = await memory_broker.connect("c")
    await client.send(Disconnect(session_expiry_interval=5))
    farewell = await client.closed()
    assert isinstance(farewell, Disconnect)
    assert farewell.reason_code == ReasonCode.PROTOCOL_ERROR
    assert memory_broker.broker.metrics.sessions == 0


async def test_who_asked_for_a_session_may_ask_again_where_none_is_kept() -> None:
    """The rule is about what CONNECT said, not about what was granted."""
    async with open_memory_broker(Limits(session_expiry_interval=0)) as memory:
        client = await memory.connect("c", session_expiry_interval=60)
        await client.send(Disconnect(session_expiry_interval=60))
        assert await client.closed() is None
        assert memory.broker.metrics.sessions == memory.broker.metrics.protocol_errors == 0


# Planned shutdown


async def test_shutdown_sends_clients_elsewhere(memory_broker: MemoryBroker) -> None:
    clients = [await memory_broker.connect(f"c{version}", version=version) for version in VERSIONS]
    small = await memory_broker.connect("small", maximum_packet_size=29)
    large = await memory_broker.connect("large", maximum_packet_size=30)
    await memory_broker.clients.shut_down("other.example:1883")
    sent_on = Disconnect(ReasonCode.USE_ANOTHER_SERVER, server_reference="other.example:1883")
    assert [await client.closed() for client in clients] == [None, None, sent_on]
    assert await small.closed() == Disconnect(ReasonCode.SERVER_SHUTTING_DOWN)
    assert await large.closed() == sent_on
    assert memory_broker.broker.metrics.client_failures == 0
