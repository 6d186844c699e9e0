"""Reason String and User Properties: who gets them, and that they give way where the receiver has no room for them."""

from __future__ import annotations

import attrs
import pytest

from mqtt_trio.errors import LocalProtocolError
from mqtt_trio.protocol import packets as p
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.connection import ClientConnection, ServerConnection
from mqtt_trio.protocol.encode import encode

V311, V5 = ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0
WHY = "because"
USER = (("key", "value"), ("key", "another"))

Reasoned = p.ConnAck | p.PubAck | p.PubRec | p.PubRel | p.PubComp | p.SubAck | p.UnsubAck | p.Disconnect | p.Auth
NOT_FOUND = ReasonCode.PACKET_IDENTIFIER_NOT_FOUND

FROM_A_SERVER: list[tuple[Reasoned, str, str]] = [
    (p.ConnAck(reason_code=ReasonCode.BANNED, reason_string=WHY, user_properties=USER), "3.2.2-19", "3.2.2-20"),
    (p.ConnAck(assigned_client_identifier="id", reason_string=WHY, user_properties=USER), "3.2.2-19", "3.2.2-20"),
    (p.SubAck(1, (ReasonCode.GRANTED_QOS_1, ReasonCode.NOT_AUTHORIZED), WHY, USER), "3.9.2-1", "3.9.2-2"),
    (p.UnsubAck(1, (ReasonCode.NO_SUBSCRIPTION_EXISTED,), WHY, USER), "3.11.2-1", "3.11.2-2"),
]
FROM_BOTH: list[tuple[Reasoned, str, str]] = [
    (p.PubAck(1, ReasonCode.NOT_AUTHORIZED, WHY, USER), "3.4.2-2", "3.4.2-3"),
    (p.PubAck(1, reason_string=WHY, user_properties=USER), "3.4.2-2", "3.4.2-3"),
    (p.PubRec(1, ReasonCode.QUOTA_EXCEEDED, WHY, USER), "3.5.2-2", "3.5.2-3"),
    (p.PubRel(1, NOT_FOUND, WHY, USER), "3.6.2-2", "3.6.2-3"),
    (p.PubComp(1, NOT_FOUND, WHY, USER), "3.7.2-2", "3.7.2-3"),
    (
        p.Disconnect(ReasonCode.UNSPECIFIED_ERROR, reason_string=WHY, user_properties=USER),
        "3.14.2-3",
        "3.14.2-4",
    ),
    (p.Auth(ReasonCode.CONTINUE_AUTHENTICATION, "method", b"data", WHY, USER), "3.15.2-2", "3.15.2-3"),
]
"""A packet with both, and the statements about its Reason String and its User Properties."""


def server_for(
    maximum_packet_size: int | None = None, request_problem_information: int | None = None
) -> ServerConnection:
    """A Server's end whose Client has just connected, where DISCONNECT is allowed as well."""
    server = ServerConnection()
    # Its CONNACK has to pass, so the size is set behind it, as if it had stood in the CONNECT.
    connect = p.Connect(request_problem_information=request_problem_information, authentication_method="method")
    server.receive_data(encode(connect, V5))
    assert server.next_packet() == connect
    server.encode(p.ConnAck(authentication_method="method"))
    if maximum_packet_size is not None:
        server.peer_maximum_packet_size = maximum_packet_size
    return server


def client_for(maximum_packet_size: int) -> ClientConnection:
    """A Client's end whose Server announced a Maximum Packet Size."""
    client = ClientConnection()
    client.encode(p.Connect())
    client.receive_data(encode(p.ConnAck(maximum_packet_size=maximum_packet_size), V5))
    assert client.next_packet() is not None
    return client


def without(packet: Reasoned, *, reason: bool = False) -> Reasoned:
    """The packet without its User Properties, and with `reason` without its Reason String as well."""
    return attrs.evolve(packet, user_properties=(), reason_string=None if reason else packet.reason_string)


def gives_way(packet: Reasoned, make: type[ServerConnection] | type[ClientConnection]) -> None:
    """Whatever size the receiver takes: as much of the text as fits, and never more than fits."""
    variants = [encode(each, V5) for each in (packet, without(packet), without(packet, reason=True))]
    full, reasoned, bare = map(len, variants)
    assert full > reasoned > bare
    for maximum in range(bare, full + 2):
        connection = server_for(maximum) if make is ServerConnection else client_for(maximum)
        fitting = next(frame for frame in variants if len(frame) <= maximum)
        assert connection.encode(packet) == fitting, f"to one that takes {maximum} bytes"
    connection = server_for(bare - 1) if make is ServerConnection else client_for(bare - 1)
    with pytest.raises(LocalProtocolError, match=f"of {bare} bytes; the peer takes {bare - 1}"):
        connection.encode(packet)


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(packet, marks=pytest.mark.spec(*(f"MQTT5-{each}" for each in ids)), id=type(packet).__name__)
        for packet, *ids in (*FROM_A_SERVER, *FROM_BOTH)
    ],
)
def test_text_of_a_server_gives_way(packet: Reasoned) -> None:
    gives_way(packet, ServerConnection)


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(packet, marks=pytest.mark.spec(*(f"MQTT5-{each}" for each in ids)), id=type(packet).__name__)
        for packet, *ids in FROM_BOTH
    ],
)
def test_text_of_a_client_gives_way(packet: Reasoned) -> None:
    gives_way(packet, ClientConnection)


def test_user_properties_of_requests_do_not_give_way() -> None:
    """They belong to what the caller asks for; only text beside a reason code may be left out."""
    client = client_for(20)
    for packet in (
        p.Subscribe(1, (p.Subscription("t"),), user_properties=USER),
        p.Unsubscribe(1, ("t",), user_properties=USER),
        p.Publish("t", properties=p.MessageProperties(user_properties=USER)),
    ):
        with pytest.raises(LocalProtocolError):
            client.encode(packet)


@pytest.mark.spec("MQTT5-3.1.2-29")
@pytest.mark.parametrize("wanted", [None, 0, 1])
@pytest.mark.parametrize("packet", [row[0] for row in (*FROM_A_SERVER, *FROM_BOTH)], ids=lambda p: type(p).__name__)
def test_problem_information_by_packet(packet: Reasoned, wanted: int | None) -> None:
    server = server_for(request_problem_information=wanted)
    may_explain = wanted != 0 or isinstance(packet, p.ConnAck | p.Disconnect)
    assert server.encode(packet) == encode(packet if may_explain else without(packet, reason=True), V5)


@pytest.mark.spec("MQTT5-3.1.2-29")
def test_messages_keep_their_user_properties_whatever_was_asked_for() -> None:
    properties = p.MessageProperties(user_properties=USER)
    packet = p.Publish("t", b"x", QoS.AT_LEAST_ONCE, packet_id=1, properties=properties)
    assert server_for(request_problem_information=0).encode(packet) == encode(packet, V5)


@pytest.mark.parametrize("packet", [row[0] for row in (*FROM_A_SERVER, *FROM_BOTH)], ids=lambda p: type(p).__name__)
def test_3_1_1_has_no_such_text(packet: Reasoned) -> None:
    if isinstance(packet, p.Auth):
        with pytest.raises(LocalProtocolError):
            encode(packet, V311)
    else:
        assert b"because" not in encode(packet, V311)
        assert encode(packet, V311) == encode(without(packet, reason=True), V311)
