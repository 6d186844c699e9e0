"""What clients of Kafka are set up with, and where it comes from [K16]."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import kafka.errors
import pytest
from kafka import KafkaConsumer, KafkaProducer

from gateways.kafka import client_settings, workers
from gateways.kafka.client_settings import (
    CONSUMER,
    OURS,
    PRODUCER,
    auto_commit_interval,
    begins_at_end,
    consumer_settings,
    problems_of,
    producer_settings,
    values,
)
from gateways.kafka.options import KafkaOptions, MessagesOptions, TopicsOptions
from mqtt_trio.config import LoggingOptions, Overrides, load_config
from mqtt_trio.config_show import show
from mqtt_trio.logs import configure

COMPAT = 'Profile = "compat"'
GIVEN = "[Kafka.Producer]"


def test_the_safe_profile() -> None:
    settings = producer_settings(KafkaOptions(), "archive")
    assert settings["acks"] == ("all", OURS)
    assert settings["enable_idempotence"] == (True, OURS)
    assert settings == producer_settings(KafkaOptions(), "bus")
    assert consumer_settings(KafkaOptions())["enable_auto_commit"] == (False, OURS)


def test_the_compat_profile_changes_every_producer_but_that_of_the_bus() -> None:
    options = KafkaOptions(profile="compat")
    assert producer_settings(options, "archive")["acks"] == (1, COMPAT)
    assert producer_settings(options, "archive")["enable_idempotence"] == (False, COMPAT)
    assert producer_settings(options, "bus") == producer_settings(KafkaOptions(), "bus")


def test_the_group_of_the_stream() -> None:
    assert KafkaOptions().messages_group == "monstermq-cluster"
    assert KafkaOptions(profile="compat").messages_group == "Monster"
    topics = TopicsOptions(messages=MessagesOptions(group="monstermq-cluster"))
    assert KafkaOptions(profile="compat", topics=topics).messages_group == "monstermq-cluster"


def test_when_offsets_of_the_stream_are_stored() -> None:
    """[K16]: automatic commits are the profile's, for that one reader; all can be said otherwise."""
    assert auto_commit_interval(KafkaOptions()) is None
    compat = KafkaOptions(profile="compat")
    assert auto_commit_interval(compat) == 5
    assert consumer_settings(compat)["enable_auto_commit"] == (False, OURS), "the bus keeps its own account"
    assert auto_commit_interval(KafkaOptions(profile="compat", consumer={"enable.auto.commit": False})) is None
    given = {"enable.auto.commit": True, "auto.commit.interval.ms": 200}
    assert auto_commit_interval(KafkaOptions(consumer=given)) == 0.2
    assert consumer_settings(KafkaOptions(consumer=given))["enable_auto_commit"] == (False, OURS)
    latest = KafkaOptions(consumer={"auto.offset.reset": "latest"})
    assert (begins_at_end(KafkaOptions()), begins_at_end(latest)) == (False, True)
    assert consumer_settings(latest)["auto_offset_reset"] == ("earliest", OURS)


def test_what_is_given_wins() -> None:
    options = KafkaOptions(
        profile="compat", producer={"acks": "all", "batch.size": 1}, consumer={"max.poll.records": 2}
    )
    settings = producer_settings(options, "archive")
    assert settings["acks"] == ("all", GIVEN)
    assert settings["batch_size"] == (1, GIVEN)
    assert settings["enable_idempotence"] == (False, COMPAT)
    assert consumer_settings(options)["max_poll_records"] == (2, "[Kafka.Consumer]")


@pytest.mark.parametrize("acks", [0, 1])
def test_fewer_acknowledgements_turn_idempotence_off(acks: int) -> None:
    options = KafkaOptions(producer={"acks": acks})
    assert producer_settings(options, "bus")["enable_idempotence"] == (False, "follows from acks, [Kafka.Producer]")
    assert problems_of(options) == []


def test_the_delivery_timeout_is_none_of_kafka_python_s() -> None:
    """A producer is given up as a whole (docs/kafka-errors.md), so that nothing overtakes."""
    assert "delivery_timeout_ms" not in producer_settings(
        KafkaOptions(producer={"delivery.timeout.ms": 7000}), "archive"
    )


