"""What a reader asks a schema registry for when records name ids that lead nowhere [K8], by a clock of the test."""

from __future__ import annotations

import pytest

from gateways.kafka.avro import SCHEMA, AvroError, AvroMapper, schema_text
from gateways.kafka.reading import UnreadableError, reader_of
from gateways.kafka.records import ConsumedRecord
from gateways.kafka.schema_registry import RegistryError
from gateways.kafka.writer_schemas import MISS_TIME, MOST_MISSES, MOST_SCHEMAS, WriterSchemas
from mqtt_trio.errors import GatewayError
from mqtt_trio.gateway import Message

FOREIGN = '{"type": "record", "name": "N", "fields": [{"name": "n", "type": {"type": "array", "items": "null"}}]}'


class World:
    """A registry and a clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.has: dict[int, str] = {}
        self.away = False
        self.asked: list[int] = []
        self.schemas = WriterSchemas(self.find, lambda: self.now)

    def find(self, schema_id: int) -> str:
        self.asked.append(schema_id)
        if self.away:
            raise RegistryError("away", retriable=True)
        if schema_id not in self.has:
            raise RegistryError(f"has no schema with the id {schema_id}", retriable=False)
        return self.has[schema_id]

    def misses(self, schema_id: int) -> bool:
        with pytest.raises(GatewayError, match=f"no schema with the id {schema_id}$") as caught:
            self.schemas[schema_id]
        return not caught.value.retriable


def record_of(value: bytes) -> ConsumedRecord:
    return ConsumedRecord("t", 0, 0, b"a", value, (), 5)


def test_an_id_that_is_not_there_is_asked_for_once_in_a_while() -> None:
    world = World()
    for _ in range(1000):
        assert world.misses(9)
    assert world.asked == [9]
    world.now += MISS_TIME - 0.001
    assert world.misses(9)
    assert world.asked == [9]
    world.now += 0.001
    assert world.misses(9)
    assert world.asked == [9, 9]


def test_a_schema_that_comes_later_is_found() -> None:
    world = World()
    assert world.misses(9)
    world.has[9] = schema_text()
    assert world.misses(9), "not before its time"
    world.now += MISS_TIME
    assert world.schemas[9] is SCHEMA
    world.now += 1e9
    assert world.schemas[9] is SCHEMA
    assert world.asked == [9, 9]


def test_a_schema_that_is_no_record_of_ours_is_fetched_once_in_a_while() -> None:
    world = World()
    world.has[9] = FOREIGN
    for _ in range(1000):
        with pytest.raises(AvroError, match="no record of plain fields"):
            world.schemas[9]
    assert world.asked == [9]
    world.now += MISS_TIME
    world.has[9] = schema_text()
    assert world.schemas[9] is SCHEMA


def test_a_registry_that_is_away_is_asked_again_at_once() -> None:
    world = World()
    world.away = True
    for _ in range(3):
        with pytest.raises(RegistryError, match="away") as caught:
            world.schemas[9]
        assert caught.value.retriable
    world.away, world.has[9] = False, schema_text()
    assert world.schemas[9] is SCHEMA
    assert world.schemas.asked == 4


def test_ids_that_no_registry_gives_are_not_asked_for() -> None:
    world = World()
    for schema_id in (-1, -(2**31)):
        with pytest.raises(GatewayError, match="no schema registry has") as caught:
            world.schemas[schema_id]
        assert not caught.value.retriable
    assert world.asked == []


def test_what_is_remembered_is_bounded() -> None:
    world = World()
    for schema_id in range(MOST_MISSES):
        assert world.misses(schema_id)
    assert len(set(world.asked)) == MOST_MISSES
    world.asked.clear()
    assert world.misses(0)
    assert world.misses(MOST_MISSES)  # one more: the oldest, 0, gives way
    assert world.misses(1)
    assert world.asked == [MOST_MISSES]
    assert world.misses(0)
    assert world.asked == [MOST_MISSES, 0]
    assert len(world.schemas._misses) == MOST_MISSES


def test_known_schemas_are_bounded_and_outlive_a_flood() -> None:
    world = World()
    world.has = dict.fromkeys(range(MOST_SCHEMAS + 1), schema_text())
    for schema_id in range(MOST_SCHEMAS):
        assert world.schemas[schema_id] is SCHEMA
    for schema_id in range(10**6, 10**6 + 3 * MOST_MISSES):
        assert world.misses(schema_id)
    world.asked.clear()
    assert world.schemas[0] is SCHEMA
    assert world.asked == []
    assert world.schemas[MOST_SCHEMAS] is SCHEMA
    assert len(world.schemas._known) == 1


def test_a_flood_of_garbage_does_not_reach_the_registry() -> None:
    """Through the reader: 10,000 records that name one id, good ones among them."""
    world = World()
    world.has[77] = schema_text()
    reader = reader_of("AVRO", world.find)
    mapper = AvroMapper("t", registered=True)
    mapper.use_id(77)
    good = mapper.record(Message("a", b"x", published_at=1.0)).value
    assert good is not None
    garbage = b"\0\0\0\0\x09" + good[5:]
    for number in range(10_000):
        if number % 100 == 50:
            assert reader.read(record_of(good)).message.payload == b"x"
        else:
            with pytest.raises(GatewayError, match="no schema with the id 9") as caught:
                reader.read(record_of(garbage))
            assert not isinstance(caught.value, UnreadableError)
    assert world.asked == [9, 77]
