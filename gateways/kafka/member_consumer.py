"""A KafkaConsumer that shares its topics with the other members of a group [K14]. Blocking.

`member` uses it from one thread; what the listener says comes from kafka-python's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

import attrs
import kafka.errors as kafka_errors
from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import OffsetAndMetadata

from gateways.kafka import batches
from gateways.kafka.client_metrics import ClientFigures, ClientMetrics, FetchWatch
from gateways.kafka.options import KafkaOptions
from gateways.kafka.poller import COMMIT_NOTE, Partition
from gateways.kafka.records import ConsumedRecord
from gateways.kafka.workers import (
    ENDS_TIMEOUT_MS,
    common_config,
    consumed,
    is_connected,
    leak_safe,
    normal_keys,
    release_parked,
)

OFFSETS_TIMEOUT_MS: Final = 5000
CLOSE_TIMEOUT_MS: Final = 2000
SHORTEST_WAIT: Final = 0.05
"""Seconds that a look for records takes at least where none come."""
REJOIN: Final = (
    kafka_errors.CommitFailedError,
    kafka_errors.RebalanceInProgressError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.IllegalGenerationError,
)
"""Offsets are not stored because the group is sharing its partitions out anew, or has done so without this member."""
DENIALS: Final = (
    kafka_errors.TopicAuthorizationFailedError,
    kafka_errors.GroupAuthorizationFailedError,
    kafka_errors.FencedInstanceIdError,
    kafka_errors.InvalidGroupIdError,
    kafka_errors.InvalidSessionTimeoutError,
    kafka_errors.InconsistentGroupProtocolError,
)
"""What another attempt meets as well."""


class GroupListener(Protocol):
    """Who is told which partitions this member has. kafka-python's thread: it must not block."""

    def assigned(self, partitions: Sequence[Partition]) -> None:
        """These are this member's now."""

    def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, int]:
        """These go to other members; return the offsets to store of them first."""

    def lost(self, partitions: Sequence[Partition]) -> None:
        """Other members may have these already: nothing can be stored of them."""


def is_denial(error: BaseException) -> bool:
    """Tell whether Kafka refuses this member for what it is or may do, so that no repetition can help."""
    return isinstance(error, DENIALS)


def is_rejoin(error: BaseException) -> bool:
    """Tell whether offsets were not stored because the group shares its partitions out anew."""
    return isinstance(error, REJOIN)


def pairs(partitions: Any) -> list[Partition]:
    """Return kafka-python's partitions as ours."""
    return [(p.topic, p.partition) for p in partitions]


def stored(offsets: Mapping[Partition, int]) -> dict[TopicPartition, OffsetAndMetadata]:
    """Return offsets as kafka-python stores them."""
    return {TopicPartition(*p): OffsetAndMetadata(at, f"{COMMIT_NOTE}{at}", -1) for p, at in offsets.items()}


def never_spin(coordinator: Any) -> None:
    """Let `poll` wait although a heartbeat is overdue. kafka-python looks for records until the next one is due: where
    Kafka does not answer the last one that is at once, thousands of times a second, for as long as the session lasts.
    Its network thread sends them, and needs no `poll` for that."""
    time_to_next_poll = coordinator.time_to_next_poll
    coordinator.time_to_next_poll = lambda: max(SHORTEST_WAIT, time_to_next_poll())


