"""Which kind a record is, by the producer that got it: each producer of the gateway writes to topics of its own."""

from __future__ import annotations

from typing import Final

from gateways.kafka.dlq import REDRIVEN_HEADER
from gateways.kafka.mapping import MessageRecord
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import Record
from gateways.kafka.retained import MAP_KEY
from tests.record_check.rules import Kind, bus_kind

OF_TESTS: Final = ("test", "life", "sender-")
"""How the names of producers begin that tests make to write what they like: nothing says what that has to be."""
ARCHIVES: Final = {"JSON": Kind.ARCHIVE_JSON, "RAW": Kind.ARCHIVE_RAW, "AVRO": Kind.ARCHIVE_AVRO}


class UnknownRecordError(Exception):
    """A record that no shipped schema describes."""


def kind_of(producer: str, record: Record, options: KafkaOptions | None = None) -> Kind | None:
    """Return the kind of a record that `producer` is to write; None: it is a test's own. `options`: of the gateway,
    where there is one.

    Raises:
      UnknownRecordError: nobody has said what such records are.
    """
    found: Kind | None = None
    if producer.startswith(OF_TESTS):
        return None
    if producer == "archive":
        found = _archived(record, options)
    elif producer == "messages" and isinstance(record, MessageRecord):
        found = Kind.MESSAGES
    elif producer == "bus":
        found = bus_kind(record.value) if record.key is None else _retained(record)
    elif producer == "redrive":
        is_note = record.value is None and any(name == REDRIVEN_HEADER for name, _ in record.headers)
        found = Kind.NOTE if is_note else Kind.REDRIVEN
    else:
        found = {"dlq": Kind.LETTER, "events": Kind.EVENT, "metrics": Kind.METRICS}.get(producer)
    if found is None:
        raise UnknownRecordError(f"no schema is known for such a record of the producer {producer!r}")
    return found


def _archived(record: Record, options: KafkaOptions | None) -> Kind | None:
    if not isinstance(record, MessageRecord):
        return None
    mapper = record._mapper
    found = ARCHIVES.get(mapper.form)
    has_registry = options.schema_registry.url is not None if options is not None else bool(vars(mapper).get("_prefix"))
    return Kind.ARCHIVE_AVRO_REGISTRY if found is Kind.ARCHIVE_AVRO and has_registry else found


def _retained(record: Record) -> Kind:
    if record.key == MAP_KEY:
        return Kind.RETAINED_PARTITIONS
    return Kind.RETAINED_TOMBSTONE if record.value is None else Kind.RETAINED
