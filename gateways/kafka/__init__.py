"""The Kafka gateway: archive groups into Kafka, nodes joined by Kafka."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from gateways.kafka.options import KafkaOptions
from mqtt_trio.errors import ConfigError

if TYPE_CHECKING:
    from gateways.kafka.kafka_gateway import KafkaGateway
    from mqtt_trio.gateway import Finding, GatewayCommand

COMMANDS: Final = {"dlq": "dlq_commands", "offsets": "offset_commands", "topics": "topic_commands"}
"""Command -> module with `COMMAND`; it imports kafka-python when it runs."""


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
        from gateways.kafka import workers
        from gateways.kafka.security import security_of
    except ImportError as exc:
        text = f"Kafka: {exc.name} is not installed; install mqtt-trio with its extra: pip install 'mqtt-trio[kafka]'"
        raise ConfigError([text]) from None
    workers.check_client_options(options)
    security_of(options).check()


def examine(options: object, archive_topics: Sequence[str | None]) -> Iterator[Finding]:
    """Look at everything that section [Kafka] needs, for `mqtt-trio doctor`; blocks while it is read.

    `archive_topics`: destinations of the archive groups that store in Kafka, None: the archive topic.
    """
    from gateways.kafka.doctor import examine as look

    if not isinstance(options, KafkaOptions):
        raise TypeError(f"expected KafkaOptions, got {type(options).__name__}")
    check(options)
    return look(options, archive_topics)


def command(name: str) -> GatewayCommand:
    """Return the command `name` of `COMMANDS`."""
    found: GatewayCommand = importlib.import_module(f"gateways.kafka.{COMMANDS[name]}").COMMAND
    return found
