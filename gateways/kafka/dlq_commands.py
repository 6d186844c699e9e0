"""`mqtt-trio dlq list|redrive` [K12, F3]: what could not be stored or understood, and writing it again."""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from gateways.kafka.command_arguments import add_common, options_of, table
from gateways.kafka.dlq import BusSource, DeadLetter, KafkaSource, Source, encode_letter, iso_time
from gateways.kafka.dlq_box import Filed, Letterbox, Note, add_filter, printable, read_filter
from gateways.kafka.dlq_redrive import MOST_LETTERS, Redriver
from gateways.kafka.options import KafkaOptions
from gateways.kafka.topic_plan import DEFAULTS, plan_topics
from mqtt_trio.errors import GatewayError

if TYPE_CHECKING:
    from gateways.kafka.admin import Admin
    from gateways.kafka.workers import Consumer
    from mqtt_trio.gateway import CommandContext, Console

DEFAULT_LIMIT: Final = 100
LARGEST_LIMIT: Final = 1_000_000
LARGEST_VALUE: Final = 64 * 1024 * 1024
SHORT_ID: Final = 12
LONGEST_ERROR: Final = 60
"""Characters; --json has all of it."""
LIST_EPILOG: Final = """\
REDRIVE is `yes` where `dlq redrive` can write the record again, `done` where it did, else `no`.

exit codes: 0 shown, also when there is none; 1 failure, 2 wrong usage, 78 configuration that cannot be used"""
REDRIVE_EPILOG: Final = f"""\
Writes the records of letters to the Kafka topics that they were meant for, with their keys, headers and times, and with
the letter's id in the header mqtt.dlq.id. A record that is there already is not written a second time, also when an
earlier redrive was interrupted: the target is searched from the time of the oldest letter on. A letter without its
record (too large, left out by configuration) cannot be redriven, nor can what newer messages have replaced.

A record that was no message goes out as it was, and is a dead letter again, unless it is mended: --value FILE writes
what is in the file instead, for the one letter that --id names.

Shows what it would do; --execute does it. One redrive at a time, of {MOST_LETTERS} letters at most.

exit codes: 0 done, 1 failure, 2 wrong usage, 78 configuration that cannot be used"""


