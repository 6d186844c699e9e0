"""`mqtt-trio rebuild` [K19]: empty stores from an archive in Kafka, and on from where it was when it was stopped."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

import attrs

from gateways.kafka.archived import FORMATS
from gateways.kafka.command_arguments import add_common, options_of
from gateways.kafka.options import KafkaOptions
from gateways.kafka.reading import Find, Reader, reader_of
from gateways.kafka.rebuild_reader import MergingReader
from gateways.kafka.records import ConsumedRecord
from mqtt_trio.errors import GatewayError, WrongUsageError
from mqtt_trio.gateway import Entry, Message, NotEmptyError, Progress

if TYPE_CHECKING:
    from gateways.kafka.admin import Admin
    from gateways.kafka.workers import Consumer
    from mqtt_trio.gateway import CommandContext, Console, RebuildTarget

BATCH_RECORDS: Final = 5000
BATCH_BYTES: Final = 4 * 1024 * 1024
"""What is stored together, and read again at most after a kill."""
SHOWN: Final = 5
"""Unreadable records that are shown one by one."""
EPILOG: Final = """\
Fills the empty stores of the configuration: the session store ([Persistence] Store = "SQLITE") with the last retained
message of each topic, the file of a group with Store = "SQLITE" with every message that the group would have stored.
Sessions and queued messages are in no archive. The node must not be running.

Reads up to where the topic ends at the start. A rebuild that was stopped, or killed, goes on where it was when the
command is given again, and the stores end the same. Until then no node starts on them.

