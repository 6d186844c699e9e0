"""Writing the records of dead letters again, each once [K12].

A record that is written again has the letter's id in a header, and mqtt.dlq gets a note under the letter's key that it
was. Where the note is missing (it was interrupted in between) the target is searched for the id, from the time of the
oldest letter on: a record is written with the time that it would have had, so it lies behind the first one that is as
old. One redrive runs at a time: it is the only member of a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from gateways.kafka.command_arguments import EXIT_FAILURE, table
from gateways.kafka.dlq import ID_HEADER, DeadLetter
from gateways.kafka.dlq_box import Administrator, Letterbox, LetterFilter, Note, printable
from gateways.kafka.dlq_writer import Notes, Pending, ProducerLike, Writer, redriven_record
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import ConsumedRecord
from gateways.kafka.topic_plan import TopicState
from gateways.kafka.topic_reader import ConsumerLike, read_range, total
from mqtt_trio.errors import GatewayError

if TYPE_CHECKING:
    from mqtt_trio.gateway import Console

Partition: TypeAlias = tuple[str, int]
GROUP: Final = "mqtt-trio-dlq-redrive"
MOST_LETTERS: Final = 100_000
"""Letters of one redrive. Outcome: further ones are left for the next."""
MOST_BYTES: Final = 256 * 1024 * 1024
"""Bytes of records of one redrive. Outcome as above."""
MAX_BYTES: Final = "max.message.bytes"
CLOSE_TIMEOUT: Final = 5.0


@attrs.define
class Collected:
    """What a look into mqtt.dlq brought."""

    pending: dict[str, Pending] = attrs.Factory(dict)
    """By id; one for letters that came twice."""
    done: int = 0
    """Letters with a note."""
    left: int = 0
    """Letters beyond the bounds of one redrive."""
    size: int = 0
    skipped: Counter[str] = attrs.Factory(Counter)
    """Letters that cannot be redriven, by why."""


class Redriver:
    """See the module. Blocking."""

    def __init__(
        self,
        admin: Administrator,
        consumer: ConsumerLike,
        options: KafkaOptions,
        console: Console,
        targets: Set[str],
    ) -> None:
        """`targets`: the only topics to write to. Anybody may write to mqtt.dlq, so a letter's word is not enough."""
        self._admin = admin
        self._consumer = consumer
        self._options = options
        self._console = console
        self._targets = targets
        self.value: bytes | None = None
        """What the record of the one letter shall hold instead: somebody has mended it."""

    def run(self, box: Letterbox, wanted: LetterFilter, *, execute: bool) -> int:
        """Show what is to be done, do it if told to; return the exit code.

        Raises:
          GatewayError: another redrive is running, Kafka does not do its part, or a value is given for several letters.
        """
        if not execute:
            self._prepare(box, wanted)
            self._console.say("Nothing was written: --execute does it.")
            return 0
        with alone(self._options, GROUP, box.topic):
            todo, there = self._prepare(box, wanted)
            return self._write(box.topic, todo, there) if todo or there else 0

    def _prepare(self, box: Letterbox, wanted: LetterFilter) -> tuple[list[Pending], dict[str, str]]:
        """Return what is to be written, in the order in which it was published; and what is there already, by id."""
        found = self._collect(box, wanted)
        box.report(self._console)
        self._mend(found)
        sizes = self._sizes(found)
        there = self._search(list(found.pending.values()), sizes)
        todo = [one for identity, one in found.pending.items() if identity not in there]
        todo.sort(key=lambda one: (one.timestamp_ms, one.letter.dead_at_ms))
        self._show(found, todo)
        return todo, there

    # --- which

    def _collect(self, box: Letterbox, wanted: LetterFilter) -> Collected:
        found = Collected()
        for entry in box.read(wanted, self._console):
            if isinstance(entry, Note):
                if (known := found.pending.pop(entry.id, None)) is not None:
                    found.size -= known.record.size
                    found.done += 1
            elif (why := self._obstacle(entry.letter)) is not None:
                found.skipped[why] += 1
            elif (record := entry.letter.record) is None or entry.letter.id in found.pending:
                continue
            elif len(found.pending) >= MOST_LETTERS or found.size + record.size > MOST_BYTES:
                found.left += 1
            else:
                found.pending[entry.letter.id] = Pending(entry.letter, record)
                found.size += record.size
        return found

    def _mend(self, found: Collected) -> None:
        if self.value is None or not found.pending:
            return
        if len(found.pending) > 1:
            text = f"--value mends one letter, and {len(found.pending)} match: name it with --id"
            raise GatewayError(text, retriable=False)
        ((identity, one),) = found.pending.items()
        found.pending[identity] = Pending(one.letter, attrs.evolve(one.record, value=self.value))

    def _obstacle(self, letter: DeadLetter) -> str | None:
        if letter.record is None:
            return "without their record"
        if not letter.redrivable:
            return "not to be written again"
        if (topic := letter.record.topic) not in self._targets:
            return f"for {topic}, which is no topic of this configuration (--target {topic} if it is meant)"
        return None

    def _sizes(self, found: Collected) -> dict[str, int]:
        """Return the partitions of each target; letters that their target cannot take are skipped."""
        topics = sorted({one.record.topic for one in found.pending.values()})
        states = self._admin.describe(topics)
        for identity, one in list(found.pending.items()):
            if (why := _cannot_take(states.get(one.record.topic), one)) is not None:
                del found.pending[identity]
                found.skipped[why] += 1
        return {topic: state.partitions for topic, state in states.items() if state is not None}

    # --- what is there

    def _search(self, pending: Sequence[Pending], sizes: Mapping[str, int]) -> dict[str, str]:
        """Return where in the targets records with ids of `pending` are."""
        oldest: dict[str, int] = {}
        ids: set[str] = set()
        for one in pending:
            ids.add(one.letter.id)
            topic = one.record.topic
            oldest[topic] = min(oldest.get(topic, one.timestamp_ms), one.timestamp_ms)
        first: dict[Partition, int] = {}
        end: dict[Partition, int] = {}
        for topic, timestamp_ms in oldest.items():
            partitions = [(topic, number) for number in range(sizes[topic])]
            found = self._admin.offsets_at(partitions, timestamp_ms)
            for p, (_, behind) in self._admin.bounds(partitions).items():
                first[p], end[p] = found[p] if found[p] >= 0 else behind, behind
        there: dict[str, str] = {}
        with self._console.progress("looking for records that are there", total(first, end), "record") as done:
            for record in read_range(self._consumer, first, end, done):
                if (identity := _id_of(record)) in ids:
                    there.setdefault(identity, f"{record.topic}-{record.partition}@{record.offset}")
        return there

    def _show(self, found: Collected, todo: Sequence[Pending]) -> None:
        console = self._console
        counts = Counter(one.record.topic for one in found.pending.values())
        missing = Counter(one.record.topic for one in todo)
        if counts:
            rows = [(topic, str(missing[topic]), str(counts[topic] - missing[topic])) for topic in sorted(counts)]
            console.show("\n".join(table([("TARGET", "TO-WRITE", "THERE-ALREADY"), *rows], frozenset((1, 2)))))
        else:
            console.show("There is nothing to write.")
        if found.done:
            console.say(f"{found.done} were redriven before")
        for why, count in sorted(found.skipped.items()):
            console.say(f"{count} cannot be redriven: {why}")
        if found.left:
            console.say(f"up to {found.left} more are left for the next redrive")

    # --- writing

    def _write(self, dlq_topic: str, todo: Sequence[Pending], there: Mapping[str, str]) -> int:
        topics = sorted({dlq_topic, *(one.record.topic for one in todo)})
        sizes = {name: state.partitions for name, state in self._admin.describe(topics).items() if state is not None}
        console, patience = self._console, self._options.effective_delivery_timeout
        open_it = partial(open_producer, self._options)
        notes = Notes(open_it, dlq_topic, sizes.get(dlq_topic, 1), patience)
        try:
            for identity, where in there.items():
                notes.write(identity, where)
            with console.progress("writing", len(todo), "record") as done:
                writer = Writer(open_it, sizes, notes, patience, done)
                writer.write(todo, lambda left: self._search(left, sizes))
        finally:
            notes.close()
        if todo:
            console.show(f"{writer.written} of {len(todo)} records were written.")
        for error, count in writer.errors.items():
            console.say(f"{count} failed: {printable(error)}")
        if notes.error:
            console.say(f"{dlq_topic} takes no notes, so the next redrive has to search: {printable(notes.error)}")
        return EXIT_FAILURE if writer.errors else 0


def _cannot_take(state: TopicState | None, one: Pending) -> str | None:
    if state is None:
        return f"for {one.record.topic}, which does not exist or may not be seen"
    limit = state.config.get(MAX_BYTES, "")
    if limit.isdigit() and redriven_record(one).measure() > int(limit):
        return f"larger than {MAX_BYTES} of {one.record.topic}, {limit}"
    return None


def _id_of(record: ConsumedRecord) -> str:
    for name, value in record.headers:
        if name == ID_HEADER:
            return value.decode(errors="replace")
    return ""


def alone(options: KafkaOptions, group: str, topic: str) -> AbstractContextManager[None]:
    """Be the only one that redrives; tests put a fake in the place of this."""
    from gateways.kafka.admin import sole_member

    return sole_member(options, group, topic)


@contextmanager
def open_producer(options: KafkaOptions) -> Iterator[ProducerLike]:
    """Make a producer that writes each record once, whatever the profile; tests put a fake in the place of this."""
    from gateways.kafka import workers

    producer = workers.Producer(attrs.evolve(options, profile="safe"), "redrive", None, 5)
    try:
        yield producer
    finally:
        producer.close(CLOSE_TIMEOUT)
