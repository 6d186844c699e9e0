"""What our Client's end refuses to send and to take: the statements about clients that it can keep by itself."""

from __future__ import annotations

import pytest

from mqtt_trio.errors import LocalProtocolError, RemoteProtocolError
from mqtt_trio.protocol import packets as p
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.connection import ClientConnection, State
from mqtt_trio.protocol.encode import encode

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


def answered(connack: p.ConnAck, version: ProtocolVersion = V5, *, clean_start: bool = False) -> ClientConnection:
    """A Client that sent its CONNECT and has this CONNACK before it."""
    client = ClientConnection()
    client.encode(p.Connect(client_id="c", protocol_version=version, clean_start=clean_start))
    client.receive_data(encode(connack, version))
    return client


def connected(connack: p.ConnAck, version: ProtocolVersion = V5) -> ClientConnection:
    client = answered(connack, version)
    assert isinstance(client.next_packet(), p.ConnAck)
    return client


def publish(qos: int, *, retain: bool = False) -> p.Publish:
    return p.Publish("t", b"x", QoS(qos), retain, packet_id=1 if qos else None)


@pytest.mark.spec("MQTT5-3.2.2-11")
@pytest.mark.parametrize("maximum", [None, 0, 1])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_nothing_is_published_above_the_maximum_qos(maximum: int | None, qos: int) -> None:
    client = connected(p.ConnAck(maximum_qos=maximum))
    if qos <= (2 if maximum is None else maximum):
        assert client.encode(publish(qos)) == encode(publish(qos), V5)
        return
    with pytest.raises(LocalProtocolError, match=f"QoS {qos}; the Maximum QoS is {maximum}"):
        client.encode(publish(qos))
    subscribe = p.Subscribe(1, (p.Subscription("t", QoS(qos)),))
    assert client.encode(subscribe) == encode(subscribe, V5), "subscribing is another matter [MQTT5-3.2.2-10]"


@pytest.mark.spec("MQTT5-3.2.2-14")
@pytest.mark.parametrize("available", [None, 0, 1])
def test_nothing_is_published_with_retain_where_nothing_is_retained(available: int | None) -> None:
    client = connected(p.ConnAck(retain_available=available))
    assert client.encode(publish(1)) == encode(publish(1), V5)
    if available == 0:
        with pytest.raises(LocalProtocolError, match="RETAIN"):
            client.encode(publish(1, retain=True))
    else:
        assert client.encode(publish(1, retain=True)) == encode(publish(1, retain=True), V5)


@pytest.mark.spec("MQTT5-3.2.2-4")
@pytest.mark.parametrize("version", [V311, V5])
def test_a_session_that_it_cannot_have_ends_the_connection(version: ProtocolVersion) -> None:
    client = answered(p.ConnAck(session_present=True), version, clean_start=True)
    with pytest.raises(RemoteProtocolError, match="Session Present") as caught:
        client.next_packet()
    assert caught.value.reason_code == ReasonCode.PROTOCOL_ERROR
    assert client.state is State.FAILED
    for present in (False, True):
        client = answered(p.ConnAck(session_present=present), version)
        assert client.next_packet() == p.ConnAck(session_present=present), "who kept one may get either"
        assert client.state is State.CONNECTED


@pytest.mark.spec("MQTT3-3.14.4-2", "MQTT5-3.14.4-1")
@pytest.mark.parametrize("version", [V31, V311, V5])
@pytest.mark.parametrize("packet", [p.PingReq(), p.Publish("t"), p.PubAck(1), p.Disconnect(), p.Connect()])
def test_nothing_is_sent_behind_a_disconnect(version: ProtocolVersion, packet: p.Packet) -> None:
    client = connected(p.ConnAck(), version)
    client.encode(p.PingReq())
    client.encode(p.Disconnect())
    with pytest.raises(LocalProtocolError, match="behind a DISCONNECT"):
        client.encode(packet)
    client.receive_data(encode(p.Publish("t", b"was on its way"), version))
    assert client.next_packet() == p.Publish("t", b"was on its way"), "what crossed it is read"


def test_a_disconnect_that_cannot_be_written_is_none() -> None:
    client = connected(p.ConnAck(maximum_packet_size=10))
    with pytest.raises(LocalProtocolError):
        client.encode(p.Disconnect(ReasonCode.NO_SUBSCRIPTION_EXISTED))
    assert client.encode(p.Disconnect()) == b"\xe0\0"
