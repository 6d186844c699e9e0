"""Kafka topics: the plan, creation, drift, refusals; with a fake admin client and with a real Kafka."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
import trio

from gateways.kafka import client_settings, workers
from gateways.kafka.admin import Admin
from gateways.kafka.cluster import Cluster
from gateways.kafka.kafka_gateway import KafkaGateway
from gateways.kafka.options import (
    BusOptions,
    KafkaOptions,
    MessagesOptions,
    MetricsOptions,
    TopicOptions,
    TopicsOptions,
)
from gateways.kafka.topic_plan import DENIED, TopicPlan, plan_topics
from gateways.kafka.topics import TopicManager, survey
from mqtt_trio.errors import ConfigError
from tests.gateway_support import told
from tests.kafka_fakes import FakeAdmin
from tests.kafka_support import KafkaNode, unique_name
from tests.lines import wait_until

DAY = 24 * 3600 * 1000
EVERYTHING = TopicsOptions(messages=MessagesOptions(enabled=True), events=TopicOptions(enabled=True))
OPTIONS = KafkaOptions(
    servers="kafka:9092",
    bus=BusOptions(enabled=True),
    metrics=MetricsOptions(enabled=True, reporters=["kafka"]),
    topics=EVERYTHING,
)
"""Every feature that has a topic is on."""
PLANS = plan_topics(OPTIONS, [None])


async def keep(cluster: Cluster, plans: Sequence[TopicPlan], admin: FakeAdmin, until: str = "complete") -> None:
    """Run a manager until it is `complete`, or has `looked`."""
    manager = TopicManager(OPTIONS, cluster, plans, lambda: admin)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager.run)
            await getattr(manager, until).wait()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("brokers,expected", [(1, 1), (2, 2), (3, 3), (5, 3)])
async def test_what_is_missing_is_created(brokers: int, expected: int) -> None:
    admin, cluster = FakeAdmin(brokers), Cluster(["k"])
    await keep(cluster, PLANS, admin)
    assert sorted(admin.created) == sorted(plan.name for plan in PLANS)
    assert {topic.replication_factor for topic in admin.topics.values()} == {expected}
    facts = cluster.facts("mqtt.archive")
    assert facts is not None
    assert (facts.partitions, facts.max_message_bytes) == (12, 4 * 1024 * 1024)


async def test_what_exists_is_left_alone_and_its_drift_told_once(caplog: pytest.LogCaptureFixture) -> None:
    admin, cluster = FakeAdmin(), Cluster(["k"])
    await keep(cluster, PLANS, admin)
    admin.created.clear()
    dlq = admin.topics["mqtt.dlq"]
    config = {**dlq.config, "retention.ms": "7", "max.message.bytes": "9", "cleanup.policy": "compact"}
    admin.topics["mqtt.dlq"] = attrs.evolve(dlq, partitions=5, config=config)
    again = Cluster(["k"])
    with caplog.at_level(logging.WARNING):
        await keep(again, PLANS, admin)
    assert admin.created == []
    assert [record.message for record in caplog.records] == [
        "Kafka topic mqtt.dlq has partitions 5 instead of 3 (Kafka cannot take partitions away; keep them: "
        "[Kafka.Topics.Dlq] Partitions = 5), cleanup.policy compact instead of delete (Kafka keeps the last record of "
        f"each key only), retention.ms 7 instead of {30 * DAY} (kept for 7 ms instead of 30 days); it is used as it is "
        "(mqtt-trio topics plan)"
    ]
    facts = again.facts("mqtt.dlq")
    assert facts is not None
    assert (facts.partitions, facts.max_message_bytes) == (5, 9)


CREATE = (
    "kafka-topics.sh --bootstrap-server a:1,b:2 --create --topic t --partitions 2 --replication-factor 1"
    " --config retention.ms=5 --config min.insync.replicas=1"
)
ALLOW = (
    "kafka-acls.sh --bootstrap-server a:1,b:2 --add --allow-principal User:NAME --operation Describe"
    " --operation DescribeConfigs --operation Read --operation Write --topic t"
)


@pytest.mark.parametrize(
    "hidden,refusal,text",
    [
        (False, DENIED, f"is missing and this node may not create it; somebody who may: {CREATE}"),
        (
            True,
            DENIED,
            "may be neither seen nor created by this node's user; somebody who may, if there is such a topic: "
            f"{ALLOW}; if not, also: {CREATE}",
        ),
        (False, "InvalidTopicError: no", "cannot be created: InvalidTopicError: no"),
    ],
)
async def test_what_a_right_is_missing_for_names_the_commands(
    hidden: bool, refusal: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = TopicPlan(name="t", partitions=2, config={"retention.ms": "5"})
    admin = FakeAdmin(refusal=refusal)
    admin.hidden = {"t"} if hidden else set()
    await keep(Cluster(["a:1", "b:2"]), [plan], admin, until="looked")
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [f"Kafka topic t {text}"]


async def test_topics_that_exist_need_no_right_to_create(caplog: pytest.LogCaptureFixture) -> None:
    admin = FakeAdmin()
    await keep(Cluster(["k"]), PLANS, admin)
    admin.refusal = DENIED
    cluster = Cluster(["k"])
    with caplog.at_level(logging.INFO):
        await keep(cluster, PLANS, admin)
    assert caplog.records == []
    assert all(cluster.facts(plan.name) is not None for plan in PLANS)


async def test_an_outage_is_told_once_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    admin = FakeAdmin()
    admin.failures = [OSError("no"), OSError("no"), OSError("no")]
    cluster = Cluster(["k"])
    with caplog.at_level(logging.WARNING):
        await keep(cluster, PLANS, admin)
    assert not cluster.is_away
    assert cluster.outages == 1
    assert [record.message for record in caplog.records] == [
        "Kafka at k is away for topics: OSError: no. MQTT goes on; trying until it is back",
        "Kafka at k is back",
    ]
    assert admin.closed == 4


async def test_a_topic_that_vanished_is_made_again() -> None:
    admin, cluster = FakeAdmin(), Cluster(["k"])
    manager = TopicManager(OPTIONS, cluster, PLANS, lambda: admin)
    known = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def look() -> None:
        if cluster.facts("monster") is not None and admin.created.count("monster") == 2:
            token.run_sync_soon(known.set)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager.run)
            await manager.complete.wait()
            del admin.topics["monster"]
            cluster.listen(look)
            cluster.forget("monster")
            await known.wait()
            nursery.cancel_scope.cancel()
    assert admin.created.count("mqtt.dlq") == 1


async def test_a_topic_that_was_deleted_is_told_of_when_it_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever reads it says so, too; nobody reads an archive."""
    admin, cluster = FakeAdmin(), Cluster(["k"])
    manager = TopicManager(OPTIONS, cluster, PLANS, lambda: admin)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        with trio.fail_after(10):
            await manager.complete.wait()
            assert not caplog.records, "what a first start creates was not deleted"
            for _ in range(2):
                del admin.topics["mqtt.archive"]
                cluster.forget("mqtt.archive")
                await told(cluster, lambda: cluster.facts("mqtt.archive") is not None)
        nursery.cancel_scope.cancel()
    text = "Kafka topic mqtt.archive was deleted, with what was in it; it is made again"
    assert caplog.messages == [text] * 2


