"""Records that need the id of their schema: they wait for it, and a registry that is away is an outage [K8, K10]."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio

from gateways.kafka import schema_ids
from gateways.kafka.archive import KafkaArchiveStore
from gateways.kafka.avro import AvroMapper, schema_text, split_id
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.kafka_gateway import KafkaGateway
from gateways.kafka.options import KafkaOptions, SchemaRegistryOptions
from gateways.kafka.schema_ids import SchemaId, SchemaIds
from mqtt_trio.errors import GatewayError
from mqtt_trio.gateway import Message
from tests.gateway_support import LIMIT
from tests.gateways.memory_kafka import FakeKafka, producing


@attrs.define
class FakeRegistry:
    """A registry that says what a test wants."""

    url: str = "http://registry"
    options: SchemaRegistryOptions = attrs.field(factory=lambda: SchemaRegistryOptions(url="http://registry"))
    answers: list[int | Exception] = attrs.field(factory=list)
    """What the next requests get; the last one stays."""
    asked: list[tuple[str, str]] = attrs.field(factory=list)
    threads: set[str] = attrs.field(factory=set)
    open: threading.Event = attrs.field(factory=threading.Event)

    def subject(self, topic: str, record_name: str) -> str:
        return f"{topic}-value"

    def id_of(self, subject: str, schema: str) -> int:
        self.threads.add(threading.current_thread().name)
        self.asked.append((subject, schema))
        assert self.open.wait(LIMIT)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def away(text: str) -> GatewayError:
    return GatewayError(text, retriable=True)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema_ids, "FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(schema_ids, "LONGEST_BACKOFF", 0.002)


@attrs.define
class Watched:
    """A store whose records need an id, and what it tells its group."""

    registry: FakeRegistry
    kafka: FakeKafka
    store: KafkaArchiveStore
    ids: SchemaIds
    told: list[str | None] = attrs.field(factory=list)
    outcomes: list[Any] = attrs.field(factory=list)
    changed: trio.Event = attrs.field(factory=trio.Event)

    def tell(self) -> None:
        self.told.append(self.store.trouble())
        self.changed.set()

    def submit(self, *payloads: bytes) -> None:
        def done(outcome: Any) -> None:
            self.outcomes.append(outcome)
            self.changed.set()

        self.store.submit([Message("a", payload, published_at=1.0) for payload in payloads], done)

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(LIMIT):
            while not condition():
                self.changed = trio.Event()
                await self.changed.wait()


async def test_what_is_submitted_waits_for_the_id_and_an_outage_is_told(caplog: pytest.LogCaptureFixture) -> None:
    registry, kafka = FakeRegistry(answers=[away("nobody"), away("nobody"), away("broken"), 7]), FakeKafka()
    async with producing(kafka) as setup, trio.open_nursery() as nursery:
        mapper, ids = AvroMapper("t", "node-1", registered=True), SchemaIds(registry)
        store = KafkaArchiveStore(setup.bridge, mapper, DeadLetters(), SchemaId(ids, mapper))
        watched = Watched(registry, kafka, store, ids)
        store.watch(watched.tell)
        assert store.describe() == "Kafka topic t (AVRO, schema registry http://registry)"
        await nursery.start(store.run)
        nursery.start_soon(store.prepare)
        watched.submit(b"1", b"2")
        watched.submit(b"3")
        await trio.testing.wait_all_tasks_blocked()
        assert (kafka.log, store.trouble()) == ([], None), "nobody knows yet whether the registry answers"
        registry.open.set()
        await watched.until(lambda: len(watched.outcomes) == 2)
        assert watched.told[0] == "nobody"
        assert watched.told[-1] is None
        assert len(watched.told) == 2, "an outage is told once, and its end"
        watched.submit(b"4")
        await watched.until(lambda: len(watched.outcomes) == 3)
        nursery.cancel_scope.cancel()
    assert watched.outcomes == [{}, {}, {}]
    values = [record.value or b"" for record in kafka.log]
    assert [split_id(value)[0] for value in values] == [7] * 4
    assert [value.count(b"%d" % number) > 0 for number, value in enumerate(values, 1)] == [True] * 4
    assert registry.asked == [("t-value", schema_text())] * 4, "known once, it is not asked for again"
    assert threading.main_thread().name not in registry.threads
    assert ids.failures == 3
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line.partition(". ")[0] for line in lines] == [
        "nobody",
        "broken",
        "schema registry http://registry: Kafka topic t has its schema now",
    ]


async def test_a_registry_that_hangs_is_an_outage_and_holds_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema_ids, "PATIENCE", -4.9)
    registry = FakeRegistry(answers=[3])
    ids, mappers = SchemaIds(registry), [AvroMapper(f"t{number}", registered=True) for number in range(3)]
    preparations, failed = [SchemaId(ids, mapper) for mapper in mappers], trio.Event()

    def note() -> None:
        if ids.failures > 5:
            failed.set()

    async with trio.open_nursery() as nursery:
        for preparation in preparations:
            nursery.start_soon(preparation.run, note)
        with trio.fail_after(LIMIT):
            await failed.wait()
            assert all("no answer in" in (preparation.trouble or "") for preparation in preparations)
            assert len(registry.asked) == 1, "one request at a time, and this one hangs"
            registry.open.set()
    assert all(mapper.is_ready for mapper in mappers)
    assert [preparation.trouble for preparation in preparations] == [None] * 3


async def test_a_store_without_its_id_can_be_stopped() -> None:
    registry = FakeRegistry(answers=[away("nobody")])
    registry.open.set()
    async with producing(FakeKafka()) as setup, trio.open_nursery() as nursery:
        mapper = AvroMapper("t", registered=True)
        store = KafkaArchiveStore(setup.bridge, mapper, DeadLetters(), SchemaId(SchemaIds(registry), mapper))
        nursery.start_soon(store.prepare)
        await nursery.start(store.run)
        outcomes: list[Any] = []
        store.submit([Message("a", b"1")], outcomes.append)
        with trio.move_on_after(0.05) as scope:
            await store.stop()
        assert scope.cancelled_caught
        assert store.is_over
        assert outcomes == []
        nursery.cancel_scope.cancel()


def test_the_gateway_is_not_ready_while_a_registry_is_away() -> None:
    gateway = KafkaGateway(KafkaOptions(schema_registry=SchemaRegistryOptions(url="http://127.0.0.1:1")))
    stores = [gateway.archive_store(topic, topic, form="AVRO") for topic in ("a", "b")]
    plain = gateway.archive_store("c", "c", form="RAW")
    assert [store.describe() for store in (*stores, plain)] == [
        "Kafka topic a (AVRO, schema registry http://127.0.0.1:1)",
        "Kafka topic b (AVRO, schema registry http://127.0.0.1:1)",
        "Kafka topic c (RAW)",
    ]
    for store in stores:
        assert isinstance(store, KafkaArchiveStore)
        assert isinstance(store._preparation, SchemaId)
        store._preparation.trouble = "schema registry: nobody"
    assert gateway.unready()[0] == "schema registry: nobody"
    assert sum("schema registry" in line for line in gateway.unready()) == 1
    assert gateway.counters()["schema_registry_failures"] == 0


async def test_an_outage_at_the_start_is_told_when_the_store_runs() -> None:
    registry = FakeRegistry(answers=[away("nobody")])
    registry.open.set()
    async with producing(FakeKafka()) as setup, trio.open_nursery() as nursery:
        mapper = AvroMapper("t", registered=True)
        store = KafkaArchiveStore(setup.bridge, mapper, DeadLetters(), SchemaId(SchemaIds(registry), mapper))
        watched = Watched(registry, setup.kafka, store, SchemaIds(registry))
        store.watch(watched.tell)
        nursery.start_soon(store.prepare)
        with trio.fail_after(LIMIT):
            await store.tried.wait()
        assert watched.told == [], "nobody listens before the store runs"
        await nursery.start(store.run)
        assert watched.told == ["nobody"]
        registry.answers = [5]
        await watched.until(lambda: len(watched.told) == 2)
        assert watched.told == ["nobody", None]
        nursery.cancel_scope.cancel()
