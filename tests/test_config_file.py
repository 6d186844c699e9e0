"""The shipped config.toml: loads as it is, and with every line uncommented but what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import attrs

from gateways.kafka.options import KafkaOptions
from mqtt_trio.config import LoadedConfig, load_config
from mqtt_trio.errors import ConfigError

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
    built = "\n".join(line for line in text.splitlines() if "not built yet" not in line)
    assert built.count("=") > 90, "the file shows every key"
    loaded = load(tmp_path, built)
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
            producer={},
            consumer={},
        )
        == expected
    )
    assert attrs.evolve(kafka(loaded).bus, enabled=False) == KafkaOptions().bus


def test_lines_that_are_not_built_yet_load_or_say_so(tmp_path: Path) -> None:
    table, accepted, refused = "", set(), set()
    for line in SHIPPED.read_text().splitlines():
        bare = line.removeprefix("#")
        if bare.startswith("["):
            table = bare
        if not re.match(r"#\w+ = .*not built yet", line):
            continue
        name = f"{table.split('#')[0].strip()} {bare.split(' ')[0]}"
        required = 'Name = "a"' if "ArchiveGroups" in table else ""
        try:
            load(tmp_path, f"{table}\n{required}\n{bare}")
            accepted.add(name)
        except ConfigError as exc:
            if any("yet" in problem for problem in exc.problems):
                refused.add(name)
    assert accepted == {"[Kafka.Bus] Ack"}
    assert refused == {"[Kafka.Bus] OnOutage"}
