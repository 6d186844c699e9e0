"""mqtt.messages, the public stream of messages, both ways [K11]: `stream_in` and `stream_out`, with their threads."""

from __future__ import annotations

from functools import partial
from typing import Final

import trio

from gateways.kafka.archive import KafkaArchiveStore
from gateways.kafka.bridge import ProducerBridge
from gateways.kafka.cluster import Cluster
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.dlq import Stage
from gateways.kafka.group_bridge import GroupBridge
from gateways.kafka.mapping import JsonMapper
from gateways.kafka.options import KafkaOptions
from gateways.kafka.stream_in import StreamIn
from gateways.kafka.stream_out import StreamOut
from gateways.kafka.stream_records import GUARD_HEADER
from gateways.kafka.thread_counters import thread_counters
from mqtt_trio.gateway import GatewayHost

CONSUMER: Final = "messages-reader"
PRODUCER: Final = "messages"
LAST_WORD: Final = 0.5
"""Seconds that a stop whose time is up still gives the reader to store offsets; its thread goes on with that anyway."""


class Stream:
    """One node's end of the stream. Trio thread only."""

    def __init__(self, options: KafkaOptions, cluster: Cluster, host: GatewayHost, dead_letters: DeadLetters) -> None:
        self.topic, self.group = options.messages_topic, options.messages_group
        self.filters = options.topics.messages.filter
        self._host = host
        self._cluster = cluster
        self.incoming = StreamIn(host.local_client("mqtt.messages"), dead_letters)
        self.reader = GroupBridge(options, cluster, self.topic, self.group, self.incoming.on_records, name=CONSUMER)
        self.reader.room = self.incoming.room
        self.writer = ProducerBridge(
            options,
            cluster,
            name=PRODUCER,
            compression="lz4",
            window_records=options.window_messages,
            window_bytes=options.window_bytes,
            lazy=True,
        )
        self.writer.on_refused = partial(dead_letters.refused, Stage.MESSAGES)
        self.writer.after_drain = host.flush
        mapper = JsonMapper(self.topic, host.node_id)
        mapper.mark = (GUARD_HEADER, host.node_id.encode())
        self.outgoing = StreamOut(
            host,
            KafkaArchiveStore(self.writer, mapper, dead_letters, stage=Stage.MESSAGES),
            self.filters,
            window_messages=options.window_messages,
            window_bytes=options.window_bytes,
            is_closed=self._is_closed,
        )

    def _is_closed(self) -> bool:
        return self._cluster.facts(self.topic) is None and self._cluster.trouble(self.topic) is not None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `started()` at once. Nothing is read before everything is there that shall see it."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.incoming.run)
            if self.filters:
                await nursery.start(self.writer.run)
                await nursery.start(self.outgoing.run)
            task_status.started()
            await self._host.complete.wait()
            await nursery.start(self.reader.run)

    async def stop_intake(self) -> None:
        """Publish nothing more, wait until what was published is kept, leave the group. Bounded by the caller's cancel
        scope: cancelled, others may read again what this node published last."""
        try:
            await self.incoming.finish()
            await self.reader.stop()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(LAST_WORD):  # what is done with shall be stored
                await self.reader.stop()

    async def stop(self) -> None:
        """Ship what clients published, close the producer. Bounded by the caller's cancel scope."""
        if not self.filters:
            return
        try:
            await self.outgoing.stop()
        finally:
            with trio.CancelScope() as scope:
                if self.writer.outstanding_records:
                    scope.cancel()  # Kafka is away, or time is up: nobody waits for the stream
                await self.writer.stop()

    def describe(self) -> str:
        """Return a line for the start-up summary."""
        written = f"of {', '.join(self.filters)}" if self.filters else "not written"
        return f"stream of messages: topic {self.topic}, {written}; read in group {self.group}"

    def counters(self) -> dict[str, int]:
        """Counters by name; what waits is a gauge."""
        return {
            **self.incoming.counters(),
            **self.outgoing.counters(),
            "stream_partitions": len(self.reader.owned),
            **{f"stream_consumer_{name}": n for name, n in self.reader.counters().items()},
            **thread_counters("stream_producer", self.writer.counters()),
        }
