"""aiomqtt, the asyncio client of the Python world, against the broker: its own event loop, our process."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import aiomqtt
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.interop.broker_process import BrokerProcess

pytestmark = pytest.mark.interop

V311, V5 = aiomqtt.ProtocolVersion.V311, aiomqtt.ProtocolVersion.V5
LIMIT = 20.0
"""Seconds."""


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


@pytest.mark.parametrize("version", [V311, V5], ids=["3.1.1", "5.0"])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_both_directions_in_order(
    broker: BrokerProcess, topic: str, version: aiomqtt.ProtocolVersion, qos: int
) -> None:
    async def scenario() -> None:
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=version) as client:
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


def test_will_and_retained(broker: BrokerProcess, topic: str) -> None:
    async def scenario() -> None:
        will = aiomqtt.Will(f"{topic}/gone", b"!", qos=1, retain=True)
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=V5) as watcher:
            await watcher.subscribe(f"{topic}/gone", qos=1)
            cut = aiomqtt.Client("127.0.0.1", broker.port, protocol=V5, will=will)
            await cut.__aenter__()
            connection = cut._client.socket()
            assert connection is not None
            connection.close()  # it breaks without a word
            message = await anext(watcher.messages)
            assert (message.payload, message.retain) == (b"!", False)
            await watcher.unsubscribe(f"{topic}/gone")
            await watcher.subscribe(f"{topic}/gone", qos=1)
            again = await anext(watcher.messages)
            assert (again.payload, again.retain) == (b"!", True)

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


def test_topic_alias_and_expiry(broker: BrokerProcess, topic: str) -> None:
    async def scenario() -> None:
        async with aiomqtt.Client("127.0.0.1", broker.port, protocol=V5) as client:
            await client.subscribe(topic, qos=1)
            await client.publish(topic, b"first", properties=properties(TopicAlias=3))
            # paho demands a Topic Name, so the alias is only learnt and learnt again: it must not reach subscribers.
            await client.publish(topic, b"second", qos=1, properties=properties(TopicAlias=3, MessageExpiryInterval=60))
            first, second = await anext(client.messages), await anext(client.messages)
            assert (first.payload, second.payload) == (b"first", b"second")
            assert value(first, "TopicAlias") is value(second, "TopicAlias") is None
            assert 0 < value(second, "MessageExpiryInterval") <= 60

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
