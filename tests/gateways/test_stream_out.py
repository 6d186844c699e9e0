"""From clients of this node to mqtt.messages [K11]: a whole broker in memory, on the fake clock, and a store that is
slow, away or refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from gateways.kafka.archive import KafkaArchiveStore
from gateways.kafka.mapping import JsonMapper
from gateways.kafka.stream_out import BATCH, StreamOut
from gateways.kafka.stream_records import GUARD_HEADER, OutsideMessage, is_own
from mqtt_trio.errors import StoreError
from mqtt_trio.gateway import Message, Outcome, Parcel
from mqtt_trio.protocol.codes import QoS
from mqtt_trio.protocol.packets import PubAck, Publish
from mqtt_trio.testing import MemoryBroker, NothingCameError, open_memory_broker
from tests.gateways.test_stream_records import record

WINDOW = 10
"""Messages."""


@attrs.define
class FakeStore:
    """Has what it is given at once, or when `here` is set."""

    batches: list[list[Message]] = attrs.Factory(list)
    waiting: list[Callable[[], None]] = attrs.Factory(list)
    slow: bool = False
    reason: str | None = None
    changed: Callable[[], None] = lambda: None
    failures: Outcome = attrs.Factory(dict)
    stopped: bool = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    def trouble(self) -> str | None:
        return self.reason

    def watch(self, changed: Callable[[], None]) -> None:
        self.changed = changed

    def submit(self, batch: Sequence[Message], done: Callable[[Outcome], None]) -> None:
        self.batches.append(list(batch))
        if self.slow or self.reason is not None:
            self.waiting.append(lambda: done({}))
        else:
            done(self.failures)

    def confirm(self) -> None:
        waiting, self.waiting = self.waiting, []
        for done in waiting:
            done()

    def go_away(self, reason: str | None) -> None:
        self.reason = reason
        self.changed()

    async def stop(self) -> None:
        self.stopped = True

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for batch in self.batches for message in batch]


@attrs.define
class World:
    memory: MemoryBroker
    store: FakeStore
    stream: StreamOut
    closed: bool = False

    @property
    def counters(self) -> dict[str, int]:
        return {name.removeprefix("stream_"): value for name, value in self.stream.counters().items() if value}


@asynccontextmanager
async def world(*filters: str, window: int = WINDOW) -> AsyncIterator[World]:
    async with open_memory_broker() as memory:
        store = FakeStore()
        made: list[World] = []
        stream = StreamOut(
            memory.host, cast(KafkaArchiveStore, store), filters or ("#",), window_messages=window,
            window_bytes=1 << 20, is_closed=lambda: made[0].closed,
        )  # fmt: skip
        made.append(World(memory, store, stream))
        await memory.nursery.start(stream.run)
        yield made[0]


async def test_what_clients_publish_is_in_the_stream_and_what_came_from_it_is_not(autojump_clock: MockClock) -> None:
    async with world() as w:
        client = await w.memory.connect("c")
        for qos in (0, 1, 2):
            await client.publish("a/b", b"%d" % qos, qos=qos)
        outside = OutsideMessage("a/b", b"outside", 1)
        assert w.memory.host.local_client("stream").bring([Parcel(outside)]) == 1
        await trio.sleep(1)
        assert w.store.payloads == [b"0", b"1", b"2"]
        assert {message.client_id for message in w.store.batches[0]} == {"c"}
        assert w.counters == {"messages_written": 3}


async def test_topics_that_no_filter_names_and_sys_are_not_in_it(autojump_clock: MockClock) -> None:
    async with world("a/+", "b/#") as w:
        client = await w.memory.connect("c")
        for topic in ("a/1", "a/1/2", "b", "b/x/y", "c", "$other/x"):
            await client.publish(topic, topic.encode(), qos=1)
        await trio.sleep(1)
        assert w.store.payloads == [b"a/1", b"b", b"b/x/y"]
    async with world() as w:
        assert w.stream.route("$SYS/broker/uptime") is None
        assert w.stream.route("$SYS") is None


async def test_a_burst_becomes_batches_in_order(autojump_clock: MockClock) -> None:
    async with world(window=10_000) as w:
        client = await w.memory.connect("c")
        packets = [Publish("t", b"%d" % number, QoS(0)) for number in range(2 * BATCH + 10)]
        for packet in packets:
            await client.send(packet)
        await trio.sleep(1)
        assert w.store.payloads == [b"%d" % number for number in range(2 * BATCH + 10)]
        assert max(map(len, w.store.batches)) <= 2 * BATCH


async def test_beyond_the_window_qos_0_is_left_out_and_others_wait(autojump_clock: MockClock) -> None:
    async with world() as w:
        listener, client = await w.memory.connect("l"), await w.memory.connect("c")
        await listener.subscribe("t", qos=1)
        w.store.slow = True
        for number in range(WINDOW + 3):
            await client.publish("t", b"%d" % number)
            await wait_all_tasks_blocked()  # a run of several would be taken whole
        await trio.sleep(1)
        assert len(w.store.payloads) == WINDOW
        assert w.counters == {"messages_left_out": 3, "messages_waiting": WINDOW}
        await client.send(Publish("t", b"sure", QoS(1), packet_id=1))
        with pytest.raises(NothingCameError):
            await client.next_packet(timeout=60)
        for _ in range(WINDOW + 3):
            await listener.next_message()
        assert (await listener.next_message()).payload == b"sure", "subscribers do not wait"
        w.store.confirm()
        w.memory.host.flush()
        assert isinstance(await client.next_packet(), PubAck)
        w.store.confirm()
        assert w.counters["messages_written"] == WINDOW + 1
        assert "messages_waiting" not in w.counters


async def test_while_kafka_is_away_nobody_waits(autojump_clock: MockClock) -> None:
    async with world() as w:
        client = await w.memory.connect("c")
        w.store.slow = True
        for number in range(WINDOW):
            await client.publish("t", b"%d" % number)
        await client.send(Publish("t", b"held", QoS(1), packet_id=1))
        with pytest.raises(NothingCameError):
            await client.next_packet(timeout=5)
        w.store.go_away("planned")
        assert isinstance(await client.next_packet(timeout=0.001), PubAck), "it does not wait any longer"
        for qos in (0, 1, 2):
            await client.publish("t", b"more", qos=qos)
        assert w.counters == {"messages_left_out": 3, "messages_waiting": WINDOW + 1, "messages_held": 1}
        w.store.go_away(None)
        w.store.confirm()
        await trio.sleep(1)
        w.store.confirm()
        await client.publish("t", b"again", qos=1)
        await trio.sleep(1)
        w.store.confirm()
        assert w.counters["messages_written"] == WINDOW + 2
        assert w.store.payloads[-2:] == [b"held", b"again"]


async def test_for_a_topic_that_takes_nothing_nothing_is_kept(autojump_clock: MockClock) -> None:
    async with world() as w:
        client = await w.memory.connect("c")
        w.closed = True
        w.store.go_away("no right to write")
        await client.publish("t", b"1", qos=1)
        await trio.sleep(1)
        assert w.store.payloads == []
        assert w.counters == {"messages_left_out": 1}


async def test_a_flood_that_nobody_takes_stops_all_publishers_until_there_is_room(autojump_clock: MockClock) -> None:
    async with world() as w:
        clients = [await w.memory.connect(f"c{number}") for number in range(3 * WINDOW)]
        w.store.slow = True
        for client in clients:
            await client.send(Publish("t", b"x", QoS(1), packet_id=1))
        await trio.sleep(1)
        assert w.stream.window.messages == 2 * WINDOW
        assert w.counters["publishers_stopped"] == 1
        for _ in range(4):
            w.store.confirm()
            w.memory.host.flush()
            await trio.sleep(1)
        for client in clients:
            assert isinstance(await client.next_packet(), PubAck)
        assert w.counters["messages_written"] == 3 * WINDOW


async def test_what_kafka_refuses_is_counted(autojump_clock: MockClock) -> None:
    async with world() as w:
        client = await w.memory.connect("c")
        w.store.failures = {0: StoreError("too large")}
        await client.publish("t", b"1", qos=1)
        await trio.sleep(1)
        assert w.counters == {"messages_failed": 1}


@pytest.mark.parametrize("away", [False, True])
async def test_a_stop_ships_what_waits(autojump_clock: MockClock, away: bool, caplog: pytest.LogCaptureFixture) -> None:
    async with world() as w:
        client = await w.memory.connect("c")
        if away:
            w.store.go_away("planned")
        await client.publish("t", b"1", qos=1)
        await w.stream.stop()
        assert w.store.payloads == [b"1"]
        assert w.store.stopped is not away
        assert ("1 messages are not in the stream" in caplog.text) is away


def test_records_carry_the_mark_by_which_they_are_left_out() -> None:
    mapper = JsonMapper("mqtt.messages", "node-1")
    mapper.mark = (GUARD_HEADER, b"node-1")
    made: Any = mapper.record(Message("t", b"x", 1, client_id="c", published_at=1.5))
    assert next(iter(made.headers)) == (GUARD_HEADER, b"node-1")
    assert is_own(record({}, headers=made.headers))
    assert (made.key, made.timestamp_ms) == (b"t", 1500)
