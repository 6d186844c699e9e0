"""From mqtt.messages to the subscribers [K11]: on the fake clock, with a whole broker in memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import attrs
import pytest
import trio
from trio.testing import MockClock

from gateways.kafka.group_poller import Handed, Membership, Progress
from gateways.kafka.records import ConsumedRecord, Reason
from gateways.kafka.stream_in import WINDOW_RECORDS, StreamIn
from gateways.kafka.stream_records import GUARD_HEADER, OutsideMessage
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.store import Batch, MemoryStore
from mqtt_trio.errors import StoreError
from mqtt_trio.gateway import ReasonCode
from mqtt_trio.testing import MemoryBroker, open_memory_broker
from tests.gateways.whole_nodes import drain, open_cluster

TOPIC = "mqtt.messages"
T = TypeVar("T")
OWN = [(GUARD_HEADER, b"node-1")]


@attrs.define
class FakeLetters:
    """Takes letters; they are written when `write` is called, or at once."""

    at_once: bool = True
    has_room: bool = True
    letters: list[tuple[int, Reason, str, bool]] = attrs.Factory(list)
    waiting: list[Callable[[], None]] = attrs.Factory(list)

    def undeliverable(
        self, record: ConsumedRecord, reason: Reason, error: str, done: Callable[[], None], *, redrivable: bool = True
    ) -> None:
        assert self.has_room
        self.letters.append((record.offset, reason, error, redrivable))
        if self.at_once:
            done()
        else:
            self.waiting.append(done)


@attrs.define
class World:
    memory: MemoryBroker
    stream: StreamIn
    letters: FakeLetters
    membership: Membership = attrs.Factory(Membership)
    progress: Progress = attrs.Factory(Progress)
    end: int = 0

    def put(self, *values: object, headers: Sequence[tuple[str, bytes]] = ()) -> None:
        """Have records come; a text is the payload of a message of topic t."""
        records = []
        for value in values:
            value = {"topic": "t", "payload": value} if isinstance(value, str) else value
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            records.append(ConsumedRecord(TOPIC, 0, self.end, None, raw, headers, 1000))
            self.end += 1
        self.hand(records)

    def hand(self, records: list[ConsumedRecord]) -> None:
        self.stream.on_records(Handed(records, self.membership, self.membership.tenure, self.progress))

    @property
    def done(self) -> int:
        """The offset that may be stored in the group."""
        return self.progress.done.get((TOPIC, 0), 0)


@asynccontextmanager
async def world(store: MemoryStore | None = None, **options: Any) -> AsyncIterator[World]:
    async with open_memory_broker(store=store, **options) as memory:
        letters = FakeLetters()
        stream = StreamIn(memory.host.local_client("stream"), letters)
        await memory.nursery.start(stream.run)
        yield World(memory, stream, letters)


async def test_what_others_put_there_is_published_and_seen_by_the_taps(autojump_clock: MockClock) -> None:
    async with world() as w:
        bus = w.memory.add_gateway()
        client = await w.memory.connect("c")
        await client.subscribe("#", qos=2)
        w.put("one", {"topic": "a/b", "payload": "AP8=", "payloadEncoding": "base64", "qos": 2, "clientId": "maker"})
        found = await drain(client)
        assert [(p.topic_name, p.payload, p.qos) for p in found] == [("t", b"one", 1), ("a/b", b"\0\xff", 2)]
        assert [type(message) for message in bus.messages] == [OutsideMessage, OutsideMessage]
        assert bus.messages[1].client_id == "maker"
        assert w.done == 2
        assert w.stream.counters()["stream_messages_published"] == 2


async def test_records_of_this_deployment_are_left_out(autojump_clock: MockClock) -> None:
    async with world() as w:
        client = await w.memory.connect("c")
        await client.subscribe("#", qos=1)
        w.put("mine", "mine too", headers=OWN)
        w.put("other")
        assert [p.payload for p in await drain(client)] == [b"other"]
        assert w.done == 3
        assert w.stream.counters()["stream_records_own"] == 2


async def test_retained_ones_are_kept_and_removed(autojump_clock: MockClock) -> None:
    async with world() as w:
        w.put({"topic": "t", "payload": "kept", "retained": True})
        late = await w.memory.connect("late")
        await late.subscribe("t", qos=1)
        (message,) = await drain(late)
        assert (message.payload, message.retain) == (b"kept", True)
        w.put({"topic": "t", "payload": "", "retained": True})
        assert w.memory.broker.retained.get("t") is None


async def test_what_is_no_message_is_a_letter_and_the_next_ones_go_on(autojump_clock: MockClock) -> None:
    async with world(limits=Limits(topic_levels=10)) as w:
        client = await w.memory.connect("c")
        await client.subscribe("#", qos=1)
        w.letters.at_once = False
        w.put(b"{", {"topic": "$SYS/x", "payload": ""}, {"topic": "/" * 10, "payload": ""}, "good")
        assert [p.payload for p in await drain(client)] == [b"good"]
        assert [(offset, reason, redrivable) for offset, reason, _, redrivable in w.letters.letters] == [
            (0, Reason.MALFORMED, True), (1, Reason.MALFORMED, True), (2, Reason.MALFORMED, True),
        ]  # fmt: skip
        assert "$SYS is the broker's own" in w.letters.letters[1][2]
        assert "more than 10 levels" in w.letters.letters[2][2]
        assert w.done == 0, "their letters are not written yet"
        for done in w.letters.waiting:
            done()
        assert w.done == 4
        assert w.stream.counters()["stream_records_malformed"] == 3


async def test_letters_that_find_no_room_hold_the_stream_up(autojump_clock: MockClock) -> None:
    async with world() as w:
        client = await w.memory.connect("c")
        await client.subscribe("#", qos=1)
        w.letters.has_room = False
        w.put(b"{", "behind")
        assert await drain(client, within=20) == []
        assert w.letters.letters == []
        w.letters.has_room = True
        assert [p.payload for p in await drain(client, within=20)] == [b"behind"]
        assert len(w.letters.letters) == 1


async def test_a_tap_that_refuses_delays_it_and_the_others_see_it_once(autojump_clock: MockClock) -> None:
    async with world() as w:
        bus, archive = w.memory.add_gateway(), w.memory.add_gateway()
        client = await w.memory.connect("c")
        await client.subscribe("#", qos=1)
        archive.refuse()
        w.put("one", "two")
        assert await drain(client, within=60) == []
        assert [message.payload for message in bus.messages] == [b"one"], "not even the second: order holds"
        assert w.done == 0
        archive.accept()
        assert [p.payload for p in await drain(client, within=20)] == [b"one", b"two"]
        assert [message.payload for message in bus.messages] == [b"one", b"two"]
        assert [message.payload for message in archive.messages] == [b"one", b"two"]
        assert w.done == 2


async def test_offsets_wait_for_what_a_tap_holds_back(autojump_clock: MockClock) -> None:
    async with world() as w:
        archive = w.memory.add_gateway()
        client = await w.memory.connect("c")
        await client.subscribe("#", qos=1)
        archive.hold()
        w.put("one", "two", "three")
        assert len(await drain(client)) == 3, "subscribers have it at once"
        assert w.done == 0
        archive.release(1)
        assert w.done == 1
        archive.release()
        assert w.done == 3


async def test_what_a_tap_did_not_keep_after_all_is_a_letter_that_is_not_for_writing_again(
    autojump_clock: MockClock,
) -> None:
    async with world() as w:
        archive = w.memory.add_gateway()
        archive.hold()
        w.put("one", "two")
        archive.release(1, refused=ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR)
        archive.release(1)
        assert w.done == 2
        ((offset, reason, error, redrivable),) = w.letters.letters
        assert (offset, reason, redrivable) == (0, Reason.UNDELIVERED, False)
        assert "did not keep" in error


class Disk(MemoryStore):
    """A commit takes a second, or fails."""

    broken = False

    def commit(self, batch: Batch) -> None:
        if self.broken:
            raise StoreError("planned: no space")
        super().commit(batch)


async def test_offsets_wait_for_the_store_and_a_late_client_gets_all(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    async with world(disk) as w:
        client = await w.memory.connect("kept", clean_start=False, session_expiry_interval=3600)
        await client.subscribe("#", qos=1)
        await client.disconnect()
        disk.broken = True
        w.put("one", "two")
        await trio.sleep(1)
        assert w.done == 0, "nothing keeps them yet"
        disk.broken = False
        await trio.sleep(60)
        assert w.done == 2
    async with world(disk) as w:  # as behind a kill
        client = await w.memory.connect("kept", clean_start=False, session_expiry_interval=3600)
        assert [p.payload for p in await drain(client)] == [b"one", b"two"]


async def test_what_is_published_and_not_kept_is_bounded(autojump_clock: MockClock) -> None:
    async with world() as w:
        archive = w.memory.add_gateway()
        archive.hold()
        w.put(*(f"{number}" for number in range(WINDOW_RECORDS + 10)))
        assert len(archive.messages) == WINDOW_RECORDS
        roomy = trio.Event()

        async def ask() -> None:
            await w.stream.room()
            roomy.set()

        w.memory.nursery.start_soon(ask)
        await trio.sleep(1)
        assert not roomy.is_set(), "the reader waits"
        archive.release(100)
        await trio.sleep(1)
        assert roomy.is_set()
        assert len(archive.messages) == WINDOW_RECORDS + 10
        assert w.done == 100


async def test_stopped_publishers_stop_the_stream_as_well(autojump_clock: MockClock) -> None:
    async with world() as w:
        client = await w.memory.connect("c")
        await client.subscribe("#", qos=1)
        w.memory.host.stop_publishers(w)
        w.put("one")
        assert await drain(client, within=5) == []
        w.memory.host.resume_publishers(w)
        assert [p.payload for p in await drain(client)] == [b"one"]


async def test_lost_partitions_are_left_to_others_and_nothing_is_delivered_twice(autojump_clock: MockClock) -> None:
    async with world() as w:
        client = await w.memory.connect("c")
        await client.subscribe("#", qos=1)
        w.put("0", "1")
        raw = json.dumps({"topic": "t", "payload": "2"}).encode()
        third = ConsumedRecord(TOPIC, 0, 2, None, raw, [], 1000)
        late = Handed([third], w.membership, w.membership.tenure, w.progress)
        w.membership.lost([(TOPIC, 0)])
        w.stream.on_records(late)
        assert w.stream.counters()["stream_records_left"] == 1
        assert w.done == 2
        w.end = 0
        w.put("0", "1", "2", "3")  # it came back, and the group's offset is an old one
        assert [p.payload for p in await drain(client)] == [b"0", b"1", b"2", b"3"]
        assert w.stream.counters()["stream_records_repeated"] == 2
        assert w.done == 4
        w.progress, w.end = Progress(), 0  # the topic was deleted and made again
        w.put("new")
        assert [p.payload for p in await drain(client)] == [b"new"]


async def test_an_error_on_the_way_is_a_letter_and_stops_nobody(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world() as w:
        client = await w.memory.connect("c")
        await client.subscribe("#", qos=1)
        deliver = w.memory.broker.sender.deliver

        def fail(message: Any, *arguments: Any, **named: Any) -> None:
            if message.payload == b"bad":
                raise RuntimeError("planned")
            deliver(message, *arguments, **named)

        monkeypatch.setattr(w.memory.broker.sender, "deliver", fail)
        w.put("before", "bad", "behind")
        assert [p.payload for p in await drain(client)] == [b"before", b"behind"]
        assert w.letters.letters == [(1, Reason.UNDELIVERED, "RuntimeError: planned", True)]
        assert w.done == 3


async def test_offsets_wait_until_kafka_has_it_for_the_other_nodes(autojump_clock: MockClock) -> None:
    """Whatever `[Kafka.Bus] Ack` says to clients, which are answered at once here."""
    async with open_cluster() as cluster:
        one, two = await cluster.start("one"), await cluster.start("two")
        stream, far = StreamIn(one.memory.host.local_client("stream"), FakeLetters()), await two.connect("far", "t")
        await one.memory.nursery.start(stream.run)
        w = World(one.memory, stream, FakeLetters())
        publisher = await one.connect("publisher")
        cluster.kafka.go_away()
        await publisher.publish("t", b"of a client", qos=1)
        w.put("1", "2")
        await publisher.publish("t", b"of a client", qos=1)
        await trio.sleep(60)
        assert w.done == 0
        cluster.kafka.come_back()
        assert [p.payload for p in await drain(far)] == [b"of a client", b"1", b"2", b"of a client"]
        assert w.done == 2


async def test_a_stop_waits_for_what_is_published_and_takes_nothing_more(autojump_clock: MockClock) -> None:
    async with world() as w:
        archive = w.memory.add_gateway()
        archive.hold()
        w.put("one")
        finished = trio.Event()

        async def finish() -> None:
            await w.stream.finish()
            finished.set()

        w.memory.nursery.start_soon(finish)
        await trio.sleep(1)
        w.put("two")
        assert len(archive.messages) == 1
        assert not finished.is_set()
        archive.release()
        await trio.sleep(1)
        assert finished.is_set()
        assert w.done == 1
