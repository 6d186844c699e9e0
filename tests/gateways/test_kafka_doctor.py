"""What `mqtt-trio doctor` says about Kafka: name, connection, TLS, login, rights and topics told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import pytest

from gateways.kafka import doctor
from gateways.kafka.options import BusOptions, KafkaOptions, TopicOptions, TopicsOptions
from gateways.kafka.precheck import Step
from gateways.kafka.topic_plan import DENIED, TopicState, plan_topics
from mqtt_trio.errors import GatewayError
from mqtt_trio.gateway import Finding, Verdict
from tests.gateways.secured import FAULTS, WAYS, login, options_of, trust
from tests.kafka_support import KafkaNode, SecureKafka, unique_name

OPTIONS = KafkaOptions(servers="127.0.0.1:1", bus=BusOptions(enabled=True, topic="bus"))
BROKERS = 3


@attrs.define
class Admin:
    """A cluster that has all topics as planned, until a test says otherwise."""

    states: dict[str, TopicState | None]
    refusal: str | None = None
    sizes: dict[tuple[str, int], int] = attrs.field(factory=dict)

    def broker_count(self) -> int:
        return BROKERS

    def describe(self, names: Sequence[str]) -> Mapping[str, TopicState | None]:
        return {name: self.states[name] for name in names if name in self.states}

    def bounds(self, partitions: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], tuple[int, int]]:
        return {p: (0, self.sizes.get(p, 1000)) for p in partitions}

    def may_create(self, name: str, partitions: int, replication_factor: int) -> str | None:
        return self.refusal

    def create(self, name: str, partitions: int, replication_factor: int, config: Mapping[str, str]) -> str | None:
        raise AssertionError("a doctor changes nothing")

    def close(self) -> None: ...


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Admin:
    made = Admin(
        {
            plan.name: TopicState(
                partitions=plan.partitions,
                replication_factor=3,
                leaders=True,
                config=plan.properties(3),
            )
            for plan in plan_topics(OPTIONS)
        }
    )

    @contextmanager
    def give(_options: KafkaOptions) -> Iterator[Admin]:
        yield made

    def one_step(_options: KafkaOptions, _server: str) -> list[Step]:
        return [Step(name="brokers", text="lets us in")]

    monkeypatch.setattr(doctor, "open_admin", give)
    monkeypatch.setattr(doctor, "precheck", one_step)
    return made


def change(admin: Admin, topic: str, **facts: Any) -> None:
    state = admin.states[topic]
    assert state is not None
    admin.states[topic] = attrs.evolve(state, **facts)


def about(topic: str) -> list[Finding]:
    return [one for one in doctor.examine(OPTIONS, ()) if one.about == f"Kafka topic {topic}"]


def test_all_is_well(admin: Admin) -> None:
    found = list(doctor.examine(OPTIONS, ()))
    assert {one.verdict for one in found} == {Verdict.OK}
    assert [one.about for one in found][:2] == ["Kafka 127.0.0.1:1 brokers", "Kafka cluster"]
    assert "12 partitions, replication factor 3" in about("bus")[0].text


def test_a_missing_topic_is_created_later_or_not(admin: Admin) -> None:
    del admin.states["bus"]
    assert [(one.verdict, one.text) for one in about("bus")] == [
        (Verdict.NOTE, "is not there yet; the broker will create it")
    ]
    admin.refusal = "InvalidReplicationFactorError"
    (found,) = about("bus")
    assert (found.verdict, found.text) == (
        Verdict.PROBLEM,
        "is missing, and cannot be created: InvalidReplicationFactorError",
    )
    admin.refusal = DENIED
    (found,) = about("bus")
    assert found.verdict is Verdict.PROBLEM
    assert "kafka-topics.sh --bootstrap-server 127.0.0.1:1 --create --topic bus" in found.text
    admin.states["bus"] = None  # it may be there
    (found,) = about("bus")
    assert "kafka-acls.sh" in found.text


def test_rights_that_are_missing(admin: Admin) -> None:
    change(admin, "bus", writable=False, readable=False)
    written, read = about("bus")
    assert (written.verdict, written.text) == (Verdict.PROBLEM, "this user may not write to it")
    assert (read.verdict, read.text) == (Verdict.PROBLEM, "this user may not read it")
    assert "--operation Write --topic bus" in written.mend
    change(admin, "mqtt.dlq", readable=False)
    assert [one.verdict for one in about("mqtt.dlq")] == [Verdict.OK], "a node never reads it"
    change(admin, "mqtt.dlq", config={})
    assert [one.verdict for one in about("mqtt.dlq")] == [Verdict.OK, Verdict.NOTE]


def test_a_topic_without_leader(admin: Admin) -> None:
    change(admin, "bus", leaders=False)
    (found,) = about("bus")
    assert (found.verdict, found.mend) == (Verdict.PROBLEM, "start the brokers that are down")


def test_replicas_that_are_behind(admin: Admin) -> None:
    change(admin, "bus", out_of_sync=4)
    (found,) = about("bus")
    assert (found.verdict, found.text) == (Verdict.PROBLEM, "4 of 12 partitions are under-replicated")


def test_partitions_that_are_uneven(admin: Admin) -> None:
    admin.sizes["bus", 5] = 3500
    (fine,) = about("bus")
    assert fine.verdict is Verdict.OK
    admin.sizes["bus", 5] = 8000
    _, found = about("bus")
    assert found.verdict is Verdict.NOTE
    assert found.text == "partition 5 holds 8000 of 19000 records, 5.1 times the average"


def test_advice_comes_first(admin: Admin) -> None:
    options = attrs.evolve(OPTIONS, servers="kafka.example:9092")
    found = next(iter(doctor.examine(options, ())))
    assert (found.verdict, found.about) == (Verdict.NOTE, "Kafka.Security.Protocol")


def test_what_differs_from_the_plan(admin: Admin) -> None:
    change(admin, "bus", partitions=4)
    sound, grown = about("bus")
    assert (sound.verdict, grown.verdict) == (Verdict.OK, Verdict.NOTE)
    assert grown.text == "partitions 4 instead of 12"
    assert grown.mend.endswith("`mqtt-trio topics apply`")
    state = admin.states["mqtt.retained"]
    assert state is not None
    change(admin, "mqtt.retained", config={**state.config, "cleanup.policy": "delete"})
    (found,) = about("mqtt.retained")
    assert (found.verdict, found.text) == (Verdict.PROBLEM, "cleanup.policy delete instead of compact")
    assert found.mend.endswith("`mqtt-trio topics apply --configs`")
    state = admin.states["bus"]
    assert state is not None
    change(admin, "bus", partitions=12, config={**state.config, "min.insync.replicas": "5"})
    (found,) = about("bus")
    assert (found.verdict, found.text) == (Verdict.PROBLEM, "min.insync.replicas 5 instead of 2")
    assert "Kafka refuses every write" in found.mend


def with_bus(**changes: Any) -> KafkaOptions:
    return attrs.evolve(OPTIONS, topics=TopicsOptions(bus=TopicOptions(**changes)))


def test_copies_that_the_configuration_asks_for(admin: Admin) -> None:
    """[K20]: they are as planned, and fewer than there could be."""
    state = admin.states["bus"]
    assert state is not None
    change(admin, "bus", replication_factor=1, config={**state.config, "min.insync.replicas": "1"})
    sound, found = examined(with_bus(replication_factor=1))
    assert (sound.verdict, found.verdict) == (Verdict.OK, Verdict.NOTE)
    assert found.text.startswith("the loss of its broker takes what bus holds")
    assert found.mend.startswith("Kafka.Topics.Bus.ReplicationFactor = 3")
    change(admin, "bus", replication_factor=3, config=state.config)
    assert [one.verdict for one in examined(with_bus(replication_factor=3))] == [Verdict.OK]


def test_in_sync_as_the_configuration_asks_for(admin: Admin) -> None:
    state = admin.states["bus"]
    assert state is not None
    for asked, verdicts in (("1", [Verdict.OK, Verdict.NOTE]), ("2", [Verdict.OK]), ("3", [Verdict.OK])):
        change(admin, "bus", config={**state.config, "min.insync.replicas": asked})
        found = examined(with_bus(config={"min.insync.replicas": asked}))
        assert [one.verdict for one in found] == verdicts, asked
    change(admin, "bus", replication_factor=2, config={**state.config, "min.insync.replicas": "3"})
    found = examined(with_bus(replication_factor=2, config={"min.insync.replicas": "3"}))
    assert [one.text for one in found if one.about == "Kafka.Topics.Bus.Config.min.insync.replicas"] == [
        "bus: Kafka refuses every write, since there are never 3 replicas"
    ]
    assert len([one for one in found if "refuses every write" in one.text]) == 1, "once"


def examined(options: KafkaOptions) -> list[Finding]:
    """Return what is said of the bus topic and its keys."""
    names = ("Kafka topic bus", "Kafka.Topics.Bus")
    return [one for one in doctor.examine(options, ()) if one.about.startswith(names)]


def test_a_kafka_that_fails_meanwhile(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise GatewayError("Kafka at 127.0.0.1:1 failed: gone", retriable=True)

    monkeypatch.setattr(Admin, "broker_count", lambda self: fail())
    found = list(doctor.examine(OPTIONS, ()))[-1]
    assert (found.verdict, found.about, found.text) == (
        Verdict.PROBLEM,
        "Kafka topics",
        "Kafka at 127.0.0.1:1 failed: gone",
    )


def test_a_name_and_a_port_where_nobody_is() -> None:
    options = KafkaOptions(servers=["no-such-host.invalid:9092", "127.0.0.1:1"])
    found = list(doctor.examine(options, ()))
    assert [(one.verdict, one.about) for one in found] == [
        (Verdict.NOTE, "Kafka.Security.Protocol"),
        (Verdict.PROBLEM, "Kafka no-such-host.invalid:9092 name"),
        (Verdict.OK, "Kafka 127.0.0.1:1 name"),
        (Verdict.PROBLEM, "Kafka 127.0.0.1:1 connection"),
        (Verdict.NOTE, "Kafka topics"),
    ]
    assert all(one.mend for one in found if one.verdict is Verdict.PROBLEM)


@pytest.mark.kafka
@pytest.mark.parametrize(
    "fault, title",
    [
        ("expired", "TLS"),
        ("wrong host", "TLS"),
        ("mechanism not enabled", "mechanism"),
        ("wrong password", "login"),
        ("login missing", "login"),
        ("plain to TLS", "protocol"),
    ],
)
def test_faults_of_a_real_kafka_are_told_apart(secure_kafka: SecureKafka, fault: str, title: str) -> None:
    way, words = FAULTS[fault]
    found = list(doctor.examine(options_of(secure_kafka, way(secure_kafka)), ()))
    (problem,) = [one for one in found if one.verdict is Verdict.PROBLEM]
    assert problem.about.endswith(f" {title}")
    assert words.partition(";")[0] in problem.text
    assert all("-secret" not in one.text + one.mend for one in found)


@pytest.mark.kafka
def test_a_user_without_rights_is_told_what_is_missing(secure_kafka: SecureKafka, kafka: KafkaNode) -> None:
    """The login is fine: nothing but rights is wrong, and somebody is told what to type."""
    bus = BusOptions(enabled=True, topic=unique_name("doctor"))
    allowed = options_of(secure_kafka, WAYS["SCRAM-SHA-512, JKS"](secure_kafka), bus=bus)
    found = list(doctor.examine(allowed, [unique_name("archive")]))
    assert {one.verdict for one in found} == {Verdict.OK, Verdict.NOTE}
    assert "Kafka cluster" in [one.about for one in found]
    way = ("SASL_SSL", login(secure_kafka, "SCRAM-SHA-512", "limited"), trust(secure_kafka))
    limited = list(doctor.examine(options_of(secure_kafka, way, bus=bus), ()))
    problems = [one for one in limited if one.verdict is Verdict.PROBLEM]
    assert {one.about for one in problems} >= {f"Kafka topic {bus.topic}"}
    assert all("kafka-acls.sh" in one.text + one.mend for one in problems)
    assert all(one.verdict is Verdict.OK for one in limited if one.about.startswith("Kafka 127.0.0.1"))
