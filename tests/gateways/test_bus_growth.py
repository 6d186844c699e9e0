"""Topics of the bus that get more partitions while nodes run [K3, K23]."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from gateways.kafka.partitions import partition_for
from gateways.kafka.retained import MAP_KEY
from mqtt_trio.gateway import Message
from tests.gateways.memory_bus import MemoryKafka, Node, start_node

SOON = 0.1
TOPICS = [f"t/{number}" for number in range(40)]


class Growing:
    """A cluster whose topics begin with four partitions."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.kafka = MemoryKafka(partitions=4)
        self.nursery = nursery

    async def start(self, node_id: str) -> Node:
        return await start_node(self.nursery, self.kafka, node_id)

    def partitions_of(self, topic: str) -> set[int]:
        """Partitions with batches, or with retained messages."""
        return {
            number
            for (name, number), log in self.kafka.logs.items()
            if name == topic and any(record.key != MAP_KEY and (record.value or b"\1\0")[1] == 0 for record in log)
        }


@pytest.fixture
async def cluster() -> AsyncIterator[Growing]:
    async with trio.open_nursery() as nursery:
        yield Growing(nursery)
        nursery.cancel_scope.cancel()


async def test_running_nodes_keep_their_partitions_and_new_ones_use_all(
    autojump_clock: MockClock, cluster: Growing
) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    for topic in TOPICS:
        one.publish(topic, b"before", qos=1)
    await trio.sleep(SOON)
    cluster.kafka.grow(16)
    for topic in TOPICS:
        one.publish(topic, b"after", qos=1)
    await trio.sleep(SOON)
    assert cluster.partitions_of("monster") == {0, 1, 2, 3}
    late = await cluster.start("late")
    for topic in TOPICS:
        late.publish(topic, b"late", qos=1)
    await trio.sleep(SOON)
    assert len(cluster.partitions_of("monster")) > 10
    for node in (one, two):
        from_late = [item for item in node.seen if isinstance(item, Message) and item.payload == b"late"]
        assert sorted(message.topic_name for message in from_late) == sorted(TOPICS)
    for topic in TOPICS:
        heard = [item.payload for item in two.seen if isinstance(item, Message) and item.topic_name == topic]
        assert heard == [b"before", b"after", b"late"]


async def test_new_partitions_are_read_from_their_beginning(autojump_clock: MockClock, cluster: Growing) -> None:
    """A node that hears late of new partitions misses nothing that others have put there meanwhile."""
    one = await cluster.start("one")
    one.consumer.known_partitions = 4
    cluster.kafka.grow(16)
    late = await cluster.start("late")
    for topic in TOPICS:
        late.publish(topic, b"1", qos=1)
    await trio.sleep(SOON)
    assert 0 < len(one.seen) < len(TOPICS)
    one.consumer.known_partitions = None
    late.publish("wake", b"", qos=1)
    await trio.sleep(SOON)
    assert len(one.seen) == len(TOPICS) + 1


async def test_retained_messages_stay_in_the_partitions_of_the_first_node(
    autojump_clock: MockClock, cluster: Growing
) -> None:
    """Or compaction would keep two records of one topic, and a later node might take the older one."""
    one = await cluster.start("one")
    for topic in TOPICS:
        one.publish(topic, b"old", retain=True)
    await trio.sleep(SOON)
    cluster.kafka.grow(16)
    late = await cluster.start("late")
    for topic in TOPICS:
        late.publish(topic, b"new", retain=True)
    await trio.sleep(SOON)
    assert cluster.partitions_of("mqtt.retained") == {0, 1, 2, 3}
    latest = await cluster.start("latest")
    for node in (one, late, latest):
        assert {message.payload for message in node.host.local.retained.values()} == {b"new"}
        assert len(node.host.local.retained) == len(TOPICS)
    maps = [record for record in cluster.kafka.records("mqtt.retained") if record.key == MAP_KEY]
    assert len(maps) == 1


async def test_of_two_first_nodes_the_last_word_counts(autojump_clock: MockClock, cluster: Growing) -> None:
    one, two = await cluster.start("one"), await cluster.start("two")
    value = cluster.kafka.log("mqtt.retained", 0)[0].value
    assert value is not None
    cluster.kafka.append("mqtt.retained", 0, MAP_KEY, value[:-4] + b"\0\0\0\2")
    await trio.sleep(SOON)
    for topic in TOPICS:
        two.publish(topic, b"x", retain=True)
    await trio.sleep(SOON)
    assert cluster.partitions_of("mqtt.retained") == {0, 1}
    assert {partition_for(topic.encode(), 2) for topic in TOPICS} == {0, 1}
    assert len(one.host.local.retained) == len(TOPICS)


async def test_a_map_that_cannot_be_noted_stops_nothing(autojump_clock: MockClock, cluster: Growing) -> None:
    cluster.kafka.refuse = lambda record: record.key == MAP_KEY
    one = await cluster.start("one")
    one.publish("a", b"x", retain=True)
    await trio.sleep(SOON)
    assert cluster.partitions_of("mqtt.retained") == {partition_for(b"a", 4)}
