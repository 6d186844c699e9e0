"""paho-mqtt 2 against the broker: 3.1, 3.1.1 and 5.0, over TCP and over WebSocket."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from tests.interop.broker_process import BrokerProcess
from tests.interop.paho_support import V5, V31, V311, Heard, PahoClient, Transport, wait_until_expired

pytestmark = pytest.mark.interop

END = b"end of test"
ALL_VERSIONS = [pytest.param(V31, id="3.1"), pytest.param(V311, id="3.1.1"), pytest.param(V5, id="5.0")]
versions = pytest.mark.parametrize("version", ALL_VERSIONS)
transports = pytest.mark.parametrize("transport", ["tcp", "websockets"])
qualities = pytest.mark.parametrize("qos", [0, 1, 2])
RICH = Heard(
    "",
    bytes(range(256)),
    0,
    user_properties=(("unit", "°C"), ("unit", "K"), ("", "")),
    content_type="application/octet-stream",
    response_topic="reply/to",
    correlation_data=b"\x00\xff\x80 4711",
)

Connect = Callable[..., PahoClient]


@pytest.fixture
def connect(broker: BrokerProcess, request: pytest.FixtureRequest) -> Connect:
    """Connects clients that are closed at the end of the test."""

    def make(**options: Any) -> PahoClient:
        client = PahoClient(broker, **options)
        request.addfinalizer(client.close)
        return client

    return make


@pytest.mark.spec("MQTT3-7.0.0-2")
@versions
@transports
@qualities
def test_both_directions(
    connect: Connect, topic: str, version: MQTTProtocolVersion, transport: Transport, qos: int
) -> None:
    device = connect(version=V311)
    client = connect(version=version, transport=transport)
    device.subscribe(f"{topic}/up")
    client.subscribe(f"{topic}/down")
    payloads = [b"text", b"", bytes(range(256)), os.urandom(70_000), END]
    for payload in payloads:
        client.publish(f"{topic}/up", payload, qos=qos)
        device.publish(f"{topic}/down", payload, qos=qos)
    assert device.received(len(payloads)) == [Heard(f"{topic}/up", payload, qos) for payload in payloads]
    assert client.received(len(payloads)) == [Heard(f"{topic}/down", payload, qos) for payload in payloads]


@pytest.mark.parametrize("path", ["/mqtt", "/"])
@versions
def test_websocket_paths(connect: Connect, topic: str, version: MQTTProtocolVersion, path: str) -> None:
    client = connect(version=version, transport="websockets", path=path)
    client.subscribe(topic)
    client.publish(topic, "echo", qos=2)
    assert client.received(1) == [Heard(topic, b"echo", 2)]


@transports
@versions
@qualities
def test_burst_keeps_its_order(
    connect: Connect, topic: str, version: MQTTProtocolVersion, transport: Transport, qos: int
) -> None:
    receiver = connect(version=version, transport=transport)
    receiver.subscribe(topic)
    sender = connect(version=version, transport=transport)
    payloads = [f"{number}".encode() for number in range(300)]
    for payload in payloads:
        sender.client.publish(topic, payload, qos)
    sender.publish(topic, END, qos=qos)
    assert [message.payload for message in receiver.until(END)] == payloads


@transports
@versions
@qualities
def test_retained(connect: Connect, topic: str, version: MQTTProtocolVersion, transport: Transport, qos: int) -> None:
    sender = connect(version=version, transport=transport)
    early = connect(version=version, transport=transport)
    early.subscribe(topic)
    sender.publish(topic, "first", qos=qos, retain=True)
    sender.publish(topic, "kept", qos=qos, retain=True)
    assert [(m.payload, m.retain) for m in early.received(2)] == [(b"first", False), (b"kept", False)]
    late = connect(version=version, transport=transport)
    late.subscribe(topic)
    assert late.received(1) == [Heard(topic, b"kept", qos, retain=True)]
    sender.publish(topic, None, qos=qos, retain=True)
    last = connect(version=version, transport=transport)
    last.subscribe(topic)
    sender.publish(topic, END, qos=qos)
    assert last.received(1) == [Heard(topic, END, qos)]


@transports
@versions
@qualities
def test_will_of_a_cut_connection(
    connect: Connect, topic: str, version: MQTTProtocolVersion, transport: Transport, qos: int
) -> None:
    will = Heard(f"{topic}/will", b"gone", qos)
    watcher = connect(version=version)
    watcher.subscribe(will.topic)
    connect(version=version, transport=transport, will=will).cut()
    assert watcher.received(1) == [will]


@transports
@versions
def test_no_will_after_disconnect(
    connect: Connect, topic: str, version: MQTTProtocolVersion, transport: Transport
) -> None:
    watcher = connect(version=version)
    watcher.subscribe(topic)
    leaving = connect(version=version, transport=transport, will=Heard(topic, b"gone", 1))
    leaving.close()
    assert leaving.ended.wait(10)
    watcher.publish(topic, END, qos=1)
    assert watcher.received(1) == [Heard(topic, END, 1)]


@transports
def test_retained_will_with_properties(connect: Connect, topic: str, transport: Transport) -> None:
    will = attrs.evolve(RICH, topic=topic, qos=1, retain=True)
    watcher = connect()
    watcher.subscribe(topic)
    connect(transport=transport, will=will).cut()
    assert watcher.received(1) == [attrs.evolve(will, retain=False)]
    late = connect(transport=transport)
    late.subscribe(topic)
    assert late.received(1) == [will]


def test_delayed_will_is_not_sent_to_who_returns_in_time(connect: Connect, topic: str) -> None:
    session: dict[str, Any] = {"client_id": topic.replace("/", "-"), "clean": False, "session_expiry_interval": 600}
    watcher = connect()
    watcher.subscribe(topic)
    connect(**session, will=Heard(topic, b"gone", 1), will_delay=300).cut()
    back = connect(**session)
    assert back.flags is not None
    assert back.flags.session_present
    back.publish(topic, END, qos=1)
    assert watcher.received(1) == [Heard(topic, END, 1)]


def test_delayed_will_is_sent_after_its_delay(connect: Connect, topic: str) -> None:
    watcher = connect()
    watcher.subscribe(topic)
    connect(clean=False, session_expiry_interval=600, will=Heard(topic, b"gone", 1), will_delay=1).cut()
    watcher.publish(topic, "before", qos=1)
    assert watcher.received(2) == [Heard(topic, b"before", 1), Heard(topic, b"gone", 1)]


@transports
@qualities
def test_properties(connect: Connect, topic: str, transport: Transport, qos: int) -> None:
    receiver = connect(transport=transport)
    receiver.subscribe(topic)
    message = attrs.evolve(RICH, topic=topic, qos=qos)
    sender = connect(transport="tcp" if transport == "websockets" else "websockets")
    sender.publish_message(message)
    sender.publish_message(attrs.evolve(message, payload=b""))
    assert receiver.received(2) == [message, attrs.evolve(message, payload=b"")]


@pytest.mark.parametrize("version", ALL_VERSIONS[:2])
def test_properties_do_not_reach_older_clients(connect: Connect, topic: str, version: MQTTProtocolVersion) -> None:
    receiver = connect(version=version)
    receiver.subscribe(topic)
    connect().publish_message(attrs.evolve(RICH, topic=topic, qos=1))
    assert receiver.received(1) == [Heard(topic, RICH.payload, 1)]


@transports
@versions
@pytest.mark.parametrize("qos", [1, 2])
def test_session_survives_a_cut(
    connect: Connect, topic: str, version: MQTTProtocolVersion, transport: Transport, qos: int
) -> None:
    session: dict[str, Any] = {"client_id": f"s{os.urandom(4).hex()}", "clean": False, "session_expiry_interval": 600}
    first = connect(version=version, transport=transport, **session)
    first.subscribe(topic)
    first.cut()
    sender = connect(version=version)
    for number in range(20):
        sender.publish(topic, f"{number}", qos=qos)
    second = connect(version=version, transport=transport, **session)
    sender.publish(topic, END, qos=qos)
    assert second.until(END) == [Heard(topic, f"{number}".encode(), qos) for number in range(20)]


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_take_over(connect: Connect, version: MQTTProtocolVersion) -> None:
    name = f"t{os.urandom(4).hex()}"
    first = connect(version=version, client_id=name)
    second = connect(version=version, client_id=name, transport="websockets")
    assert first.ended.wait(10)
    assert not second.ended.is_set()


@pytest.mark.spec("MQTT5-3.3.2-12")
@transports
@qualities
def test_topic_aliases_of_the_client(connect: Connect, topic: str, transport: Transport, qos: int) -> None:
    """The highest alias that the broker allows, given to a second topic later; it stays with its connection."""
    receiver = connect()
    receiver.subscribe(f"{topic}/+")
    sender = connect(transport=transport)
    for name in (f"{topic}/a", "", f"{topic}/b", "", ""):
        sender.publish_message(Heard(name, b"", qos, topic_alias=16))
    heard = receiver.received(5)
    assert [message.topic for message in heard] == [f"{topic}/{name}" for name in "aabbb"]
    assert [message.topic_alias for message in heard] == [None] * 5


@pytest.mark.spec("MQTT5-3.1.2-26", "MQTT5-3.3.2-11")
@transports
@qualities
def test_topic_aliases_of_the_broker(connect: Connect, topic: str, transport: Transport, qos: int) -> None:
    receiver = connect(transport=transport, topic_alias_maximum=2)
    receiver.subscribe(f"{topic}/+")
    sender = connect()
    for name in "abcabc":
        sender.publish(f"{topic}/{name}", name, qos=qos)
    seen = [(message.payload, message.topic, message.topic_alias) for message in receiver.received(6)]
    assert seen == [
        (b"a", f"{topic}/a", 1),
        (b"b", f"{topic}/b", 2),
        (b"c", f"{topic}/c", None),
        (b"a", "", 1),
        (b"b", "", 2),
        (b"c", f"{topic}/c", None),
    ]


@pytest.mark.spec("MQTT5-3.3.2-5", "MQTT5-3.3.2-6")
@transports
def test_expiry_in_the_queue(broker: BrokerProcess, connect: Connect, topic: str, transport: Transport) -> None:
    session: dict[str, Any] = {"client_id": topic.replace("/", "-"), "clean": False, "session_expiry_interval": 600}
    first = connect(transport=transport, **session)
    first.subscribe(f"{topic}/+")
    first.close()
    sender = connect(transport=transport)
    sender.publish_message(Heard(f"{topic}/lasting", b"lasting", 1, message_expiry_interval=300))
    sender.publish_message(Heard(f"{topic}/short", b"short", 2, retain=True, message_expiry_interval=1))
    wait_until_expired(broker, f"{topic}/short")
    second = connect(transport=transport, **session)
    sender.publish(f"{topic}/end", END, qos=1)
    [queued] = second.until(END)
    assert queued.payload == b"lasting"
    assert 250 < (queued.message_expiry_interval or 0) < 300


@pytest.mark.spec("MQTT5-3.3.2-15", "MQTT5-3.3.2-16")
@transports
def test_request_and_response(connect: Connect, topic: str, transport: Transport) -> None:
    """Two who ask at once find their answers by Response Topic and Correlation Data."""
    responder = connect()
    responder.subscribe(f"{topic}/ask")
    asking = [connect(transport=transport) for _ in range(2)]
    for number, client in enumerate(asking):
        client.subscribe(f"{topic}/{number}")
        for data in (b"\x00", b"\xff"):
            request = Heard(f"{topic}/ask", b"?", 1, response_topic=f"{topic}/{number}", correlation_data=data)
            client.publish_message(request)
    for request in responder.received(4):
        assert request.response_topic is not None
        assert request.correlation_data is not None
        payload = b"to " + request.correlation_data
        responder.publish_message(Heard(request.response_topic, payload, 1, correlation_data=request.correlation_data))
    for number, client in enumerate(asking):
        assert client.received(2) == [
            Heard(f"{topic}/{number}", b"to " + data, 1, correlation_data=data) for data in (b"\x00", b"\xff")
        ]
