"""The archive store that keeps its messages in a Kafka topic [K7]."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio

from gateways.kafka.bridge import ProducerBridge, nothing
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.dlq import Stage
from gateways.kafka.mapping import MessageRecord, PatientRecord, RecordMapper
from gateways.kafka.presence import PART as PRESENCE
from gateways.kafka.records import Reason, RecordRefusedError
from mqtt_trio.errors import StoreError
from mqtt_trio.gateway import NO_PROPERTIES, Message, Outcome

PART_RECORDS: Final = 250
PART_BYTES: Final = 256 * 1024
"""Records, and bytes of memory, that the producer gets between two looks at its window."""
RECORD_MEMORY: Final = 1000
"""Bytes of memory that a record takes beside its contents."""
TOPICS: Final = "topics"
"""What the topic manager calls itself towards the cluster."""


class Batch:
    """One submitted batch and the outcomes that are known of it."""

    __slots__ = ("done", "failures", "offered", "parts", "records", "returned", "settled", "size")

    def __init__(self, records: list[MessageRecord], done: Callable[[Outcome], None]) -> None:
        self.records = records
        self.offered = 0
        """How many of them the producer has got."""
        self.settled = 0
        """How many from the first one on have their outcome."""
        self.parts: deque[tuple[int, int]] = deque()
        """What takes room in the producer's window, as it was offered: where each part ends, and its bytes."""
        self.returned = 0
        """How many records, from the first one on, have given their room back."""
        self.size = 0
        """Bytes of the parts together."""
        self.failures: dict[int, Exception] = {}
        self.done = done


class Preparation(Protocol):
    """What must be known before the first record can be made, such as the id of a schema."""

    trouble: str | None
    """Why it cannot be known at present."""

    @property
    def url(self) -> str:
        """Who knows it."""

    async def run(self, changed: Callable[[], None]) -> None:
        """Find out, until the mapper `is_ready`; call `changed` after each attempt."""


