"""Fixtures and options that every test can use."""

from __future__ import annotations

import hypothesis
import pytest

from mqtt_trio.testing import memory_broker as memory_broker
from tests.kafka_support import kafka as kafka
from tests.kafka_support import own_kafka as own_kafka
from tests.kafka_support import secure_kafka as secure_kafka
from tests.kafka_support import shared_cluster as shared_cluster
from tests.kafka_support import three_kafkas as three_kafkas
from tests.registry_support import schema_registry as schema_registry

pytest_plugins = ["tests.record_check.plugin"]

# An example that takes long says that other programs have the cores. What has to be quick is asserted where it is.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--spec ID` and `--alone`."""
    parser.addoption("--spec", metavar="ID", help="run only tests that cite this normative statement (MQTT5-3.1.2-22)")
    parser.addoption("--alone", choices=("only", "not"), help="run only tests marked `alone`, or only the others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `--spec` and `--alone` do not ask for; have workers begin with what takes long."""
    spec, alone = config.getoption("--spec"), config.getoption("--alone")
    chosen = [item for item in items if not spec or any(spec in mark.args for mark in item.iter_markers("spec"))]
    if alone:
        chosen = [item for item in chosen if (item.get_closest_marker("alone") is not None) is (alone == "only")]
    if left_out := set(items) - set(chosen):
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = chosen
    if hasattr(config, "workerinput"):  # of pytest-xdist: files are handed out in this order, each as a whole
        items.sort(key=lambda item: not takes_long(item))


def takes_long(item: pytest.Item) -> bool:
    """Whether its file is one of those that wait for real servers or start many processes."""
    return "mutations" in item.path.parts or any(map(item.get_closest_marker, ("kafka", "interop")))
