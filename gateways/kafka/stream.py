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
    """One node's end of the stream: a way in, a way out, or both. Trio thread only."""

    def __init__(self, options: KafkaOptions, cluster: Cluster, host: GatewayHost, dead_letters: DeadLetters) -> None:
        """A way that is off has no client of Kafka, hence no thread and no connection."""
        self._options = options
        self._host = host
        self._in = WayIn(options, cluster, host, dead_letters) if options.reads_stream else None
        self._out = WayOut(options, cluster, host, dead_letters) if options.writes_stream else None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `started()` at once. Nothing is read before everything is there that shall see it."""
        async with trio.open_nursery() as nursery:
            if self._in is not None:
                await nursery.start(self._in.incoming.run)
            if self._out is not None:
                await nursery.start(self._out.writer.run)
                await nursery.start(self._out.outgoing.run)
            task_status.started()
            if self._in is not None:
                await self._host.complete.wait()
                await nursery.start(self._in.reader.run)

    async def stop_intake(self) -> None:
        """Publish nothing more, wait until what was published is kept, leave the group. Bounded by the caller's cancel
        scope: cancelled, others may read again what this node published last."""
        if self._in is None:
            return
        try:
            await self._in.incoming.finish()
            await self._in.reader.stop()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(LAST_WORD):  # what is done with shall be stored
                await self._in.reader.stop()

    async def stop(self) -> None:
        """Ship what clients published, close the producer. Bounded by the caller's cancel scope."""
        if self._out is None:
            return
        try:
            await self._out.outgoing.stop()
        finally:
            with trio.CancelScope() as scope:
                if self._out.writer.outstanding_records:
                    scope.cancel()  # Kafka is away, or time is up: nobody waits for the stream
                await self._out.writer.stop()

    def describe(self) -> str:
        """Return a line for the start-up summary."""
        options = self._options
        written = f"of {', '.join(options.topics.messages.filter)}" if self._out is not None else "not written"
        read = f"read in group {options.messages_group}" if self._in is not None else "not read"
        line = f"stream of messages: topic {options.messages_topic}, {written}; {read}"
        return f"{line}; turn it off with [Kafka.Topics.Messages] Enabled = false"

    def counters(self) -> dict[str, int]:
        """Counters by name; what waits is a gauge."""
        found: dict[str, int] = {}
        if self._in is not None:
            reader = self._in.reader
            found |= self._in.incoming.counters()
            found["stream_partitions"] = len(reader.owned)
            found |= {f"stream_consumer_{name}": n for name, n in reader.counters().items()}
        if self._out is not None:
            found |= self._out.outgoing.counters()
            found |= thread_counters("stream_producer", self._out.writer.counters())
        return found


class WayIn:
    """What reads the topic, and publishes what others put there."""

    def __init__(self, options: KafkaOptions, cluster: Cluster, host: GatewayHost, dead_letters: DeadLetters) -> None:
        self.incoming = StreamIn(host.local_client("mqtt.messages"), dead_letters)
        topic, group = options.messages_topic, options.messages_group
        self.reader = GroupBridge(options, cluster, topic, group, self.incoming.on_records, name=CONSUMER)
        self.reader.room = self.incoming.room
        self.reader.poller.thin = self.incoming.own_records.thin


class WayOut:
    """What writes to the topic what clients publish."""

    def __init__(self, options: KafkaOptions, cluster: Cluster, host: GatewayHost, dead_letters: DeadLetters) -> None:
        self._cluster = cluster
        self._topic = options.messages_topic
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
        mapper = JsonMapper(self._topic, host.node_id)
        mapper.mark = (GUARD_HEADER, host.node_id.encode())
        self.outgoing = StreamOut(
            host,
            KafkaArchiveStore(self.writer, mapper, dead_letters, stage=Stage.MESSAGES),
            options.topics.messages.filter,
            window_messages=options.window_messages,
            window_bytes=options.window_bytes,
            is_closed=self._is_closed,
        )

    def _is_closed(self) -> bool:
        return self._cluster.facts(self._topic) is None and self._cluster.trouble(self._topic) is not None
