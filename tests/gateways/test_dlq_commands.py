"""`mqtt-trio dlq list|redrive` [K12]."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import pytest

from gateways.kafka import topic_reader
from gateways.kafka.dlq import (
    ID_HEADER,
    MqttSource,
)
from gateways.kafka.dlq_box import Filed, LetterFilter, Note, moment
from gateways.kafka.dlq_commands import newest
from gateways.kafka.dlq_writer import Notes, Pending, Writer, redriven_record
from gateways.kafka.partitions import partition_for
from gateways.kafka.records import ConsumedRecord, Record
from gateways.kafka.topic_reader import read_range
from mqtt_trio.errors import GatewayError
from tests.gateways.dlq_letters import T0, consumed, letter, pending

# Which letters


@pytest.mark.parametrize(
    "wanted,expected",
    [
        (LetterFilter(), True),
        (LetterFilter(reasons=["malformed", "no_topic"], stages=["archive"]), True),
        (LetterFilter(reasons=["malformed"]), False),
        (LetterFilter(stages=["consume"]), False),
        (LetterFilter(topics=["sensors/+"]), True),
        (LetterFilter(topics=["other/#", "sensors/1"]), True),
        (LetterFilter(topics=["sensors"]), False),
        (LetterFilter(targets=["archive"], brokers=["node-1"]), True),
        (LetterFilter(targets=["other"]), False),
        (LetterFilter(brokers=["node-2"]), False),
        (LetterFilter(since_ms=T0 + 1, until_ms=T0 + 2), True),
        (LetterFilter(since_ms=T0 + 2), False),
        (LetterFilter(until_ms=T0 + 1), False),
        (LetterFilter(ids=[letter(1).id[:5]]), True),
        (LetterFilter(ids=["x"]), False),
    ],
)
def test_a_filter_holds_what_it_names(wanted: LetterFilter, expected: bool) -> None:
    assert wanted.matches(letter(1)) is expected


def test_records_that_were_read_are_named_by_their_topic() -> None:
    assert LetterFilter(topics=["monster"]).matches(consumed(1))
    assert not LetterFilter(topics=["#"]).matches(consumed(1))
    nameless = attrs.evolve(letter(1), source=MqttSource(topic="", client_id="", published_at=0))
    assert not LetterFilter(topics=["#"]).matches(nameless)


def test_times_are_moments_or_spans() -> None:
    assert moment("2026-11-30T12:00:00Z") == moment("2026-11-30T12:00:00") == moment("2026-11-30T13:00:00+01:00")
    assert abs(time.time() * 1000 - 90 * 60_000 - moment("90m")) < 60_000
    assert moment("999999d") == 0
    for text in ("", "m", "90", "soon", "-1h", "1w"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a time"):
            moment(text)


def test_the_newest_are_kept_with_their_notes() -> None:
    filed = [Filed(letter(number), number % 2, number) for number in (5, 1, 4, 2, 3)]
    notes = [Note(letter(number).id, f"archive-0@{number}") for number in (1, 4)]
    shown = newest(iter([*filed[:3], *notes, *filed[3:]]), 3)
    assert [(one.letter.dead_at_ms - T0, where) for one, where in shown] == [
        (3, None),
        (4, "archive-0@4"),
        (5, None),
    ]


# Reading


class FakeConsumer:
    """Two partitions; `polls` are what the calls of `poll` return, positions follow."""

    def __init__(self, polls: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.polls = list(polls)
        self.positions: dict[tuple[str, int], int] = {}

    def assign(self, offsets: Mapping[tuple[str, int], int]) -> None:
        self.positions = dict(offsets)

    def poll(self, timeout: float) -> list[ConsumedRecord]:
        records = self.polls.pop(0) if self.polls else ()
        for partition, offset in records:
            self.positions["t", partition] = offset + 1
        return [ConsumedRecord("t", p, offset, None, b"", (), 0) for p, offset in records]

    def position(self, partition: tuple[str, int]) -> int:
        return self.positions[partition]


def test_a_range_is_read_to_its_end_and_no_further() -> None:
    passed: list[int] = []
    consumer = FakeConsumer([[(0, 5), (1, 0)], [], [(0, 6), (0, 7)]])
    found = read_range(
        consumer, {("t", 0): 5, ("t", 1): 0, ("t", 2): 3}, {("t", 0): 7, ("t", 1): 1, ("t", 2): 3}, passed.append
    )
    assert [(record.partition, record.offset) for record in found] == [(0, 5), (1, 0), (0, 6)]
    assert sum(passed) == 3


def test_a_range_that_stops_coming_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic_reader, "PATIENCE", 0.01)
    with pytest.raises(GatewayError, match="nothing comes from t-0 any more"):
        list(read_range(FakeConsumer([]), {("t", 0): 0}, {("t", 0): 1}, lambda _: None))


# Writing


class FakeProducers:
    """Producers as Kafka's are: the first failure fails all that is out, and every later record.

    `fate`: by value of a record: an exception, or None for silence; what is not in it is confirmed at once.
    """

    def __init__(self, fate: Mapping[bytes | None, Exception | None] | None = None) -> None:
        self.fate = dict(fate or {})
        self.opened = 0
        self.stored: list[tuple[Record, int]] = []

    @contextmanager
    def open(self) -> Iterator[FakeProducers]:
        self.opened += 1
        self.error: Exception | None = None
        self.silent: list[tuple[Record, Any]] = []
        yield self
        for record, failed in self.silent:
            failed(record, OSError("closed"))

    def send(self, record: Record, partition: int, done: Any, failed: Any) -> None:
        self.error = self.error or self.fate.get(record.value)
        if self.error is not None:
            failed(record, self.error)
        elif record.value in self.fate:
            self.silent.append((record, failed))
        else:
            self.stored.append((record, partition))
            done(record, argparse.Namespace(topic=record.topic, partition=partition, offset=7))

    @property
    def values(self) -> list[bytes | None]:
        return [record.value for record, _ in self.stored]


def value(number: int) -> bytes:
    return b'{"n":%d}' % number


@attrs.define
class Writing:
    """A writer of letters and its surroundings."""

    producers: FakeProducers
    note_producers: FakeProducers = attrs.Factory(FakeProducers)
    passed: list[int] = attrs.Factory(list)
    searched: list[str] = attrs.Factory(list)
    there: dict[str, str] = attrs.Factory(dict)

    def run(self, *todo: Pending) -> Writer:
        self.notes = Notes(self.note_producers.open, "dlq", 3, 0.01)
        writer = Writer(self.producers.open, {"archive": 4}, self.notes, 0.01, self.passed.append)
        try:
            writer.write(todo, self.search)
        finally:
            self.notes.close()
        return writer

    def search(self, left: Sequence[Pending]) -> Mapping[str, str]:
        self.searched += [one.letter.id for one in left]
        return self.there

    notes: Notes = attrs.field(init=False)


def test_a_note_follows_what_kafka_has() -> None:
    writing = Writing(FakeProducers())
    writer = writing.run(pending(1), pending(2))
    assert (writer.written, writer.errors, sum(writing.passed), writing.searched) == (2, {}, 2, [])
    assert writing.producers.values == [value(1), value(2)]
    note, partition = writing.note_producers.stored[0]
    assert (note.topic, note.key, note.value) == ("dlq", letter(1).id.encode(), None)
    place = partition_for(b"sensors/1", 4)
    assert list(note.headers) == [("mqtt.dlq.redriven", f"archive-{place}@7".encode())]
    assert partition == partition_for(letter(1).id.encode(), 3)


def test_poison_fails_alone() -> None:
    writing = Writing(FakeProducers({value(2): OSError("poison")}))
    writer = writing.run(*map(pending, range(6)))
    assert (writer.written, writer.errors, sum(writing.passed)) == (5, {"OSError: poison": 1}, 6)
    assert writing.producers.values == [value(n) for n in (0, 1, 3, 4, 5)]
    assert len(writing.note_producers.stored) == 5


def test_what_has_no_outcome_is_looked_for_before_it_is_written_again() -> None:
    writing = Writing(FakeProducers({value(1): None, value(2): OSError("poison")}))
    writing.there = {letter(1).id: "archive-0@9"}  # it was written, and the answer lost
    writer = writing.run(*map(pending, range(4)))
    assert writing.searched == [letter(n).id for n in (1, 2, 3)]
    assert (writer.written, writer.errors) == (3, {"OSError: poison": 1})
    assert writing.producers.values == [value(0), value(3)]


def test_a_target_that_takes_nothing_is_given_up() -> None:
    fate: dict[bytes | None, Exception | None] = {value(n): OSError("denied") for n in range(100)}
    writing = Writing(FakeProducers(fate))
    writer = writing.run(*map(pending, range(50)), pending(100, "other"))
    assert (writer.written, sum(writing.passed)) == (1, 51)
    assert writer.errors == {
        "OSError: denied": 5,
        "not tried, because 5 others failed on archive before": 45,
    }
    assert writing.producers.opened == 1 + 6


def test_a_silent_kafka_is_given_up() -> None:
    with pytest.raises(GatewayError, match="has not confirmed 1 records"):
        Writing(FakeProducers({value(1): None})).run(pending(1))


def test_notes_that_fail_hold_nobody_up() -> None:
    writing = Writing(FakeProducers(), FakeProducers({None: OSError("no notes")}))
    assert writing.run(*map(pending, range(3))).written == 3
    assert writing.notes.error == "OSError: no notes"


def test_a_time_from_before_all_times_is_the_first_of_them() -> None:
    one = pending(1)
    early = attrs.evolve(one.record, timestamp_ms=-5)
    assert Pending(attrs.evolve(one.letter, dead_at_ms=-62_135_596_800_000), early).timestamp_ms == 0
    assert moment("0001-01-01T00:00:00Z") == 0


def test_the_record_is_as_it_would_have_been_but_for_the_id() -> None:
    one = pending(1)
    again = attrs.evolve(one.record, headers=[(ID_HEADER, b"older"), *one.record.headers], timestamp_ms=None)
    record = redriven_record(Pending(one.letter, again))
    assert (record.topic, record.key, record.value, record.timestamp_ms) == (
        "archive",
        b"sensors/1",
        b'{"n":1}',
        T0 + 1,
    )
    assert list(record.headers) == [("mqtt.qos", b"1"), (ID_HEADER, one.letter.id.encode())]
