"""Dead letters in a real Kafka [K7, K12]."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from jsonschema import Draft202012Validator

from gateways.kafka import build
from gateways.kafka.admin import Admin
from gateways.kafka.dlq import MqttSource, Stage
from gateways.kafka.dlq_reading import decode_letter
from gateways.kafka.kafka_gateway import KafkaGateway
from gateways.kafka.options import KafkaOptions, TopicOptions, TopicsOptions
from gateways.kafka.records import Reason
from gateways.kafka.schema_files import load_schema
from mqtt_trio.gateway import Message
from tests.gateway_support import LIMIT, read_records, without_stream
from tests.gateways.memory_bus import FakeHost
from tests.kafka_support import KafkaNode, unique_name

pytestmark = pytest.mark.kafka
VALIDATOR = Draft202012Validator(load_schema("mqtt_dlq.schema.json"))


@asynccontextmanager
async def running(options: KafkaOptions, topics: Sequence[str | None]) -> AsyncIterator[tuple[KafkaGateway, list[Any]]]:
    gateway = build(without_stream(options))
    stores = [gateway.archive_store(topic, f"group-{number}") for number, topic in enumerate(topics)]
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            await nursery.start(gateway.run, FakeHost("node-1", bytes(16)))
        for store in stores:
            await nursery.start(store.run)
        yield gateway, stores
        with trio.move_on_after(5):
            await gateway.stop()
        nursery.cancel_scope.cancel()


async def test_what_the_archive_cannot_take_is_a_dead_letter_and_fails(kafka: KafkaNode) -> None:
    archive, dlq = unique_name("archive"), unique_name("dlq")
    topics = TopicsOptions(
        archive=TopicOptions(name=archive, partitions=2, config={"max.message.bytes": "3000"}),
        dlq=TopicOptions(name=dlq),
    )
    options = KafkaOptions(servers=kafka.servers, topics=topics)
    noise = random.Random(7).randbytes(4000)
    messages = [
        Message("a", payload, 1, client_id="c", published_at=1.5 + number)
        for number, payload in enumerate((b"1", noise, b"2", b"x" * 4000))  # the last one fits once it is compressed
    ]
    outcomes: list[Any] = []
    async with running(options, [None]) as (gateway, stores):
        stores[0].submit(messages, outcomes.append)
        with trio.fail_after(LIMIT):
            await stores[0].stop()
    (outcome,) = outcomes
    assert list(outcome) == [1]  # it counts as not stored, so with Ack = "store" its answer is negative
    stored = await trio.to_thread.run_sync(read_records, kafka.servers, archive, 3)
    assert [json.loads(record.value)["payload"][:1] for record in stored] == ["1", "2", "x"]
    (record,) = await trio.to_thread.run_sync(read_records, kafka.servers, dlq, 1)
    VALIDATOR.validate(json.loads(record.value))
    letter = decode_letter(record.value)
    assert (letter.stage, letter.reason, letter.size) == (Stage.ARCHIVE, Reason.TOO_LARGE, 4000)
    assert letter.source == MqttSource(topic="a", client_id="c", published_at=2.5, qos=1)
    assert letter.record is None
    assert letter.target == archive
    assert record.key == letter.id.encode()
    assert dict(record.headers)["mqtt.dlq.reason"] == b"too_large"
    counters = gateway.counters()
    assert (counters["dlq_letters_written"], counters["dlq_letters_lost"], counters["dlq_too_large"]) == (1, 0, 1)


async def test_a_limit_that_is_lowered_costs_one_producer_and_not_one_for_each_record(kafka: KafkaNode) -> None:
    """What Kafka refuses makes the node look at the topic again; from then on such records are not sent."""
    archive = unique_name("lowered")
    topics = TopicsOptions(archive=TopicOptions(name=archive, partitions=1), dlq=TopicOptions(name=unique_name("dlq")))
    options = KafkaOptions(servers=kafka.servers, topics=topics)
    noise = random.Random(7)
    messages = [Message(f"a/{n}", noise.randbytes(4000) if n % 2 else b"small", 1, client_id="c") for n in range(12)]
    outcomes: list[Any] = []
    async with running(options, [None]) as (gateway, stores):
        admin = Admin(options)
        assert admin.configure(archive, {"max.message.bytes": "3000"}) is None
        admin.close()
        for message in messages:  # one at a time: each would break a producer of its own
            stores[0].submit([message], outcomes.append)
            with trio.fail_after(LIMIT):
                await stores[0].stop()
    assert [bool(outcome) for outcome in outcomes] == [bool(n % 2) for n in range(12)]
    counters = gateway.counters()
    assert (counters["archive_rebuilds"], counters["dlq_too_large"]) == (1, 6)
