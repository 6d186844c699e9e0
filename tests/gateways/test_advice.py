"""What `check` and `doctor` would have otherwise [K20], as far as the configuration tells; what Java's keys mean."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Final

import attrs
import pytest
import trio

from gateways.kafka.advice import advice, is_loopback
from gateways.kafka.kafka_gateway import KafkaGateway
from gateways.kafka.options import BusOptions, KafkaOptions, MetricsOptions, TopicOptions, TopicsOptions
from mqtt_trio import __main__ as command_line
from mqtt_trio.config import Overrides, load_config
from mqtt_trio.errors import ConfigError
from tests.gateway_support import without_stream
from tests.gateways.memory_bus import FakeHost

HOUR_MS = 3_600_000
CONFLUENT = "io.confluent.metrics.reporter.ConfluentMetricsReporter"


def said(options: KafkaOptions) -> list[str]:
    return [one.about for one in advice(options)]


def keeping(milliseconds: int) -> TopicOptions:
    return TopicOptions(config={"retention.ms": milliseconds})


def test_the_defaults_are_fine() -> None:
    assert advice(KafkaOptions()) == []
    assert advice(KafkaOptions(bus=BusOptions(enabled=True, ack="store"))) == []


@pytest.mark.parametrize(
    "server, here",
    [
        ("localhost:9092", True), ("localhost", True), ("127.0.0.1:9092", True), ("127.8.0.1", True),
        ("[::1]:9092", True), ("[::1]", True), ("kafka:9092", False), ("10.0.0.1:9092", False),
        ("localhost.example:9092", False), ("[2001:db8::1]:9092", False), ("127.0.0.1.example:9092", False),
    ],
)  # fmt: skip
def test_what_is_on_this_machine(server: str, here: bool) -> None:
    assert is_loopback(server) == here


def test_a_way_that_others_can_read() -> None:
    (one,) = advice(KafkaOptions(servers="localhost:9092,kafka-1:9092"))
    assert one.about == "Kafka.Security.Protocol"
    assert "PLAINTEXT to kafka-1:9092" in one.text
    assert one.mend == "use SSL"


def test_an_acknowledgement_that_says_little() -> None:
    bus = BusOptions(enabled=True, ack="store")
    assert said(KafkaOptions(bus=bus, producer={"acks": 1})) == ["Kafka.Bus.Ack"]
    assert said(KafkaOptions(bus=bus, profile="compat")) == [], "the profile leaves the bus alone"


def few(servers: str, factor: int | None = None, in_sync: object = None) -> list[tuple[str, str]]:
    """Return what is said of an archive topic with these values: keys and mends."""
    config = {} if in_sync is None else {"min.insync.replicas": in_sync}
    archive = TopicOptions(replication_factor=factor, config=config)
    options = KafkaOptions(servers=servers, topics=TopicsOptions(archive=archive))
    return [(one.about.removeprefix("Kafka.Topics.Archive."), one.mend) for one in advice(options)]


THREE = "localhost:1,localhost:2,localhost:3"


def test_fewer_copies_than_there_could_be() -> None:
    assert few(THREE, 1) == [("ReplicationFactor", "3")]
    assert few(THREE, 2) == [("ReplicationFactor", "3")]
    assert few("localhost:1,localhost:2", 1) == [("ReplicationFactor", "2")]
    assert few(THREE, 3) == few("localhost:1", 1) == few(f"{THREE},localhost:4") == []
    archive = TopicOptions(replication_factor=1)
    (one,) = advice(KafkaOptions(servers=THREE, topics=TopicsOptions(archive=archive)))
    assert one.text == "the loss of its broker takes what mqtt.archive holds, and there could be more replicas"


def test_a_number_in_sync_that_defeats_what_store_promises() -> None:
    key = "Config.min.insync.replicas"
    assert few(THREE, 3, 1) == few(THREE, None, "1") == [(key, "2")]
    assert few("localhost:1", 3, 1) == [(key, "2")]
    assert few("localhost:1", None, 1) == [], "it may be one broker"
    assert few("localhost:1", 1, 2) == [(key, "1")], "refuses every write"
    assert few("localhost:1", None, 4) == [(key, "2")]
    assert few(THREE, 3, 2) == few(THREE, 3, 3) == few(THREE, None, "") == []
    bus = TopicOptions(config={"min.insync.replicas": 1})
    assert advice(KafkaOptions(servers=THREE, topics=TopicsOptions(bus=bus))) == [], "the bus is off"


def test_archive_groups_whose_acknowledgement_says_little() -> None:
    """[K9, K16]: what PUBACK waits for is on the leader alone with `compat`."""
    assert advice(KafkaOptions(), ["A"]) == []
    assert advice(KafkaOptions(profile="compat")) == []
    first, second = advice(KafkaOptions(profile="compat"), ["A", "B"])
    assert (first.about, second.about) == ("ArchiveGroups A: Ack", "ArchiveGroups B: Ack")
    assert first.text == (
        'PUBACK waits for Kafka, which confirms what one broker has, and may lose (acks = 1, Profile = "compat")'
    )
    assert first.mend == '[Kafka.Producer] acks = "all"'
    (none,) = advice(KafkaOptions(producer={"acks": 0}), ["A"])
    assert "confirms what nobody need have (acks = 0, [Kafka.Producer])" in none.text
    assert advice(KafkaOptions(profile="compat", producer={"acks": "all"}), ["A"]) == []


def test_check_and_doctor_name_the_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        '[Kafka]\nServers = "127.0.0.1:1"\nProfile = "compat"\n'
        '[[ArchiveGroups]]\nName = "Waits"\nStore = "KAFKA"\nAck = "store"\nKafkaTopic = "w"\n'
        '[[ArchiveGroups]]\nName = "Not"\nStore = "KAFKA"\n'
        '[[ArchiveGroups]]\nName = "Off"\nStore = "KAFKA"\nAck = "store"\nKafkaTopic = "o"\nEnabled = false\n'
        '[[ArchiveGroups]]\nName = "File"\nStore = "SQLITE"\nAck = "store"\n'
    )
    for command, begin in (("check", "# warning: "), ("doctor", "note     ")):
        command_line.main([command, "--config", str(file), "--data", str(tmp_path)])
        lines = [line for line in capsys.readouterr().out.splitlines() if "ArchiveGroups " in line]
        assert [line.partition(": Ack: ")[0] for line in lines] == [f"{begin}ArchiveGroups Waits"], command


def test_retention_that_is_shorter_than_an_outage() -> None:
    day = keeping(23 * HOUR_MS)
    messages = attrs.evolve(KafkaOptions().topics.messages, config=day.config)
    found = said(KafkaOptions(topics=TopicsOptions(archive=day, messages=messages, dlq=day)))
    assert found == [f"Kafka.Topics.{name}.Config.retention.ms" for name in ("Messages", "Archive", "Dlq")]
    assert said(KafkaOptions(topics=TopicsOptions(archive=keeping(-1)))) == [], "for ever"
    options = KafkaOptions(topics=TopicsOptions(bus=keeping(HOUR_MS // 2)), bus=BusOptions(enabled=True))
    (one,) = advice(options)
    assert one.text == "monster keeps records for 30 min, CheckpointAge is 1 h: a node that was away misses some"


def test_an_archive_without_compression() -> None:
    (one,) = advice(
        KafkaOptions(topics=TopicsOptions(archive=TopicOptions(config={"compression.type": "uncompressed"})))
    )
    assert (one.about, one.mend) == ("Kafka.Topics.Archive.Config.compression.type", "gzip")


def test_java_s_keys_are_accepted_with_one_warning() -> None:
    metrics = MetricsOptions(jmx_enabled=True, reporters=["log", CONFLUENT])
    (one,) = advice(KafkaOptions(metrics=metrics))
    assert one.text == f"JmxEnabled, {CONFLUENT}: there is no JVM here, so nothing comes of it"
    assert "/metrics" in one.mend


REPORTERS: Final[list[list[object]]] = [
    ["jmx"],
    ["log", "Prometheus"],
    [7],
    [{"config": {"password": "geheim"}}],
    [".a"],
]


@pytest.mark.parametrize("reporters", REPORTERS)
def test_reporters_that_nobody_knows(tmp_path: Path, reporters: list[object]) -> None:
    with pytest.raises(ValueError, match="expected one of kafka, prometheus, log") as caught:
        MetricsOptions(reporters=reporters)
    assert "geheim" not in str(caught.value)
    file = tmp_path / "config.toml"
    file.write_text('[Kafka.Metrics]\nReporters = ["jmx"]\n')
    with pytest.raises(ConfigError, match=r"Kafka\.Metrics.*got 'jmx'"):
        load_config(file, {}, Overrides(), {"Kafka": KafkaOptions})


@pytest.mark.parametrize("interval", [0, -1, 100_000])
def test_an_interval_has_bounds(interval: float) -> None:
    with pytest.raises(ValueError, match="interval"):
        MetricsOptions(interval=interval)


def test_check_shows_a_java_reporter_without_its_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        f'[Kafka]\nServers = "kafka.example:9092"\n[Kafka.Metrics]\nEnabled = true\nJmxEnabled = true\n'
        f'[[Kafka.Metrics.Reporters]]\nclass = "{CONFLUENT}"\n'
        'config = { "bootstrap.servers" = "localhost:9092", "sasl.jaas.config" = "geheim" }\n'
    )
    assert command_line.main(["check", "--config", str(file)]) == 0
    text = capsys.readouterr().out
    assert f'Reporters = ["{CONFLUENT}"]' in text
    assert "geheim" not in text
    assert text.count("# warning: Kafka.Metrics: JmxEnabled, ") == 1
    assert text.count("# warning: Kafka.Security.Protocol: PLAINTEXT to kafka.example:9092") == 1


class Heard(logging.Handler):
    """Tells when a line with figures comes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.came = trio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING or record.getMessage().startswith("figures "):
            self.lines.append(record.getMessage())
        if record.getMessage().startswith("figures "):  # it is logged on the Trio thread
            self.came.set()


async def test_the_log_reporter() -> None:
    metrics = MetricsOptions(enabled=True, interval=1, reporters=["log", CONFLUENT])
    gateway = KafkaGateway(without_stream(KafkaOptions(servers="127.0.0.1:1", metrics=metrics)))
    gateway.archive_store(None, "Default")
    logger, heard = logging.getLogger("gateways.kafka"), Heard()
    logger.addHandler(heard)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.run, FakeHost("n", b"i" * 16))
            with trio.fail_after(30):
                await heard.came.wait()
            nursery.cancel_scope.cancel()
    finally:
        logger.removeHandler(heard)
        logger.setLevel(before)
    assert sum(line.startswith(f"Kafka.Metrics: {CONFLUENT}: there is no JVM") for line in heard.lines) == 1
    (figures,) = (json.loads(line.removeprefix("figures ")) for line in heard.lines if line.startswith("figures "))
    assert figures.keys() == {"archive", "dlq"}
    assert figures["archive"]["throttle_time_seconds"] == 0
