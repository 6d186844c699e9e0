"""The Kafka gateway: archive groups into Kafka, nodes joined by Kafka."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateways.kafka.options import KafkaOptions
from mqtt_trio.errors import ConfigError

if TYPE_CHECKING:
    from gateways.kafka.kafka_gateway import KafkaGateway


def build(options: object) -> KafkaGateway:
    """Make the gateway of section [Kafka]; None: all defaults.

    Raises:
      ConfigError: an option means nothing to kafka-python, or kafka-python is not installed.
    """
    if options is None:
        options = KafkaOptions()
    if not isinstance(options, KafkaOptions):
        raise TypeError(f"expected KafkaOptions, got {type(options).__name__}")
    try:
        from gateways.kafka import workers
        from gateways.kafka.kafka_gateway import KafkaGateway
    except ImportError as exc:
        text = f"Kafka: {exc.name} is not installed; install mqtt-trio with its extra: pip install 'mqtt-trio[kafka]'"
        raise ConfigError([text]) from None
    workers.check_client_options(options)
    return KafkaGateway(options)
