"""A member of a consumer group, with a group in memory [K11]."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from gateways.kafka.cluster import Cluster, TopicFacts
from gateways.kafka.group_bridge import SLOTS, GroupBridge
from gateways.kafka.group_poller import Handed, Membership, Progress
from gateways.kafka.options import KafkaOptions
from gateways.kafka.reader_thread import CHUNK_RECORDS
from tests.gateway_support import LIMIT, told
from tests.gateways.memory_shares import TOPIC, MemoryGroup

FIRST, SECOND = (TOPIC, 0), (TOPIC, 1)


@attrs.define
class Member:
    """One bridge, and what reached the Trio thread of it: it is done with at once, unless `keeps` says otherwise."""

    group: MemoryGroup
    bridge: GroupBridge = attrs.field(init=False)
    values: list[bytes | None] = attrs.Factory(list)
    lists: list[Handed] = attrs.Factory(list)
    keeps: bool = True
    changed: trio.Event = attrs.Factory(trio.Event)

    def on_records(self, handed: Handed) -> None:
        self.lists.append(handed)
        for record in handed.records:
            partition = (record.topic, record.partition)
            if handed.membership.has_lost(partition, handed.tenure):
                continue
            if record.offset < handed.progress.delivered.get(partition, 0):
                continue
            self.values.append(record.value)
            handed.progress.delivered[partition] = record.offset + 1
            if self.keeps:
                handed.progress.done[partition] = record.offset + 1
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(LIMIT):
            while not condition():  # noqa: ASYNC110  the threads tell nobody
                await trio.sleep(0.01)


@asynccontextmanager
async def member(
    group: MemoryGroup, cluster: Cluster | None = None, options: KafkaOptions | None = None
) -> AsyncIterator[Member]:
    async with trio.open_nursery() as nursery:
        made = Member(group)
        made.bridge = GroupBridge(
            options or KafkaOptions(), cluster or Cluster(["k"]), TOPIC, "g", made.on_records, name="reader",
            open_consumer=group.open,
        )  # fmt: skip
        await nursery.start(made.bridge.run)
        yield made
        nursery.cancel_scope.cancel()


async def test_what_is_done_with_is_stored_and_a_successor_goes_on_there() -> None:
    group = MemoryGroup({FIRST: [b"0", b"1"], SECOND: [b"a"]})
    async with member(group) as one:
        await one.until(lambda: group.stored == {FIRST: 2, SECOND: 1})
        assert one.bridge.owned == {FIRST, SECOND}
        await one.until(one.bridge.joined.is_set)
        one.keeps = False
        group.put(b"2", b"3")
        await one.until(lambda: len(one.values) == 5)
        one.lists[-1].progress.done[FIRST] = 3
        await one.bridge.stop()
    assert group.stored == {FIRST: 3, SECOND: 1}, "the last one is stored on the way out"
    assert group.left == [1]
    async with member(group) as two:
        await two.until(lambda: two.values == [b"3"])


async def test_automatic_commits_wait_for_nobody_but_the_interval() -> None:
    """[K16]: what was taken for delivery is stored, kept or not; what was read and not taken is not."""
    group, gate = MemoryGroup({FIRST: [b"0", b"1"]}), trio.Event()
    gate.set()
    automatic = KafkaOptions(profile="compat", consumer={"auto.commit.interval.ms": 10})
    async with member(group, options=automatic) as one:
        one.keeps = False
        await one.until(lambda: group.stored == {FIRST: 2})
        one.bridge.room = trio.Event().wait
        group.put(b"2")
        await one.until(lambda: one.bridge._poller.received == 3)
        await one.bridge.stop()
    assert group.stored == {FIRST: 2}
    taken = Membership(Progress(automatic=True))
    taken.progress.delivered[FIRST] = 3
    assert taken.revoked([FIRST, SECOND]) == {FIRST: 3}, "whoever gets the partition goes on behind them"


async def test_a_slow_reader_fetches_no_more_and_stays_a_member() -> None:
    values = [b"%d" % number for number in range(CHUNK_RECORDS * 3 * SLOTS)]
    group, gate = MemoryGroup({FIRST: list(values)}), trio.Event()
    async with member(group) as one:
        one.bridge.room = gate.wait
        await one.until(lambda: group.held_back > 5)
        assert one.values == []
        gate.set()
        await one.until(lambda: len(one.values) == len(values))
        assert one.values == values
        assert max(len(handed.records) for handed in one.lists) == CHUNK_RECORDS
        await one.until(lambda: group.stored == {FIRST: len(values)})


async def test_a_partition_that_is_lost_and_comes_back_is_read_from_the_groups_offset_and_not_delivered_twice() -> None:
    group, gate = MemoryGroup({FIRST: [], SECOND: []}), trio.Event()
    gate.set()
    async with member(group) as one:
        await one.until(lambda: one.bridge.owned == {FIRST, SECOND})
        group.put(b"0", b"1")
        await one.until(lambda: group.stored.get(FIRST) == 2)
        gate = trio.Event()
        one.bridge.room = gate.wait
        group.put(b"2")
        await one.until(lambda: one.bridge._poller.received >= 3)
        group.shares[1] = {SECOND}
        await one.until(lambda: one.bridge.owned == {SECOND})
        group.stored[FIRST] = 1  # its other owner did not get far
        group.shares[1] = {FIRST, SECOND}
        await one.until(lambda: one.bridge.owned == {FIRST, SECOND})
        gate.set()
        await one.until(lambda: one.values == [b"0", b"1", b"2"])
        await one.until(lambda: group.stored[FIRST] == 3)


async def test_offsets_that_kafka_does_not_take_are_stored_again() -> None:
    group = MemoryGroup({FIRST: [b"0"]}, refuse_commits=2)
    async with member(group) as one:
        await one.until(lambda: group.stored == {FIRST: 1})
        assert group.refuse_commits == 0


async def test_offsets_of_partitions_that_are_others_are_not_stored() -> None:
    group = MemoryGroup({FIRST: [b"0"], SECOND: []})
    async with member(group) as one:
        one.keeps = False
        await one.until(lambda: one.values == [b"0"])
        group.shares[1] = {SECOND}
        await one.until(lambda: one.bridge.owned == {SECOND})
        one.lists[-1].progress.done[FIRST] = 1
        group.put(b"a", partition=1)
        one.keeps = True
        await one.until(lambda: group.stored == {SECOND: 1})
        assert all(FIRST not in commit for commit in group.commits)


async def test_a_consumer_that_fails_is_replaced_and_what_was_delivered_is_not_delivered_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    group = MemoryGroup({FIRST: [b"0"]})
    async with member(group) as one:
        await one.until(lambda: one.values == [b"0"])
        one.keeps = False
        group.put(b"1")
        await one.until(lambda: one.values == [b"0", b"1"])
        group.faults.append(RuntimeError("planned"))
        await one.until(lambda: group.opened == 2)
        group.put(b"2")
        await one.until(lambda: one.values == [b"0", b"1", b"2"])
        assert one.bridge.counters()["rebuilds"] == 1
    assert "Kafka consumer reader is replaced: RuntimeError: planned" in caplog.text


async def test_an_error_that_goes_on_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as a right on the group that is missing."""
    monkeypatch.setattr("gateways.kafka.reader_thread.LONGEST_BACKOFF", 0.01)
    group = MemoryGroup({FIRST: [b"0"]}, faults=[RuntimeError("no right to read the group") for _ in range(5)])
    async with member(group) as one:
        await one.until(lambda: one.values == [b"0"])
        assert group.opened == 6
        group.faults.append(RuntimeError("no right to read the group"))
        await one.until(lambda: group.opened == 7)
    assert caplog.text.count("no right to read the group") == 2, "again when it was well in between"


