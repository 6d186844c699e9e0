"""The format of dead letters [K12]: it holds what it should, anything fits in, and reading it trusts nobody."""

from __future__ import annotations

import base64
import json
from typing import Any

import attrs
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from gateways.kafka.dlq import (
    BusSource,
    DeadLetter,
    KafkaSource,
    LostRecord,
    MqttSource,
    Stage,
    encode_letter,
    id_of_bus_record,
    id_of_consumed,
    id_of_message,
    letter_headers,
    letter_id,
)
from gateways.kafka.dlq_reading import DeadLetterError, decode_letter
from gateways.kafka.records import Reason
from gateways.kafka.schema_files import load_schema
from mqtt_trio.gateway import Message

VALIDATOR = Draft202012Validator(load_schema("mqtt_dlq.schema.json"))

texts = st.text(max_size=30)  # Hypothesis makes no surrogates
numbers = st.integers(0, 2**63 - 1)
partitions = st.integers(0, 2**31 - 1)
names = st.from_regex(r"\A[a-zA-Z0-9_-]{1,40}\Z")
milliseconds = st.integers(0, 253_402_300_799_999)
records = st.builds(
    LostRecord,
    topic=names,
    key=st.none() | st.binary(max_size=20),
    value=st.none() | st.binary(max_size=60),
    headers=st.lists(st.tuples(texts, st.binary(max_size=9)), max_size=3),
    partition=st.none() | partitions,
    timestamp_ms=st.none() | st.integers(-(2**62), 2**62),
)
sources = st.one_of(
    st.builds(
        MqttSource,
        topic=texts.filter(bool),
        client_id=texts,
        published_at=st.integers(0, 2**41).map(lambda number: number / 1000),
        qos=st.integers(0, 2),
        retain=st.booleans(),
    ),
    st.builds(
        KafkaSource,
        topic=names,
        partition=partitions,
        offset=numbers,
        timestamp_ms=st.integers(-(2**63) + 1, 2**63 - 1),
    ),
    st.builds(
        BusSource,
        topic=names,
        partition=partitions,
        instance_id=st.binary(min_size=16, max_size=16),
        sequence=numbers,
        messages=numbers,
    ),
)
letters = st.builds(
    DeadLetter,
    id=st.binary().map(letter_id),
    dead_at_ms=milliseconds,
    broker_id=texts,
    stage=st.sampled_from(Stage),
    reason=st.sampled_from(Reason),
    error=texts.map(lambda text: " ".join(text.split())),
    source=sources,
    size=numbers,
    sha256=st.binary().map(letter_id),
    target=st.none() | names,
    record=records,
    payload=st.none() | st.binary(max_size=40),
    redrivable=st.booleans(),
)


@given(letters)
def test_every_letter_fits_the_schema_and_reads_back(letter: DeadLetter) -> None:
    value = encode_letter(letter)
    VALIDATOR.validate(json.loads(value))
    assert decode_letter(value) == letter
    facts = letter.without_contents()
    VALIDATOR.validate(json.loads(encode_letter(facts)))
    assert decode_letter(encode_letter(facts)) == attrs.evolve(letter, record=None, payload=None, redrivable=False)


def example(**changes: Any) -> DeadLetter:
    letter = DeadLetter(
        id=letter_id(b"x"),
        dead_at_ms=1_700_000_000_123,
        broker_id="node-1",
        stage=Stage.ARCHIVE,
        reason=Reason.REFUSED,
        error="the broker says no",
        source=MqttSource(topic="sensors/a", client_id="c", published_at=1.5, qos=1),
        size=3,
        sha256=letter_id(b"abc"),
        target="mqtt.archive",
        record=LostRecord(topic="mqtt.archive", key=b"sensors/a", value=b"\xff\x00", headers=[("h", b"1")]),
        redrivable=True,
    )
    return attrs.evolve(letter, **changes)


def test_what_a_letter_looks_like() -> None:
    assert json.loads(encode_letter(example())) == {
        "version": 1,
        "id": letter_id(b"x"),
        "timestamp": "2023-11-14T22:13:20.123Z",
        "brokerId": "node-1",
        "stage": "archive",
        "reason": "refused",
        "error": "the broker says no",
        "source": {
            "type": "mqtt", "topic": "sensors/a", "clientId": "c", "publishedAt": "1970-01-01T00:00:01.500Z", "qos": 1,
            "retained": False,
        },
        "payload": {"size": 3, "sha256": letter_id(b"abc")},
        "redrivable": True,
        "target": "mqtt.archive",
        "record": {
            "topic": "mqtt.archive", "partition": None, "timestamp": None, "key": {"text": "sensors/a"},
            "value": {"base64": base64.b64encode(b"\xff\x00").decode()}, "headers": [["h", {"text": "1"}]],
        },
    }  # fmt: skip
    assert dict(letter_headers(example())) == {
        "mqtt.dlq.version": b"1",
        "mqtt.dlq.id": letter_id(b"x").encode(),
        "mqtt.dlq.stage": b"archive",
        "mqtt.dlq.reason": b"refused",
        "mqtt.brokerId": b"node-1",
        "mqtt.topic": b"sensors/a",
        "mqtt.clientId": b"c",
    }


