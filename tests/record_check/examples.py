"""Records of examples/, which have producers of their own: a test that reads them shows them here."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, Final

import jsonschema_rs
import orjson

from gateways.kafka.records import Record
from tests.record_check.book import FOLDER
from tests.record_check.rules import Kind, errors_of
from tests.record_check.watch import book_of

SCHEMA: Final = Path(__file__).parents[2] / "examples" / "sensor_streams.schema.json"
NAMES: Final = {Kind.AGGREGATE: "aggregate", Kind.ANOMALY: "anomaly"}


def problems_of_example(kind: Kind, key: bytes | None, value: bytes | None) -> list[str]:
    """Return what is wrong with a record of sensor_streams.py."""
    try:
        found = orjson.loads(value or b"")
    except ValueError as exc:
        return [f"no JSON: {exc}"]
    problems = errors_of(_validator(NAMES[kind]), found)
    return problems or ([] if found["topic"].encode() == key else ["topic: it is not the key"])


def check_example(kind: Kind, record: Any) -> None:
    """Validate and count a record that was read with kafka-python."""
    book = book_of(os.environ[FOLDER], "process")
    if problems := problems_of_example(kind, record.key, record.value):
        book.violation(kind, Record(record.topic, None, record.key, record.value, record.headers), problems)
    else:
        book.count(kind)


@cache
def _validator(name: str) -> Any:
    return jsonschema_rs.validator_for({**json.loads(SCHEMA.read_text()), "$ref": f"#/$defs/{name}"})
