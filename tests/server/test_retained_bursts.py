"""Retained messages for a new subscription that are more than outbox, window and queue hold: all of them arrive."""

from __future__ import annotations

import pytest
import trio.testing

from mqtt_trio.broker.access import AllowEverything, Principal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.protocol.codes import QoS, ReasonCode
from mqtt_trio.protocol.packets import Publish, SubAck, Subscribe, Subscription
from mqtt_trio.testing import MemoryBroker, PipeOptions, TestClient, open_memory_broker

COUNT = 3000
SMALL = Limits(maximum_packet_size=64_000, outbox_bytes=65_536, queue_messages=10, inflight_messages=20)


def retain(memory: MemoryBroker, count: int = COUNT, qos: int = 1, size: int = 100) -> list[str]:
    names = [f"r/{number}" for number in range(count)]
    for name in names:
        memory.broker.inbound.retain(Message(name, name.encode().ljust(size), qos, True))
    return names


async def take(client: TestClient, count: int) -> list[Publish]:
    return [await client.next_message() for _ in range(count)]


@pytest.mark.spec("MQTT5-3.3.1-9", "MQTT5-3.3.1-8")
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_all_arrive_once(qos: int) -> None:
    async with open_memory_broker(SMALL) as memory:
        names = retain(memory, qos=2)
        client = await memory.connect("c")
        await client.subscribe("r/#", qos=qos)
        messages = await take(client, COUNT)
        assert sorted(message.topic_name for message in messages) == sorted(names)
        assert {(message.qos, message.retain) for message in messages} == {(qos, True)}
        assert await client.nothing_waits()
        metrics = memory.broker.metrics
        assert metrics.dropped_outbox_full == metrics.dropped_queue_full == 0


async def test_what_comes_meanwhile_comes_behind_it() -> None:
    async with open_memory_broker(SMALL) as memory:
        names = retain(memory)
        client = await memory.connect("c", receive_maximum=5)
        await client.subscribe("r/#", qos=1)
        sender = await memory.connect("sender")
        for name in names[::1000]:
            await sender.publish(name, b"new", qos=1)
        messages = await take(client, COUNT + 3)
        assert [message.payload for message in messages[-3:]] == [b"new"] * 3
        assert sorted(message.topic_name for message in messages[:-3]) == sorted(names)


async def test_what_waited_before_goes_first() -> None:
    async with open_memory_broker(SMALL) as memory:
        retain(memory, 100)
        client = await memory.connect("c", receive_maximum=1)
        await client.subscribe("q", qos=1)
        sender = await memory.connect("sender")
        for number in range(4):
            await sender.publish("q", b"%d" % number, qos=1)
        await client.subscribe("r/#", qos=1)
        await sender.publish("q", b"behind", qos=1)
        messages = await take(client, 105)
        assert [message.payload for message in messages[:4]] == [b"0", b"1", b"2", b"3"]
        assert messages[-1].payload == b"behind"


async def test_at_qos_0_an_old_value_does_not_come_behind_a_new_one() -> None:
    async with open_memory_broker(SMALL) as memory:
        names = retain(memory)
        sender = await memory.connect("sender")
        client = await memory.connect("c")
        await client.send(Subscribe(1, (Subscription("r/#", QoS(0)),)))
        for name in names:
            await sender.publish(name, b"", retain=True)  # removes it
        seen: dict[str, list[bytes]] = {}
        await client.nothing_waits()
        for packet in client.waiting:
            if isinstance(packet, Publish):
                seen.setdefault(packet.topic_name, []).append(packet.payload)
        assert all(payloads[-1] == b"" or len(payloads) == 1 for payloads in seen.values())
        assert not any(payload for payloads in seen.values() if payloads[0] == b"" for payload in payloads)


async def test_a_burst_goes_on_when_its_session_is_resumed() -> None:
    async with open_memory_broker(SMALL) as memory:
        names = retain(memory, 200)
        client = await memory.connect("c", session_expiry_interval=100, receive_maximum=3)
        await client.subscribe("r/#", qos=1)
        first = await take(client, 50)
        await client.cut()
        client = await memory.connect("c", clean_start=False, session_expiry_interval=100)
        rest = [await client.next_message() for _ in range(150)]
        assert {message.topic_name for message in (*first, *rest)} == set(names)


async def test_nobody_else_waits_for_a_reader_that_stops() -> None:
    async with open_memory_broker(SMALL) as memory:
        retain(memory)
        frozen = await memory.connect("frozen")
        await frozen.send(Subscribe(1, (Subscription("r/#", QoS(1)),)))
        other = await memory.connect("other")
        await other.subscribe("live")
        await other.publish("live", b"1", qos=1)
        assert (await other.next_message()).payload == b"1"
        assert memory.broker.metrics.messages_queued == 0
        session = memory.broker.connections.sessions["frozen"]
        assert len(session.inflight) == 20
        await frozen.cut()
        assert "frozen" not in memory.broker.connections.sessions


