"""Fixtures that every test can use."""

from __future__ import annotations

from tests.kafka_support import kafka as kafka
from tests.kafka_support import own_kafka as own_kafka
