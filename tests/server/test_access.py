"""The Authorizer is asked on every way that a message can take, also after rights were revoked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from mqtt_trio.broker.access import AllowEverything, Principal
from mqtt_trio.broker.local import LocalPublisher
from mqtt_trio.broker.message import Message
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import ConnAck, PubAck, PubComp, PubRec, PubRel, Will
from mqtt_trio.testing import MemoryBroker, open_memory_broker
from tests.connecting import begin, refusal

V31, V311, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


class Table:
    """Rows of (Client Identifier, publish | subscribe | receive, topic) that are denied; everything else is allowed."""

    def __init__(self) -> None:
        self.denied: set[tuple[str, str, str]] = set()

    def may_publish(self, principal: Principal, topic_name: str) -> bool:
        return (principal.client_id, "publish", topic_name) not in self.denied

    def may_subscribe(self, principal: Principal, topic_filter: str) -> bool:
        return (principal.client_id, "subscribe", topic_filter) not in self.denied

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        return (principal.client_id, "receive", topic_name) not in self.denied


class Ruled:
    """A broker in memory with its table."""

    def __init__(self, memory: MemoryBroker, table: Table) -> None:
        self.memory = memory
        self.table = table
        self.metrics = memory.broker.metrics

    def revoke(self, *row: str) -> None:
        client_id, action, topic = row
        self.table.denied.add((client_id, action, topic))
        self.memory.broker.rights_changed()


@asynccontextmanager
async def ruled_broker() -> AsyncIterator[Ruled]:
    table = Table()
    async with open_memory_broker(authorizer=table) as memory:
        yield Ruled(memory, table)


# Publish


@pytest.mark.spec("MQTT3-3.3.5-2")
@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("version", [V31, V311, V5])
async def test_publishing_is_revoked_at_once(version: ProtocolVersion, qos: int) -> None:
    """The fast lane has learnt the topic by then."""
    async with ruled_broker() as ruled:
        sender = await ruled.memory.connect("sender", version=version)
        receiver = await ruled.memory.connect("receiver")
        await receiver.subscribe("t", "other")
        for _ in range(3):
            assert await sender.publish("t", b"allowed", qos=qos) == ReasonCode.SUCCESS
            assert (await receiver.next_message()).payload == b"allowed"
        ruled.revoke("sender", "publish", "t")
        expected = ReasonCode.NOT_AUTHORIZED if version == V5 and qos else ReasonCode.SUCCESS
        assert await sender.publish("t", b"denied", qos=qos) == expected  # [MQTT3-3.3.5-2]: 3.x hears nothing of it
        assert await sender.publish("other", b"allowed", qos=qos) == ReasonCode.SUCCESS
        assert (await receiver.next_message()).topic_name == "other"
        assert await receiver.nothing_waits()
        assert ruled.metrics.dropped_not_authorized == 1


async def test_what_may_not_be_published_is_not_retained() -> None:
    async with ruled_broker() as ruled:
        sender = await ruled.memory.connect("sender")
        ruled.revoke("sender", "publish", "t")
        await sender.publish("t", b"denied", qos=1, retain=True)
        assert len(ruled.memory.broker.retained) == 0


# Subscribe


@pytest.mark.spec("MQTT3-3.8.4-5", "MQTT3-3.9.3-2", "MQTT5-3.8.4-6")
@pytest.mark.parametrize(
    "version, code",
    [(V5, ReasonCode.NOT_AUTHORIZED), (V311, ReasonCode.UNSPECIFIED_ERROR), (V31, ReasonCode.GRANTED_QOS_1)],
)
async def test_a_denied_subscription(version: ProtocolVersion, code: ReasonCode) -> None:
    """3.1 cannot say that a subscription failed."""
    async with ruled_broker() as ruled:
        ruled.revoke("c", "subscribe", "denied/#")
        client = await ruled.memory.connect("c", version=version)
        assert await client.subscribe("denied/#", "allowed", qos=1) == (code, ReasonCode.GRANTED_QOS_1)
        sender = await ruled.memory.connect("sender")
        await sender.publish("denied/t", b"secret")
        await sender.publish("allowed", b"public")
        assert (await client.next_message()).topic_name == "allowed"
        assert await client.nothing_waits()


# Delivery


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_receiving_is_revoked_at_once(qos: int) -> None:
    async with ruled_broker() as ruled:
        sender, receiver = await ruled.memory.connect("sender"), await ruled.memory.connect("receiver")
        await receiver.subscribe("#")
        for _ in range(3):
            await sender.publish("t", b"allowed", qos=qos)
            assert (await receiver.next_message()).payload == b"allowed"
        ruled.revoke("receiver", "receive", "t")
        assert await sender.publish("t", b"denied", qos=qos) == ReasonCode.SUCCESS
        await sender.publish("other", b"allowed", qos=qos)
        assert (await receiver.next_message()).topic_name == "other"
        assert await receiver.nothing_waits()


async def test_messages_of_gateways_obey_as_well() -> None:
    async with ruled_broker() as ruled:
        receiver = await ruled.memory.connect("receiver")
        await receiver.subscribe("#")
        ruled.revoke("receiver", "receive", "t")
        LocalPublisher(ruled.memory.broker, "bridge", trio.current_time).publish([Message("t"), Message("other")])
        assert (await receiver.next_message()).topic_name == "other"
        assert await receiver.nothing_waits()


async def test_retained_messages() -> None:
    async with ruled_broker() as ruled:
        sender = await ruled.memory.connect("sender")
        for topic_name in ("t", "other"):
            await sender.publish(topic_name, b"kept", retain=True)
        ruled.revoke("receiver", "receive", "t")
        receiver = await ruled.memory.connect("receiver")
        await receiver.subscribe("#")
        assert (await receiver.next_message()).topic_name == "other"
        assert await receiver.nothing_waits()


@pytest.mark.parametrize("qos", [1, 2])
async def test_what_waited_while_the_client_was_away(qos: int) -> None:
    async with ruled_broker() as ruled:
        receiver = await ruled.memory.connect("receiver", session_expiry_interval=60)
        await receiver.subscribe("#")
        await receiver.disconnect()
        sender = await ruled.memory.connect("sender")
        for topic_name in ("t", "other", "t"):
            await sender.publish(topic_name, b"queued", qos=qos)
        ruled.revoke("receiver", "receive", "t")
        receiver = await ruled.memory.connect("receiver", clean_start=False)
        assert (await receiver.next_message()).topic_name == "other"
        assert await receiver.nothing_waits()
        assert (ruled.metrics.dropped_not_authorized, ruled.metrics.messages_queued) == (2, 0)


async def test_what_waited_for_a_free_slot() -> None:
    async with ruled_broker() as ruled:
        receiver = await ruled.memory.connect("receiver", receive_maximum=1)
        await receiver.subscribe("#", qos=1)
        sender = await ruled.memory.connect("sender")
        for topic_name in ("first", "t", "t", "other"):
            await sender.publish(topic_name, qos=1)
        first = await receiver.next_message(acknowledge=False)
        ruled.revoke("receiver", "receive", "t")
        await receiver.send(PubAck(first.packet_id or 0))
        assert (await receiver.next_message()).topic_name == "other"
        assert await receiver.nothing_waits()


# In flight


async def test_a_qos_1_message_is_not_repeated() -> None:
    async with ruled_broker() as ruled:
        receiver = await ruled.memory.connect("receiver", session_expiry_interval=60)
        await receiver.subscribe("#", qos=1)
        sender = await ruled.memory.connect("sender")
        for topic_name in ("t", "other"):
            await sender.publish(topic_name, qos=1)
            await receiver.next_message(acknowledge=False)
        await receiver.cut()
        ruled.revoke("receiver", "receive", "t")
        receiver = await ruled.memory.connect("receiver", clean_start=False)
        again = await receiver.next_message()
        assert (again.topic_name, again.dup) == ("other", True)
        assert await receiver.nothing_waits()
        assert not ruled.memory.broker.connections.sessions["receiver"].inflight


async def test_a_qos_2_message_is_withdrawn_with_its_id() -> None:
    """The client lets go of the id, so that a new message under it is taken for a new one."""
    async with ruled_broker() as ruled:
        receiver = await ruled.memory.connect("receiver", session_expiry_interval=60)
        await receiver.subscribe("#")
        sender = await ruled.memory.connect("sender")
        for topic_name in ("t", "other"):
            await sender.publish(topic_name, qos=2)
            await receiver.next_message(acknowledge=False)
        await receiver.cut()
        ruled.revoke("receiver", "receive", "t")
        receiver = await ruled.memory.connect("receiver", clean_start=False)
        assert await receiver.next_packet() == PubRel(1)
        assert (await receiver.next_message()).topic_name == "other"
        session = ruled.memory.broker.connections.sessions["receiver"]
        assert await receiver.nothing_waits()
        assert list(session.inflight) == [1]
        await receiver.send(PubComp(1, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND))
        assert await receiver.nothing_waits()
        assert not session.inflight


async def test_a_released_qos_2_message_goes_to_its_end() -> None:
    async with ruled_broker() as ruled:
        receiver = await ruled.memory.connect("receiver", session_expiry_interval=60)
        await receiver.subscribe("#")
        sender = await ruled.memory.connect("sender")
        await sender.publish("t", qos=2)
        await receiver.next_message(acknowledge=False)
        await receiver.send(PubRec(1))
        await receiver.expect(PubRel)
        await receiver.cut()
        ruled.revoke("receiver", "receive", "t")
        receiver = await ruled.memory.connect("receiver", clean_start=False)
        assert await receiver.next_packet() == PubRel(1)
        assert ruled.metrics.dropped_not_authorized == 0


# Wills


async def test_a_will_is_looked_at_when_its_client_connects() -> None:
    async with ruled_broker() as ruled:
        ruled.revoke("c", "publish", "gone")
        client = await begin(ruled.memory, client_id="c", will=Will(topic_name="gone"))
        refused = ConnAck(reason_code=ReasonCode.NOT_AUTHORIZED, reason_string="the Will Topic is not allowed")
        assert await refusal(client) == refused
        client = await begin(ruled.memory, V311, client_id="c", will=Will(topic_name="gone"))
        assert await refusal(client) == ConnAck(reason_code=ReasonCode.NOT_AUTHORIZED)
        assert ruled.metrics.sessions == 0


@pytest.mark.parametrize("delay", [0, 5])
async def test_a_will_is_looked_at_again_when_it_is_due(autojump_clock: trio.testing.MockClock, delay: int) -> None:
    async with ruled_broker() as ruled:
        watcher = await ruled.memory.connect("watcher")
        await watcher.subscribe("#")
        will = Will(topic_name="gone", retain=True, payload=b"!", will_delay_interval=delay)
        device = await ruled.memory.connect("device", will=will, session_expiry_interval=60)
        if delay:
            await device.cut()
        ruled.revoke("device", "publish", "gone")
        if not delay:
            await device.cut()
        await trio.sleep(10)
        assert await watcher.nothing_waits()
        assert (ruled.metrics.wills_published, ruled.metrics.dropped_not_authorized) == (0, 1)
        assert len(ruled.memory.broker.retained) == 0


async def test_a_will_reaches_only_those_who_may_receive_it() -> None:
    async with ruled_broker() as ruled:
        watchers = [await ruled.memory.connect(name) for name in ("trusted", "stranger")]
        for watcher in watchers:
            await watcher.subscribe("#")
        ruled.revoke("stranger", "receive", "gone")
        device = await ruled.memory.connect("device", will=Will(topic_name="gone"))
        await device.cut()
        assert (await watchers[0].next_message()).topic_name == "gone"
        assert await watchers[1].nothing_waits()


# Nothing is asked where nothing is denied


async def test_without_rules_queues_ask_nobody(memory_broker: MemoryBroker) -> None:
    assert type(memory_broker.broker.authorizer) is AllowEverything
    assert memory_broker.broker.sender.may_receive is None