def test_any_error_text_and_any_time_can_be_written() -> None:
    source = MqttSource(topic="t" * 2000, client_id="", published_at=-5)
    letter = example(error="a\nb\udcff" + "x" * 5000, dead_at_ms=2**62, source=source)
    value = json.loads(encode_letter(letter))
    VALIDATOR.validate(value)
    assert value["error"].startswith("a b\\udcff")
    assert len(value["error"]) == 1000
    assert (value["timestamp"][:4], value["source"]["publishedAt"][:4]) == ("9999", "1970")
    assert "mqtt.topic" not in dict(letter_headers(letter))


def test_the_id_is_that_of_what_the_letter_is_about() -> None:
    message = Message("a", b"1", 1, client_id="c", published_at=1.25)
    assert id_of_message(message, "n", "t") == id_of_message(attrs.evolve(message), "n", "t")
    ids = {
        id_of_message(message, "n", "t"),
        id_of_message(message, "n", "t", 1),
        id_of_message(message, "n", "u"),
        id_of_message(message, "m", "t"),
        *(
            id_of_message(attrs.evolve(message, **change), "n", "t")
            for change in (
                {"topic_name": "b"}, {"payload": b"2"}, {"qos": 2}, {"retain": True}, {"client_id": "d"},
                {"published_at": 1.2500001},
            )
        ),
        id_of_consumed(KafkaSource(topic="t", partition=0, offset=1), b"x"),
        id_of_consumed(KafkaSource(topic="t", partition=1, offset=0), b"x"),
        id_of_consumed(KafkaSource(topic="t", partition=1, offset=0), b"y"),
        id_of_consumed(KafkaSource(topic="t", partition=1, offset=0, timestamp_ms=1), b"y"),
        id_of_bus_record(BusSource(topic="t", partition=1, instance_id=bytes(16), sequence=1)),
        id_of_bus_record(BusSource(topic="t", partition=1, instance_id=bytes(16), sequence=2)),
    }  # fmt: skip
    assert len(ids) == 16
    assert letter_id(b"a", b"b") != letter_id(b"ab")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"version": 2}, "format version 2"),
        ({"version": True}, "version is no number"),
        ({"id": "abc"}, "id is not what it should be"),
        ({"stage": "x"}, "'x' is not a valid Stage"),
        ({"reason": None}, "reason is no text"),
        ({"source": {"type": "x", "topic": "a", "partition": 0}}, "source.type 'x'"),
        ({"source": 5}, "source is no JSON object"),
        ({"payload": {"size": -1}}, "size is no number"),
        ({"redrivable": 1}, "redrivable is neither true nor false"),
        ({"target": "../x y"}, "target is not what it should be"),
        ({"timestamp": "yesterday"}, "timestamp is no time"),
        ({"record": {"topic": "t", "key": {"base64": "?"}}}, "record.key is no base64"),
        ({"record": {"topic": "t", "value": {"hex": "00"}}}, "record.value is neither text nor base64"),
        ({"record": {"topic": "t", "headers": {}}}, "record.headers is no list"),
        ({"record": {"topic": "t", "headers": [["a", None]]}}, "record.headers holds something else"),
        ({"record": {"topic": "t", "partition": 2**31}}, "partition is no number"),
    ],
)
def test_what_is_no_letter_is_told(change: dict[str, Any], text: str) -> None:
    value = json.dumps(json.loads(encode_letter(example())) | change).encode()
    with pytest.raises(DeadLetterError, match=text):
        decode_letter(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
def test_reading_garbage_ends_in_one_kind_of_error(data: st.DataObject) -> None:
    table = json.loads(encode_letter(example()))
    for place in (table, table["source"], table["payload"], table["record"]):
        if data.draw(st.booleans()):
            place[data.draw(st.sampled_from(sorted(place)))] = data.draw(json_values)
    value = data.draw(
        st.just(json.dumps(table).encode()) | st.binary(max_size=50) | json_values.map(json.dumps).map(str.encode)
    )
    try:
        letter = decode_letter(value)
    except DeadLetterError:
        return
    assert decode_letter(encode_letter(letter)).id == letter.id


@pytest.mark.parametrize("value", [None, b"", b"[" * 1_000_000, b"9" * 500_000, orjson.dumps({"version": 2**64 - 1})])
def test_hostile_json_is_no_letter(value: bytes | None) -> None:
    with pytest.raises(DeadLetterError):
        decode_letter(value)
