"""Kafka for the ledger: nodes that can be killed, a network in front of them, and what lies in a topic at the end."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from tests.kafka_support import KafkaCluster
from tests.ledger.proxy import Network
from tests.ledger.server import free_port
from tests.ledger.stream_verdict import Found

READ_LIMIT: Final = 120.0
"""Seconds in which a topic must be read to its end."""


class Stage:
    """One Kafka behind one network. Everything blocks."""

    def __init__(self, directory: Path, brokers: int) -> None:
        self.network = Network([free_port() for _ in range(brokers)])
        self.cluster = KafkaCluster(directory, "kafka", brokers, proxies=tuple(self.network.ports))

    @property
    def servers(self) -> str:
        """What our nodes are told: the network."""
        return ",".join(f"127.0.0.1:{port}" for port in self.network.ports)

    def start(self) -> None:
        """Start all nodes and open the network.

        Raises:
          RuntimeError, OSError: something does not start.
        """
        self.cluster.start()
        self.network.go(self.cluster.behind_proxies())

    def close(self) -> None:
        """End everything."""
        self.network.close()
        self.cluster.kill()

    def leader(self, topic: str, partition: int) -> int:
        """Return the node that leads a partition; some node when nobody knows."""
        try:
            with _closing(KafkaAdminClient(bootstrap_servers=self.cluster.servers, request_timeout_ms=5000)) as admin:
                partitions = admin.describe_topics([topic])[0]["partitions"]
                return int(partitions[partition % len(partitions)]["leader_id"])
        except Exception:
            return partition % self.cluster.brokers + 1

    def read(self, topic: str) -> list[Found]:
        """Return the messages of an archive topic, each partition in its order.

        Raises:
          RuntimeError: its end is not reached within READ_LIMIT.
        """
        with _closing(KafkaConsumer(bootstrap_servers=self.cluster.servers, enable_auto_commit=False)) as consumer:
            partitions = [TopicPartition(topic, n) for n in sorted(consumer.partitions_for_topic(topic) or ())]
            consumer.assign(partitions)
            consumer.seek_to_beginning(*partitions)
            ends = consumer.end_offsets(partitions)
            found: list[Found] = []
            limit = time.monotonic() + READ_LIMIT
            while any(consumer.position(partition) < end for partition, end in ends.items()):
                if time.monotonic() > limit:
                    raise RuntimeError(f"the end of Kafka topic {topic} is not reached")
                for records in consumer.poll(timeout_ms=200).values():
                    found += [_message(record) for record in records]
            return found


def _message(record: Any) -> Found:
    """Read an archive record as a consumer has to [K8]."""
    value = json.loads(record.value)
    text: str = value["payload"]
    payload = base64.b64decode(text) if value.get("payloadEncoding") == "base64" else text.encode()
    return Found(record.partition, value["topic"], value["qos"], payload, value["clientId"])


@contextmanager
def _closing(client: Any) -> Iterator[Any]:
    try:
        yield client
    finally:
        client.close()
