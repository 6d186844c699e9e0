"""Each configuration block of the page that the Kafka design comes from, in TOML: it loads, `check` takes it, a node
starts with it. One of them gives the one warning that docs/monitoring.md documents [C, K16, K17]."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from gateways.kafka.archived import archived_message
from gateways.kafka.options import KafkaOptions
from gateways.kafka.reading import JsonReader
from gateways.kafka.records import ConsumedRecord
from gateways.kafka.stream_records import message_of
from mqtt_trio import __main__ as command_line
from mqtt_trio.app import Node
from mqtt_trio.config import LoadedConfig, Overrides, load_config
from mqtt_trio.logs import levels
from tests.gateways.test_key_stores import jks_file, make

FOLDER: Final = Path(__file__).parent / "origin_blocks"
BLOCKS: Final = sorted(path.stem for path in FOLDER.glob("*.toml"))
LIMIT: Final = 60.0
JAVA: Final = (
    "# warning: Kafka.Metrics: JmxEnabled, io.confluent.metrics.reporter.ConfluentMetricsReporter: "
    "there is no JVM here, so nothing comes of it"
)
WARNINGS: Final[Mapping[str, str]] = {"metrics": JAVA}
SECRETS: Final = {
    "KAFKA_USERNAME": "mqtt",
    "KAFKA_PASSWORD": "word of the login",
    "TRUSTSTORE_PASSWORD": "word of the authorities",
    "KEYSTORE_PASSWORD": "word of the key",
}


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Set what the blocks refer to, with real stores."""
    maker = make()
    ca = maker.chain[1]
    (tmp_path / "truststore.jks").write_bytes(jks_file([], [("ca", ca)], SECRETS["TRUSTSTORE_PASSWORD"]))
    (tmp_path / "keystore.jks").write_bytes(maker.jks(SECRETS["KEYSTORE_PASSWORD"]))
    environ = {**SECRETS, "STORES": str(tmp_path)}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return environ


def load(name: str, environ: Mapping[str, str], *sets: str) -> LoadedConfig:
    overrides = Overrides(sets=sets, port=0, ws_port=0)
    return load_config(FOLDER / f"{name}.toml", environ, overrides, {"Kafka": KafkaOptions})


def kafka(name: str, environ: Mapping[str, str] | None = None) -> KafkaOptions:
    options = load(name, environ or {}).gateways["Kafka"]
    assert isinstance(options, KafkaOptions)
    return options


