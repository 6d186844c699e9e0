"""Bounds of tables and buffers that a client can make grow: what happens there, and how it is counted."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.fast_lane import ROUTE_SIZE, FastLane
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.store import Batch, MemoryStore
from mqtt_trio.errors import StoreError
from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import ConnAck, Connect, Publish, SubAck, Subscribe, Subscription
from mqtt_trio.server.clients import Clients
from mqtt_trio.server.listeners import ListenerOptions
from mqtt_trio.server.storage import Storage
from mqtt_trio.testing import MemoryBroker, Pipe, PipeOptions, TestClient, open_memory_broker

T = TypeVar("T")
V5 = ProtocolVersion.MQTT_5_0


async def test_retained_bytes(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    async with open_memory_broker(Limits(retained_bytes=1000), store=store) as memory:
        client = await memory.connect("c")
        metrics = memory.broker.metrics
        for name in "abc":
            await client.publish(name, b"x" * 200, qos=1, retain=True)
        assert metrics.retained_refused == 0
        await client.publish("d", b"x" * 200, qos=1, retain=True)
        assert metrics.retained_refused == 1
        await client.publish("a", b"x" * 600, qos=1, retain=True)
        assert metrics.retained_refused == 2
        await client.ping()
        assert set(store.state.retained) == {"b", "c"}, "the message that was to be replaced is gone, on disk as well"
        await client.subscribe("#", qos=1)
        assert {message.topic_name for message in await client.waiting_messages()} == {"b", "c"}
        await client.publish("d", b"x" * 200, qos=1, retain=True)
        assert metrics.retained_messages == 3, "and there is room again"


async def test_retained_messages_beyond_a_lowered_bound_stay_on_disk(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore()
    async with open_memory_broker(store=store) as memory:
        client = await memory.connect("c")
        for number in range(10):
            await client.publish(f"t/{number}", b"x", qos=1, retain=True)
    caplog.set_level(logging.WARNING)
    async with open_memory_broker(Limits(retained_messages=4), store=store) as memory:
        assert memory.broker.metrics.retained_messages == 4
        assert memory.broker.metrics.retained_refused == 6
    assert "6 retained messages are left in the store: RetainedMessages" in caplog.text
    async with open_memory_broker(store=store) as memory:
        assert memory.broker.metrics.retained_messages == 10


async def test_subscriptions_of_the_node(autojump_clock: MockClock) -> None:
    async with open_memory_broker(Limits(subscriptions=3)) as memory:
        one, other = await memory.connect("one"), await memory.connect("other", version=ProtocolVersion.MQTT_3_1_1)
        assert await one.subscribe("a", "$share/g/b", qos=0) == (ReasonCode.GRANTED_QOS_0, ReasonCode.GRANTED_QOS_0)
        assert await other.subscribe("a", "b", qos=0) == (ReasonCode.GRANTED_QOS_0, ReasonCode.UNSPECIFIED_ERROR)
        assert await one.subscribe("c", qos=0) == (ReasonCode.QUOTA_EXCEEDED,)
        assert await one.subscribe("a", qos=1) == (ReasonCode.GRANTED_QOS_1,), "what is there may change"
        assert memory.broker.metrics.subscriptions_refused == 2
        await other.unsubscribe("a")
        assert await one.subscribe("c", qos=0) == (ReasonCode.GRANTED_QOS_0,)


async def test_subscribing_again_behind_an_unfinished_burst(
    memory_broker: MemoryBroker, autojump_clock: MockClock
) -> None:
    client = await memory_broker.connect("c", receive_maximum=1)
    publisher = await memory_broker.connect("p")
    for number in range(3):
        await publisher.publish(f"many/{number}", b"x", qos=1, retain=True)
    await client.subscribe("many/#", qos=1)
    await client.next_message(acknowledge=False)  # the second one waits for its acknowledgement
    for _ in range(500):
        await client.subscribe("nothing/retained", qos=1)
    assert len(memory_broker.broker.connections.sessions["c"].bursts) == 1


async def test_long_topic_names_are_not_cached(memory_broker: MemoryBroker, autojump_clock: MockClock) -> None:
    client = await memory_broker.connect("c")
    for number in range(20):
        await client.publish(f"{number}/" + "x" * ROUTE_SIZE, b"", qos=1)
    await client.publish("short", b"", qos=1)
    link = memory_broker.broker.connections.sessions["c"].link
    assert link is not None
    assert isinstance(link.lane, FastLane)
    assert set(link.lane.routes) == {b"short"}


async def test_pings_of_a_websocket_client_that_reads_no_pongs(autojump_clock: MockClock) -> None:
    limits = Limits(outbox_bytes=65_536, maximum_packet_size=16_384)
    async with open_memory_broker(limits) as memory:
        client = await memory.connect("c", websocket=True)
        client.pipe.to_client.freeze()
        ping = bytes((0x89, 0x80 | 125)) + bytes(4 + 125)
        (link,) = memory.clients.links
        rounds = 0
        while not link.ended:
            await client.pipe.client.send_all(ping * 100)
            await trio.testing.wait_all_tasks_blocked()
            rounds += 1
        assert rounds * 100 * len(ping) < 6 * limits.outbox_bytes, "what the pipe takes included"
        assert memory.broker.metrics.answers_unread == 1


def subscribes(count: int) -> bytes:
    options = QoS.AT_LEAST_ONCE
    return b"".join(
        encode(Subscribe(number, (Subscription(f"t/{number}", options),)), V5) for number in range(1, count)
    )


async def test_subacks_that_wait_for_a_slow_store(autojump_clock: MockClock) -> None:
    async def slowly(function: Callable[[], T]) -> T:
        await trio.sleep(5)
        return function()

    broker = Broker(Limits(receive_maximum=20), random_id=lambda: "x", journal=Journal())
    storage, clients = Storage(broker, MemoryStore(), slowly), Clients(broker)
    await storage.load()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.run)
        pipe = Pipe()
        nursery.start_soon(clients.serve, pipe.broker, ListenerOptions(port=0), "memory")
        client = await connect_kept(TestClient(pipe.client, V5, pipe=pipe))
        await trio.sleep(11)  # the session is on disk, the store is quiet
        await pipe.client.send_all(subscribes(1001))
        await trio.sleep(1)
        (link,) = clients.links
        assert link.paused
        assert sum(len(held.replies) for held in link.outbox.held) <= 2 * 20
        assert broker.metrics.publishers_paused >= 1
        assert [(await client.expect(SubAck)).packet_id for _ in range(1000)] == list(range(1, 1001))
        nursery.cancel_scope.cancel()


async def connect_kept(client: TestClient) -> TestClient:
    await client.send(Connect(client_id="kept", protocol_version=V5, session_expiry_interval=3600))
    client.connack = await client.expect(ConnAck)
    return client


class Failing(MemoryStore):
    """Takes nothing any more once it was told so."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False

    def commit(self, batch: Batch) -> None:
        if self.fails:
            raise StoreError("planned")
        super().commit(batch)