class KafkaArchiveStore:
    """One archive group in one topic; several share the gateway's archive producer.

    A record is made when it is sent: a waiting message costs less than its record. Outcomes are looked for in the order
    of the records, once for each burst of them.
    """

    def __init__(
        self,
        bridge: ProducerBridge,
        mapper: RecordMapper,
        dead_letters: DeadLetters | None = None,
        preparation: Preparation | None = None,
        *,
        spooled: bool = False,
        stage: Stage = Stage.ARCHIVE,
    ) -> None:
        """`dead_letters` get what no record can be made of; what Kafka refuses goes there from the bridge.
        `preparation` makes the mapper ready: until then nothing is sent. `spooled`: the group has a spool, so a record
        that finds its topic gone or closed is not given up. It waits for the topic, before what is in the spool.
        `stage` stands in letters."""
        self._stage = stage
        self._bridge = bridge
        self._preparation = preparation
        self._mapper = mapper
        self._dead_letters = dead_letters or DeadLetters()
        self._spooled = spooled
        self._make_record = PatientRecord if spooled else MessageRecord
        self._lent: tuple[int, int] | None = None  # records and bytes of the producer's window, for the others to use
        self._batches: deque[Batch] = deque()
        self._backlog: deque[Batch] = deque()
        self._waits_for_room = self._closed = False
        self._empty = trio.Event()
        self._runs = False
        self.tried = trio.Event()
        """An attempt to make the mapper ready has ended, or none is needed."""
        if preparation is None:
            self.tried.set()
        self.is_over = False
        """What was submitted is stored, or need not be."""
        self._changed: Callable[[], None] = nothing
        self._trouble: str | None = None
        bridge.collectors.append(self._collect)

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
            self._runs = True
            self._look()
            task_status.started()
            await trio.sleep_forever()
        finally:
            cluster.unlisten(look_soon)

    async def prepare(self) -> None:
        """Find out what the mapper needs to be ready; the gateway runs it, from before `run`. Cancellation ends it."""
        if self._preparation is not None:
            await self._preparation.run(self._tried)

    def _tried(self) -> None:
        """An attempt to make the mapper ready has ended. What waits goes first: others are told of the end of an
        outage then, and submit more."""
        self.tried.set()
        if self._mapper.is_ready:
            self._pump()
        if self._runs:
            self._look()

    def _look(self) -> None:
        self._share_window()
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
        return trouble or self.unprepared

    @property
    def unprepared(self) -> str | None:
        """Why no record can be made at present; None: they can, as far as is known."""
        return self._preparation.trouble if self._preparation is not None else None

    def _share_window(self) -> None:
        """Let the producer's other topics have the room of records that wait for a topic which is gone or closed: these
        may wait for days. They stay within the window of their group."""
        cluster, topic = self._bridge.cluster, self._mapper.topic
        waits = self._spooled and cluster.facts(topic) is None and cluster.trouble(topic) is not None
        if waits and self._lent is None:
            offered = sum(entry.offered - entry.returned for entry in self._batches)
            self._lent = offered, sum(entry.size for entry in self._batches)
            self._bridge.make_room(*self._lent)
        elif not waits and self._lent is not None:
            records, size = self._lent
            self._lent = None
            self._bridge.make_room(-records, -size)
            self._pump()

    def trouble(self) -> str | None:
        """Return why the topic cannot be written, while that is so."""
        return self._trouble

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` when that begins and ends."""
        self._changed = changed

    def submit(self, batch: Sequence[Message], done: Callable[[Outcome], None]) -> None:
        """Keep `batch` for the producer; `done` follows in the order of the batches."""
        mapper, make_record = self._mapper, self._make_record
        entry = Batch([make_record(mapper, message) for message in batch], done)
        self._batches.append(entry)
        self._backlog.append(entry)
        if not self._waits_for_room and self._lent is None:
            self._pump()
        if not batch:
            self._collect()

    def _pump(self) -> None:
        """Give the producer what it has room for, once records can be made."""
        self._waits_for_room = not self._mapper.is_ready
        if self._waits_for_room or self._lent is not None:
            return
        bridge, backlog = self._bridge, self._backlog
        while backlog:
            entry = backlog[0]
            records = entry.records
            while entry.offered < len(records):
                if bridge.full:
                    self._waits_for_room = True
                    bridge.when_room(self._pump)
                    return
                part, size = next_part(records, entry.offered)
                entry.offered += len(part)
                entry.parts.append((entry.offered, size))
                entry.size += size
                bridge.offer_all(part, size)
            if backlog and backlog[0] is entry:  # else a `done` submitted more, and that call got here first
                backlog.popleft()

    def _collect(self) -> None:
        """Report the oldest batches as far as all outcomes are known."""
        batches = self._batches
        while batches and not self._closed:
            entry = batches[0]
            records, at = entry.records, entry.settled
            offered = entry.offered
            while at < offered and (record := records[at]).settled:
                if record.error is not None and not self._note(entry, at, record, record.error):
                    return
                at += 1
            entry.settled = at
            self._give_back(entry)
            if at < len(records):
                return
            batches.popleft()
            entry.done(entry.failures)
        if not batches:
            self._empty.set()

    def _give_back(self, entry: Batch) -> None:
        """Let the producer have the room of parts whose outcomes are known: a batch may be larger than its window."""
        begin, size = entry.returned, 0
        while entry.parts and entry.parts[0][0] <= entry.settled:
            entry.returned, part_size = entry.parts.popleft()
            size += part_size
        count = entry.returned - begin
        if count:
            entry.size -= size
            failed = sum(begin <= index < entry.returned for index in entry.failures)
            self._bridge.give_back(sent=count - failed, failed=failed, size=size)

    def _note(self, entry: Batch, index: int, record: MessageRecord, error: Exception) -> bool:
        """Take the outcome of a record that is not in Kafka; False: the producer is closed, what became of it is not
        known, and the spool may have it."""
        if not isinstance(error, RecordRefusedError):
            self._closed = True
            return False
        entry.failures[index] = StoreError(str(error))
        if error.reason is Reason.UNENCODABLE:
            topic = self._mapper.topic
            self._dead_letters.of_message(self._stage, record.message, topic, error.reason, str(error))
        else:
            self._bridge.tell_refused(record, error)
        return True

    async def stop(self) -> None:
        """Wait until Kafka has what was submitted; the gateway closes the producer. Cancelled, nobody needs it."""
        try:
            while self._batches:
                self._empty = trio.Event()
                await self._empty.wait()
        finally:
            self.is_over = True

    def describe(self) -> str:
        """Return topic and format for the start-up summary."""
        mapper = self._mapper
        if mapper.form == "JSON":
            return f"Kafka topic {mapper.topic}"
        registry = "" if self._preparation is None else f", schema registry {self._preparation.url}"
        return f"Kafka topic {mapper.topic} ({mapper.form}{registry})"


def next_part(records: Sequence[MessageRecord], start: int) -> tuple[Sequence[MessageRecord], int]:
    """Return the next records that are offered together, and about how many bytes of memory they take: a waiting small
    record takes more than a kilobyte in kafka-python, a large one its message twice."""
    size = 0
    for end in range(start, min(start + PART_RECORDS, len(records))):
        message = records[end].message
        size += RECORD_MEMORY + 3 * len(message.topic_name) + 2 * len(message.payload)
        if message.properties is not NO_PROPERTIES:
            size += sum(len(name) + len(value) for name, value in message.properties.user_properties)
        if size > PART_BYTES:
            return records[start : end + 1], size
    return records[start : start + PART_RECORDS], size
