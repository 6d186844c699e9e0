"""aiomqtt, the asyncio client of the Python world, against the broker: its own event loop, our process."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Coroutine
from typing import Any

import aiomqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.interop.broker_process import BrokerProcess
from tests.interop.page_client import Secure
from tests.interop.page_client import secure as secure
from tests.interop.paho_support import wait_until_expired

pytestmark = pytest.mark.interop

V311, V5 = aiomqtt.ProtocolVersion.V311, aiomqtt.ProtocolVersion.V5
LIMIT = 20.0
"""Seconds."""
NO_DELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
"""Without it, the client's kernel keeps a PUBLISH behind a PUBACK back for 40 ms (Nagle, delayed acknowledgement)."""


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def within_limit() -> None:
        async with asyncio.timeout(LIMIT):
            await scenario

    asyncio.run(within_limit())


def properties(packet_type: int = PacketTypes.PUBLISH, **values: object) -> Properties:
    made = Properties(packet_type)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(made, name, value)
    return made


def value(message: aiomqtt.Message, name: str) -> Any:
    """A property of a message, None where it is absent; paho gives them names that no type checker knows."""
    return getattr(message.properties, name, None)


versions = pytest.mark.parametrize("version", [V311, V5], ids=["3.1.1", "5.0"])
qualities = pytest.mark.parametrize("qos", [0, 1, 2])


@versions
@qualities
def test_both_directions_in_order(
    broker: BrokerProcess, topic: str, version: aiomqtt.ProtocolVersion, qos: int
) -> None:
    async def scenario() -> None:
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=version, socket_options=[NO_DELAY]) as client:
            await client.subscribe(f"{topic}/#", qos=qos)
            for number in range(50):
                await client.publish(f"{topic}/{number % 3}", str(number), qos=qos)
            received = []
            async for message in client.messages:
                assert message.qos == qos
                assert isinstance(message.payload, bytes)
                received.append((message.topic.value, int(message.payload)))
                if len(received) == 50:
                    break
        assert received == [(f"{topic}/{number % 3}", number) for number in range(50)]

    run(scenario())


@versions
@pytest.mark.parametrize("scheme", ["ws", "wss"])
def test_websocket(secure: Secure, topic: str, version: aiomqtt.ProtocolVersion, scheme: str) -> None:
    options: dict[str, Any] = {"transport": "websockets", "websocket_path": "/mqtt", "protocol": version}
    port = secure.broker.ws_port
    if scheme == "wss":
        port = secure.port
        options["tls_context"] = ssl.create_default_context(cafile=secure.ca_file)

    async def scenario() -> None:
        async with aiomqtt.Client("127.0.0.1", port, **options) as client:
            await client.subscribe(topic, qos=2)
            for qos in (0, 1, 2):
                await client.publish(topic, bytes(range(256)) * 300, qos=qos)
                message = await anext(client.messages)
                assert (message.payload, message.qos) == (bytes(range(256)) * 300, qos)

    run(scenario())


def cut(client: aiomqtt.Client) -> None:
    """Break the network connection of a client without a word."""
    connection = client._client.socket()
    assert connection is not None
    connection.close()


@versions
@qualities
def test_will_and_retained(broker: BrokerProcess, topic: str, version: aiomqtt.ProtocolVersion, qos: int) -> None:
    async def scenario() -> None:
        will = aiomqtt.Will(topic, b"!", qos=qos, retain=True)
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=version) as watcher:
            await watcher.subscribe(topic, qos=2)
            dying = aiomqtt.Client("127.0.0.1", broker.port, protocol=version, will=will)
            await dying.__aenter__()
            cut(dying)
            message = await anext(watcher.messages)
            assert (message.payload, message.qos, message.retain) == (b"!", qos, False)
            await watcher.unsubscribe(topic)
            await watcher.subscribe(topic, qos=2)
            again = await anext(watcher.messages)
            assert (again.payload, again.qos, again.retain) == (b"!", qos, True)
            await watcher.unsubscribe(topic)
            await watcher.publish(topic, b"", qos=qos, retain=True)
            await watcher.subscribe(topic, qos=2)
            await watcher.publish(topic, b"end", qos=qos)
            last = await anext(watcher.messages)
            assert (last.payload, last.retain) == (b"end", False)

    run(scenario())


def test_delayed_will(broker: BrokerProcess, topic: str) -> None:
    async def scenario() -> None:
        will = aiomqtt.Will(topic, b"!", 1, properties=properties(PacketTypes.WILLMESSAGE, WillDelayInterval=1))
        session = properties(PacketTypes.CONNECT, SessionExpiryInterval=600)
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=V5) as watcher:
            await watcher.subscribe(topic, qos=1)
            dying = aiomqtt.Client("127.0.0.1", broker.port, protocol=V5, will=will, properties=session)
            await dying.__aenter__()
            begin = time.monotonic()
            cut(dying)
            message = await anext(watcher.messages)
            assert message.payload == b"!"
            assert time.monotonic() - begin >= 1

    run(scenario())


