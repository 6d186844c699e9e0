"""Logging as [Logging] says: text or JSON lines on stderr, UTC, one line per record whatever a client sent."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Final

from mqtt_trio.config import LoggingOptions, level_name

LOGGER_ALIASES: Final = {
    "org.apache.kafka.clients.admin": "kafka.admin",
    "org.apache.kafka.clients.consumer": "kafka.consumer",
    "org.apache.kafka.clients.consumer.internals.AbstractCoordinator": "kafka.coordinator",
    "org.apache.kafka.clients.consumer.internals.ConsumerCoordinator": "kafka.coordinator",
    "org.apache.kafka.clients.consumer.internals.Fetcher": "kafka.consumer.fetcher",
    "org.apache.kafka.clients.Metadata": "kafka.cluster",
    "org.apache.kafka.clients.NetworkClient": "kafka.net",
    "org.apache.kafka.clients.producer": "kafka.producer",
    "org.apache.kafka.clients.producer.internals.Sender": "kafka.producer.sender",
    "org.apache.kafka.clients": "kafka",
    "org.apache.kafka.common": "kafka",
    "org.apache.kafka.common.metrics": "kafka.metrics",
    "org.apache.kafka.common.network": "kafka.net",
    "org.apache.kafka.common.security": "kafka.net.sasl",
    "org.apache.kafka": "kafka",
    "at.rocworks.kafka": "gateways.kafka",
}
"""Loggers of Java's client of Kafka, and of the system that the Kafka design comes from -> ours; the longest counts."""
PREFIXES: Final = ("org.apache.kafka", "at.rocworks.kafka")
"""Of these, what follows is kept: `org.apache.kafka.net` is `kafka.net`."""

_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): "\\t",
}


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO mqtt_trio.app: text`, control characters escaped: no client forges a line."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        record.message = record.message.translate(_CONTROL)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: timestamp, level, logger, message, exception."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "timestamp": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure(options: LoggingOptions) -> None:
    """Set up the root logger and the levels of single loggers; replaces what an earlier call set up."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if options.format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(options.level)
    for name, level in levels(options.loggers).items():
        logging.getLogger(name).setLevel(level)


def levels(loggers: Mapping[str, str]) -> dict[str, str]:
    """Return level by logger, with the aliases and short level names resolved."""
    resolved = {}
    for name, level in sorted(loggers.items(), key=lambda item: len(item[0])):  # what says more of a name counts
        resolved[real_name(name)] = level_name(level)
    return resolved


def real_name(name: str) -> str:
    """Return the logger that a name stands for: one of Java's that has no counterpart belongs to the next one above."""
    aliases = [alias for alias in LOGGER_ALIASES if name == alias or name.startswith(f"{alias}.")]
    if not aliases:
        return name
    alias = max(aliases, key=len)
    real = LOGGER_ALIASES[alias]
    return real + name[len(alias) :] if alias in PREFIXES else real
