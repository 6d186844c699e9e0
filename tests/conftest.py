"""Fixtures that every test can use."""

from __future__ import annotations

from mqtt_trio.testing import memory_broker as memory_broker
from tests.kafka_support import kafka as kafka
from tests.kafka_support import own_kafka as own_kafka
