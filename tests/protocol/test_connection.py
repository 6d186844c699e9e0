"""Both ends of a connection: order of packets, sizes, aliases, buffers."""

from __future__ import annotations

from typing import Any

import pytest

from mqtt_trio.errors import LocalProtocolError, PacketTooLargeError, RemoteProtocolError
from mqtt_trio.protocol import packets as p
from mqtt_trio.protocol.codes import PacketType, ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.connection import (
    CLIENT_NEXT_STATE,
    SERVER_NEXT_STATE,
    ClientConnection,
    ServerConnection,
    State,
)
from mqtt_trio.protocol.encode import encode

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


def connected(
    connect: p.Connect | None = None, connack: p.ConnAck | None = None, **options: Any
) -> tuple[ClientConnection, ServerConnection]:
    client, server = ClientConnection(), ServerConnection(**options)
    server.receive_data(client.encode(connect or p.Connect(client_id="c")))
    assert isinstance(server.next_packet(), p.Connect)
    client.receive_data(server.encode(connack or p.ConnAck()))
    assert isinstance(client.next_packet(), p.ConnAck)
    return client, server


def refused(connection: ServerConnection | ClientConnection, data: bytes) -> int:
    connection.receive_data(data)
    with pytest.raises(RemoteProtocolError) as caught:
        connection.next_packet()
    return caught.value.reason_code


@pytest.mark.parametrize("version", list(ProtocolVersion))
def test_conversation(version: ProtocolVersion) -> None:
    client, server = connected(p.Connect(client_id="c", protocol_version=version))
    assert client.protocol_version is server.protocol_version is version
    assert server.version_known
    sent: list[p.Packet] = [
        p.Subscribe(1, (p.Subscription("a/+", QoS.EXACTLY_ONCE),)),
        p.Publish("a/b", b"x", QoS.EXACTLY_ONCE, packet_id=2),
        p.PubRel(2),
        p.PubAck(3),
        p.PubRec(4),
        p.PubComp(4),
        p.Unsubscribe(5, ("a/+",)),
        p.PingReq(),
        p.Disconnect(),
    ]
    server.receive_data(b"".join(client.encode(packet) for packet in sent))
    assert [server.next_packet() for _ in sent] == sent
    assert server.state is State.DISCONNECTED
    received: list[p.Packet] = [
        p.SubAck(1, (ReasonCode.GRANTED_QOS_2,)),
        p.Publish("a/b", b"x", QoS.AT_LEAST_ONCE, retain=True, packet_id=2),
        p.PubRec(2),
        p.PubComp(2),
        p.PubAck(3),
        p.PubRel(4),
        p.UnsubAck(5, (ReasonCode.SUCCESS,) if version is V5 else ()),
        p.PingResp(),
    ]
    if version is V5:
        received.append(p.Disconnect(ReasonCode.SERVER_SHUTTING_DOWN))
    client.receive_data(b"".join(server.encode(packet) for packet in received))
    assert [client.next_packet() for _ in received] == received
    assert client.state is (State.DISCONNECTED if version is V5 else State.CONNECTED)


def test_state_tables_are_total_over_what_is_accepted() -> None:
    """Whatever a state accepts leads on; DISCONNECTED and FAILED accept nothing."""
    for table in (SERVER_NEXT_STATE, CLIENT_NEXT_STATE):
        assert not [pair for pair in table if pair[0] >= State.DISCONNECTED]
    from_client = {packet_type for state, packet_type in SERVER_NEXT_STATE if state == State.CONNECTED}
    from_server = {packet_type for state, packet_type in CLIENT_NEXT_STATE if state == State.CONNECTED}
    neither = {PacketType.CONNECT, PacketType.CONNACK}
    assert from_client | from_server == set(PacketType) - neither
    assert from_client & from_server == {
        PacketType.PUBLISH,
        PacketType.PUBACK,
        PacketType.PUBREC,
        PacketType.PUBREL,
        PacketType.PUBCOMP,
        PacketType.DISCONNECT,
        PacketType.AUTH,
    }


def test_nothing_behind_disconnect_is_read() -> None:
    client, server = connected()
    server.receive_data(client.encode(p.Disconnect()) + b"\xff\xff\xff\xff\xff")
    assert server.next_packet() == p.Disconnect()
    assert server.next_packet() is None
    server.receive_data(b"\xff" * 10)
    assert server.next_packet() is None
    assert server.buffer == b""


