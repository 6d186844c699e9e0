"""mqtt.dlq as a whole, as `dlq list` and `dlq redrive` read it: letters that match, and what was redriven already."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import attrs

from gateways.kafka.dlq import REDRIVEN_HEADER, DeadLetter, MqttSource, Stage
from gateways.kafka.dlq_reading import DeadLetterError, decode_letter
from gateways.kafka.records import ConsumedRecord, Reason
from gateways.kafka.topic_plan import TopicState
from gateways.kafka.topic_reader import ConsumerLike, read_range, total
from mqtt_trio.errors import GatewayError, MqttTrioError
from mqtt_trio.gateway import topic_matches, validate_topic_filter

if TYPE_CHECKING:
    from mqtt_trio.gateway import Console

Partition: TypeAlias = tuple[str, int]
FULL_ID: Final = 64


class Administrator(Protocol):
    """What is needed of `admin.Admin`."""

    def describe(self, names: Sequence[str]) -> Mapping[str, TopicState | None]: ...
    def bounds(self, partitions: Sequence[Partition]) -> dict[Partition, tuple[int, int]]: ...
    def offsets_at(self, partitions: Sequence[Partition], timestamp_ms: int) -> dict[Partition, int]: ...


@attrs.frozen(kw_only=True)
class LetterFilter:
    """Which letters are meant. Empty: all."""

    ids: Sequence[str] = ()
    """Beginnings of ids."""
    reasons: Sequence[str] = ()
    stages: Sequence[str] = ()
    topics: Sequence[str] = ()
    """MQTT Topic Filters for what a client published; names of Kafka topics for what was read or packed."""
    targets: Sequence[str] = ()
    brokers: Sequence[str] = ()
    since_ms: int | None = None
    until_ms: int | None = None

    def matches(self, letter: DeadLetter) -> bool:
        """Say whether `letter` is meant."""
        return (
            (not self.ids or letter.id.startswith(tuple(self.ids)))
            and (not self.reasons or letter.reason in self.reasons)
            and (not self.stages or letter.stage in self.stages)
            and (not self.targets or letter.target in self.targets)
            and (not self.brokers or letter.broker_id in self.brokers)
            and (self.since_ms is None or letter.dead_at_ms >= self.since_ms)
            and (self.until_ms is None or letter.dead_at_ms < self.until_ms)
            and (not self.topics or any(_is_from(letter, each) for each in self.topics))
        )


def _is_from(letter: DeadLetter, topic: str) -> bool:
    source = letter.source
    if isinstance(source, MqttSource):
        return bool(source.topic) and topic_matches(topic, source.topic)
    return source.topic == topic


@attrs.frozen
class Filed:
    """A letter where it lies."""

    letter: DeadLetter
    partition: int
    offset: int


@attrs.frozen
class Note:
    """The record of a letter was written again."""

    id: str
    where: str
    """`topic-partition@offset`"""


@attrs.define
class Letterbox:
    """Reads mqtt.dlq from its first record, or from `since` of the filter, to the end that it has now.

    Attributes:
      letters: how many were read, matching or not.
      unreadable: records that are no letters, or letters of a later version; `example` says why one of them is not.
    """

    admin: Administrator
    consumer: ConsumerLike
    topic: str
    letters: int = 0
    unreadable: int = 0
    example: str = ""

    def read(self, wanted: LetterFilter, console: Console) -> Iterator[Filed | Note]:
        """Yield the letters that match, and every note.

        Raises:
          GatewayError: there is no such topic, or it cannot be read.
        """
        first, end = self._range(wanted.since_ms)
        with console.progress(f"reading {self.topic}", total(first, end), "record") as done:
            for record in read_range(self.consumer, first, end, done):
                if (entry := self._entry(record)) is None:
                    continue
                if isinstance(entry, Note) or wanted.matches(entry.letter):
                    yield entry

    def _range(self, since_ms: int | None) -> tuple[dict[Partition, int], dict[Partition, int]]:
        state = self.admin.describe([self.topic]).get(self.topic)
        if state is None:
            raise GatewayError(f"there is no topic {self.topic}, or this user may not see it", retriable=False)
        partitions = [(self.topic, number) for number in range(state.partitions)]
        bounds = self.admin.bounds(partitions)
        first = {p: begin for p, (begin, _) in bounds.items()}
        if since_ms is not None:
            found = self.admin.offsets_at(partitions, since_ms)
            first = {p: found[p] if found[p] >= 0 else bounds[p][1] for p in partitions}
        return first, {p: end for p, (_, end) in bounds.items()}

    def _entry(self, record: ConsumedRecord) -> Filed | Note | None:
        headers = dict(record.headers)
        if record.value is None and REDRIVEN_HEADER in headers:
            return Note((record.key or b"").decode(errors="replace"), headers[REDRIVEN_HEADER].decode(errors="replace"))
        try:
            letter = decode_letter(record.value)
        except DeadLetterError as exc:
            self.unreadable += 1
            self.example = self.example or f"{record.topic}-{record.partition}@{record.offset}: {exc}"
            return None
        self.letters += 1
        return Filed(letter, record.partition, record.offset)

    def report(self, console: Console) -> None:
        """Say what could not be read."""
        if self.unreadable:
            are = "record is no dead letter" if self.unreadable == 1 else "records are no dead letters"
            console.say(f"{self.unreadable} {are} that this version can read, such as {printable(self.example)}")


def printable(text: str) -> str:
    """Make what anybody may have written a text that cannot move the cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)


