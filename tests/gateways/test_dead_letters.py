"""Where dead letters are written: never in anybody's way, and every outcome counted."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator

import attrs
import pytest
import trio
from jsonschema import Draft202012Validator

from gateways.kafka import dead_letters
from gateways.kafka.bus_records import Kind, encode_header, encode_message
from gateways.kafka.cluster import TopicFacts
from gateways.kafka.dead_letters import BURST, DeadLetters
from gateways.kafka.dlq import BusSource, DeadLetter, KafkaSource, LostRecord, MqttSource, Stage
from gateways.kafka.dlq_reading import decode_letter
from gateways.kafka.mapping import JsonMapper
from gateways.kafka.records import ConsumedRecord, Reason, Record, RecordRefusedError
from gateways.kafka.schema_files import load_schema
from mqtt_trio.errors import GatewayError
from mqtt_trio.gateway import Message
from tests.record_check.watch import check

VALIDATOR = Draft202012Validator(load_schema("mqtt_dlq.schema.json"))
INSTANCE = bytes(range(16))


@attrs.define
class Recorder:
    """A producer that takes everything and confirms when it is told to."""

    full: bool = False
    records: list[Record] = attrs.field(factory=list)
    settled: int = 0

    def offer(self, record: Record) -> None:
        check("dlq", record, record.partition)
        self.records.append(record)

    def settle(self, error: Exception | None = None) -> None:
        for record in self.records:
            assert record.done is not None
            record.done(error)
            self.settled += 1

    def letters(self) -> list[DeadLetter]:
        for record in self.records:
            assert record.value is not None
            VALIDATOR.validate(json.loads(record.value))
        letters = [decode_letter(record.value) for record in self.records]
        for record, letter in zip(self.records, letters, strict=True):
            assert record.key == letter.id.encode() == dict(record.headers)["mqtt.dlq.id"]
        return letters

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        raise NotImplementedError


@pytest.fixture
def producer() -> Recorder:
    return Recorder()


@pytest.fixture
def dead(producer: Recorder) -> Iterator[DeadLetters]:
    letters = DeadLetters(producer)
    letters.broker_id = "node-1"
    yield letters
    unsettled = len(producer.records) - producer.settled
    assert letters.counters()["dlq_letters"] == unsettled + letters.written + letters.lost


MESSAGE = Message("sensors/a", b"\xff42", 1, client_id="c", published_at=1.5)
REFUSED = RecordRefusedError("the broker says no", Reason.REFUSED)
TOO_LARGE = RecordRefusedError("the record has 5 bytes, topic t takes 4", Reason.TOO_LARGE)


def archive_record() -> Record:
    record = JsonMapper("mqtt.archive", "node-1").record(MESSAGE)
    record.partition = 7  # as it was when it was sent
    return record


def test_a_refused_record_is_in_its_letter_as_it_should_have_been_written(
    dead: DeadLetters, producer: Recorder
) -> None:
    record = archive_record()
    dead.refused(Stage.ARCHIVE, record, REFUSED)
    (letter,) = producer.letters()
    assert letter.source == MqttSource(topic="sensors/a", client_id="c", published_at=1.5, qos=1)
    assert (letter.stage, letter.reason, letter.error) == (Stage.ARCHIVE, Reason.REFUSED, "the broker says no")
    assert (letter.target, letter.redrivable, letter.size) == ("mqtt.archive", True, 3)
    assert letter.record == LostRecord(
        topic="mqtt.archive", key=record.key, value=record.value, headers=list(record.headers), timestamp_ms=1500
    )
    producer.settle()
    assert (dead.written, dead.lost, dead.bare) == (1, 0, 0)


def test_of_a_record_that_is_too_large_only_the_facts_are_told(dead: DeadLetters, producer: Recorder) -> None:
    dead.refused(Stage.ARCHIVE, archive_record(), TOO_LARGE)
    (letter,) = producer.letters()
    assert (letter.record, letter.payload, letter.redrivable) == (None, None, False)
    assert (letter.size, letter.sha256) == (3, hashlib.sha256(MESSAGE.payload).hexdigest())
    assert dead.counters()["dlq_too_large"] == dead.bare == 1


def test_what_does_not_fit_into_the_topic_is_left_out(producer: Recorder) -> None:
    dead = DeadLetters(producer, facts=lambda _topic: TopicFacts(partitions=3, max_message_bytes=3000))
    big = attrs.evolve(MESSAGE, payload=b"x" * 2500)
    for message in (big, attrs.evolve(MESSAGE, payload=b"x" * 10)):
        dead.refused(Stage.ARCHIVE, JsonMapper("t").record(message), REFUSED)
    dead.of_message(Stage.BUS, attrs.evolve(MESSAGE, topic_name="t" * 5000), "monster", Reason.UNENCODABLE, "no")
    assert [letter.record is None for letter in producer.letters()] == [True, False]
    assert (dead.bare, dead.lost) == (1, 1)  # a topic of 5000 bytes: not even the facts fit


def test_payloads_may_be_forbidden(producer: Recorder) -> None:
    dead = DeadLetters(producer, contents=False)
    dead.refused(Stage.ARCHIVE, archive_record(), REFUSED)
    dead.of_message(Stage.BUS, MESSAGE, "monster", Reason.UNENCODABLE, "no")
    dead.unreadable(consumed(b"garbage"), Reason.MALFORMED, "no")
    assert [(letter.record, letter.payload, letter.redrivable) for letter in producer.letters()] == [
        (None, None, False)
    ] * 3


def test_a_message_that_no_record_can_be_made_of_is_in_its_letter(dead: DeadLetters, producer: Recorder) -> None:
    dead.of_message(Stage.RETAINED, MESSAGE, "mqtt.retained", Reason.UNENCODABLE, "too many properties")
    (letter,) = producer.letters()
    assert (letter.payload, letter.record, letter.target) == (MESSAGE.payload, None, "mqtt.retained")


def test_messages_that_are_alike_have_letters_of_their_own(dead: DeadLetters, producer: Recorder) -> None:
    for _ in range(3):
        dead.refused(Stage.ARCHIVE, archive_record(), REFUSED)
    ids = [letter.id for letter in producer.letters()]
    assert len(set(ids)) == 3
    again = Recorder()
    second_life = DeadLetters(again)
    second_life.broker_id = "node-1"
    for _ in range(3):
        second_life.refused(Stage.ARCHIVE, archive_record(), TOO_LARGE)
    assert [letter.id for letter in again.letters()] == ids


def test_records_of_the_bus_are_named_by_their_place(dead: DeadLetters, producer: Recorder) -> None:
    batch = encode_header(Kind.BATCH, INSTANCE, "node-1", 9) + encode_message(MESSAGE)
    hello = encode_header(Kind.HELLO, INSTANCE, "node-1", 8)
    dead.refused_on_bus(Record("monster", 3, None, hello, messages=0), REFUSED)
    dead.refused_on_bus(Record("monster", 3, None, batch, messages=1), REFUSED)
    kept = encode_header(Kind.BATCH, INSTANCE, "node-1", 4) + encode_message(attrs.evolve(MESSAGE, retain=True))
    dead.refused_on_bus(Record("mqtt.retained", 5, b"sensors/a", kept), REFUSED)
    dead.refused_on_bus(Record("mqtt.retained", 5, b"sensors/a", None, timestamp_ms=2500), REFUSED)
    bus, retained, removed = producer.letters()
    assert bus.source == BusSource(topic="monster", partition=3, instance_id=INSTANCE, sequence=9, messages=1)
    assert (bus.stage, bus.redrivable, bus.target) == (Stage.BUS, False, "monster")
    assert (bus.record, bus.size, bus.sha256) == (None, len(batch), hashlib.sha256(batch).hexdigest())
    assert retained.source == MqttSource(topic="sensors/a", client_id="c", published_at=1.5, qos=1, retain=True)
    assert (retained.stage, retained.size) == (Stage.RETAINED, 3)
    assert (removed.size, removed.redrivable) == (0, False)
    assert removed.source == MqttSource(topic="sensors/a", client_id="", published_at=2.5, retain=True)


def consumed(value: bytes | None, offset: int = 0) -> ConsumedRecord:
    return ConsumedRecord("monster", 2, offset, b"\xff", value, [("h", b"\xfe")], -1)


def test_a_record_that_was_read_is_told_once_and_named_by_its_place(dead: DeadLetters, producer: Recorder) -> None:
    dead.unreadable(consumed(b"garbage", 5), Reason.MALFORMED, "an item of unknown type 103")
    dead.unreadable(consumed(b"garbage", 5), Reason.MALFORMED, "an item of unknown type 103")
    (letter,) = producer.letters()
    assert letter.source == KafkaSource(topic="monster", partition=2, offset=5)
    assert (letter.stage, letter.size, letter.target, letter.redrivable) == (Stage.CONSUME, 7, None, False)
    assert letter.record == LostRecord(
        topic="monster", partition=2, key=b"\xff", value=b"garbage", headers=[("h", b"\xfe")], timestamp_ms=-1
    )
    assert dead.left_out == 1


def test_a_flood_of_one_kind_gets_one_letter(dead: DeadLetters, producer: Recorder) -> None:
    for number in range(50):
        for sender in (0, 1):
            record = consumed(b"%d" % number, 2 * number + sender)
            dead.unreadable(record, Reason.UNKNOWN_VERSION, "version 2", (sender, 2))
    assert len(producer.letters()) == 2
    assert dead.left_out == 98


def test_a_flood_of_all_kinds_is_bounded(dead: DeadLetters, producer: Recorder) -> None:
    for number in range(BURST + 500):
        dead.unreadable(consumed(b"%d" % number, number), Reason.MALFORMED, "no")
    assert BURST <= len(producer.records) < BURST + 500
    assert dead.left_out == BURST + 500 - len(producer.records)
    assert len(dead._known) <= dead_letters.MAX_KNOWN


def test_a_full_window_costs_the_letter_and_nothing_else(
    dead: DeadLetters, producer: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    producer.full = True
    for number in range(100):
        dead.unreadable(consumed(b"%d" % number, number), Reason.MALFORMED, "no\nway")
    assert dead.lost == 100
    producer.full = False
    dead.refused(Stage.ARCHIVE, archive_record(), REFUSED)
    producer.settle(GatewayError("closed before Kafka confirmed the record", retriable=True))
    assert (dead.lost, dead.written) == (101, 0)
    lines = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert lines == [  # two lines for all of it
        (logging.WARNING, "1 dead letter, the latest: malformed, consume (monster-2@0): no way"),
        (logging.ERROR, "a dead letter is not written: those before it wait for Kafka, and their window is full"),
    ]


def test_without_a_topic_letters_are_only_counted() -> None:
    dead = DeadLetters()
    dead.refused(Stage.ARCHIVE, archive_record(), REFUSED)
    assert (dead.counters()["dlq_letters"], dead.counters()["dlq_refused"], dead.lost) == (1, 1, 1)


def test_ids_that_are_remembered_are_bounded(
    dead: DeadLetters, producer: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "MAX_KNOWN", 3)
    monkeypatch.setattr(dead_letters, "MAX_ONCE", 3)
    for number in range(10):
        dead.unreadable(consumed(b"%d" % number, number), Reason.MALFORMED, "no", number)
    assert (len(dead._known), len(dead._once)) == (3, 3)
    dead.unreadable(consumed(b"new", 11), Reason.MALFORMED, "no", 9)
    dead.unreadable(consumed(b"new", 12), Reason.MALFORMED, "no", 0)
    assert len(producer.letters()) == 11