def test_request_and_response(broker: BrokerProcess, topic: str) -> None:
    async def responder(ready: asyncio.Event) -> None:
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=V5) as client:
            await client.subscribe(f"{topic}/request", qos=1)
            ready.set()
            request = await anext(client.messages)
            names = ("CorrelationData", "UserProperty")
            answer = properties(**{name: value(request, name) for name in names})
            assert isinstance(request.payload, bytes)
            await client.publish(value(request, "ResponseTopic"), request.payload.upper(), qos=1, properties=answer)

    async def scenario() -> None:
        ready = asyncio.Event()
        task = asyncio.create_task(responder(ready))
        await ready.wait()
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=V5) as client:
            await client.subscribe(f"{topic}/response", qos=1)
            asking = properties(
                ResponseTopic=f"{topic}/response",
                CorrelationData=b"\x00\xff",
                UserProperty=[("b", "1"), ("a", "2"), ("b", "3")],
                ContentType="text/plain",
            )
            await client.publish(f"{topic}/request", b"hello", qos=1, properties=asking)
            response = await anext(client.messages)
        await task
        assert response.payload == b"HELLO"
        assert value(response, "CorrelationData") == b"\x00\xff"
        assert value(response, "UserProperty") == [("b", "1"), ("a", "2"), ("b", "3")]

    run(scenario())


@qualities
def test_topic_aliases(broker: BrokerProcess, topic: str, qos: int) -> None:
    async def scenario() -> None:
        alias = properties(TopicAlias=3)
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=V5) as client:
            await client.subscribe(f"{topic}/#", qos=2)
            for name in (f"{topic}/a", "", f"{topic}/b", ""):
                await client.publish(name, b"", qos=qos, properties=alias)
            messages = [await anext(client.messages) for _ in range(4)]
            assert [message.topic.value for message in messages] == [f"{topic}/{name}" for name in "aabb"]
            assert [value(message, "TopicAlias") for message in messages] == [None] * 4

    run(scenario())


def test_expiry_in_the_queue(broker: BrokerProcess, topic: str) -> None:
    def client() -> aiomqtt.Client:
        expiry = properties(PacketTypes.CONNECT, SessionExpiryInterval=600)
        options: dict[str, Any] = {"identifier": topic, "clean_start": False, "properties": expiry}
        return aiomqtt.Client("127.0.0.1", broker.port, protocol=V5, **options)

    async def scenario() -> None:
        async with client() as first:
            await first.subscribe(f"{topic}/+", qos=1)
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=V5) as other:
            lasting, short = properties(MessageExpiryInterval=300), properties(MessageExpiryInterval=1)
            await other.publish(f"{topic}/lasting", b"lasting", qos=1, properties=lasting)
            await other.publish(f"{topic}/short", b"short", qos=1, retain=True, properties=short)
        await asyncio.to_thread(wait_until_expired, broker, f"{topic}/short")
        async with client() as second:
            await second.publish(f"{topic}/end", b"end", qos=1)
            queued, end = await anext(second.messages), await anext(second.messages)
        assert (queued.payload, end.payload) == (b"lasting", b"end")
        assert 250 < value(queued, "MessageExpiryInterval") < 300

    run(scenario())


@versions
@qualities
def test_shared_subscription(broker: BrokerProcess, topic: str, version: aiomqtt.ProtocolVersion, qos: int) -> None:
    async def until_end(member: aiomqtt.Client) -> list[int]:
        found = []
        async for message in member.messages:
            assert isinstance(message.payload, bytes)
            if message.topic.value.endswith("/end"):
                break
            found.append(int(message.payload))
        return found

    async def scenario() -> None:
        async with (
            aiomqtt.Client("127.0.0.1", broker.port, protocol=version) as one,
            aiomqtt.Client("127.0.0.1", broker.port, protocol=version) as two,
            aiomqtt.Client("127.0.0.1", broker.port, protocol=version) as sender,
        ):
            for member in (one, two):
                await member.subscribe([(f"$share/group/{topic}/work", qos), (f"{topic}/end", qos)])
            for number in range(40):
                await sender.publish(f"{topic}/work", str(number), qos=qos)
            await sender.publish(f"{topic}/end", "", qos=qos)
            first, second = await until_end(one), await until_end(two)
            assert first
            assert second
            assert first == sorted(first)
            assert second == sorted(second)
            assert sorted(first + second) == list(range(40))

    run(scenario())


def test_a_session_waits_for_its_client(broker: BrokerProcess, topic: str) -> None:
    def client() -> aiomqtt.Client:
        return aiomqtt.Client(
            "127.0.0.1",
            broker.port,
            protocol=V5,
            identifier=f"{topic}-sleeper",
            clean_start=False,
            properties=properties(PacketTypes.CONNECT, SessionExpiryInterval=60),
        )

    async def scenario() -> None:
        async with client() as first:
            await first.subscribe(topic, qos=2)
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=V5) as other:
            for number in range(20):
                await other.publish(topic, str(number), qos=number % 2 + 1)
        async with client() as second:
            received = [await anext(second.messages) for _ in range(20)]
        for qos in (1, 2):  # messages of different QoS may overtake each other
            payloads = [message.payload for message in received if message.qos == qos]
            assert payloads == [str(number).encode() for number in range(qos - 1, 20, 2)]

    run(scenario())