# --- arguments


def add_filter(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `LetterFilter`."""
    group = parser.add_argument_group("which letters", "Each may be given several times; all letters without any.")
    add = group.add_argument
    add("--id", action="append", default=[], type=_id, help="beginning of a letter's id")
    add("--reason", action="append", default=[], choices=[reason.value for reason in Reason], help="why it died")
    add("--stage", action="append", default=[], choices=[stage.value for stage in Stage], help="where it died")
    add("--topic", action="append", default=[], type=_filter,
        help="MQTT topic filter of what was published, or Kafka topic of what was read")  # fmt: skip
    add("--target", action="append", default=[], metavar="TOPIC", help="Kafka topic that it was meant for")
    add("--broker", action="append", default=[], metavar="NODE", help="Node.Id of the node that wrote the letter")
    add(
        "--since",
        type=moment,
        metavar="TIME",
        help="letters of this time or later: 2026-11-30T12:00:00Z, or 90m, 12h, 7d",
    )
    add("--until", type=moment, metavar="TIME", help="only before this time")


def read_filter(arguments: argparse.Namespace) -> LetterFilter:
    """Return what `add_filter` added."""
    return LetterFilter(
        ids=arguments.id,
        reasons=arguments.reason,
        stages=arguments.stage,
        topics=arguments.topic,
        targets=arguments.target,
        brokers=arguments.broker,
        since_ms=arguments.since,
        until_ms=arguments.until,
    )


def moment(text: str) -> int:
    """Read a time, or a span before now, as UTC milliseconds."""
    spans = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    now = datetime.datetime.now(datetime.UTC)
    if text[:-1].isascii() and text[:-1].isdigit() and text[-1] in spans:
        seconds = int(text[:-1]) * spans[text[-1]]
        return max(0, int((now.timestamp() - seconds) * 1000))
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a time such as 2026-11-30T12:00:00Z, or 90m, 12h, 7d before now, got {text!r}"
        ) from None
    if found.tzinfo is None:
        found = found.replace(tzinfo=datetime.UTC)
    return max(0, int(found.timestamp() * 1000))


def _id(text: str) -> str:
    folded = text.lower()
    if not 0 < len(folded) <= FULL_ID or set(folded) - set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"expected up to {FULL_ID} hexadecimal digits, got {text!r}")
    return folded


def _filter(text: str) -> str:
    try:
        validate_topic_filter(text)
    except MqttTrioError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text
