"""The archive store that keeps its messages in a Kafka topic [K7]."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import trio

from gateways.kafka.bridge import ProducerBridge, nothing
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.dlq import Stage
from gateways.kafka.mapping import JsonMapper
from gateways.kafka.presence import PART as PRESENCE
from gateways.kafka.records import Reason
from mqtt_trio.errors import GatewayError, StoreError
from mqtt_trio.gateway import Message, Outcome

TOPICS: Final = "topics"
"""What the topic manager calls itself towards the cluster."""


class Batch:
    """One submitted batch and the outcomes that are known of it."""

    __slots__ = ("done", "failures", "messages", "missing", "offered")

    def __init__(self, messages: Sequence[Message], done: Callable[[Outcome], None]) -> None:
        self.messages = messages
        self.missing = len(messages)
        """Outcomes that are not known yet."""
        self.offered = 0
        """How many messages the producer has got."""
        self.failures: dict[int, Exception] = {}
        self.done = done


class KafkaArchiveStore:
    """One archive group in one topic; several share the gateway's archive producer.

    Records are made only as far as the producer's window has room: a waiting message costs less than its record.
    """

    def __init__(self, bridge: ProducerBridge, mapper: JsonMapper, dead_letters: DeadLetters | None = None) -> None:
        """`dead_letters` get what no record can be made of; what Kafka refuses goes there from the bridge."""
        self._bridge = bridge
        self._mapper = mapper
        self._dead_letters = dead_letters or DeadLetters()
        self._batches: deque[Batch] = deque()
        self._backlog: deque[Batch] = deque()
        self._waits_for_room = False
        self._empty = trio.Event()
        self.is_over = False
        """What was submitted is stored, or need not be."""
        self._changed: Callable[[], None] = nothing
        self._trouble: str | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch whether Kafka is there for the producer until cancelled. The gateway owns the producer, and `submit`
        may be called from the start."""
        token = trio.lowlevel.current_trio_token()

        def look_soon() -> None:  # any thread
            try:
                token.run_sync_soon(self._look, idempotent=True)
            except trio.RunFinishedError:
                pass

        cluster = self._bridge.cluster
        cluster.listen(look_soon)
        try:
            self._look()
            task_status.started()
            await trio.sleep_forever()
        finally:
            cluster.unlisten(look_soon)

    def _look(self) -> None:
        trouble = self._find_trouble()
        if (trouble is None) != (self._trouble is None):
            self._trouble = trouble
            self._changed()
        self._trouble = trouble

    def _find_trouble(self) -> str | None:
        """What keeps this very topic from being written: others may be away for reasons of their own."""
        cluster, topic = self._bridge.cluster, self._mapper.topic
        trouble = cluster.away_for(self._bridge.name) or cluster.away_for(PRESENCE)
        if trouble is None and cluster.facts(topic) is None:
            found = cluster.trouble(topic)
            trouble = found.text if found is not None else cluster.away_for(TOPICS)
        return trouble

    def trouble(self) -> str | None:
        """Return why the topic cannot be written, while that is so."""
        return self._trouble

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` when that begins and ends."""
        self._changed = changed

    def submit(self, batch: Sequence[Message], done: Callable[[Outcome], None]) -> None:
        """Keep `batch` for the producer; `done` follows in the order of the batches."""
        entry = Batch(batch, done)
        self._batches.append(entry)
        self._backlog.append(entry)
        if not self._waits_for_room:
            self._pump()
        if not batch:
            self._hand_out()

    def _pump(self) -> None:
        """Give the producer what it has room for."""
        self._waits_for_room = False
        bridge, backlog = self._bridge, self._backlog
        while backlog:
            entry = backlog[0]
            messages = entry.messages
            while entry.offered < len(messages):
                if bridge.full:
                    self._waits_for_room = True
                    bridge.when_room(self._pump)
                    return
                index = entry.offered
                entry.offered = index + 1
                self._offer(entry, index, messages[index])
            if backlog and backlog[0] is entry:  # else a `done` submitted more, and that call got here first
                backlog.popleft()

    def _offer(self, entry: Batch, index: int, message: Message) -> None:
        try:
            record = self._mapper.record(message)
        except Exception as exc:  # a message that cannot be mapped must not stop the others
            text = f"{type(exc).__name__}: {exc}"
            self._dead_letters.of_message(Stage.ARCHIVE, message, self._mapper.topic, Reason.UNENCODABLE, text)
            self._settle(entry, index, exc)
            return
        record.done = Settle(self, entry, index)
        self._bridge.offer(record)

    def _settle(self, entry: Batch, index: int, error: Exception | None) -> None:
        if isinstance(error, GatewayError) and error.retriable:
            return  # the producer is closed: what became of the message is not known, and the spool may have it
        if error is not None:
            entry.failures[index] = error if isinstance(error, StoreError) else StoreError(str(error))
        entry.missing -= 1
        if not entry.missing and entry is self._batches[0]:
            self._hand_out()

    def _hand_out(self) -> None:
        """Report the oldest batches as far as they are complete."""
        batches = self._batches
        while batches and not batches[0].missing:
            entry = batches.popleft()
            entry.done(entry.failures)
        if not batches:
            self._empty.set()

    async def stop(self) -> None:
        """Wait until Kafka has what was submitted; the gateway closes the producer. Cancelled, nobody needs it."""
        try:
            while self._batches:
                self._empty = trio.Event()
                await self._empty.wait()
        finally:
            self.is_over = True

    def describe(self) -> str:
        """Return the topic for the start-up summary."""
        return f"Kafka topic {self._mapper.topic}"


class Settle:
    """The outcome of one record; a class because it is made once a message (a closure costs twice as much)."""

    __slots__ = ("_entry", "_index", "_store")

    def __init__(self, store: KafkaArchiveStore, entry: Batch, index: int) -> None:
        self._store = store
        self._entry = entry
        self._index = index

    def __call__(self, error: Exception | None) -> None:
        self._store._settle(self._entry, self._index, error)
