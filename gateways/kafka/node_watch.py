"""Whether a node is alive, as somebody sees it who reads the bus topic. Blocking, for commands.

A node says so every few seconds [K21]. Kafka knows nothing of it: a node assigns its partitions itself, so its group
has no members, and timestamps of records are as good as the clocks of the nodes. So the answer takes a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from gateways.kafka.bus_records import BusRecordError, Kind, decode_header
from gateways.kafka.nodes import ANNOUNCE_INTERVAL
from gateways.kafka.records import ConsumedRecord

LISTEN: Final = 2 * ANNOUNCE_INTERVAL + 1
"""Seconds of silence after which a node counts as dead: two announcements are missing."""
CATCH_UP: Final = 30.0
"""Seconds behind these to read what was written meanwhile."""
POLL: Final = 0.2


class ConsumerLike(Protocol):
    """What is needed of `workers.Consumer`."""

    def partitions(self, topic: str) -> list[int]: ...
    def end_offsets(self, partitions: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]: ...
    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None: ...
    def poll(self, timeout: float) -> list[ConsumedRecord]: ...
    def position(self, partition: tuple[str, int]) -> int: ...


def hears_from(
    consumer: ConsumerLike, topic: str, node_id: str, passed: Callable[[int], None], listen: float = LISTEN
) -> bool | None:
    """Listen to the bus topic for `listen` seconds, and say whether node `node_id` writes there.

    `passed` is told of each second that passed. Returns None when the bus is too busy to read all that was written
    meanwhile: nothing is known then.
    """
    partitions = [(topic, number) for number in consumer.partitions(topic)]
    if not partitions:
        return False
    consumer.assign(consumer.end_offsets(partitions))
    start = time.monotonic()
    told = 0
    while (spent := time.monotonic() - start) < listen:
        if any(_is_from(record, node_id) for record in consumer.poll(POLL)):
            return True
        passed(int(spent) - told)
        told = int(spent)
    ends = consumer.end_offsets(partitions)
    while any(consumer.position(p) < end for p, end in ends.items()):
        if time.monotonic() - start > listen + CATCH_UP:
            return None
        if any(_is_from(record, node_id) for record in consumer.poll(POLL)):
            return True
    return False


def _is_from(record: ConsumedRecord, node_id: str) -> bool:
    try:
        header = decode_header(record.value or b"")
    except BusRecordError:  # of another version, or no node's at all
        return False
    return header.node_id == node_id and header.kind is not Kind.GOODBYE