async def test_subacks_that_wait_for_a_store_that_fails(autojump_clock: MockClock) -> None:
    store = Failing()
    async with open_memory_broker(Limits(receive_maximum=20), store=store) as memory:
        client = await memory.connect("kept", session_expiry_interval=3600)
        await client.ping()
        store.fails = True
        await client.pipe.client.send_all(subscribes(101))
        assert [(await client.expect(SubAck)).packet_id for _ in range(100)] == list(range(1, 101))
        assert (await memory.connect("other")).connack


async def test_answers_of_a_failed_commit_keep_their_order(autojump_clock: MockClock) -> None:
    """A publisher that had to wait goes on behind its answers, with what it sent meanwhile."""
    store = Failing()
    async with open_memory_broker(Limits(receive_maximum=20), store=store) as memory:
        kept = await memory.connect("kept", session_expiry_interval=3600)
        await kept.subscribe("t", qos=1)
        await kept.disconnect()
        publisher = await memory.connect("p", session_expiry_interval=3600)
        await publisher.ping()
        store.fails = True
        messages = [encode(Publish("t", b"x", qos=QoS.AT_LEAST_ONCE, packet_id=number), V5) for number in range(1, 20)]
        await publisher.pipe.client.send_all(b"".join(messages[:10]) + subscribes(60) + b"".join(messages[10:]))
        packets = [await publisher.next_packet() for _ in range(19 + 59)]
        ids = [packet.packet_id for packet in packets if not isinstance(packet, SubAck)]  # type: ignore[union-attr]
        assert ids == list(range(1, 20))


