"""Topics as they should be, and what is said about those that are not so."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from gateways.kafka.options import (
    BusOptions,
    KafkaOptions,
    MessagesOptions,
    MetricsOptions,
    TopicOptions,
    TopicsOptions,
)
from gateways.kafka.topic_plan import (
    DEFAULTS,
    KafkaTools,
    Remedy,
    TopicPlan,
    TopicState,
    differences,
    duration,
    plan_for,
    plan_topics,
)

DAY = 24 * 3600 * 1000
ALWAYS = {"mqtt.dlq", "mqtt.messages"}
"""What is there wherever Kafka is configured [K11, K12]."""
PLAN = TopicPlan(name="t", partitions=4, config={"cleanup.policy": "delete", "retention.ms": "5000"}, section="S")


def as_planned(plan: TopicPlan = PLAN, factor: int = 3) -> TopicState:
    return TopicState(
        partitions=plan.partitions, replication_factor=factor, leaders=True, config=plan.properties(factor)
    )


def test_the_defaults_are_those_of_the_requirements() -> None:
    facts = {
        plan.name: (
            plan.partitions,
            plan.config["cleanup.policy"],
            plan.config.get("retention.ms"),
            plan.config.get("compression.type"),
        )
        for plan in DEFAULTS.values()
    }
    assert facts == {
        "mqtt.messages": (12, "delete", str(7 * DAY), "lz4"),
        "mqtt.archive": (12, "delete", str(30 * DAY), "gzip"),
        "mqtt.events": (3, "delete", str(7 * DAY), None),
        "mqtt.metrics": (3, "delete", str(DAY), None),
        "mqtt.dlq": (3, "delete", str(30 * DAY), None),
        "monster": (12, "delete", str(DAY), "lz4"),
        "mqtt.retained": (12, "compact", None, None),
    }


@pytest.mark.parametrize(
    "options,archive_topics,expected",
    [
        (KafkaOptions(), [], ALWAYS),
        (KafkaOptions(), [None, "mqtt.sensors"], {*ALWAYS, "mqtt.archive", "mqtt.sensors"}),
        (KafkaOptions(bus=BusOptions(enabled=True)), [], {*ALWAYS, "monster", "mqtt.retained"}),
        (KafkaOptions(metrics=MetricsOptions(enabled=True, reporters=["kafka"])), [], {*ALWAYS, "mqtt.metrics"}),
        (KafkaOptions(metrics=MetricsOptions(enabled=True, reporters=["log"])), [], ALWAYS),
        (KafkaOptions(metrics=MetricsOptions(reporters=["kafka"])), [], ALWAYS),
        (
            KafkaOptions(
                metrics=MetricsOptions(enabled=True, reporters=["kafka"]),
                topics=TopicsOptions(metrics=TopicOptions(enabled=False)),
            ),
            [],
            ALWAYS,
        ),
        (KafkaOptions(topics=TopicsOptions(dlq=TopicOptions(enabled=False))), [], {"mqtt.messages"}),
        (
            KafkaOptions(
                topics=TopicsOptions(messages=MessagesOptions(enabled=True), archive=TopicOptions(enabled=True))
            ),
            [],
            {*ALWAYS, "mqtt.archive"},
        ),
        (KafkaOptions(topics=TopicsOptions(messages=MessagesOptions(enabled=False))), [], {"mqtt.dlq"}),
        (KafkaOptions(topics=TopicsOptions(messages=MessagesOptions(read=False, filter=[]))), [], {"mqtt.dlq"}),
    ],
)
def test_a_topic_is_wanted_when_its_feature_is_on(
    options: KafkaOptions, archive_topics: list[str | None], expected: set[str]
) -> None:
    assert {plan.name for plan in plan_topics(options, archive_topics)} == expected


def test_the_plan_follows_the_configuration() -> None:
    topics = TopicsOptions(
        archive=TopicOptions(
            name="a", partitions=24, replication_factor=2, config={"retention.ms": 1, "preallocate": True}
        ),
        dlq=TopicOptions(name="errors"),
    )
    options = KafkaOptions(topics=topics, bus=BusOptions(enabled=True, topic="b"))
    plans = {plan.name: plan for plan in plan_topics(options, ["mqtt.sensors", "a", None])}
    assert plans.keys() == {"a", "errors", "b", "mqtt.retained", "mqtt.messages", "mqtt.sensors"}
    for name in ("a", "mqtt.sensors"):  # a group's own topic is made like the archive topic
        plan = plans[name]
        assert (plan.partitions, plan.replication_factor, plan.section) == (24, 2, "Kafka.Topics.Archive")
        assert plan.config["retention.ms"] == "1"
        assert plan.config["preallocate"] == "true"
        assert plan.config["compression.type"] == "gzip"


@pytest.mark.parametrize(
    "changes,written,read",
    [
        ({}, True, True),
        ({"write": False}, False, True),
        ({"filter": []}, False, True),
        ({"read": False}, True, False),
        ({"enabled": True, "read": False}, True, False),
    ],
)
def test_the_stream_has_two_ways_that_are_on_and_off_by_themselves(
    changes: dict[str, Any], written: bool, read: bool
) -> None:
    options = KafkaOptions(topics=TopicsOptions(messages=MessagesOptions(**changes)))
    assert (options.writes_stream, options.reads_stream, options.has_stream) == (written, read, True)
    (plan,) = [plan for plan in plan_topics(options) if plan.section == "Kafka.Topics.Messages"]
    assert (plan.written, plan.read) == (written, read)
    off = attrs.evolve(options.topics.messages, enabled=False)
    assert not KafkaOptions(topics=TopicsOptions(messages=off)).has_stream


@pytest.mark.parametrize("brokers,factor,in_sync", [(0, 1, "1"), (1, 1, "1"), (2, 2, "1"), (3, 3, "2"), (9, 3, "2")])
def test_replicas_follow_the_number_of_brokers(brokers: int, factor: int, in_sync: str) -> None:
    assert PLAN.factor(brokers) == factor
    assert PLAN.properties(factor)["min.insync.replicas"] == in_sync
    mine = attrs.evolve(PLAN, replication_factor=4, config={"min.insync.replicas": "3"})
    assert mine.factor(brokers) == 4
    assert mine.properties(4) == {"min.insync.replicas": "3"}


@pytest.mark.parametrize(
    "changes,config,expected",
    [
        ({}, {}, []),
        ({}, {"retention.ms": "5000.0"}, []),
        ({}, {"unrelated": "1"}, []),
        ({"replication_factor": 4}, {}, []),
        ({}, {"min.insync.replicas": "3"}, []),
        ({"partitions": 3}, {}, [("partitions 3 instead of 4", Remedy.GROW, "newer messages of a topic before older")]),
        ({"partitions": 5}, {}, [("partitions 5 instead of 4", Remedy.NONE, "keep them: [S] Partitions = 5")]),
        (
            {"replication_factor": 2},
            {},
            [("replication factor 2 instead of 3", Remedy.NONE, "kafka-reassign-partitions.sh")],
        ),
        (
            {},
            {"cleanup.policy": "compact"},
            [("cleanup.policy compact instead of delete", Remedy.CONFIG, "the last record of each key only")],
        ),
        (
            {},
            {"retention.ms": "3600000"},
            [("retention.ms 3600000 instead of 5000", Remedy.CONFIG, "setting it deletes what is older")],
        ),
        (
            {},
            {"min.insync.replicas": "1"},
            [("min.insync.replicas 1 instead of 2", Remedy.CONFIG, "may be on one broker alone")],
        ),
        (
            {},
            {"min.insync.replicas": "4"},
            [("min.insync.replicas 4 instead of 2", Remedy.CONFIG, "refuses every write")],
        ),
    ],
)
def test_what_differs_is_found(
    changes: dict[str, Any], config: dict[str, str], expected: list[tuple[str, Remedy, str]]
) -> None:
    planned = as_planned()
    state = attrs.evolve(planned, config={**planned.config, **config}, **changes)
    found = differences(PLAN, state, brokers=3)
    assert [(str(one), one.remedy) for one in found] == [(text, remedy) for text, remedy, _ in expected]
    for one, (_, _, note) in zip(found, expected, strict=True):
        assert note in one.note


def test_a_compacted_topic_does_not_grow() -> None:
    plan = plan_for("retained", TopicOptions(partitions=24))
    (found,) = differences(plan, attrs.evolve(as_planned(plan), partitions=12), brokers=3)
    assert found.remedy is Remedy.NONE
    assert "[Kafka.Topics.Retained] Partitions = 12" in found.note
    by_mistake = attrs.evolve(as_planned(), partitions=1, config={**as_planned().config, "cleanup.policy": "compact"})
    assert [one.remedy for one in differences(PLAN, by_mistake, brokers=3)] == [Remedy.NONE, Remedy.CONFIG]


def test_a_retained_topic_that_forgets_is_told() -> None:
    plan = plan_for("retained", TopicOptions())
    forgetful = attrs.evolve(as_planned(plan), config={**as_planned(plan).config, "cleanup.policy": "compact,delete"})
    (found,) = differences(plan, forgetful, brokers=3)
    assert found.note == "Kafka deletes records by age: what must stay is lost"
    both = attrs.evolve(plan, config={**plan.config, "cleanup.policy": "delete, compact"})
    assert differences(both, forgetful, brokers=3) == []


def test_a_property_that_kafka_does_not_know_is_told() -> None:
    plan = attrs.evolve(PLAN, config={**PLAN.config, "retention.mss": "1"})
    (found,) = differences(plan, as_planned(), brokers=3)
    assert (str(found), found.remedy) == ("retention.mss unknown instead of 1", Remedy.NONE)


def test_what_may_not_be_seen_is_no_difference() -> None:
    assert differences(PLAN, attrs.evolve(as_planned(), config={}), brokers=3) == []


@pytest.mark.parametrize(
    "milliseconds,text",
    [
        ("604800000", "7 days"),
        ("86400000", "1 day"),
        ("5400000", "90 minutes"),
        ("1001", "1001 ms"),
        ("-1", "ever"),
        ("0", "0 ms"),
        ("soon", "soon"),
    ],
)
def test_durations_are_told_as_people_say_them(milliseconds: str, text: str) -> None:
    assert duration(milliseconds) == text


def test_commands_stand_as_a_shell_reads_them() -> None:
    tools = KafkaTools(["a:1", "b:2"], secured=True)
    start = "--bootstrap-server a:1,b:2 --command-config client.properties"
    assert tools.grow("t", 5) == f"kafka-topics.sh {start} --alter --topic t --partitions 5"
    plan = attrs.evolve(PLAN, config={"x": "a b"})
    assert tools.create(plan, 1) == (
        f"kafka-topics.sh {start} --create --topic t --partitions 4 --replication-factor 1"
        " --config 'x=a b' --config min.insync.replicas=1"
    )
    assert tools.configure("t", {"cleanup.policy": "compact,delete", "retention.ms": "1"}) == (
        f"kafka-configs.sh {start} --alter --entity-type topics --entity-name t"
        " --add-config 'cleanup.policy=[compact,delete],retention.ms=1'"
    )