@pytest.mark.spec("MQTT5-3.3.2-9", "MQTT5-3.3.2-10", "MQTT5-3.3.2-11", "MQTT5-3.3.2-12")
def test_topic_aliases_both_ways() -> None:
    client, server = connected(p.Connect(topic_alias_maximum=1), p.ConnAck(topic_alias_maximum=2))
    for sender, receiver in ((client, server), (server, client)):
        for topic_name, alias in (("a", 1), ("", 1), ("b", 1), ("", 1)):
            receiver.receive_data(sender.encode(p.Publish(topic_name, topic_alias=alias)))
        names = []
        while (packet := receiver.next_packet()) is not None:
            assert isinstance(packet, p.Publish)
            names.append(packet.topic_name)
        assert names == ["a", "a", "b", "b"]
    assert refused(server, encode(p.Publish("a", topic_alias=3), V5)) == ReasonCode.TOPIC_ALIAS_INVALID
    assert refused(client, server.encode(p.Publish("a", topic_alias=2))) == ReasonCode.TOPIC_ALIAS_INVALID


@pytest.mark.spec("MQTT5-3.3.2-7")
def test_aliases_end_with_the_connection() -> None:
    client, server = connected(connack=p.ConnAck(topic_alias_maximum=2))
    server.receive_data(client.encode(p.Publish("a", topic_alias=1)))
    assert server.next_packet() == p.Publish("a", topic_alias=1)
    client, server = connected(connack=p.ConnAck(topic_alias_maximum=2))
    assert refused(server, client.encode(p.Publish("", topic_alias=1))) == ReasonCode.PROTOCOL_ERROR


@pytest.mark.spec("MQTT5-3.2.2-18")
def test_no_alias_where_none_was_announced() -> None:
    client, server = connected()
    with pytest.raises(LocalProtocolError):
        client.encode(p.Publish("a", topic_alias=1))
    assert refused(server, encode(p.Publish("a", topic_alias=1), V5)) == ReasonCode.TOPIC_ALIAS_INVALID


@pytest.mark.spec("MQTT5-3.2.2-17")
def test_our_client_uses_no_alias_above_the_maximum() -> None:
    client, _ = connected(connack=p.ConnAck(topic_alias_maximum=2))
    assert client.encode(p.Publish("a", topic_alias=2)) == b"\x30\x07\0\x01a\x03\x23\0\x02"
    with pytest.raises(LocalProtocolError, match="Topic Alias 3; the maximum is 2"):
        client.encode(p.Publish("a", topic_alias=3))


@pytest.mark.spec("MQTT5-3.1.2-24", "MQTT5-3.4.2-2", "MQTT5-3.4.2-3", "MQTT5-3.14.2-3")
def test_optional_text_gives_way_to_maximum_packet_size() -> None:
    _, server = connected(p.Connect(maximum_packet_size=20))
    user = (("key", "value"),)
    assert server.encode(p.PubAck(1, ReasonCode.NOT_AUTHORIZED, "short")) == b"\x40\x0c\0\x01\x87\x08\x1f\0\x05short"
    assert server.encode(p.PubAck(1, ReasonCode.NOT_AUTHORIZED, "too long for it", user)) == b"\x40\x03\0\x01\x87"
    assert server.encode(p.Disconnect(ReasonCode.SERVER_BUSY, reason_string="x" * 30)) == b"\xe0\x01\x89"
    with pytest.raises(LocalProtocolError):
        server.encode(p.Publish("a", bytes(30)))


@pytest.mark.spec("MQTT5-3.2.2-15")
def test_the_servers_maximum_packet_size_binds_the_client() -> None:
    client, _ = connected(connack=p.ConnAck(maximum_packet_size=10))
    assert client.peer_maximum_packet_size == 10
    with pytest.raises(LocalProtocolError):
        client.encode(p.Publish("a", bytes(10)))


@pytest.mark.spec("MQTT5-3.1.2-29")
def test_no_problem_information_unless_wanted() -> None:
    _, server = connected(p.Connect(request_problem_information=0))
    assert server.encode(p.PubAck(1, ReasonCode.NOT_AUTHORIZED, "why")) == b"\x40\x03\0\x01\x87"
    assert b"why" in server.encode(p.Disconnect(ReasonCode.SERVER_BUSY, reason_string="why"))
    kept = p.MessageProperties(user_properties=(("a", "b"),))
    assert b"\x26\0\x01a\0\x01b" in server.encode(p.Publish("t", properties=kept))


