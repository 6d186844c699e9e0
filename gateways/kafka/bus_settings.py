"""What the bus is told, and what it uses of its producer, its consumer and the cluster."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import attrs
import trio

from gateways.kafka.poller import Began
from gateways.kafka.records import ConsumedRecord, Record


@attrs.frozen(kw_only=True)
class BusSettings:
    """What the bus needs to know of the configuration."""

    topic: str = "monster"
    retained_topic: str = "mqtt.retained"
    linger: float = 0.003
    """Seconds that messages wait to share a record."""
    partitions: int = 12
    """Of the bus topic, while Kafka has not said otherwise."""
    retained_partitions: int = 12
    """Of the retained topic, while Kafka has not said otherwise."""
    window_messages: int = 200_000
    """Messages that may wait for Kafka. Outcome: see `BusWindow`."""
    window_bytes: int = 32 * 1024 * 1024
    """Bytes of them, with an estimate of what a message costs beside its content. Outcome: see `BusWindow`."""
    ack: str = "none"
    """`store`: QoS 1 and 2 are acknowledged once Kafka, or while it is away the disk, has them."""
    ack_timeout: float = 30.0
    """Seconds that an acknowledgement waits for Kafka. Outcome: what is on disk is acknowledged, the rest goes to the
    spool; without one it is a negative answer."""
    on_outage: str | None = None
    """What becomes of QoS 1 and 2 while Kafka is away: `spool`, `reject`, `drop`; None: they wait in the window."""
    spool_bytes: int = 1024 * 1024 * 1024
    """Bytes that the spool takes on disk at most. Outcome: the window fills."""
    checkpoint_age: float = 3600.0
    """Seconds for which a node may have been away and still gets what was published meanwhile."""


class Producer(Protocol):
    """What the bus uses of `ProducerBridge`."""

    after_drain: Callable[[], None]

    def offer(self, record: Record) -> None: ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...

    async def stop(self) -> None: ...

    def counters(self) -> dict[str, int]: ...


class Consumer(Protocol):
    """What the bus uses of `ConsumerBridge`."""

    positions_known: trio.Event
    caught_up: trio.Event
    room: Callable[[], Awaitable[None]]
    on_another: Callable[[str, str | None], None]

    def expect(self, topic: str, identity: str) -> None: ...

    def identity(self, topic: str) -> str | None: ...

    @property
    def began(self) -> Mapping[tuple[str, int], Began]: ...

    def commit(self, offsets: Mapping[tuple[str, int], int]) -> None: ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...

    def counters(self) -> dict[str, int]: ...


class MakeConsumer(Protocol):
    """Makes the one consumer of the bus: `topic` from the offsets that are given for its partitions, from its end when
    there are none; `retained_topic` from its beginning."""

    def __call__(self, on_records: Callable[[list[ConsumedRecord]], None], offsets: Mapping[int, int]) -> Consumer: ...


class TopicSize(Protocol):
    """What the bus uses of `cluster.TopicFacts`."""

    @property
    def partitions(self) -> int: ...

    @property
    def max_message_bytes(self) -> int: ...
