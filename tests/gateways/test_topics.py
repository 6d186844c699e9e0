"""Kafka topics: the plan, creation, drift, refusals; with a fake admin client and with a real Kafka."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import pytest
import trio

from gateways.kafka import workers
from gateways.kafka.admin import Admin, TopicState
from gateways.kafka.cluster import Cluster
from gateways.kafka.options import BusOptions, KafkaOptions, TopicOptions, TopicsOptions
from gateways.kafka.topics import TopicManager, TopicPlan, drift, plan_topics
from tests.kafka_support import KafkaNode, unique_name

DAY = 24 * 3600 * 1000
OPTIONS = KafkaOptions(servers="kafka:9092")


class FakeAdmin:
    """A cluster in memory."""

    def __init__(self, brokers: int = 1, refusal: str | None = None) -> None:
        self.brokers = brokers
        self.refusal = refusal
        self.topics: dict[str, TopicState] = {}
        self.created: list[str] = []
        self.failures: list[Exception] = []
        self.closed = 0

    def broker_count(self) -> int:
        return self.brokers

    def describe(self, names: Sequence[str]) -> Mapping[str, TopicState]:
        if self.failures:
            raise self.failures.pop()
        return {name: self.topics[name] for name in names if name in self.topics}

    def create(self, name: str, partitions: int, replication_factor: int, config: Mapping[str, str]) -> str | None:
        if self.refusal is not None:
            return self.refusal
        self.created.append(name)
        self.topics[name] = TopicState(
            partitions=partitions, replication_factor=replication_factor, leaders=True, config=dict(config)
        )
        return None

    def close(self) -> None:
        self.closed += 1


async def keep(cluster: Cluster, plans: Sequence[TopicPlan], admin: FakeAdmin, until: str = "complete") -> None:
    """Run a manager until it is `complete`, or has `looked`."""
    manager = TopicManager(OPTIONS, cluster, plans, lambda: admin)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(manager.run)
            await getattr(manager, until).wait()
            nursery.cancel_scope.cancel()


def test_the_plan_is_the_one_of_the_requirements() -> None:
    plans = {plan.name: plan for plan in plan_topics(OPTIONS)}
    facts = {
        name: (plan.partitions, plan.config.get("retention.ms"), plan.config.get("compression.type"))
        for name, plan in plans.items()
    }
    assert facts == {
        "mqtt.messages": (12, str(7 * DAY), "lz4"),
        "mqtt.archive": (12, str(30 * DAY), "gzip"),
        "mqtt.events": (3, str(7 * DAY), None),
        "mqtt.metrics": (3, str(DAY), None),
        "mqtt.dlq": (3, str(30 * DAY), None),
        "monster": (12, str(DAY), "lz4"),
        "mqtt.retained": (12, None, None),
    }
    assert plans["mqtt.retained"].config["cleanup.policy"] == "compact"


def test_the_plan_follows_the_configuration() -> None:
    topics = TopicsOptions(
        archive=TopicOptions(partitions=24, replication_factor=2, config={"retention.ms": 1, "preallocate": True}),
        events=TopicOptions(enabled=False),
        dlq=TopicOptions(name="errors"),
    )
    options = KafkaOptions(servers="k", topics=topics, bus=BusOptions(topic="b"))
    plans = {plan.name: plan for plan in plan_topics(options, ["mqtt.sensors", "mqtt.archive"])}
    assert plans.keys() == {
        "mqtt.messages",
        "mqtt.archive",
        "mqtt.metrics",
        "errors",
        "b",
        "mqtt.retained",
        "mqtt.sensors",
    }
    for name in ("mqtt.archive", "mqtt.sensors"):  # a group's own topic is made like the archive topic
        assert plans[name].partitions == 24
        assert plans[name].replication_factor == 2
        assert plans[name].config["retention.ms"] == "1"
        assert plans[name].config["preallocate"] == "true"
        assert plans[name].config["compression.type"] == "gzip"


@pytest.mark.parametrize("brokers,expected", [(1, 1), (2, 2), (3, 3), (5, 3)])
async def test_what_is_missing_is_created(brokers: int, expected: int) -> None:
    admin, cluster = FakeAdmin(brokers), Cluster(["k"])
    await keep(cluster, plan_topics(OPTIONS), admin)
    assert sorted(admin.created) == sorted(plan.name for plan in plan_topics(OPTIONS))
    assert {topic.replication_factor for topic in admin.topics.values()} == {expected}
    facts = cluster.facts("mqtt.archive")
    assert facts is not None
    assert (facts.partitions, facts.max_message_bytes) == (12, 4 * 1024 * 1024)


async def test_what_exists_is_left_alone_and_its_drift_told_once(caplog: pytest.LogCaptureFixture) -> None:
    admin, cluster = FakeAdmin(), Cluster(["k"])
    await keep(cluster, plan_topics(OPTIONS), admin)
    admin.created.clear()
    admin.topics["mqtt.dlq"] = attrs.evolve(
        admin.topics["mqtt.dlq"], partitions=5, config={"retention.ms": "7", "max.message.bytes": "9"}
    )
    again = Cluster(["k"])
    with caplog.at_level(logging.WARNING):
        await keep(again, plan_topics(OPTIONS), admin)
    assert admin.created == []
    assert [record.message for record in caplog.records] == [
        f"Kafka topic mqtt.dlq has partitions 5 instead of 3, retention.ms 7 instead of {30 * DAY}; it is used as it is"
    ]
    facts = again.facts("mqtt.dlq")
    assert facts is not None
    assert (facts.partitions, facts.max_message_bytes) == (5, 9)


async def test_no_right_to_create_names_the_command(caplog: pytest.LogCaptureFixture) -> None:
    plan = TopicPlan(name="t", partitions=2, config={"retention.ms": "5"})
    await keep(Cluster(["a:1", "b:2"]), [plan], FakeAdmin(refusal="denied"), until="looked")
    command = (
        "kafka-topics.sh --bootstrap-server a:1,b:2 --create --topic t --partitions 2 --replication-factor 1"
        " --config retention.ms=5"
    )
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        f"Kafka topic t is missing and this node may not create it; somebody who may: {command}"
    ]


async def test_an_outage_is_told_once_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    admin = FakeAdmin()
    admin.failures = [OSError("no"), OSError("no"), OSError("no")]
    cluster = Cluster(["k"])
    with caplog.at_level(logging.WARNING):
        await keep(cluster, plan_topics(OPTIONS), admin)
    assert not cluster.is_away
    assert cluster.outages == 1
    assert [record.message for record in caplog.records] == [
        "Kafka at k is away for topics: OSError: no. MQTT goes on; trying until it is back",
        "Kafka at k is back",
    ]
    assert admin.closed == 4


async def test_a_topic_that_vanished_is_made_again() -> None:
    admin, cluster = FakeAdmin(), Cluster(["k"])
    manager = TopicManager(OPTIONS, cluster, plan_topics(OPTIONS), lambda: admin)
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


def test_drift_ignores_what_cannot_be_seen() -> None:
    plan = TopicPlan(name="t", partitions=1, config={"retention.ms": "5"})
    assert drift(plan, TopicState(partitions=1, replication_factor=3, leaders=True, config={})) == []


@pytest.mark.parametrize(
    "changes,problem",
    [
        ({"servers": "a:1", "bootstrap_servers": ["b:1"]}, "name different servers"),
        ({"servers": "a:http"}, "expected host:port"),
        ({"servers": []}, "at least one"),
        ({"bus": BusOptions(topic="x"), "topics": TopicsOptions(bus=TopicOptions(name="y"))}, "different topics"),
        ({"profile": "fast"}, "profile"),
    ],
)
def test_options_that_contradict_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        KafkaOptions(**changes)


def test_servers_have_two_names_and_two_forms() -> None:
    assert KafkaOptions(servers="a:1, b").server_names == ["a:1", "b"]
    assert KafkaOptions(bootstrap_servers=["a:1", "b"]).server_names == ["a:1", "b"]
    assert KafkaOptions(servers="a:1", bootstrap_servers=["a:1"]).server_names == ["a:1"]
    assert KafkaOptions().server_names == ["localhost:9092"]


def ensure(servers: str, plans: Sequence[TopicPlan]) -> dict[str, str]:
    """Do what a starting node does about its topics; return what was refused."""
    from gateways.kafka.topics import survey

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
        states = admin.describe(names)
    finally:
        admin.close()
    assert {name: (state.partitions, state.replication_factor) for name, state in states.items()} == dict.fromkeys(
        names, (3, 1)
    )
    assert {state.config["retention.ms"] for state in states.values()} == {"123456"}


@pytest.mark.kafka
def test_what_the_broker_refuses_is_told_in_its_words(kafka: KafkaNode) -> None:
    plan = TopicPlan(name=unique_name("bad"), partitions=1, config={"retention.ms": "soon"})
    assert "retention.ms" in ensure(kafka.servers, [plan])[plan.name]


def failing_constructor(make: Callable[[KafkaOptions], object]) -> None:
    with pytest.raises(Exception, match="Unable to bootstrap"):
        make(KafkaOptions(servers="127.0.0.1:1"))


def test_failed_constructors_leave_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BOOTSTRAP_TIMEOUT_MS", 50)
    before = threading.active_count()
    for _ in range(2):
        failing_constructor(Admin)
        failing_constructor(lambda options: workers.Consumer(options, "test"))
        failing_constructor(lambda options: workers.Producer(options, "test", None, 0))
    assert threading.active_count() == before