class Rebalances(AsyncConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Passes on what the group decides, and stores offsets before a partition goes."""

    consumer: Any = None

    def __init__(self, listener: GroupListener) -> None:
        self._listener = listener

    async def on_partitions_assigned(self, assigned: Any) -> None:
        self._listener.assigned(pairs(assigned))

    async def on_partitions_revoked(self, revoked: Any) -> None:
        offsets = self._listener.revoked(pairs(revoked))
        if offsets:
            with suppress(kafka_errors.KafkaError):  # what is not stored is read again by whoever has them next
                await self.consumer.commit_async(stored(offsets))

    async def on_partitions_lost(self, lost: Any) -> None:
        self._listener.lost(pairs(lost))


class MemberConsumer:
    """One member of a group. One thread has it. When offsets are stored is for that thread to say: kafka-python's own
    automatic commits are off, since it knows of a record only that it has handed it out."""

    def __init__(
        self, options: KafkaOptions, name: str, group: str, topics: Sequence[str], listener: GroupListener
    ) -> None:
        """Connect. Blocks for three seconds at most. `name` ends the client id.

        Raises:
          kafka.errors.KafkaError: no broker answers, or does not let us in.
        """
        config = common_config(options, name) | {
            "max_partition_fetch_bytes": 4 * 1024 * 1024,
            "max_poll_records": 500,
            "session_timeout_ms": 10_000,
            "partition_assignment_strategy": (CooperativeStickyAssignor,),
        }
        config |= normal_keys(options.consumer) | {
            "enable_auto_commit": False,
            # Where the group has no offset, or Kafka has deleted what it points at; `begin_at_end` for "latest".
            "auto_offset_reset": "earliest",
        }
        batches.install()
        self._topics = list(topics)
        self._rebalances = Rebalances(listener)
        with leak_safe() as make_client:
            self._consumer = KafkaConsumer(
                kafka_client=make_client,
                group_id=group,
                **config,
            )
        self._rebalances.consumer = self._consumer
        never_spin(self._consumer._coordinator)
        self._metrics = ClientMetrics(self._consumer, "consumer")
        self._fetches = FetchWatch(self._consumer._fetcher, kafka_errors.Cancelled)

    def missing(self) -> list[str]:
        """Return the topics that do not exist, or may not be seen."""
        return [topic for topic in self._topics if not self._consumer.partitions_for_topic(topic)]

    def begin_at_end(self) -> None:
        """Store the ends of the topics for a group that has no offsets of them, before it is joined: a member that
        dies before its first commit has a successor that begins where it did. Partitions that are added later are read
        from their beginning."""
        partitions = [TopicPartition(t, n) for t in self._topics for n in self._consumer.partitions_for_topic(t) or ()]
        known = [self._consumer.committed(p, timeout_ms=OFFSETS_TIMEOUT_MS) for p in partitions]
        if not partitions or any(offset is not None for offset in known):
            return
        ends = self._consumer.end_offsets(partitions, OFFSETS_TIMEOUT_MS)
        with suppress(*REJOIN):  # the group has members: one of them did the same
            self._consumer.commit(stored({(p.topic, p.partition): at for p, at in ends.items()}), OFFSETS_TIMEOUT_MS)

    def join(self) -> None:
        """Become a member; partitions come with later calls of `poll`."""
        self._consumer.subscribe(self._topics, listener=self._rebalances)

    def poll(self, timeout: float, *, paused: bool) -> list[ConsumedRecord]:
        """Return what has come, in order per partition; waits for at most `timeout` seconds. `paused`: bring no
        records, remain a member."""
        assignment = self._consumer.assignment()
        (self._consumer.pause if paused else self._consumer.resume)(*assignment)
        release_parked(self._consumer)
        self._go_on_joining()
        found = self._consumer.poll(timeout_ms=int(timeout * 1000))
        return [consumed(record) for records in found.values() for record in records]

    def _go_on_joining(self) -> None:
        """Have a join finished that the last `poll` began. kafka-python forgets about it where that ended after the
        leader had dealt out the shares of a topic that has grown, and before Kafka had answered: this member would
        send no heartbeat any more, store no offset, and read on what is long another's."""
        coordinator = self._consumer._coordinator
        if coordinator.rejoining:
            coordinator.request_rejoin()

    def commit(self, offsets: Mapping[Partition, int], timeout: float) -> None:
        """Store offsets; returns when Kafka has them.

        Raises:
          kafka.errors.KafkaError: they are not stored, or not known to be.
        """
        self._consumer.commit(stored(offsets), timeout_ms=int(timeout * 1000))

    def standing(self) -> tuple[dict[Partition, int], dict[Partition, int | None]]:
        """Return where reading is and where partitions end, as of the last fetch; of those that a place is known of."""
        positions: dict[Partition, int] = {}
        ends: dict[Partition, int | None] = {}
        states = self._consumer._subscription.assignment  # `position()` may ask Kafka, and wait
        for p in self._consumer.assignment():
            state = states.get(p)
            if state is not None and state.position is not None:
                positions[p.topic, p.partition] = state.position.offset
                ends[p.topic, p.partition] = state.highwater
        return positions, ends

    def latest_ends(self, partitions: Sequence[Partition]) -> dict[Partition, int]:
        """Ask Kafka where partitions end; gives up soon."""
        found = self._consumer.end_offsets([TopicPartition(*p) for p in partitions], ENDS_TIMEOUT_MS)
        return {(p.topic, p.partition): offset for p, offset in found.items()}

    def figures(self) -> ClientFigures:
        """Return what the client says about itself, and how its fetches fared."""
        watch = self._fetches
        return attrs.evolve(self._metrics.read(), failed_fetches=watch.failed, answered_at=watch.answered_at)

    @property
    def connected(self) -> bool:
        """A connection to some broker stands."""
        return is_connected(self._consumer._client)

    def close(self) -> None:
        """Leave the group; blocks for two seconds at most."""
        with suppress(Exception):
            self._consumer.close(autocommit=False, timeout_ms=CLOSE_TIMEOUT_MS)
