"""scripts/kafka and the fixtures on top of it: a node answers, survives kill -9 with its data, and ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kafka_support import SCRIPT, KafkaCluster, KafkaNode, SecureKafka, run_node, unique_name

LOOPBACK = "127.0.0.1"


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.kafka
def test_records_survive_a_crash_of_the_node(own_kafka: KafkaNode) -> None:
    kafka = pytest.importorskip("kafka")
    topic, port = unique_name("crash"), own_kafka.port
    admin = kafka.KafkaAdminClient(bootstrap_servers=own_kafka.servers)
    admin.create_topics({topic: {"num_partitions": 1, "replication_factor": 1}})
    admin.close()
    producer = kafka.KafkaProducer(bootstrap_servers=own_kafka.servers)
    producer.send(topic, b"before", partition=0).get(10)
    producer.close(5)

    own_kafka.kill()
    assert own_kafka.pid is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, port), 1)

    own_kafka.start()
    assert own_kafka.port == port
    consumer = kafka.KafkaConsumer(bootstrap_servers=own_kafka.servers, auto_offset_reset="earliest")
    partition = kafka.TopicPartition(topic, 0)
    consumer.assign([partition])
    records = consumer.poll(timeout_ms=10_000)
    consumer.close()
    assert [record.value for record in records[partition]] == [b"before"]


@pytest.mark.kafka
def test_three_nodes_lose_one_and_nothing_else(three_kafkas: KafkaCluster) -> None:
    kafka = pytest.importorskip("kafka")
    pytest.importorskip("gateways.kafka.workers")  # closes the sockets that kafka-python forgets when a node is dead
    topic = unique_name("three")
    admin = kafka.KafkaAdminClient(bootstrap_servers=three_kafkas.servers)
    assert len(admin.describe_cluster()["brokers"]) == 3
    admin.create_topics({topic: {"num_partitions": 1, "replication_factor": 3}}, wait_for_metadata=True)
    leader = admin.describe_topics([topic])[0]["partitions"][0]["leader_id"]
    admin.close()
    producer = kafka.KafkaProducer(bootstrap_servers=three_kafkas.servers, reconnect_backoff_max_ms=500)
    producer.send(topic, b"before", partition=0).get(10)

    three_kafkas.kill(leader)
    producer.send(topic, b"meanwhile", partition=0).get(30)  # another node leads now
    three_kafkas.start(leader)
    other = leader % 3 + 1
    three_kafkas.pause(other)
    assert (
        "is paused" in call("status", "--dir", str(three_kafkas.folder), "--name", "three", "--node", str(other)).stdout
    )
    three_kafkas.resume(other)
    producer.send(topic, b"after", partition=0).get(30)
    producer.close(5)

    consumer = kafka.KafkaConsumer(bootstrap_servers=three_kafkas.servers, auto_offset_reset="earliest")
    partition = kafka.TopicPartition(topic, 0)
    consumer.assign([partition])
    values: list[bytes] = []
    for _ in range(20):
        values += [record.value for record in consumer.poll(timeout_ms=1000).get(partition, [])]
        if len(values) == 3:
            break
    consumer.close()
    assert values == [b"before", b"meanwhile", b"after"]


@pytest.mark.kafka
def test_what_a_cluster_is_does_not_change_with_its_data(three_kafkas: KafkaCluster) -> None:
    where = ("--dir", str(three_kafkas.folder), "--name", three_kafkas.name)
    fewer = call("start", "--port", "0", "--brokers", "2", *where)
    assert (fewer.returncode, fewer.stderr) == (
        1,
        f"scripts/kafka: {three_kafkas.folder / 'three'} holds the data of 3 brokers; --fresh removes them\n",
    )
    stranger = call("kill", "--node", "4", *where)
    assert (stranger.returncode, stranger.stderr.count("\n")) == (1, 1)
    assert "has no node 4; its nodes: 1, 2, 3" in stranger.stderr


@pytest.mark.kafka
@pytest.mark.parametrize("listener", ["SASL_SSL", "SSL", "SASL_PLAINTEXT"])
def test_secured_listeners_let_their_users_in(secure_kafka: SecureKafka, listener: str) -> None:
    kafka = pytest.importorskip("kafka")
    options = {
        "security_protocol": listener,
        "ssl_cafile": secure_kafka.file("ca.pem"),
        "ssl_certfile": secure_kafka.file("client.pem"),
        "ssl_keyfile": secure_kafka.file("client.key"),
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "alice",
        "sasl_plain_password": secure_kafka.PASSWORDS["alice"],
    }
    admin = kafka.KafkaAdminClient(bootstrap_servers=secure_kafka.address(listener), **options)
    assert unique_name("none") not in admin.list_topics()
    assert len(admin.describe_cluster()["brokers"]) == 1
    admin.close()


@pytest.mark.kafka
def test_a_node_without_secured_listeners_gets_none_later(kafka: KafkaNode) -> None:
    result = call("start", "--secure", "--port", "0", "--dir", str(kafka.folder), "--name", kafka.name)
    assert result.returncode == 1
    assert "holds the data of a node without secured listeners; --fresh removes them" in result.stderr


@pytest.mark.kafka
def test_topics_are_never_created_by_asking_for_them(kafka: KafkaNode) -> None:
    client = pytest.importorskip("kafka")
    producer = client.KafkaProducer(bootstrap_servers=kafka.servers, max_block_ms=500)
    with pytest.raises(client.errors.KafkaTimeoutError):
        producer.send(unique_name("nowhere"), b"x").get(5)
    producer.close(5)


@pytest.mark.kafka
def test_a_failing_test_leaves_no_node_behind(tmp_path: Path) -> None:
    fixture = run_node(KafkaNode(tmp_path, "failing"))
    node = next(fixture)
    pid = node.pid
    assert pid is not None
    with pytest.raises(ZeroDivisionError):
        fixture.throw(ZeroDivisionError())  # type: ignore[attr-defined]  # a generator, typed as an iterator
    assert not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text()


@pytest.mark.kafka
def test_starting_twice_is_one_node_and_fresh_forgets_its_data(tmp_path: Path) -> None:
    where = ("--dir", str(tmp_path), "--name", "twice")
    try:
        first = call("start", "--port", "0", *where)
        second = call("start", "--port", "0", *where)
        (tmp_path / "twice" / "data" / "marker").touch()
        pid = first.stdout.partition("(pid ")[2].split(",")[0]
        assert f"already answers (pid {pid}," in second.stdout
        assert call("status", *where).returncode == 0

        fresh = call("start", "--port", "0", "--fresh", *where)
        assert fresh.returncode == 0
        assert f"(pid {pid}," not in fresh.stdout
        assert not (tmp_path / "twice" / "data" / "marker").exists()
    finally:
        stopped = call("stop", *where)
    assert "its data stay" in stopped.stdout
    assert call("status", *where).returncode == 1


@pytest.mark.kafka
def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        result = call("start", "--port", str(port), "--dir", str(tmp_path), "--name", "busy")
    assert result.returncode == 1
    assert result.stderr == f"scripts/kafka: port {port} of {LOOPBACK} is in use by another program\n"


def test_without_java_or_maven_the_message_says_what_to_install(tmp_path: Path) -> None:
    nothing, only_java = tmp_path / "nothing", tmp_path / "java"
    nothing.mkdir()
    only_java.mkdir()
    fake = only_java / "java"
    fake.write_text("#!/bin/sh\necho 'openjdk version \"17.0.1\"' >&2\n")
    fake.chmod(0o755)
    where = ("--dir", str(tmp_path / "nodes"), "--name", "none")
    environment = {"JAVA_HOME": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    no_java = call("start", *where, PATH=str(nothing), **environment)
    assert (no_java.returncode, no_java.stderr.count("\n")) == (1, 1)
    assert "install a JRE 17" in no_java.stderr

    no_maven = call("start", *where, PATH=str(only_java), **environment)
    assert (no_maven.returncode, no_maven.stderr.count("\n")) == (1, 1)
    assert "install Maven" in no_maven.stderr


def test_an_old_java_is_named(tmp_path: Path) -> None:
    fake = tmp_path / "java"
    fake.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    fake.chmod(0o755)
    result = call("start", "--dir", str(tmp_path), "--name", "old", JAVA_HOME="", PATH=str(tmp_path))
    assert result.returncode == 1
    assert "Java 17 or newer is needed, found Java 11" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("start", "--port", "0"),
        ("stop", "--fresh"),
        ("start", "--name", "../up"),
        ("restart",),
        ("start", "--brokers", "0"),
        ("stop", "--brokers", "3"),
        ("start", "--brokers", "3", "--node", "1"),
        ("start", "--brokers", "3", "--secure"),
        ("start", "--brokers", "3", "--port", "65534"),
        ("start", "--secure", "--port", "65531"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).returncode == 2