@pytest.mark.spec("MQTT5-3.14.0-1")
def test_no_disconnect_before_connack_nor_in_3() -> None:
    client, server = ClientConnection(), ServerConnection()
    with pytest.raises(LocalProtocolError):
        server.encode(p.Disconnect(ReasonCode.SERVER_BUSY))
    server.receive_data(client.encode(p.Connect()))
    server.next_packet()
    server.encode(p.ConnAck(reason_code=ReasonCode.BANNED))
    with pytest.raises(LocalProtocolError):
        server.encode(p.Disconnect(ReasonCode.SERVER_BUSY))
    _, server = connected(p.Connect(client_id="c", protocol_version=V311))
    with pytest.raises(LocalProtocolError):
        server.encode(p.Disconnect(ReasonCode.SERVER_BUSY))


@pytest.mark.spec("MQTT5-3.1.2-30", "MQTT5-4.12.0-5", "MQTT5-4.12.1-1")
def test_enhanced_authentication() -> None:
    client, server = ClientConnection(), ServerConnection()
    server.receive_data(client.encode(p.Connect(authentication_method="m", authentication_data=b"1")))
    assert isinstance(server.next_packet(), p.Connect)
    before = server.state
    client.receive_data(server.encode(p.Auth(ReasonCode.CONTINUE_AUTHENTICATION, "m", b"2")))
    assert isinstance(client.next_packet(), p.Auth)
    answer = p.Auth(ReasonCode.CONTINUE_AUTHENTICATION, "m", b"3")
    server.receive_data(client.encode(answer))
    assert server.next_packet() == answer
    client.receive_data(server.encode(p.ConnAck(authentication_method="m")))
    assert isinstance(client.next_packet(), p.ConnAck)
    assert (before, server.state) == (State.AUTHENTICATING, State.CONNECTED)
    again = p.Auth(ReasonCode.RE_AUTHENTICATE, "m")
    server.receive_data(client.encode(again) + client.encode(p.PingReq()))
    assert server.next_packet() == again
    assert server.next_packet() == p.PingReq()
    assert refused(server, client.encode(p.Auth(ReasonCode.RE_AUTHENTICATE, "n"))) == ReasonCode.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "packet",
    [
        p.PingReq(),
        p.Publish("a"),
        p.Auth(ReasonCode.RE_AUTHENTICATE, "m"),
        p.Auth(ReasonCode.CONTINUE_AUTHENTICATION, "n"),
    ],
)
@pytest.mark.spec("MQTT5-3.1.2-30")
def test_nothing_else_while_authenticating(packet: p.Packet) -> None:
    client, server = ClientConnection(), ServerConnection()
    server.receive_data(client.encode(p.Connect(authentication_method="m")))
    server.next_packet()
    assert refused(server, client.encode(packet)) == ReasonCode.PROTOCOL_ERROR


def test_a_refused_client_reads_no_further() -> None:
    client, server = ClientConnection(), ServerConnection()
    server.receive_data(client.encode(p.Connect()))
    server.next_packet()
    client.receive_data(server.encode(p.ConnAck(reason_code=ReasonCode.SERVER_BUSY)) + b"\xd0\x00")
    assert client.next_packet() == p.ConnAck(reason_code=ReasonCode.SERVER_BUSY)
    assert client.state is State.DISCONNECTED
    assert client.next_packet() is None


def test_session_expiry_may_change_where_it_was_not_0() -> None:
    client, server = connected(p.Connect(session_expiry_interval=5))
    server.receive_data(client.encode(p.Disconnect(session_expiry_interval=0xFFFFFFFF)))
    assert server.next_packet() == p.Disconnect(session_expiry_interval=0xFFFFFFFF)


@pytest.mark.parametrize(
    "frame,version",
    [
        (b"\x10\x0d\0\x04MQTT\x05\x03\0\0\0\0\0", V5),
        (b"\x10\x0d\0\x04MQTT\x06\x02\0\0\0\0\0", V5),
        (b"\x10\x0c\0\x04MQTT\x04\x03\0\0\0\0", V311),
        (b"\x10\x0c\0\x04MQTT\x84\x02\0\0\0\0", V311),
        (b"\x10\x0e\0\x06MQIsdp\x03\xc6\0\0\0\0", V31),
    ],
)
def test_the_version_of_a_bad_connect_is_known(frame: bytes, version: ProtocolVersion) -> None:
    server = ServerConnection()
    assert refused(server, frame) >= 0x80
    assert server.version_known
    assert server.protocol_version is version


# Buffers


def test_one_read_is_not_copied() -> None:
    client, server = connected()
    data = client.encode(p.Publish("a", b"x")) * 3
    server.receive_data(data)
    assert server.buffer is data
    assert server.start == 0
    assert server.next_packet() == p.Publish("a", b"x")
    assert server.buffer is data
    assert server.start == len(data) // 3


