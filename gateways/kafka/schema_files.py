"""The schemas of what the gateway writes, shipped as package data in `schemas/` [K8, K12]."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Literal, TypeAlias

SchemaName: TypeAlias = Literal[
    "mqtt_message.schema.json",
    "mqtt_message.avsc",
    "mqtt_event.schema.json",
    "mqtt_metrics.schema.json",
    "mqtt_dlq.schema.json",
    "mqtt_records.schema.json",
    "mqtt_bus.layout.json",
]
"""JSON Schemas of the values of archive topics and mqtt.messages, of mqtt.events, mqtt.metrics and mqtt.dlq, and of key
and headers of every record; the Avro schema of archive topics; how the bytes of bus records lie."""


def load_schema(name: SchemaName) -> dict[str, Any]:
    """Return a schema: every value that is written validates against its own."""
    schema: dict[str, Any] = json.loads((files("gateways.kafka") / "schemas" / name).read_text("utf-8"))
    return schema
