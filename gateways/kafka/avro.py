"""MQTT messages as Avro records [K8]: pure, no I/O. `schemas/mqtt_message.avsc` is the schema.

A value is one datum in Avro's binary encoding, without a container. With a schema registry it stands behind the bytes
that clients of one expect: 0 and the schema's id, four bytes, big-endian.
"""

from __future__ import annotations

import json
import struct
from io import BytesIO
from typing import Any, Final

import fastavro

from gateways.kafka.mapping import RecordMapper
from gateways.kafka.schema_files import load_schema
from mqtt_trio.gateway import Message

MAGIC: Final = 0
PREFIX: Final = struct.Struct(">bi")
LARGEST_ID: Final = 2**31 - 1
RECORD_NAME: Final = "at.rocworks.kafka.MqttMessage"
PRIMITIVES: Final = ("null", "boolean", "int", "long", "float", "double", "bytes", "string")


class AvroError(Exception):
    """Bytes that are no record of ours, or a schema that no such record can be read with."""


def schema_text() -> str:
    """Return the schema as it is registered: white space apart, what the package data hold."""
    return json.dumps(load_schema("mqtt_message.avsc"), separators=(",", ":"))


SCHEMA: Final = fastavro.parse_schema(load_schema("mqtt_message.avsc"))


class AvroMapper(RecordMapper):
    """AVRO values: what the schema has no field for is in the headers.

    Attributes:
      is_ready: with a registry, the id is known; until then no record can be made.
    """

    form = "AVRO"

    def __init__(self, topic: str, broker_id: str = "", *, registered: bool = False) -> None:
        """`registered`: values name their schema by the id that `use_id` sets."""
        super().__init__(topic, broker_id)
        self.is_ready = not registered
        self._prefix = b""

    def use_id(self, schema_id: int) -> None:
        """Say which id the registry has for the schema."""
        self._prefix = PREFIX.pack(MAGIC, schema_id)
        self.is_ready = True

    def value(self, message: Message, milliseconds: int) -> bytes:
        """Return the datum, behind the id where there is a registry."""
        if not self.is_ready:
            raise AvroError("the schema registry has not said yet which id the schema has")
        out = BytesIO()
        out.write(self._prefix)
        datum = {
            "timestamp": milliseconds,
            "topic": message.topic_name,
            "payload": message.payload,
            "qos": message.qos,
            "retained": message.retain,
            "clientId": message.client_id or None,
        }
        fastavro.schemaless_writer(out, SCHEMA, datum)
        return out.getvalue()


def split_id(value: bytes) -> tuple[int | None, bytes]:
    """Return the id that stands before a datum, and the datum; None: there is no id.

    A datum of ours begins with 0 only where it was published at the very beginning of 1970.
    """
    if len(value) < PREFIX.size or value[0] != MAGIC:
        return None, value
    return PREFIX.unpack_from(value)[1], value[PREFIX.size :]


def decode_datum(data: bytes, writer: Any = SCHEMA) -> dict[str, Any]:
    """Return the fields of a datum; `writer` is the schema that it was written with, from `parse_writer`.

    Raises:
      AvroError: it is none, or what it was written with cannot be read as ours.
    """
    stream = BytesIO(data)
    try:
        datum = fastavro.schemaless_reader(stream, writer, None if writer is SCHEMA else SCHEMA)
    except Exception as exc:  # fastavro raises whatever its inner loops meet
        raise AvroError(f"not an Avro record of {RECORD_NAME}: {type(exc).__name__}: {exc}") from None
    if stream.tell() != len(data):
        raise AvroError(f"{len(data) - stream.tell()} bytes behind the Avro record")
    if not isinstance(datum, dict):
        raise AvroError(f"not an Avro record of {RECORD_NAME}")
    return datum


def parse_writer(text: str) -> Any:
    """Return a schema that somebody else wrote with, for `decode_datum`.

    Raises:
      AvroError: it is no schema, or not one of a record of plain fields.
    """
    try:
        table = json.loads(text)
        if table == load_schema("mqtt_message.avsc"):
            return SCHEMA
        if not _is_flat(table):
            raise AvroError("its schema is no record of plain fields")
        return fastavro.parse_schema(table)
    except (ValueError, RecursionError, fastavro.schema.SchemaParseException, KeyError, TypeError) as exc:
        raise AvroError(f"not an Avro schema: {type(exc).__name__}: {exc}") from None


def _is_flat(schema: object) -> bool:
    """Whether a schema is a record of fields that take bytes for what they hold: an array of nulls is as long as it
    says it is, for nothing, and a schema that contains itself nests as deep as its data want."""
    if not isinstance(schema, dict) or schema.get("type") != "record":
        return False
    return all(_is_plain(field["type"]) for field in schema["fields"])


def _is_plain(tp: object) -> bool:
    if isinstance(tp, list):
        return all(map(_is_plain, tp))
    if isinstance(tp, dict):
        kind = tp.get("type")
        return kind in ("enum", "fixed") or (kind == "map" and tp["values"] in PRIMITIVES) or kind in PRIMITIVES
    return tp in PRIMITIVES