async def test_many_subscriptions_hold_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mqtt_trio.broker.bursts.OPEN_MESSAGES", 10)
    async with open_memory_broker(Limits(inflight_messages=1)) as memory:
        names = retain(memory, 20)
        client = await memory.connect("c")
        filters = ("#", "+/#", *names)
        await client.send(Subscribe(1, tuple(Subscription(f, QoS(1)) for f in filters)))
        await client.expect(SubAck)
        bursts = memory.broker.connections.sessions["c"].bursts
        assert [len(burst.acknowledged) for burst in bursts] == [19] + [0] * 21
        assert await client.unsubscribe(names[0]) == (ReasonCode.SUCCESS,)  # its burst has not begun
        assert len(await take(client, 20 + 20 + 19)) == 59
        assert await client.nothing_waits()
        assert not bursts


class Revocable(AllowEverything):
    """Everybody may receive everything until `closed`."""

    closed = False

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        return not self.closed


@pytest.mark.parametrize("qos", [0, 1])
async def test_rights_are_asked_again_for_each_message(qos: int) -> None:
    rules = Revocable()
    async with open_memory_broker(SMALL, authorizer=rules) as memory:
        retain(memory, 50, size=50_000)
        client = await memory.connect("c", receive_maximum=2, pipe=PipeOptions(capacity=1000))
        client.pipe.to_client.freeze()
        await client.send(Subscribe(1, (Subscription("r/#", QoS(qos)),)))
        await trio.testing.wait_all_tasks_blocked()
        rules.closed = True
        memory.broker.rights_changed()
        client.pipe.to_client.thaw()
        assert len(await client.waiting_messages()) <= 6  # those that had left
        assert memory.broker.metrics.dropped_not_authorized >= 44
        assert not memory.broker.connections.sessions["c"].bursts


@pytest.mark.spec("MQTT5-3.10.4-2", "MQTT5-3.10.4-3")
@pytest.mark.parametrize("qos", [0, 1])
async def test_unsubscribe_ends_a_burst(qos: int) -> None:
    async with open_memory_broker(SMALL) as memory:
        retain(memory, 100, size=10_000)
        client = await memory.connect("c", receive_maximum=1, pipe=PipeOptions(capacity=1000))
        await client.send(Subscribe(1, (Subscription("r/#", QoS(qos)),)))
        await client.expect(SubAck)
        await client.unsubscribe("r/#")
        rest = await client.next_messages(len([p for p in client.waiting if isinstance(p, Publish)]))
        assert len(rest) <= 10
        assert await client.nothing_waits()


async def test_subscribing_again_begins_again() -> None:
    async with open_memory_broker(SMALL) as memory:
        names = retain(memory, 30)
        client = await memory.connect("c", receive_maximum=1)
        await client.subscribe("r/#", qos=1)
        await client.subscribe("r/#", qos=1)
        messages = await take(client, 31)  # one had left
        assert sorted({message.topic_name for message in messages}) == sorted(names)
        assert await client.nothing_waits()


async def test_a_retained_value_comes_before_what_was_published_after_it() -> None:
    """Also when the queue that it waits behind is pushed out meanwhile."""
    async with open_memory_broker(Limits(queue_messages=2, queue_overflow="drop-oldest")) as memory:
        sender = await memory.connect("sender")
        client = await memory.connect("c", receive_maximum=1)
        await client.subscribe("live/#", qos=1)
        for number in range(3):
            await sender.publish(f"live/{number}", b"%d" % number, qos=1)
        await sender.publish("r/a", b"kept", qos=1, retain=True)
        await client.subscribe("r/#", qos=1)
        for number in range(3, 6):
            await sender.publish("r/a", b"%d" % number, qos=1)
        assert [message.payload for message in await take(client, 4)] == [b"0", b"kept", b"4", b"5"]


async def test_one_subscriber_gives_others_their_turn(autojump_clock: trio.testing.MockClock) -> None:
    """Many subscriptions that search a large store are looked at in steps."""
    async with open_memory_broker() as memory:
        for number in range(30_000):
            memory.broker.inbound.retain(Message(f"dev{number}/state/v", b"x", 0, True))
        client, other = await memory.connect("c"), await memory.connect("other")
        visited = memory.broker.retained.visited
        await client.send(Subscribe(1, tuple(Subscription(f"+/state/n{n}", QoS(1)) for n in range(20))))
        await client.expect(SubAck)
        await other.ping()
        assert memory.broker.retained.visited - visited < 700_000  # of 20 times 60,000: some steps of a ping each
        await trio.testing.wait_all_tasks_blocked()
        assert not memory.broker.connections.sessions["c"].bursts


async def test_a_message_that_never_fits_holds_back_nobody() -> None:
    """One that was retained under larger limits."""
    async with open_memory_broker(SMALL) as memory:
        memory.broker.inbound.retain(Message("r/large", bytes(100_000), 0, True))
        retain(memory, 3, qos=0)
        client = await memory.connect("c")
        await client.subscribe("r/#")
        assert len(await take(client, 3)) == 3
        assert memory.broker.metrics.dropped_outbox_full == 1
