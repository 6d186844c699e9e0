"""The stream of messages is on where Kafka is configured, each way by itself [K11]: what a node makes of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from kafka.errors import GroupAuthorizationFailedError, KafkaError, TopicAuthorizationFailedError

from gateways.kafka.cluster import Cluster
from gateways.kafka.dead_letters import DeadLetters
from gateways.kafka.kafka_gateway import KafkaGateway
from gateways.kafka.options import KafkaOptions, MessagesOptions, SecurityOptions, TopicsOptions
from gateways.kafka.stream import CONSUMER, PRODUCER, Stream
from gateways.kafka.stream_consumer import mend_of
from gateways.kafka.topic_plan import DENIED, TopicPlan, plan_topics
from gateways.kafka.topics import TopicManager
from mqtt_trio.config import Overrides, load_config
from tests.gateway_support import LIMIT, without_stream
from tests.gateways.memory_bus import FakeHost
from tests.kafka_fakes import FakeAdmin

AWAY = "127.0.0.1:1"


def options(**messages: Any) -> KafkaOptions:
    return KafkaOptions(servers=AWAY, topics=TopicsOptions(messages=MessagesOptions(**messages)))


@pytest.mark.parametrize(
    "messages, clients, said",
    [
        ({}, {CONSUMER, PRODUCER}, "of #; read in group monstermq-cluster"),
        ({"read": False, "filter": ["a/#", "b"]}, {PRODUCER}, "of a/#, b; not read"),
        ({"write": False, "group": "g"}, {CONSUMER}, "not written; read in group g"),
        ({"filter": []}, {CONSUMER}, "not written; read in group monstermq-cluster"),
    ],
)
def test_a_way_that_is_off_has_no_client(messages: dict[str, Any], clients: set[str], said: str) -> None:
    gateway = KafkaGateway(options(**messages))
    assert gateway.cluster.clients.keys() == {"dlq"}
    letters: DeadLetters = gateway.dead_letters
    stream = Stream(gateway.options, gateway.cluster, FakeHost("n", bytes(16)), letters)
    assert gateway.cluster.clients.keys() == {"dlq"} | clients
    assert stream.describe() == (
        f"stream of messages: topic mqtt.messages, {said}; turn it off with [Kafka.Topics.Messages] Enabled = false"
    )
    counters = stream.counters()
    assert ("stream_messages_written" in counters) == (PRODUCER in clients)
    assert ("stream_messages_published" in counters) == (CONSUMER in clients)


@pytest.mark.parametrize(
    "text", ['[Kafka]\nServers = "127.0.0.1:1"\n', '[[ArchiveGroups]]\nName = "A"\nStore = "KAFKA"\n']
)
def test_it_is_on_where_kafka_is_configured(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    found = load_config(file, {}, Overrides(), {"Kafka": KafkaOptions}).gateways["Kafka"]
    assert isinstance(found, KafkaOptions)
    assert (found.writes_stream, found.reads_stream) == (True, True)
    file.write_text("[Limits]\nKeepAlive = 60\n")
    assert load_config(file, {}, Overrides(), {"Kafka": KafkaOptions}).gateways == {}, "no Kafka, no gateway"


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_node_has_a_tap_for_it_or_none(wanted: bool) -> None:
    gateway = KafkaGateway(options() if wanted else without_stream(options()))
    host = FakeHost("n", bytes(16))
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            await nursery.start(gateway.run, host)
        assert len(host.taps) == wanted
        assert [line for line in gateway.describe() if line.startswith("stream of messages: topic")] != [] or not wanted
        assert ("stream of messages: off; Enabled, Read or Write of [Kafka.Topics.Messages] turn it on" in
                gateway.describe()) != wanted  # fmt: skip
        nursery.cancel_scope.cancel()


async def told(admin: FakeAdmin, plan: TopicPlan, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what a node says of a topic at its first look."""
    manager = TopicManager(options(), Cluster(["k"]), [plan], lambda: admin)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            nursery.start_soon(manager.run)
            await manager.looked.wait()
        nursery.cancel_scope.cancel()
    return caplog.messages


async def test_a_topic_that_may_not_be_made_is_told_with_the_way_to_do_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    admin = FakeAdmin()
    admin.refusal = DENIED
    plans = {plan.name: plan for plan in plan_topics(options())}
    (line,) = await told(admin, plans["mqtt.messages"], caplog)
    assert line.endswith("; without the stream of messages: [Kafka.Topics.Messages] Enabled = false")
    caplog.clear()
    (line,) = await told(admin, plans["mqtt.dlq"], caplog)
    assert "somebody who may: kafka-topics.sh" in line
    assert "Enabled" not in line


def test_rights_that_reading_needs() -> None:
    limited = KafkaOptions(servers="k:1", security=SecurityOptions(sasl_username="mqtt"))
    without = "; without what others put into the stream: [Kafka.Topics.Messages] Read = false"
    assert mend_of(limited, "g", GroupAuthorizationFailedError()) == (
        "; somebody who may: kafka-acls.sh --bootstrap-server k:1 --add --allow-principal User:mqtt --operation Read "
        f"--group g{without}"
    )
    assert mend_of(limited, "g", TopicAuthorizationFailedError()).endswith(f"--topic mqtt.messages{without}")
    assert mend_of(limited, "g", KafkaError()) == ""
