"""What a user without all rights can do with topics, groups and letters, and what is said about the rest [K3, K12]."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ACL, ACLFilter, ACLOperation, ACLPermissionType, ResourcePattern, ResourceType

from gateways.kafka.admin import Admin
from gateways.kafka.cluster import Cluster
from gateways.kafka.dlq import encode_letter, letter_headers
from gateways.kafka.options import KafkaOptions
from gateways.kafka.topic_plan import TopicPlan, plan_topics
from gateways.kafka.topics import TopicManager, survey
from mqtt_trio.__main__ import main
from tests.gateways.dlq_letters import letter
from tests.gateways.secured import login, options_of, trust
from tests.kafka_support import SecureKafka, unique_name

pytestmark = pytest.mark.kafka
USER = "User:limited"


class Setting:
    """A topic that nobody made yet, and two users: one who may do everything, one who may do what it is allowed."""

    def __init__(self, kafka: SecureKafka, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.servers = kafka.servers
        self.superuser = KafkaOptions(servers=kafka.servers)
        self.limited = options_of(kafka, ("SASL_SSL", login(kafka, "PLAIN", "limited"), trust(kafka)))
        self.topic, self.dlq = unique_name("rights"), unique_name("dlq")
        self.config = folder / "config.toml"
        security, tls = self.limited.security, self.limited.ssl
        self.config.write_text(
            f'[Kafka]\nServers = "{self.limited.servers}"\n'
            f'[Kafka.Security]\nProtocol = "SASL_SSL"\nSaslMechanism = "PLAIN"\n'
            f'SaslUsername = "limited"\nSaslPassword = "{security.sasl_password}"\n'
            f'[Kafka.SSL]\nTruststoreLocation = "{tls.truststore_location}"\n'
            f'TruststorePassword = "{tls.truststore_password}"\n'
            f'[Kafka.Topics.Dlq]\nName = "{self.dlq}"\n'
            f'[[ArchiveGroups]]\nName = "A"\nStore = "KAFKA"\nKafkaTopic = "{self.topic}"\n'
        )

    @property
    def plan(self) -> TopicPlan:
        (plan,) = [plan for plan in plan_topics(self.limited, [self.topic]) if plan.name == self.topic]
        return plan

    def make(self, *plans: TopicPlan) -> None:
        assert survey(lambda: Admin(self.superuser), plans or [self.plan]).refused == {}

    def allow(
        self, *operations: ACLOperation, name: str | None = None, kind: ResourceType = ResourceType.TOPIC
    ) -> None:
        """Give the limited user rights, and wait until the broker knows them."""
        pattern = ResourcePattern(kind, name or self.topic)
        acls = {ACL(USER, "*", operation, ACLPermissionType.ALLOW, pattern) for operation in operations}
        wanted = ACLFilter(USER, "*", ACLOperation.ANY, ACLPermissionType.ANY, pattern)
        admin = KafkaAdminClient(bootstrap_servers=self.servers)
        try:
            assert admin.create_acls(list(acls))["failed"] == []
            until = time.monotonic() + 30
            while not acls <= set(admin.describe_acls(wanted)[0]):
                assert time.monotonic() < until
        finally:
            admin.close()

    async def start_node(self, until: Callable[[TopicManager], trio.Event]) -> Cluster:
        """Do what a node does about its topic; return what it knows then."""
        cluster = Cluster(self.limited.server_names)
        manager = TopicManager(self.limited, cluster, [self.plan])
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(manager.run)
                await until(manager).wait()
                nursery.cancel_scope.cancel()
        return cluster

    def run(self, *arguments: str) -> int:
        self.capsys.readouterr()
        return main([*arguments[:2], "--config", str(self.config), *arguments[2:]])


@pytest.fixture
def setting(secure_kafka: SecureKafka, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Setting:
    return Setting(secure_kafka, tmp_path, capsys)


async def test_a_topic_that_may_not_be_made(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    def errors() -> list[str]:
        return [record.message for record in caplog.records if record.levelno == logging.ERROR]

    await setting.start_node(lambda manager: manager.looked)
    (line,) = errors()
    assert line.startswith(f"Kafka topic {setting.topic} may be neither seen nor created by this node's user")
    assert "--add --allow-principal User:limited --operation Describe " in line
    assert f"--command-config client.properties --create --topic {setting.topic} --partitions 12" in line
    caplog.clear()
    setting.allow(ACLOperation.DESCRIBE)
    await setting.start_node(lambda manager: manager.looked)
    (line,) = errors()
    assert line.startswith(f"Kafka topic {setting.topic} is missing and this node may not create it")
    assert setting.run("topics", "apply", "--topic", setting.topic) == 1
    assert "is missing and this node may not create it" in setting.capsys.readouterr().err
    caplog.clear()
    setting.allow(ACLOperation.READ, ACLOperation.WRITE)
    setting.make()
    cluster = await setting.start_node(lambda manager: manager.complete)
    assert errors() == []  # it exists, and that is enough
    assert cluster.facts(setting.topic) is not None


def test_a_topic_that_may_not_be_looked_into_or_changed(setting: Setting) -> None:
    setting.make(TopicPlan(name=setting.topic, partitions=2, config={"retention.ms": "1000000"}))
    setting.allow(ACLOperation.DESCRIBE)
    only = ("--topic", setting.topic)
    assert setting.run("topics", "plan", *only) == 1
    shown = setting.capsys.readouterr().out
    assert "partitions  2 -> 12" in shown
    assert "its properties may not be seen: this user lacks DescribeConfigs" in shown
    setting.allow(ACLOperation.DESCRIBE_CONFIGS)
    assert setting.run("topics", "plan", *only) == 3
    assert setting.run("topics", "apply", *only, "--configs", "--yes") == 1
    errors = setting.capsys.readouterr().err.splitlines()
    assert [line.partition(" --bootstrap-server")[0] for line in errors] == [
        f"Topic {setting.topic}: this user may not alter it; somebody who may: kafka-topics.sh",
        f"Topic {setting.topic}: this user may not alter it; somebody who may: kafka-configs.sh",
    ]
    setting.allow(ACLOperation.ALTER, ACLOperation.ALTER_CONFIGS)
    assert setting.run("topics", "apply", *only, "--configs", "--yes") == 0
    assert setting.run("topics", "plan", *only) == 0


def test_a_group_that_may_not_be_seen(setting: Setting) -> None:
    setting.make()
    setting.allow(ACLOperation.DESCRIBE)
    group = unique_name("group")
    assert setting.run("offsets", "show") == 0  # ours, as far as they may be seen
    assert "may not see group monstermq-cluster: it lacks Describe" in setting.capsys.readouterr().err
    reset = ("--group", group, "--topic", setting.topic, "--to", "latest", "--execute")
    assert setting.run("offsets", "show", "--group", group) == 1
    assert setting.run("offsets", "reset", *reset) == 1
    assert f"this user may not see group {group}: it lacks Describe on it" in setting.capsys.readouterr().err


def test_a_target_that_may_not_be_written_to(setting: Setting) -> None:
    setting.make()
    setting.make(TopicPlan(name=setting.dlq, partitions=1, config={"retention.ms": "-1"}))
    letters = [letter(number, setting.topic) for number in range(8)]
    producer = KafkaProducer(bootstrap_servers=setting.servers)
    for each in letters:
        producer.send(setting.dlq, encode_letter(each), each.id.encode(), list(letter_headers(each)))
    producer.flush(30)
    producer.close()
    assert setting.run("dlq", "list") == 1
    assert f"there is no topic {setting.dlq}, or this user may not see it" in setting.capsys.readouterr().err
    setting.allow(ACLOperation.READ, name=setting.dlq)
    setting.allow(ACLOperation.READ)
    assert setting.run("dlq", "redrive", "--execute") == 1
    assert "mqtt-trio-dlq-redrive" in setting.capsys.readouterr().err
    setting.allow(ACLOperation.READ, name="mqtt-trio-dlq-redrive", kind=ResourceType.GROUP)
    assert setting.run("dlq", "redrive", "--execute") == 1
    captured = setting.capsys.readouterr()
    assert "0 of 8 records were written." in captured.out
    assert f"3 failed: not tried, because 5 others failed on {setting.topic} before" in captured.err
    setting.allow(ACLOperation.WRITE)
    assert setting.run("dlq", "redrive", "--execute") == 0
    captured = setting.capsys.readouterr()
    assert "8 of 8 records were written." in captured.out
    assert f"{setting.dlq} takes no notes, so the next redrive has to search" in captured.err
    assert setting.run("dlq", "redrive", "--execute") == 0
    assert setting.capsys.readouterr().out.split()[-2:] == ["0", "8"]
