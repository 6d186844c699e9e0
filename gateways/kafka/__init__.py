"""The Kafka gateway: archive groups into Kafka, nodes joined by Kafka; and reading archives from other programs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from gateways.kafka.options import KafkaOptions as KafkaOptions
from mqtt_trio.errors import ConfigError

if TYPE_CHECKING:
    from gateways.kafka.archive_consumer import ArchiveConsumer as ArchiveConsumer
    from gateways.kafka.archived import ArchivedMessage as ArchivedMessage
    from gateways.kafka.kafka_gateway import KafkaGateway
    from mqtt_trio.gateway import Finding, GatewayCommand

COMMANDS: Final = {
    "dlq": "dlq_commands",
    "offsets": "offset_commands",
    "rebuild": "rebuild_command",
    "topics": "topic_commands",
}
"""Command -> module with `COMMAND`; it imports kafka-python when it runs."""

PUBLIC: Final = {
    "ArchiveConsumer": "archive_consumer",
    "ArchivedMessage": "archived",
}
"""Name for other programs -> its module, imported when somebody asks: the broker reads options without any of it."""


def __getattr__(name: str) -> object:
    if name in PUBLIC:
        return getattr(importlib.import_module(f"gateways.kafka.{PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(options: object) -> KafkaGateway:
    """Make the gateway of section [Kafka]; None: all defaults.

    Raises:
      ConfigError: an option means nothing to kafka-python, a store or key cannot be used, or kafka-python is not
        installed.
    """
    if options is None:
        options = KafkaOptions()
    if not isinstance(options, KafkaOptions):
        raise TypeError(f"expected KafkaOptions, got {type(options).__name__}")
    check(options)
    from gateways.kafka.kafka_gateway import KafkaGateway

    return KafkaGateway(options)


def check(options: KafkaOptions) -> None:
    """Compare the options with what kafka-python can do.

    Raises:
      ConfigError: an option means nothing to kafka-python, a store or key cannot be used, or kafka-python is not
        installed.
    """
    try:
        from gateways.kafka import schema_registry, workers
        from gateways.kafka.security import security_of
    except ImportError as exc:
        text = f"Kafka: {exc.name} is not installed; install mqtt-trio with its extra: pip install 'mqtt-trio[kafka]'"
        raise ConfigError([text]) from None
    workers.check_client_options(options)
    security_of(options).check()
    schema_registry.check(options)


def examine(
    options: object, archive_topics: Sequence[str | None], acknowledging: Sequence[str] = ()
) -> Iterator[Finding]:
    """Look at everything that section [Kafka] needs, for `mqtt-trio doctor`; blocks while it is read.

    `archive_topics`: destinations of the archive groups that store in Kafka, None: the archive topic; `acknowledging`:
    names of those with `Ack = "store"`.
    """
    from gateways.kafka.doctor import examine as look

    if not isinstance(options, KafkaOptions):
        raise TypeError(f"expected KafkaOptions, got {type(options).__name__}")
    check(options)
    return look(options, archive_topics, acknowledging)


def command(name: str) -> GatewayCommand:
    """Return the command `name` of `COMMANDS`."""
    found: GatewayCommand = importlib.import_module(f"gateways.kafka.{COMMANDS[name]}").COMMAND
    return found