async def test_retained_messages_count_for_the_journal() -> None:
    broker = Broker(Limits(), random_id=lambda: "x", journal=Journal(limit=100_000))
    for number in range(9):
        broker.inbound.retain(Message(f"t/{number}", b"x" * 10_000, retain=True))
        broker.flush()
    assert not broker.stopped
    broker.inbound.retain(Message("t/last", b"x" * 10_000, retain=True))
    broker.flush()
    assert broker.stopped == {id(broker.journal)}
    broker.keeper.take()
    assert not broker.stopped


DEEP = "a/a/a/a/a/a/a/a/a/a/a/a"


async def subscribe_often(client: TestClient, qos: int) -> None:
    """Subscribe to 4,096 filters that match DEEP, each with a Subscription Identifier of four bytes."""
    topic_filters = ["/".join(levels) for levels in itertools.product("a+", repeat=DEEP.count("/") + 1)]
    for first in range(0, len(topic_filters), 256):
        some = topic_filters[first : first + 256]
        await client.subscribe(*some, qos=qos, subscription_identifier=268_435_455 - first)


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_a_copy_that_its_subscription_identifiers_make_larger_than_the_outbox(
    qos: int, autojump_clock: MockClock
) -> None:
    """4,096 filters match one topic: 20 KiB of identifiers beside a payload that alone would fit."""
    limits = Limits(outbox_bytes=65_536, maximum_packet_size=64_000)
    async with open_memory_broker(limits) as memory:
        wide, narrow = await memory.connect("wide"), await memory.connect("narrow")
        await subscribe_often(wide, qos)
        await narrow.subscribe("#", qos=qos)
        publisher = await memory.connect("publisher")
        for payload in (bytes(60_000), b"small"):
            await publisher.publish(DEEP, payload, qos=qos)
        copies = await wide.waiting_messages()
        expected = [60_000, 5] if qos else [5]
        assert [len(copy.payload) for copy in copies] == expected
        assert all(len(copy.subscription_identifiers) == 4096 for copy in copies)
        assert [len(copy.payload) for copy in await narrow.waiting_messages()] == [60_000, 5]
        metrics = memory.broker.metrics
        assert (metrics.dropped_outbox_full, metrics.messages_queued) == (2 - len(expected), 0)


@pytest.mark.parametrize("qos", [1, 2])
async def test_copies_larger_than_the_outbox_go_one_by_one(qos: int, autojump_clock: MockClock) -> None:
    """To a client that reads nothing for a while, and in a queue and after a reconnect just as well."""
    limits = Limits(outbox_bytes=65_536, maximum_packet_size=64_000, inflight_messages=3)
    async with open_memory_broker(limits) as memory:
        wide = await memory.connect("wide", session_expiry_interval=600, pipe=PipeOptions(capacity=1024))
        await subscribe_often(wide, qos)
        publisher = await memory.connect("publisher")
        wide.pipe.to_client.freeze()
        for number in range(6):
            await publisher.publish(DEEP, b"%d" % number * 60_000, qos=qos)
        assert memory.broker.metrics.messages_queued > 0
        wide.pipe.thaw()
        for number in range(2):
            assert (await wide.next_message(timeout=60)).payload[:1] == b"%d" % number
        await wide.cut()
        wide = await memory.reconnect(wide)
        rest = [message.payload[:1] for message in await wide.waiting_messages()]
        assert rest == [b"%d" % number for number in range(2, 6)]
        assert (memory.broker.metrics.messages_queued, memory.broker.metrics.dropped_outbox_full) == (0, 0)