async def test_a_topic_that_is_missing_is_asked_for_and_one_that_is_made_again_is_read_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateways.kafka.group_poller.LOOK_INTERVAL", 0.0)
    group, cluster = MemoryGroup({}), Cluster(["k"])
    async with member(group, cluster) as one:
        await told(cluster, lambda: TOPIC in cluster.wanted)
        group.log[FIRST] = [b"0", b"1"]
        cluster.know(TOPIC, TopicFacts(partitions=1))
        await one.until(lambda: group.stored == {FIRST: 2})
        group.log.clear()
        await told(cluster, lambda: TOPIC in cluster.wanted)
        group.life += 1
        group.stored.clear()
        group.log[FIRST] = [b"new"]
        await one.until(lambda: one.values == [b"0", b"1", b"new"])


async def test_a_thread_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateways.kafka.watchdog.LOOK_INTERVAL", 0.05)
    monkeypatch.setattr("gateways.kafka.watchdog.SILENCE", 0.5)
    group = MemoryGroup({FIRST: [b"0"]})
    async with member(group) as one:
        await one.until(lambda: one.values == [b"0"])
        hanging = one.bridge._poller._consumer
        assert hanging is not None
        monkeypatch.setattr(hanging, "poll", lambda timeout, paused: hanging.closed.wait() and [])  # type: ignore[attr-defined]
        await one.until(lambda: group.opened == 2)
        group.put(b"1")
        await one.until(lambda: one.values == [b"0", b"1"])
        assert one.bridge.counters()["threads_hung"] == 1
