"""Logging as [Logging] says: text or JSON lines on stderr, UTC, one line per record whatever a client sent."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Final

from mqtt_trio.config import LoggingOptions, level_name

LOGGER_ALIASES: Final = {"org.apache.kafka": "kafka", "at.rocworks.kafka": "gateways.kafka"}
"""Names of the loggers of the system that the Kafka design comes from."""

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
    for name, level in loggers.items():
        for alias, real in LOGGER_ALIASES.items():
            if name == alias or name.startswith(f"{alias}."):
                name = real + name[len(alias) :]
                break
        resolved[name] = level_name(level)
    return resolved
