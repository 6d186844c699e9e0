"""What clients of this node publish, as JSON records in mqtt.messages for everybody [K11].

A record for each message costs ten times what the bus needs, so this is bounded, and nobody's promise: what the stream
leaves out still reaches subscribers, archive groups and other nodes. In a window everything is taken. Beyond it QoS 0
is left out, and QoS 1 and 2 publishers wait until there is room: they go as fast as Kafka takes the stream. While Kafka
is away nobody waits for it: what the window cannot hold is left out, whatever its QoS. All that is left out is counted.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import trio

from gateways.kafka.archive import RECORD_MEMORY, KafkaArchiveStore
from gateways.kafka.bus_window import BusWindow
from gateways.kafka.stream_records import OutsideMessage
from mqtt_trio.gateway import (
    Answer,
    FrameRun,
    GatewayHost,
    Hold,
    Message,
    Outcome,
    Rank,
    TapRoute,
    is_system_topic,
    read_run,
    topic_matches,
)

log = logging.getLogger("gateways.kafka.messages")

LINGER: Final = 0.002
"""Seconds that messages wait to become records together."""
BATCH: Final = 250
"""Messages that become records in one stretch."""


class StreamOut:
    """The tap of the stream, and its one route. Trio thread only."""

    rank = Rank.SHIPS

    def __init__(
        self,
        host: GatewayHost,
        store: KafkaArchiveStore,
        filters: Sequence[str],
        *,
        window_messages: int,
        window_bytes: int,
        is_closed: Callable[[], bool] = lambda: False,
    ) -> None:
        """`store` makes and ships the records; the window: `window_messages`, and `window_bytes` of memory that they
        take; `is_closed`: the topic is missing or forbidden although Kafka answers."""
        self.left_out = self.written = self.failed = 0
        self.window = BusWindow(
            window_messages,
            window_bytes,
            stop=partial(host.stop_publishers, self),
            resume=partial(host.resume_publishers, self),
        )
        self._host = host
        self._store = store
        self._filters = tuple(filters)
        self._is_closed = is_closed
        self._away = False
        self._pending: deque[FrameRun | Message] = deque()
        self._arrived = trio.Event()
        store.watch(self._look)

    # --- tap

    def route(self, topic_name: str) -> TapRoute | None:
        """Return this stream when it wants `topic_name`. $SYS is never in it."""
        if is_system_topic(topic_name):
            return None
        return self if any(topic_matches(each, topic_name) for each in self._filters) else None

    def take_run(self, run: FrameRun) -> Answer:
        """Take a run as it is; it is decoded when it is shipped."""
        return self._take(run, run.count, size_of(run), run.qos)

    def take(self, message: Message) -> Answer:
        """Take one message, but none that came from the stream."""
        if isinstance(message, OutsideMessage):
            return None
        return self._take(message, 1, size_of(message), message.qos)

    def _take(self, item: FrameRun | Message, count: int, size: int, qos: int) -> Answer:
        window, answer = self.window, None
        if self._away and self._is_closed():  # else each of them would be a dead letter
            self.left_out += count
            return None
        if not window.full:
            window.add(count, size)
        else:
            answer = window.beyond(qos, count, size) if qos and not self._away else None
            if not isinstance(answer, Hold):
                self.left_out += count
                return None
        self._pending.append(item)
        if not self._arrived.is_set():
            self._arrived.set()
        return answer

    # --- to the store

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Make records of what comes, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._store.run)
            self._look()
            self._host.add_tap(self)
            task_status.started()
            while True:
                await self._arrived.wait()
                await trio.sleep(LINGER)
                self._arrived = trio.Event()
                while self._pending:
                    self._ship()
                    await trio.lowlevel.checkpoint()

    def _ship(self) -> None:
        """Hand about BATCH messages to the store."""
        messages: list[Message] = []
        size = 0
        while self._pending and len(messages) < BATCH:
            item = self._pending.popleft()
            size += size_of(item)
            messages += [item] if isinstance(item, Message) else read_run(item)
        self._store.submit(messages, partial(self._settle, len(messages), size))

    def _settle(self, count: int, size: int, failures: Outcome) -> None:
        """A batch has its outcome; what failed is a dead letter."""
        failed = len(failures)
        self.failed += failed
        self.written += count - failed
        self.window.settle(count, size)

    def _look(self) -> None:
        """Kafka, or the topic, went away or is back."""
        self._away = self._store.trouble() is not None
        if self._away:
            self.window.release_all()
            self._host.flush()

    async def stop(self) -> None:
        """Ship what waits; back when Kafka has it, at once while it is away. Bounded by the caller's cancel scope."""
        while self._pending:
            self._ship()
        try:
            if self._store.trouble() is None:
                await self._store.stop()
        finally:
            if missing := self.window.messages:
                log.warning("%d messages are not in the stream of messages: Kafka did not take them in time", missing)
            self.window.release_all()
            self._host.flush()

    def counters(self) -> dict[str, int]:
        """Counters by name; what waits is a gauge."""
        window = self.window
        return {
            "stream_messages_written": self.written,
            "stream_messages_left_out": self.left_out,
            "stream_messages_failed": self.failed,
            "stream_messages_held": window.held,
            "stream_messages_waiting": window.messages,
            "stream_publishers_stopped": window.stops,
        }


def size_of(item: FrameRun | Message) -> int:
    """Bytes of memory that an item counts for."""
    if isinstance(item, FrameRun):
        return len(item.frames) + RECORD_MEMORY * item.count
    return len(item.topic_name) + len(item.payload) + RECORD_MEMORY
