"""mqtt.messages, the public stream of messages, both ways [K11]: `stream_in` and `stream_out`, with their threads."""

from __future__ import annotations

from typing import Final

import trio

from gateways.kafka.cluster import Cluster
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.group_bridge import GroupBridge
from gateways.kafka.options import KafkaOptions
from gateways.kafka.stream_in import StreamIn
from mqtt_trio.gateway import GatewayHost

CONSUMER: Final = "messages-reader"


class Stream:
    """One node's end of the stream. Trio thread only."""

    def __init__(self, options: KafkaOptions, cluster: Cluster, host: GatewayHost, dead_letters: DeadLetters) -> None:
        self.topic, self.group = options.messages_topic, options.topics.messages.group
        self._host = host
        self.incoming = StreamIn(host.local_client("mqtt.messages"), dead_letters)
        self.reader = GroupBridge(options, cluster, self.topic, self.group, self.incoming.on_records, name=CONSUMER)
        self.reader.room = self.incoming.room

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `started()` at once. Nothing is read before everything is there that shall see it."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.incoming.run)
            task_status.started()
            await self._host.complete.wait()
            await nursery.start(self.reader.run)

    async def stop_intake(self) -> None:
        """Publish nothing more, wait until what was published is kept, leave the group. Bounded by the caller's cancel
        scope: cancelled, others may read again what this node published last."""
        try:
            await self.incoming.finish()
        finally:
            with trio.CancelScope(shield=True):  # bounded by itself; what is done with shall be stored
                await self.reader.stop()

    def describe(self) -> str:
        """Return a line for the start-up summary."""
        return f"stream of messages: topic {self.topic}, read in group {self.group}"

    def counters(self) -> dict[str, int]:
        """Counters by name; what waits is a gauge."""
        return {
            **self.incoming.counters(),
            "stream_partitions": len(self.reader.owned),
            **{f"stream_consumer_{name}": n for name, n in self.reader.counters().items()},
        }