def test_kafka_python_knows_all_of_our_own_settings() -> None:
    assert set(PRODUCER) | set(values(producer_settings(KafkaOptions(), "bus"))) <= set(KafkaProducer.DEFAULT_CONFIG)
    assert set(CONSUMER) | set(values(consumer_settings(KafkaOptions()))) <= set(KafkaConsumer.DEFAULT_CONFIG)


def shown(*sets: str) -> dict[str, tuple[str, str]]:
    """Return what `check` prints about the clients."""
    loaded = load_config(None, {}, Overrides(sets=["Kafka.Servers=k:9092", *sets]), {"Kafka": KafkaOptions})
    lines = show(loaded)
    begin = lines.index("# [Kafka] as its clients get it")
    found = {}
    for line in lines[begin + 1 :]:
        setting, _, origin = line.removeprefix("# ").rpartition("# ")
        name, _, value = setting.strip().rpartition(" = ")
        found[name] = (value, origin)
    return found


def test_check_shows_each_setting_with_its_origin() -> None:
    found = shown()
    assert found["Kafka.Producer.acks"] == ('"all"', OURS)
    assert found["Kafka.Producer.delivery_timeout_ms"] == ("60000", "DeliveryTimeout")
    assert found["Kafka.Topics.Messages.Group"] == ('"monstermq-cluster"', OURS)
    assert found["Kafka.Consumer.fetch_max_bytes"] == ("67108864", OURS)
    assert found["Kafka.Consumer.enable_auto_commit, of mqtt.messages"] == ("false", OURS)
    assert "Kafka.Consumer.auto_commit_interval_ms, of mqtt.messages" not in found
    assert not any("of the bus" in name for name in found)
    found = shown("Kafka.Profile=compat", "Kafka.Producer.linger.ms=7", "Kafka.Producer.delivery.timeout.ms=9000")
    assert found["Kafka.Producer.acks"] == ("1", COMPAT)
    assert found["Kafka.Producer.acks, of the bus"] == ('"all"', OURS)
    assert found["Kafka.Producer.enable_idempotence"] == ("false", COMPAT)
    assert found["Kafka.Topics.Messages.Group"] == ('"Monster"', COMPAT)
    assert found["Kafka.Consumer.enable_auto_commit"] == ("false", OURS)
    assert found["Kafka.Consumer.enable_auto_commit, of mqtt.messages"] == ("true", COMPAT)
    assert found["Kafka.Consumer.auto_commit_interval_ms, of mqtt.messages"] == ("5000", OURS)
    assert found["Kafka.Producer.linger_ms"] == ("7", GIVEN)
    assert found["Kafka.Producer.delivery_timeout_ms"] == ("9000", GIVEN)


@pytest.fixture
def loggers() -> Iterator[None]:
    """Put logging back as it was."""
    root, kafka_s = logging.getLogger(), logging.getLogger("kafka")
    before = list(root.handlers), root.level, kafka_s.level
    yield
    root.handlers[:], level, kafka_level = before
    root.setLevel(level)
    kafka_s.setLevel(kafka_level)


@pytest.mark.usefixtures("loggers")
@pytest.mark.parametrize("level, heard", [("WARN", True), ("OFF", False), (None, False)])
def test_levels_of_java_s_loggers_reach_the_client(
    monkeypatch: pytest.MonkeyPatch, level: str | None, heard: bool
) -> None:
    monkeypatch.setattr(client_settings, "COMMON", {**client_settings.COMMON, "bootstrap_timeout_ms": 100})
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    logging.getLogger("kafka").setLevel(logging.NOTSET)
    configure(LoggingOptions(loggers={} if level is None else {"org.apache.kafka.clients": level}))
    workers.quiet_loggers()
    with pytest.raises(kafka.errors.KafkaError):
        workers.Consumer(KafkaOptions(servers="127.0.0.1:1"), "test")
    assert ("WARNING kafka.net" in stream.getvalue()) == heard
