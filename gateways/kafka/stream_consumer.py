"""The member of a group that reads the stream of messages, as `GroupPoller` uses it [K11].

Cooperative: in a rebalance a member goes on with what it keeps. It joins dynamically: a node that was killed leaves its
partitions to others when its session ends, ten seconds later, one that stops in order at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final

from kafka import TopicPartition
from kafka.errors import GroupAuthorizationFailedError, TopicAuthorizationFailedError

from gateways.kafka.client_settings import begins_at_end
from gateways.kafka.lag import Partition
from gateways.kafka.member_consumer import GroupListener, MemberConsumer, pairs, stored
from gateways.kafka.options import WITHOUT_READING, KafkaOptions
from gateways.kafka.topic_plan import KafkaTools

POSITION_TIMEOUT_MS: Final = 1000
NotStored = Callable[[Mapping[Partition, int], Exception], None]


class StreamConsumer(MemberConsumer):
    """A member of a group of one topic. Where the group has no offset yet, reading begins with the oldest record, or,
    with `auto_offset_reset = "latest"`, with what is new [K16]; where Kafka deleted what an offset points at, with the
    oldest that is left."""

    def __init__(self, options: KafkaOptions, name: str, group: str, topic: str, listener: GroupListener) -> None:
        """Connect. Blocks for three seconds at most.

        Raises:
          kafka.errors.KafkaError: no broker answers, or does not let us in.
        """
        super().__init__(options, name, group, [topic], listener)
        self._begins_at_end = begins_at_end(options)

    def join(self) -> None:
        """Become a member; partitions come with later calls of `poll`. Blocks, where the group may have no offsets."""
        if self._begins_at_end:
            self.begin_at_end()
        super().join()

    def partitions(self, topic: str) -> list[int]:
        """Return the partitions of `topic` as the client knows them; none when there is no such topic."""
        return sorted(self._consumer.partitions_for_topic(topic) or ())

    def identity(self, topic: str) -> object:
        """Return what tells `topic` from an earlier one of its name; None: the client does not know."""
        return self._consumer._client.cluster.topic_id(topic)

    def owned(self) -> frozenset[Partition]:
        """Return the partitions that are ours."""
        return frozenset(pairs(self._consumer.assignment()))

    def position(self, partition: Partition) -> int:
        """Return the offset of the next record to be polled."""
        return int(self._consumer.position(TopicPartition(*partition), POSITION_TIMEOUT_MS) or 0)

    def highwater(self, partition: Partition) -> int | None:
        """Return the end of the partition as of the last fetch."""
        found: int | None = self._consumer.highwater(TopicPartition(*partition))
        return found

    def store(self, offsets: Mapping[Partition, int], failed: NotStored) -> None:
        """Store offsets in the group; a later `poll` tells when Kafka did not take them."""
        self._consumer.commit_async(stored(offsets), callback=partial(answered, offsets, failed))

    def store_now(self, offsets: Mapping[Partition, int], timeout: float) -> None:
        """Store offsets and wait for Kafka's answer, `timeout` seconds at most; a failure is not told."""
        with suppress(Exception):
            self.commit(offsets, timeout)


def answered(offsets: Mapping[Partition, int], failed: NotStored, _stored: object, answer: object) -> None:
    """Kafka has answered a commit."""
    if isinstance(answer, Exception):
        failed(offsets, answer)


def mend_of(options: KafkaOptions, group: str, error: Exception) -> str:
    """Say what somebody can do about a right that this node's user lacks; nothing of other errors."""
    tools = KafkaTools.of(options)
    if isinstance(error, GroupAuthorizationFailedError):
        return f"; somebody who may: {tools.allow_group(group)}{WITHOUT_READING}"
    if isinstance(error, TopicAuthorizationFailedError):
        return f"; somebody who may: {tools.allow(options.messages_topic, 'Read')}{WITHOUT_READING}"
    return ""