@pytest.mark.parametrize(
    "changes,problem",
    [
        ({"servers": "a:1", "bootstrap_servers": ["b:1"]}, "name different servers"),
        ({"servers": "a:http"}, "expected host:port"),
        ({"servers": "http://a:1"}, "expected host:port, got 'http://a:1'"),
        ({"servers": "a:1 b:1"}, "expected host:port, got 'a:1 b:1'"),
        ({"servers": []}, "at least one"),
        ({"bus": BusOptions(topic="x"), "topics": TopicsOptions(bus=TopicOptions(name="y"))}, "different topics"),
        ({"bus": BusOptions(enabled=True, topic="mqtt.retained")}, "Topics.Retained and Bus.Topic are the same topic"),
        ({"bus": BusOptions(enabled=True, topic="mqtt.archive")}, "Bus.Topic and Topics.Archive are the same topic"),
        ({"topics": TopicsOptions(dlq=TopicOptions(name="mqtt.archive"))}, "Topics.Dlq and Topics.Archive are"),
        ({"topics": TopicsOptions(messages=MessagesOptions(name="monster"))}, "Topics.Messages and Bus.Topic are"),
        (
            {"topics": TopicsOptions(archive=TopicOptions(name="mqtt.messages"))},
            r"Topics.Messages and Topics.Archive are the same topic, mqtt.messages; each needs one of its own; "
            r"without the stream of messages: \[Kafka.Topics.Messages\] Enabled = false",
        ),
        (
            {"topics": TopicsOptions(events=TopicOptions(enabled=True, name="mqtt.dlq"))},
            "Topics.Events and Topics.Dlq are the same topic, mqtt.dlq",
        ),
        (
            {
                "metrics": MetricsOptions(enabled=True, reporters=["kafka"]),
                "topics": TopicsOptions(metrics=TopicOptions(name="mqtt.archive")),
            },
            "Topics.Metrics and Topics.Archive are",
        ),
        ({"profile": "fast"}, "profile"),
    ],
)
def test_options_that_contradict_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        KafkaOptions(**changes)