exit codes: 0 done, 1 failure or refused, 2 wrong usage, 78 configuration that cannot be used"""


class RebuildCommand:
    """See the module."""

    def add_arguments(self, parser: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
        """Describe the arguments; there are no actions."""
        for action in shared._actions:  # argparse takes parents at the birth of a parser only
            parser._add_action(action)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = EPILOG
        parser.add_argument(
            "--from", dest="topic", required=True, metavar="TOPIC", help="the archive, such as mqtt.archive"
        )
        parser.add_argument(
            "--format",
            choices=FORMATS,
            type=str.upper,
            help="of its records (that of the group that writes it, or JSON)",
        )
        parser.add_argument(
            "--group", action="append", default=[], metavar="NAME", help="only the history of this group; repeatable"
        )
        parser.add_argument(
            "--retained", action="store_true", help="only the retained messages; with --group: these too"
        )
        add_common(parser, json=False)

    def run(self, arguments: argparse.Namespace, context: CommandContext) -> int:
        """Rebuild."""
        options = options_of(context.options)
        targets = chosen(context.rebuild_targets, arguments.group, retained=arguments.retained)
        topic = arguments.topic
        default = None if topic == options.archive_topic else topic
        form = arguments.format or context.archive_formats.get(topic) or context.archive_formats.get(default) or "JSON"
        with ExitStack() as stack:
            for target in targets:
                stack.callback(target.close)
            found = opened(targets, context.console)
            admin, consumer = stack.enter_context(open_kafka(options))
            rebuild = Rebuild(admin, consumer, context.console, topic, reader_of(form, schemas_of(options, form)))
            return rebuild.run(found)


COMMAND: Final = RebuildCommand()


def schemas_of(options: KafkaOptions, form: str) -> Find | None:
    """Return what asks the schema registry of `options` for a schema; None: there is none, or no need of one."""
    if form != "AVRO" or options.schema_registry.url is None:
        return None
    from gateways.kafka.schema_registry import SchemaRegistry

    return SchemaRegistry(options).schema


@contextmanager
def open_kafka(options: KafkaOptions) -> Iterator[tuple[Admin, Consumer]]:
    """Connect."""
    from gateways.kafka import workers
    from gateways.kafka.admin import administration

    # The merge holds some of each partition: not much of each, since there may be many.
    bounds = {"max_partition_fetch_bytes": 1024 * 1024, "max_poll_records": 1000}
    options = attrs.evolve(options, consumer={**bounds, **options.consumer})
    with administration(options) as admin:
        consumer = workers.Consumer(options, "rebuild")
        try:
            yield admin, consumer
        finally:
            consumer.close()


def chosen(targets: Sequence[RebuildTarget], groups: Sequence[str], *, retained: bool) -> list[RebuildTarget]:
    """Return the stores that are meant: all, unless some are named.

    Raises:
      WrongUsageError: there is no such store, or none at all.
    """
    by_name = {target.name: target for target in targets}
    names = [f"history of group {group}" for group in groups] + ["retained messages"] * retained
    for name in names:
        if name not in by_name:
            there = ", ".join(by_name) or "none"
            raise WrongUsageError(f"no embedded store for {name} in this configuration; there is: {there}")
    if not targets:
        raise WrongUsageError('no store to fill: neither [Persistence] nor an archive group has Store = "SQLITE"')
    return [by_name[name] for name in dict.fromkeys(names)] if names else list(targets)


def read(reader: Reader, record: ConsumedRecord) -> Message:
    """Return the message of a record.

    Raises:
      GatewayError: it holds none; or, retriable, the schema registry does not answer.
    """
    if record.defect is not None:
        raise GatewayError(record.defect, retriable=False)
    return reader.read(record).message


def opened(targets: Sequence[RebuildTarget], console: Console) -> list[tuple[RebuildTarget, Progress | None]]:
    """Open the stores that are still to be rebuilt, each with how far it has come.

    Stores are finished one after the other at the end. A rebuild that was killed in between has left some that are, and
    others that lack nothing but that.

    Raises:
      StoreError: a store cannot be rebuilt.
    """
    found: list[tuple[RebuildTarget, Progress | None]] = []
    finished: list[tuple[RebuildTarget, NotEmptyError]] = []
    for target in targets:
        try:
            found.append((target, target.open()))
        except NotEmptyError as exc:
            finished.append((target, exc))
    if finished:
        if not found or not all(progress is not None and progress.is_complete for _, progress in found):
            raise finished[0][1]
        for target, _ in finished:
            console.say(f"{target.name}: was finished before")
    return found


class Rebuild:
    """One run of the command, its stores opened."""

    def __init__(self, admin: Admin, consumer: Consumer, console: Console, topic: str, reader: Reader) -> None:
        self._admin = admin
        self._consumer = consumer
        self._console = console
        self._topic = topic
        self._reader = reader
        self._unreadable = 0
        self._records = 0

    def run(self, found: Sequence[tuple[RebuildTarget, Progress | None]]) -> int:
        """Read and store; return the exit code."""
        bounds = self._bounds()
        unfinished = [progress for _, progress in found if progress is not None]
        whole = self._plan(bounds, unfinished)
        for target, progress in found:
            if progress is None:
                target.begin(whole)
        targets = [target for target, _ in found]
        positions = [progress or whole for _, progress in found]
        first = {number: min(p.next[number] for p in positions) for number in whole.ends}
        self._warn_of_gaps(bounds, first, resumed=bool(unfinished))
        began = time.monotonic()
        self._copy(targets, first, whole.ends)
        self._report(targets, time.monotonic() - began)
        return 0

    def _bounds(self) -> dict[int, tuple[int, int]]:
        topic = self._topic
        state = self._admin.describe([topic]).get(topic)
        if state is None:
            raise GatewayError(f"there is no topic {topic}, or this user may not see it", retriable=False)
        numbers = [(topic, number) for number in range(state.partitions)]
        return {number: at for (_, number), at in self._admin.bounds(numbers).items()}

    def _plan(self, bounds: dict[int, tuple[int, int]], found: Sequence[Progress]) -> Progress:
        """Return what is to be read: what an unfinished rebuild had begun, or all that there is.

        Raises:
          GatewayError: an unfinished rebuild is of something else.
        """
        source = f"Kafka topic {self._topic}"
        self._consumer.partitions(self._topic)  # makes the client ask for the topic's identity, too
        identity = str(self._consumer.identity(self._topic) or "")
        whole = Progress(
            source=source,
            identity=identity,
            ends={number: end for number, (_, end) in bounds.items()},
            next={number: first for number, (first, _) in bounds.items()},
        )
        for progress in found:
            if progress.source != source:
                raise GatewayError(
                    f"an unfinished rebuild of these stores is from {progress.source}: finish it, or remove the stores",
                    retriable=False,
                )
            shorter = any(bounds.get(number, (0, 0))[1] < end for number, end in progress.ends.items())
            if shorter or (progress.identity and identity and progress.identity != identity):
                raise GatewayError(
                    f"{source} was deleted and made again since the rebuild began: remove the stores and begin anew",
                    retriable=False,
                )
        if found:
            self._console.say(f"An unfinished rebuild from {source} goes on.")
            return attrs.evolve(whole, ends=found[0].ends, next={n: whole.next.get(n, 0) for n in found[0].ends})
        return whole

    def _warn_of_gaps(self, bounds: dict[int, tuple[int, int]], first: dict[int, int], *, resumed: bool) -> None:
        deleted = 0
        for number, at in first.items():
            oldest = bounds[number][0] if number in bounds else at
            deleted += max(0, oldest - at)
            first[number] = max(at, oldest)
        if deleted:
            self._console.say(f"{deleted} records were deleted from Kafka since the rebuild began: they are missing.")
        elif not resumed and any(at for at in first.values()):
            self._console.say(f"Kafka has deleted older records of {self._topic}: what is rebuilt begins behind them.")

    def _copy(self, targets: Sequence[RebuildTarget], first: dict[int, int], ends: Mapping[int, int]) -> None:
        topic = self._topic
        starts = {(topic, number): at for number, at in first.items()}
        limits = {(topic, number): end for number, end in ends.items()}
        total = sum(max(0, limits[p] - at) for p, at in starts.items())
        entries: list[Entry] = []
        size = 0
        with self._console.progress("rebuild", total, "record") as done:
            for record in MergingReader(self._consumer, starts, limits):
                entries.append(self._entry(record))
                size += len(record.value or b"") + len(record.key or b"")
                if len(entries) >= BATCH_RECORDS or size >= BATCH_BYTES:
                    self._store(targets, entries)
                    done(len(entries))
                    entries, size = [], 0
            self._store(targets, entries)
            done(len(entries))

    def _store(self, targets: Sequence[RebuildTarget], entries: Sequence[Entry]) -> None:
        self._records += len(entries)
        for target in targets:
            target.store(entries)

    def _entry(self, record: ConsumedRecord) -> Entry:
        message = None
        try:
            message = read(self._reader, record)
        except GatewayError as exc:
            if exc.retriable:
                raise
            self._unreadable += 1
            if self._unreadable <= SHOWN:
                where = f"{record.topic}-{record.partition}@{record.offset}"
                self._console.say(f"{where} holds no message and is left out: {exc}")
        return Entry(message, record.partition, record.offset)

    def _report(self, targets: Sequence[RebuildTarget], seconds: float) -> None:
        for target in targets:
            self._console.show(f"{target.name}: {', '.join(target.finish())}")
        if self._unreadable > SHOWN:
            self._console.say(f"{self._unreadable} records in all hold no message and were left out.")
        rate = f", {self._records / seconds:,.0f} a second" if seconds > 0.1 else ""
        self._console.show(f"{self._records} records of {self._topic} were read in {seconds:.1f} s{rate}.")
