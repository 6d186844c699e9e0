"""Both ends against the tables of the specification: each packet, property, flag, cut, reason code."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.connection import ClientConnection, ServerConnection, State
from tests.protocol import derived_vectors as d
from tests.protocol import vector_tables as t
from tests.protocol.derived_vectors import Vector
from tests.protocol.vector_tables import unhex

V5 = ProtocolVersion.MQTT_5_0
CONNECT_FRAME = unhex("10 13 0004 4d515454 05 02 0000 05 11 0000000a 0001 63")
CONNECT_WITH_METHOD = unhex("10 12 0004 4d515454 05 02 0000 04 15 0001 6d 0001 63")
TO_SERVER = [owner for owner in t.WITH_PROPERTIES if owner == t.WILL or owner in t.FROM_CLIENT]
TO_CLIENT = [owner for owner in t.WITH_PROPERTIES if owner in t.FROM_SERVER]


def server_for(packet_type: int) -> ServerConnection:
    """A Server's end that waits for a packet of this type."""
    connection = ServerConnection()
    if packet_type != t.CONNECT:
        connection.receive_data(CONNECT_WITH_METHOD if packet_type == t.AUTH else CONNECT_FRAME)
        assert connection.next_packet() is not None
    return connection


def client_for(packet_type: int) -> ClientConnection:
    """A Client's end that waits for a packet of this type."""
    connection = ClientConnection(protocol_version=V5)
    connection.topic_alias_maximum = 10
    if packet_type != t.CONNACK:
        connection.receive_data(unhex("20 03 00 00 00"))
        assert connection.next_packet() is not None
    return connection


def outcome(connection: ServerConnection | ClientConnection, frame: bytes) -> int | None:
    """The reason code with which the frame is refused, or None when it is taken."""
    connection.receive_data(frame)
    try:
        packet = connection.next_packet()
    except RemoteProtocolError as exc:
        assert connection.state is State.FAILED
        return int(exc.reason_code)
    assert packet is not None
    return None


def check(vectors: Iterable[Vector], *, to_server: bool) -> None:
    wrong = []
    for vector in vectors:
        connection = server_for(vector.packet_type) if to_server else client_for(vector.packet_type)
        if (found := outcome(connection, vector.frame)) != vector.code:
            wrong.append((vector.name, vector.frame.hex(" "), found, vector.code))
    assert not wrong


@pytest.mark.parametrize("owner", TO_SERVER)
def test_properties_from_a_client(owner: int | str) -> None:
    check(d.property_vectors(owner, to_server=True), to_server=True)
    check(d.length_vectors(owner), to_server=True)


@pytest.mark.parametrize("owner", TO_CLIENT)
def test_properties_from_a_server(owner: int | str) -> None:
    check(d.property_vectors(owner, to_server=False), to_server=False)
    check(d.length_vectors(owner), to_server=False)


@pytest.mark.spec("MQTT5-2.1.3-1", "MQTT5-3.3.1-2", "MQTT5-3.3.1-4")
@pytest.mark.parametrize("packet_type", t.FROM_CLIENT)
def test_flags_from_a_client(packet_type: int) -> None:
    check(d.flag_vectors(packet_type), to_server=True)


@pytest.mark.spec("MQTT5-2.1.3-1", "MQTT5-3.3.1-2", "MQTT5-3.3.1-4")
@pytest.mark.parametrize("packet_type", t.FROM_SERVER)
def test_flags_from_a_server(packet_type: int) -> None:
    check(d.flag_vectors(packet_type), to_server=False)


@pytest.mark.parametrize("name", [name for name, row in d.SHAPES.items() if row[0] in t.FROM_CLIENT])
def test_truncations_from_a_client(name: str) -> None:
    check(d.truncation_vectors(name), to_server=True)


@pytest.mark.parametrize("name", [name for name, row in d.SHAPES.items() if row[0] in t.FROM_SERVER and name != "AUTH"])
def test_truncations_from_a_server(name: str) -> None:
    check(d.truncation_vectors(name), to_server=False)


@pytest.mark.spec(
    "MQTT5-3.4.2-1", "MQTT5-3.5.2-1", "MQTT5-3.6.2-1", "MQTT5-3.7.2-1", "MQTT5-3.14.2-1", "MQTT5-3.15.2-1"
)
@pytest.mark.parametrize("packet_type", [*t.ACKS, t.DISCONNECT, t.AUTH])
def test_reason_codes_from_a_client(packet_type: int) -> None:
    allowed = {t.DISCONNECT: t.DISCONNECT_FROM_CLIENT, t.AUTH: (0x18,)}.get(packet_type) or t.REASON_CODES[packet_type]
    check(d.reason_vectors(packet_type, allowed), to_server=True)


@pytest.mark.spec("MQTT5-3.2.2-8", "MQTT5-3.9.3-2", "MQTT5-3.11.3-2", "MQTT5-3.14.2-1")
@pytest.mark.parametrize("packet_type", [t.CONNACK, *t.ACKS, t.SUBACK, t.UNSUBACK, t.DISCONNECT])
def test_reason_codes_from_a_server(packet_type: int) -> None:
    allowed = t.DISCONNECT_FROM_SERVER if packet_type == t.DISCONNECT else t.REASON_CODES[packet_type]
    # Table 2-6 lists 0x8C for DISCONNECT, table 3-10 does not.
    check(d.reason_vectors(packet_type, allowed, (0x8C,) if packet_type == t.DISCONNECT else ()), to_server=False)