class DlqCommand:
    """See the module."""

    def add_arguments(self, parser: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
        """Describe `list` and `redrive`."""
        actions = parser.add_subparsers(dest="action", metavar="list|redrive", required=True)
        raw = argparse.RawDescriptionHelpFormatter
        listing = actions.add_parser(
            "list", parents=[shared], formatter_class=raw, epilog=LIST_EPILOG, help="show dead letters, newest last"
        )
        redrive = actions.add_parser(
            "redrive", parents=[shared], formatter_class=raw, epilog=REDRIVE_EPILOG, help="write their records again"
        )
        add_common(listing)
        listing.add_argument(
            "--limit", type=_limit, default=DEFAULT_LIMIT, metavar="N", help=f"only the newest N ({DEFAULT_LIMIT})"
        )
        listing.add_argument("--contents", action="store_true", help="with --json: payloads and records as well")
        add_filter(listing)
        add_common(redrive, json=False)
        how = redrive.add_mutually_exclusive_group()
        how.add_argument("--dry-run", action="store_true", help="only show what would be done (the default)")
        how.add_argument("--execute", action="store_true", help="do it")
        redrive.add_argument(
            "--value", type=Path, metavar="FILE", help="write the content of this file instead: one letter, mended"
        )
        add_filter(redrive)

    def run(self, arguments: argparse.Namespace, context: CommandContext) -> int:
        """Run `list` or `redrive`."""
        options = options_of(context.options)
        topic = options.topics.dlq.name or DEFAULTS["dlq"].name
        wanted = read_filter(arguments)
        with open_admin(options) as admin, open_consumer(options) as consumer:
            box = Letterbox(admin, consumer, topic)
            if arguments.action == "list":
                show = _show_json if arguments.json else _show_table
                entries = newest(box.read(wanted, context.console), arguments.limit)
                show(entries, context.console, contents=arguments.contents)
                box.report(context.console)
                return 0
            plans = plan_topics(options, context.archive_topics)
            targets = {p.name for p in plans if p.section in ("Kafka.Topics.Archive", "Kafka.Topics.Messages")}
            redriver = Redriver(admin, consumer, options, context.console, targets | set(wanted.targets))
            if arguments.value is not None:
                redriver.value = read_value(arguments.value)
            return redriver.run(box, wanted, execute=arguments.execute)


COMMAND: Final = DlqCommand()


def open_admin(options: KafkaOptions) -> AbstractContextManager[Admin]:
    """Connect."""
    from gateways.kafka.admin import administration

    return administration(options)


@contextmanager
def open_consumer(options: KafkaOptions) -> Iterator[Consumer]:
    """Make a consumer without a group."""
    from gateways.kafka import workers

    consumer = workers.Consumer(options, "dlq")
    try:
        yield consumer
    finally:
        consumer.close()


def read_value(path: Path) -> bytes:
    """Return what a record shall hold instead of what it held.

    Raises:
      GatewayError: the file cannot be read, or is too large for any record.
    """
    try:
        with path.open("rb") as file:
            value = file.read(LARGEST_VALUE + 1)
    except OSError as exc:
        raise GatewayError(f"{path} cannot be read: {exc.strerror}", retriable=False) from None
    if len(value) > LARGEST_VALUE:
        raise GatewayError(f"{path} has more than {LARGEST_VALUE} bytes, too many for a record", retriable=False)
    return value


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= LARGEST_LIMIT:
        raise argparse.ArgumentTypeError(f"expected 1 to {LARGEST_LIMIT}, got {text!r}")
    return int(text)


def newest(entries: Iterator[Filed | Note], limit: int) -> list[tuple[Filed, str | None]]:
    """Return the newest letters, oldest of them first, each with where it was redriven to."""
    heap: list[tuple[tuple[int, int, int], Filed]] = []
    notes: dict[str, str] = {}
    kept: dict[str, int] = {}
    for entry in entries:
        if isinstance(entry, Note):
            if entry.id in kept:
                notes[entry.id] = entry.where
            continue
        order = (entry.letter.dead_at_ms, entry.partition, entry.offset)
        kept[entry.letter.id] = kept.get(entry.letter.id, 0) + 1
        if len(heap) < limit:
            heapq.heappush(heap, (order, entry))
            continue
        dropped = heapq.heappushpop(heap, (order, entry))[1].letter.id
        kept[dropped] -= 1
        if not kept[dropped]:
            del kept[dropped]
            notes.pop(dropped, None)
    return [(entry, notes.get(entry.letter.id)) for _, entry in sorted(heap, key=lambda pair: pair[0])]


# --- showing


def _show_table(entries: Sequence[tuple[Filed, str | None]], console: Console, *, contents: bool) -> None:
    if not entries:
        console.say("No dead letter matches.")
        return
    titles = ("TIME", "ID", "REASON", "STAGE", "SOURCE", "TARGET", "SIZE", "REDRIVE", "ERROR")
    rows = [_row(entry.letter, redriven) for entry, redriven in entries]
    console.show("\n".join(table([titles, *rows], frozenset((6,)))))


def _row(letter: DeadLetter, redriven: str | None) -> tuple[str, ...]:
    error = printable(letter.error)
    return (
        iso_time(letter.dead_at_ms),
        letter.id[:SHORT_ID],
        letter.reason,
        letter.stage,
        printable(_source(letter.source)),
        letter.target or "-",
        str(letter.size),
        "done" if redriven else "yes" if letter.redrivable else "no",
        error if len(error) <= LONGEST_ERROR else f"{error[: LONGEST_ERROR - 1]}…",
    )


def _source(source: Source) -> str:
    if isinstance(source, KafkaSource):
        return f"{source.topic}-{source.partition}@{source.offset}"
    if isinstance(source, BusSource):
        return f"{source.topic}-{source.partition}, {source.messages} messages"
    return source.topic


def _show_json(entries: Sequence[tuple[Filed, str | None]], console: Console, *, contents: bool) -> None:
    for entry, redriven in entries:
        value: dict[str, Any] = orjson.loads(encode_letter(entry.letter))
        if not contents:
            value.pop("record", None)
            value["payload"].pop("data", None)
        value["redriven"] = redriven
        value["dlq"] = {"partition": entry.partition, "offset": entry.offset}
        console.show(orjson.dumps(value).decode())