@pytest.mark.parametrize("name", BLOCKS)
def test_check_takes_it_with_no_word_but_the_documented_one(
    name: str, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(name, environment).inactive == ()
    assert command_line.main(["check", "--config", str(FOLDER / f"{name}.toml")]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    said = [line for line in lines if line.startswith("# warning: ")]
    expected = WARNINGS.get(name)
    assert [line.startswith(expected or "") for line in said] == [True] * (expected is not None), said
    assert "not active yet" not in output.out
    assert not [word for key, word in SECRETS.items() if key.endswith("PASSWORD") and word in output.out]


@pytest.mark.parametrize("name", BLOCKS)
async def test_a_node_starts_with_it_while_kafka_is_away(
    name: str, environment: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing listens at port 1; the log says of the block what `check` says of it, and that Kafka is away."""
    caplog.set_level(logging.WARNING)
    servers = [f"Kafka.{key}=127.0.0.1:1" for key in ("Servers", "BootstrapServers")]
    node = Node(load(name, environment, f"Persistence.Path={tmp_path}", *servers))
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.run)
            await node.started.wait()
            node.stopping.set()
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("gateways.")]
    of_block = [text for text in texts if "Kafka at 127.0.0.1:1" not in text]
    expected = WARNINGS.get(name)
    wanted = [] if expected is None else [expected.removeprefix("# warning: ")]
    assert len(of_block) == len(wanted), texts
    assert all(text.startswith(start) for text, start in zip(of_block, wanted, strict=True))


@pytest.mark.parametrize("subject", ["topics", "clients", "logging"])
def test_dotted_keys_mean_the_same_bare_and_quoted(subject: str) -> None:
    bare, quoted = load(f"{subject}_bare", {}), load(f"{subject}_quoted", {})
    assert bare.gateways == quoted.gateways
    assert bare.options == quoted.options
    assert {path for path in bare.origins if "Config" not in path} <= set(quoted.origins)


def test_the_smallest_one_turns_the_bus_on() -> None:
    options = kafka("quick_start")
    assert (options.server_names, options.bus.enabled, options.bus_topic) == (["localhost:9092"], True, "monster")


def test_what_could_not_be_chosen_there() -> None:
    options = kafka("fixed_values")
    effective = options.effective()
    assert effective["Producer.acks"] == (1, 'Profile = "compat"')
    assert effective["Producer.acks, of the bus"][0] == "all"
    assert effective["Consumer.auto_offset_reset, of mqtt.messages"] == ("earliest", "[Kafka.Consumer]")
    assert effective["Consumer.enable_auto_commit, of mqtt.messages"] == (True, 'Profile = "compat"')
    assert options.messages_group == "Monster"


def test_groups_in_kafka_need_no_section() -> None:
    loaded = load("archive_groups", {})
    groups = [(one.name, one.filter, one.store, one.kafka_topic) for one in loaded.options.archive_groups]
    assert groups == [("Default", ("#",), "KAFKA", None), ("Sensors", ("sensors/+",), "KAFKA", "mqtt.sensors")]
    assert kafka("archive_groups").server_names == ["localhost:9092"]
    assert kafka("archive_groups").archive_topic == "mqtt.archive"


def test_login_and_stores(environment: dict[str, str]) -> None:
    options = kafka("production", environment)
    assert options.server_names == ["kafka1:9092", "kafka2:9092", "kafka3:9092"]
    security = options.security
    assert (security.protocol, security.sasl_mechanism) == ("SASL_SSL", "PLAIN")
    assert (security.sasl_username, security.sasl_password) == ("mqtt", SECRETS["KAFKA_PASSWORD"])
    assert options.ssl.truststore_password == SECRETS["TRUSTSTORE_PASSWORD"]
    assert options.ssl.keystore_location == f"{environment['STORES']}/keystore.jks"


def test_topics_and_their_properties() -> None:
    topics = kafka("topics_bare").topics
    assert topics.messages.config == {
        "retention.ms": 604_800_000,
        "compression.type": "snappy",
        "segment.ms": 3_600_000,
    }
    assert (topics.messages.partitions, topics.messages.replication_factor) == (12, 3)
    assert topics.archive.config == {"retention.ms": 2_592_000_000, "compression.type": "gzip"}
    assert (topics.archive.name, topics.archive.partitions) == ("mqtt.archive", 24)


def test_topics_are_ours_by_default() -> None:
    """[K3]: partitions and retention of the five are what they were there, without a word about them."""
    from gateways.kafka.topic_plan import DEFAULTS

    topics = kafka("topics_of_their_own").topics
    for purpose in ("messages", "archive", "events", "metrics", "dlq"):
        given, default = getattr(topics, purpose), DEFAULTS[purpose]
        assert (given.name, given.partitions) == (default.name, default.partitions), purpose
        assert str(given.config["retention.ms"]) == default.config["retention.ms"], purpose


def test_options_of_the_clients() -> None:
    effective: Mapping[str, Any] = kafka("clients_bare").effective()
    given = {
        name: value for name, (value, origin) in effective.items() if origin in ("[Kafka.Producer]", "[Kafka.Consumer]")
    }
    assert given == {
        "Producer.acks": "all",
        "Producer.linger_ms": 5,
        "Producer.batch_size": 131_072,
        "Producer.max_in_flight_requests_per_connection": 5,
        "Consumer.max_poll_records": 500,
        "Consumer.fetch_max_wait_ms": 250,
        "Consumer.fetch_min_bytes": 1,
    }


def test_loggers_of_java_are_ours() -> None:
    loggers = load("logging_bare", {}).options.logging.loggers
    assert levels(loggers) == {"kafka": "DEBUG", "gateways.kafka": "DEBUG"}


def test_records_of_there_are_read_here() -> None:
    """[K8, K11]: seconds without a fraction, headers in an object, no key, no headers of the record."""
    value = {
        "timestamp": "2026-01-15T10:30:00Z",
        "topic": "sensors/cellar",
        "payload": "17.5",
        "qos": 1,
        "retained": False,
        "clientId": "probe-7",
        "brokerId": "node-a",
        "headers": {"contentType": "text/plain", "correlationId": "c-9"},
    }
    record = ConsumedRecord("mqtt.archive", 0, 0, None, json.dumps(value).encode(), (), 1_768_473_000_123)
    archived = archived_message(JsonReader().read(record), record)
    assert (archived.topic_name, archived.payload, archived.client_id) == ("sensors/cellar", b"17.5", "probe-7")
    published = message_of(record)
    assert (published.topic_name, published.payload, published.qos) == ("sensors/cellar", b"17.5", 1)


HEADINGS: Final = (
    "Overview", "Architecture", "Quick Start", "Basic Configuration", "Kafka as Archive", "Kafka Setup",
    "Local Development", "Production Setup", "Topic Management", "Auto-created Topics", "Custom Topic Configuration",
    "Manual Topic Creation", "Message Format", "Kafka Message Schema", "Avro Schema", "Configuration Limitations",
    "Manual Offset Management", "Stream Processing", "Kafka Streams Integration", "ksqlDB Queries", "Monitoring",
    "Kafka Metrics", "Key Metrics to Monitor", "Monitoring Commands", "Performance Tuning",
    "Performance Considerations", "JVM Tuning", "OS Tuning", "Troubleshooting", "Common Issues",
    "Connection Failures", "Consumer Lag", "Producer Timeouts", "Partition Imbalance", "Debug Logging",
    "Integration Examples", "Spring Boot Integration", "Python Client", "Best Practices",
    "partition strategy", "compression", "replication", "monitoring", "retention", "security", "backup",
    "capacity",
)  # fmt: skip
"""What that page has, in its order; small letters: the best practices one by one."""


def test_each_heading_of_there_has_its_counterpart() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "kafka.md").read_text()
    table = guide[guide.index("| there | here |") :].split("\n\n", 1)[0].splitlines()[2:]
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table]
    assert all(len(row) == 3 and all(row) for row in rows), "what it is, where it is, what is different and why"
    there = [part.strip() for row in rows for part in re.split(r"[;:]", row[0].removeprefix("... "))]
    named = [part for part in there if part in HEADINGS]
    assert named == list(HEADINGS)
    assert [row[0] for row in rows if "](" not in row[1] and "`" not in row[1]] == []
