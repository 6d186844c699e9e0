"""What tests of the Kafka gateway share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import attrs
import kafka
import trio

from gateways.kafka.cluster import Cluster
from gateways.kafka.options import KafkaOptions

LIMIT = 60.0
"""Seconds after which a test that waits has failed."""


def without_stream(options: KafkaOptions) -> KafkaOptions:
    """Turn mqtt.messages off, which is on by itself: tests of something else share one Kafka, and would share that."""
    messages = attrs.evolve(options.topics.messages, enabled=False)
    return attrs.evolve(options, topics=attrs.evolve(options.topics, messages=messages))


K = TypeVar("K")


@attrs.define
class Outcomes(Generic[K]):
    """What became of records, by whatever a test knows them by."""

    outcomes: dict[K, Exception | None] = attrs.field(factory=dict)
    changed: trio.Event = attrs.field(factory=trio.Event)

    def done(self, key: K, error: Exception | None) -> None:
        """Note an outcome; with the key bound it is `Record.done`."""
        assert key not in self.outcomes, "an outcome came twice"
        self.outcomes[key] = error
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is tried after each outcome."""
        with trio.fail_after(LIMIT):
            while not condition():
                self.changed = trio.Event()
                await self.changed.wait()


def read_records(servers: str, topic: str, count: int) -> list[Any]:
    """Read the first `count` records of a topic as any other program would; fewer when they do not come."""
    consumer = kafka.KafkaConsumer(topic, bootstrap_servers=servers, auto_offset_reset="earliest", group_id=None)
    found: list[Any] = []
    try:
        for _ in range(100):
            for records in consumer.poll(timeout_ms=200).values():
                found += records
            if len(found) >= count:
                break
    finally:
        consumer.close()
    return found


async def told(cluster: Cluster, condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, which some change of `cluster` brings about."""
    token, event = trio.lowlevel.current_trio_token(), trio.Event()

    def look() -> None:
        if condition():
            token.run_sync_soon(event.set)

    cluster.listen(look)
    look()
    with trio.fail_after(LIMIT):
        await event.wait()
    cluster.unlisten(look)
