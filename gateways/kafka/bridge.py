"""The Trio half of the bridge: bounded windows towards the feeder thread, lists of records from the poller thread.

Costs decide the shape (docs/kafka.md): a hop per record takes 50 µs and more, a deque with one wake per burst 0.4 µs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import trio

from gateways.kafka.cluster import Cluster
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import ConsumedRecord as ConsumedRecord
from gateways.kafka.records import Record as Record


def nothing() -> None:
    """Do nothing: the hook that is not set."""


class ProducerBridge:
    """One kafka-python producer in threads of its own, fed from the Trio thread.

    Everything but `run` and `stop` is synchronous and runs on the Trio thread. Kafka being away fails no record: the
    bridge keeps what it has and goes on trying. Only a record that Kafka can never take fails, alone.

    Attributes:
      after_drain: called on the Trio thread after each burst of `done` calls; set it to `host.flush`.
    """

    after_drain: Callable[[], None]

    def __init__(
        self,
        options: KafkaOptions,
        cluster: Cluster,
        *,
        name: str,
        compression: str | None,
        window_records: int,
        window_bytes: int,
        linger_ms: int = 5,
    ) -> None:
        """`name` stands in logs and client ids; `linger_ms` is the producer's (0 where records are packed already)."""
        raise NotImplementedError

    def offer(self, record: Record) -> None:
        """Take `record`, behind all records before it. Never blocks, never refuses: the caller looks at `full`."""
        raise NotImplementedError

    @property
    def full(self) -> bool:
        """The window is reached, in records or in bytes."""
        raise NotImplementedError

    @property
    def hard_full(self) -> bool:
        """Twice the window is reached: whoever offers must stop altogether."""
        raise NotImplementedError

    def when_room(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, on the Trio thread, at the end of the drain that makes `full` False, before
        `after_drain`; at once when it is False now."""
        raise NotImplementedError

    @property
    def outstanding_records(self) -> int:
        """Records offered and not settled."""
        raise NotImplementedError

    @property
    def outstanding_messages(self) -> int:
        """MQTT messages in them."""
        raise NotImplementedError

    @property
    def outstanding_bytes(self) -> int:
        """Bytes of them, by `Record.measure`."""
        raise NotImplementedError

    @property
    def oldest_age(self) -> float:
        """Seconds since the oldest unsettled record was offered (0 when there is none); about 0.5 s exact."""
        raise NotImplementedError

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the feeder thread until cancelled or stopped; `started()` at once, also while Kafka is away.

        Cancelled, the thread is told to close at once and left to do so.
        """
        raise NotImplementedError

    async def stop(self) -> None:
        """Send what was offered, close. Bounded by the caller's cancel scope: cancelled, the producer is closed by
        force and every unsettled record gets `done(GatewayError)`. Idempotent."""
        raise NotImplementedError

    def counters(self) -> dict[str, int]:
        """`records_sent`, `messages_sent`, `records_failed`, `records_resent`, `rebuilds`."""
        raise NotImplementedError


From = Literal["end", "beginning"]
Assignment = tuple[str, From]


class ConsumerBridge:
    """One kafka-python consumer in a thread of its own, by manual assignment of all partitions of some topics.

    No group and no commits: positions live in the bridge, also across rebuilds.

    Attributes:
      positions_known: set when the first position of every partition is known: nothing published from now on is missed.
      caught_up: set when all topics that are read from the beginning were handed over up to the end that they had at
        the start (after the `on_records` calls with those records).
    """

    positions_known: trio.Event
    caught_up: trio.Event

    def __init__(
        self,
        options: KafkaOptions,
        cluster: Cluster,
        assignments: Sequence[Assignment],
        on_records: Callable[[list[ConsumedRecord]], None],
        *,
        name: str = "bus",
        on_positions_known: Callable[[], None] = nothing,
        on_caught_up: Callable[[], None] = nothing,
    ) -> None:
        """`on_records` is called on the Trio thread with bounded lists (about 128 KiB), per partition in order."""
        raise NotImplementedError

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the poller thread until cancelled; `started()` at once, also while Kafka is away."""
        raise NotImplementedError

    def lag(self) -> dict[tuple[str, int], int]:
        """Records per (topic, partition) that Kafka has and the bridge has not, as of the last fetch."""
        raise NotImplementedError

    def counters(self) -> dict[str, int]:
        """`records_received`, `rebuilds`."""
        raise NotImplementedError