def test_a_stream_that_is_off_takes_no_topic_from_others() -> None:
    off = MessagesOptions(enabled=False)
    archive = TopicOptions(name="mqtt.messages")
    assert KafkaOptions(topics=TopicsOptions(messages=off, archive=archive)).archive_topic == "mqtt.messages"
    KafkaGateway(KafkaOptions(topics=TopicsOptions(messages=off))).archive_store("mqtt.messages", "A")
    KafkaGateway(KafkaOptions()).archive_store("monster", "A")


@pytest.mark.parametrize(
    "topic,key", [("monster", "Bus.Topic"), ("mqtt.dlq", "Topics.Dlq"), ("mqtt.messages", "Topics.Messages")]
)
def test_no_archive_group_writes_to_a_topic_of_something_else(topic: str, key: str) -> None:
    gateway = KafkaGateway(KafkaOptions(bus=BusOptions(enabled=True)))
    with pytest.raises(ConfigError, match=f"archive group A: KafkaTopic = {topic} is the topic of Kafka.{key}"):
        gateway.archive_store(topic, "A")
    gateway.archive_store("mqtt.sensors", "A")


def test_servers_have_two_names_and_two_forms() -> None:
    assert KafkaOptions(servers="a:1, b").server_names == ["a:1", "b"]
    assert KafkaOptions(bootstrap_servers=["a:1", "b"]).server_names == ["a:1", "b"]
    assert KafkaOptions(servers="a:1", bootstrap_servers=["a:1"]).server_names == ["a:1"]
    assert KafkaOptions().server_names == ["localhost:9092"]


def ensure(servers: str, plans: Sequence[TopicPlan]) -> dict[str, str]:
    """Do what a starting node does about its topics; return what was refused."""
    found = survey(lambda: Admin(KafkaOptions(servers=servers)), plans)
    return dict(found.refused)


@pytest.mark.kafka
def test_five_nodes_at_once_and_a_second_start(kafka: KafkaNode) -> None:
    names = [unique_name("topics") for _ in range(3)]
    plans = [TopicPlan(name=name, partitions=3, config={"retention.ms": "123456"}) for name in names]
    refused: list[dict[str, str]] = []
    nodes = [threading.Thread(target=lambda: refused.append(ensure(kafka.servers, plans))) for _ in range(5)]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(60)
    assert refused == [{}] * 5
    changed = [attrs.evolve(plan, partitions=7, config={"retention.ms": "7"}) for plan in plans]
    assert ensure(kafka.servers, changed) == {}
    admin = Admin(KafkaOptions(servers=kafka.servers))
    try:
        # A broker may learn of a topic some moments behind the controller that has made it.
        wait_until(lambda: all(admin.describe(names).values()), "three topics")
        states = [state for state in admin.describe(names).values() if state is not None]
    finally:
        admin.close()
    assert [(state.partitions, state.replication_factor) for state in states] == [(3, 1)] * 3
    assert {state.config["retention.ms"] for state in states} == {"123456"}


@pytest.mark.kafka
async def test_a_topic_of_another_shape_is_told_and_used(kafka: KafkaNode, caplog: pytest.LogCaptureFixture) -> None:
    name = unique_name("shape")
    wrong = TopicPlan(name=name, partitions=2, config={"cleanup.policy": "compact"})
    assert await trio.to_thread.run_sync(ensure, kafka.servers, [wrong]) == {}
    cluster = Cluster([kafka.servers])
    plan = TopicPlan(name=name, partitions=3, config={"cleanup.policy": "delete"}, section="Kafka.Topics.Bus")
    manager = TopicManager(KafkaOptions(servers=kafka.servers), cluster, [plan])
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager.run)
            await manager.complete.wait()
            nursery.cancel_scope.cancel()
    (line,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith(f"Kafka topic {name} has partitions 2 instead of 3 (a compacted topic must not grow")
    assert "cleanup.policy compact instead of delete (Kafka keeps the last record of each key only)" in line
    facts = cluster.facts(name)
    assert facts is not None
    assert facts.partitions == 2


@pytest.mark.kafka
def test_what_the_broker_refuses_is_told_in_its_words(kafka: KafkaNode) -> None:
    plan = TopicPlan(name=unique_name("bad"), partitions=1, config={"retention.ms": "soon"})
    assert "retention.ms" in ensure(kafka.servers, [plan])[plan.name]


def failing_constructor(make: Callable[[KafkaOptions], object]) -> None:
    with pytest.raises(Exception, match="Unable to bootstrap"):
        make(KafkaOptions(servers="127.0.0.1:1"))


def test_failed_constructors_leave_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_settings, "COMMON", {**client_settings.COMMON, "bootstrap_timeout_ms": 50})
    before = set(threading.enumerate())
    for _ in range(2):
        failing_constructor(Admin)
        failing_constructor(lambda options: workers.Consumer(options, "test"))
        failing_constructor(lambda options: workers.Producer(options, "test", None, 0))
    assert set(threading.enumerate()) <= before  # one of an earlier test may end meanwhile
