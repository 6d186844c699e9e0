"""Fixtures and options that every test can use."""

from __future__ import annotations

import pytest

from mqtt_trio.testing import memory_broker as memory_broker
from tests.kafka_support import kafka as kafka
from tests.kafka_support import own_kafka as own_kafka
from tests.kafka_support import secure_kafka as secure_kafka
from tests.kafka_support import shared_cluster as shared_cluster
from tests.kafka_support import three_kafkas as three_kafkas
from tests.registry_support import schema_registry as schema_registry


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--spec ID`."""
    parser.addoption("--spec", metavar="ID", help="run only tests that cite this normative statement (MQTT5-3.1.2-22)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not cite the statement of `--spec`."""
    wanted = config.getoption("--spec")
    if not wanted:
        return
    chosen = [item for item in items if any(wanted in mark.args for mark in item.iter_markers("spec"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