def test_the_fast_lane_may_advance_over_whole_packets() -> None:
    client, server = connected()
    one, two = client.encode(p.Publish("a", b"x")), client.encode(p.Publish("b", b"yy"))
    server.receive_data(one + two + one[:3])
    server.start += len(one)
    assert server.next_packet() == p.Publish("b", b"yy")
    assert server.next_packet() is None
    assert server.buffer[server.start :] == one[:3]
    server.receive_data(one[3:] + two)
    assert server.buffer[server.start :] == one + two
    server.start += len(one + two)
    server.receive_data(two)
    assert server.buffer is two
    assert server.next_packet() == p.Publish("b", b"yy")


def test_a_silent_connection_keeps_no_bytes() -> None:
    client, server = connected()
    server.receive_data(client.encode(p.PingReq()))
    assert server.next_packet() == p.PingReq()
    assert server.next_packet() is None
    assert server.buffer == b""


@pytest.mark.parametrize("read_size", [1000, 65_536, 262_144])
def test_a_large_packet_is_gathered_apart(read_size: int) -> None:
    client, server = connected()
    large = p.Publish("large", bytes(range(256)) * 4000)
    small = p.Publish("small", b"x")
    stream = client.encode(small) + client.encode(large) + client.encode(small)
    seen: list[p.Packet] = []
    buffered = 0
    for at in range(0, len(stream), read_size):
        server.receive_data(stream[at : at + read_size])
        while (packet := server.next_packet()) is not None:
            seen.append(packet)
        if len(seen) == 1:
            buffered = max(buffered, len(server.buffer))
    assert seen == [small, large, small]
    assert buffered <= read_size  # once gathering has begun, the fast lane finds nothing


def test_many_reads_while_nobody_looks() -> None:
    client, server = connected()
    frame = client.encode(p.Publish("a", b"x" * 300))
    stream = frame * 3
    for at in range(0, len(stream), 50):
        server.receive_data(stream[at : at + 50])
    assert [server.next_packet() for _ in range(4)] == [*[p.Publish("a", b"x" * 300)] * 3, None]


def test_too_large_before_the_body() -> None:
    client, _ = connected()
    _, server = connected(maximum_packet_size=1000)
    server.receive_data(client.encode(p.Publish("a", bytes(1000)))[:5])
    with pytest.raises(PacketTooLargeError):
        server.next_packet()


# What cannot be written


@pytest.mark.parametrize(
    "packet",
    [
        p.Publish("a", qos=QoS.AT_LEAST_ONCE),
        p.Publish("a", qos=QoS.AT_LEAST_ONCE, packet_id=0),
        p.Publish("a", dup=True),
        p.Publish(""),
        p.Publish("a\0"),
        p.Publish("\ud800"),
        p.Publish("a" * 65_536),
        p.Publish("a", topic_alias=0),
        p.Publish("a", topic_alias=65_536),
        p.Publish("a", subscription_identifiers=(0,)),
        p.Publish("a", subscription_identifiers=(268_435_456,)),
        p.Publish("a", properties=p.MessageProperties(payload_format_indicator=2)),
        p.Publish("a", properties=p.MessageProperties(correlation_data=bytes(65_536))),
        p.Publish("a", properties=p.MessageProperties(message_expiry_interval=2**32)),
        p.PubAck(0),
        p.PubAck(65_536),
        p.PubAck(1, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND),
        p.Subscribe(1, ()),
        p.Subscribe(1, (p.Subscription("a"),), subscription_identifier=0),
        p.Unsubscribe(1, ()),
        p.SubAck(1, (ReasonCode.NO_SUBSCRIPTION_EXISTED,)),
        p.Connect(receive_maximum=0),
        p.Connect(keep_alive=65_536),
        p.Connect(protocol_version=V311, password=b"p"),
        p.ConnAck(session_present=True, reason_code=ReasonCode.BANNED),
        p.ConnAck(reason_code=ReasonCode.KEEP_ALIVE_TIMEOUT),
        p.Auth(ReasonCode.CONTINUE_AUTHENTICATION),
    ],
)
def test_local_errors(packet: p.Packet) -> None:
    with pytest.raises(LocalProtocolError):
        ClientConnection().encode(packet)


def test_local_errors_of_3() -> None:
    client = ClientConnection(protocol_version=V311)
    for packet in (p.Auth(), p.ConnAck(reason_code=ReasonCode.PACKET_TOO_LARGE)):
        with pytest.raises(LocalProtocolError):
            client.encode(packet)
    assert client.encode(p.PubAck(1, ReasonCode.NOT_AUTHORIZED)) == b"\x40\x02\0\x01"
