"""The shipped config.toml: loads as it is, and with every line uncommented but what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import attrs

from gateways.kafka.options import KafkaOptions
from mqtt_trio.config import LoadedConfig, load_config

SHIPPED = Path(__file__).parent.parent / "config.toml"
SECTIONS: Mapping[str, type] = {"Kafka": KafkaOptions}


def kafka(loaded: LoadedConfig) -> KafkaOptions:
    options = loaded.gateways["Kafka"]
    assert isinstance(options, KafkaOptions)
    return options


def load(directory: Path, text: str) -> LoadedConfig:
    path = directory / "config.toml"
    path.write_text(text)
    return load_config(path, {}, None, SECTIONS)


def test_the_shipped_file_loads() -> None:
    loaded = load_config(SHIPPED, {}, None, SECTIONS)
    (group,) = loaded.options.archive_groups
    assert (group.name, group.store, group.filter) == ("Default", "SQLITE", ("#",))
    assert group.retention == 7 * 86_400
    assert group.max_size == 2**30
    defaults = load_config(None, {}, None, SECTIONS)
    assert attrs.evolve(loaded.options, archive_groups=()) == defaults.options
    assert loaded.gateways == {}


def test_the_shipped_file_with_every_line_uncommented(tmp_path: Path) -> None:
    text = re.sub(r"(?m)^#(?=[A-Za-z\[])", "", SHIPPED.read_text())
    assert text.count("=") > 90, "the file shows every key"
    loaded = load(tmp_path, text)
    assert [group.name for group in loaded.options.archive_groups] == ["Default", "Sensors"]
    defaults = load_config(None, {}, None, SECTIONS).options
    assert loaded.options.limits == defaults.limits
    assert loaded.options.shutdown.timeout == defaults.shutdown.timeout
    assert loaded.options.http == attrs.evolve(defaults.http, port=8080)
    expected = attrs.evolve(KafkaOptions(), servers="localhost:9092")
    assert (
        attrs.evolve(
            kafka(loaded),
            bus=KafkaOptions().bus,
            topics=KafkaOptions().topics,
            metrics=KafkaOptions().metrics,
            security=KafkaOptions().security,
            ssl=KafkaOptions().ssl,
            schema_registry=KafkaOptions().schema_registry,
            producer={},
            consumer={},
        )
        == expected
    )
    assert attrs.evolve(kafka(loaded).bus, enabled=False) == KafkaOptions().bus
