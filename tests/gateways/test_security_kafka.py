"""Bus and archive over every protocol, mechanism and kind of store of [K2], against a Kafka that insists on them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import kafka as client
import pytest
import trio

from gateways.kafka import build
from gateways.kafka.kafka_gateway import KafkaGateway
from gateways.kafka.options import BusOptions, KafkaOptions, TopicOptions, TopicsOptions
from mqtt_trio.gateway import ArchiveStore, Message
from tests.gateway_support import LIMIT, without_stream
from tests.gateways.memory_bus import NOW, FakeHost
from tests.gateways.secured import WAYS, login, options_of, trust
from tests.kafka_support import SecureKafka, unique_name

pytestmark = pytest.mark.kafka

BUS, RETAINED, ARCHIVE = (unique_name(name) for name in ("secured-bus", "secured-retained", "secured-archive"))
"""All tests share them: making topics takes longer than anything else here."""
TOPICS = TopicsOptions(
    retained=TopicOptions(name=RETAINED, partitions=1),
    archive=TopicOptions(name=ARCHIVE, partitions=1),
    bus=TopicOptions(partitions=1),
    dlq=TopicOptions(enabled=False),
)


@attrs.frozen
class Node:
    """A gateway at work."""

    host: FakeHost
    gateway: KafkaGateway
    store: ArchiveStore

    def publish(self, topic: str, payload: bytes) -> Message:
        """Publish as a client of this node would."""
        message = Message(topic, payload, 1, client_id="c", published_at=NOW)
        for tap in self.host.taps:
            if (route := tap.route(topic)) is not None:
                route.take(message)
        return message

    def saw(self, message: Message) -> bool:
        return any(isinstance(each, Message) and each.payload == message.payload for each in self.host.local.seen)


@asynccontextmanager
async def running(options: KafkaOptions, node_id: str, nursery: trio.Nursery) -> AsyncIterator[Node]:
    gateway, host = build(without_stream(options)), FakeHost(node_id, os.urandom(16))
    node = Node(host, gateway, gateway.archive_store(None, "all"))
    with TemporaryDirectory() as folder, trio.CancelScope() as scope:
        host.data = Path(folder)
        with trio.fail_after(LIMIT):
            await nursery.start(gateway.run, host)
            await nursery.start(node.store.run)
        yield node
        with trio.move_on_after(5):
            await gateway.stop()
        scope.cancel()


def archived(kafka: SecureKafka) -> list[Any]:
    """Return the payloads in the archive topic."""
    consumer = client.KafkaConsumer(bootstrap_servers=kafka.servers, auto_offset_reset="earliest", group_id=None)
    try:
        partition = client.TopicPartition(ARCHIVE, 0)
        consumer.assign([partition])
        consumer.seek_to_beginning(partition)
        end, found = consumer.end_offsets([partition])[partition], []
        while consumer.position(partition) < end:
            for records in consumer.poll(timeout_ms=1000).values():
                found += [json.loads(record.value)["payload"] for record in records]
        return found
    finally:
        consumer.close()


@pytest.mark.parametrize("name", WAYS)
async def test_bus_and_archive_work_and_nothing_is_given_away(
    secure_kafka: SecureKafka, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = options_of(secure_kafka, WAYS[name](secure_kafka), bus=BusOptions(enabled=True, topic=BUS), topics=TOPICS)
    results: list[Any] = []
    stored = trio.Event()

    def done(outcome: Any) -> None:
        results.append(outcome)
        stored.set()

    with caplog.at_level(logging.DEBUG, "kafka"):
        async with (
            trio.open_nursery() as nursery,
            running(options, f"{name}-a", nursery) as a,
            running(options, f"{name}-b", nursery) as b,
        ):
            message = a.publish("rooms/1", name.encode())
            a.store.submit([message], done)
            with trio.fail_after(LIMIT):
                await stored.wait()
                while not b.saw(message):  # noqa: ASYNC110  what is waited for has no event
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert results == [{}]
    assert name in await trio.to_thread.run_sync(archived, secure_kafka)
    assert len(caplog.records) > 20, "kafka-python had its say"
    said = caplog.text  # as it was told: a closed transport of kafka-python cannot be shown any more
    for secret in ("-secret", options.security.sasl_oauth_token or "-secret"):
        assert secret not in said


async def test_a_user_without_rights_is_told_what_to_ask_for(
    secure_kafka: SecureKafka, caplog: pytest.LogCaptureFixture
) -> None:
    way = ("SASL_SSL", login(secure_kafka, "PLAIN", "limited"), trust(secure_kafka))
    topics = TopicsOptions(archive=TopicOptions(name=unique_name("denied")), dlq=TopicOptions(enabled=False))
    with caplog.at_level(logging.INFO, "gateways.kafka"):
        async with (
            trio.open_nursery() as nursery,
            running(options_of(secure_kafka, way, topics=topics), "limited", nursery) as node,
        ):
            assert not node.gateway.cluster.is_away, "it may log in"
            nursery.cancel_scope.cancel()
    (told,) = caplog.messages
    assert "may be neither seen nor created by this node's user" in told
    assert "--command-config" in told
