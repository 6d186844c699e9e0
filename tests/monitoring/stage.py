"""Two nodes under load, a real Kafka and a real Prometheus with our rules: nothing is wrong, then one thing after the
other. tests/monitoring/test_alerts_live.py plays it in short, scripts/alerts in full length [K17].
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import trio
from kafka import KafkaAdminClient, KafkaProducer
from kafka.errors import UnknownTopicOrPartitionError
from kafka.protocol.admin.client_quotas import AlterClientQuotasRequest as Alter
from prometheus_client.parser import text_string_to_metric_families

from gateways.kafka.options import KafkaOptions
from mqtt_trio.app import Node
from mqtt_trio.config import LoadedConfig, Overrides, load_config
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.packets import ConnAck, Connect
from mqtt_trio.testing import TestClient
from tests.http_support import fetch
from tests.ledger.server import free_port
from tests.lines import require_tool
from tests.monitoring.rules import RULES, without_delay

LIMIT: Final = 90.0
"""Seconds in which an alert comes, or goes."""
RATE: Final = 200
"""Messages per second that the first node gets."""
TOPICS: Final = 60
"""MQTT topics, so that every partition has some."""
JUNK: Final = 15_000
"""Records for one partition of the bus: more than any reader may be behind."""
DELETIONS: Final = 20
DELETION_INTERVAL: Final = 4.0
TIMED: Final = frozenset({"MqttLoopLate"})
"""Alerts that a busy machine may bring about: only their own delay makes them one."""


@attrs.define
class Prometheus:
    """A server of this test alone."""

    port: int
    process: subprocess.Popen[bytes]

    async def ask(self, query: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query."""
        path = "/api/v1/query?" + urllib.parse.urlencode({"query": query})
        answer = await fetch(self.port, path)
        assert answer.status == 200, answer.body
        result: list[dict[str, Any]] = json.loads(answer.body)["data"]["result"]
        return result

    async def active(self) -> set[str]:
        """Return the alerts whose condition holds."""
        return {sample["metric"]["alertname"] for sample in await self.ask("ALERTS")}

    async def active_within(self, seconds: float) -> set[str]:
        """Return the alerts whose condition held at any time of the last seconds."""
        found = await self.ask(f"count_over_time(ALERTS[{max(1, int(seconds))}s])")
        return {sample["metric"]["alertname"] for sample in found}


@asynccontextmanager
async def run_prometheus(directory: Path, targets: list[int]) -> AsyncIterator[Prometheus]:
    """Run a Prometheus that looks at these ports and at the rules, without their delays, every second."""
    rules, config, port = directory / "alerts.yml", directory / "prometheus.yml", free_port()
    rules.write_text(without_delay(RULES.read_text()))
    ports = ", ".join(f'"127.0.0.1:{target}"' for target in targets)
    config.write_text(
        f"global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: ['{rules}']\n"
        f"scrape_configs:\n  - job_name: mqtt-trio\n    static_configs: [{{ targets: [{ports}] }}]\n"
    )
    command = [require_tool("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}",
               f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]  # fmt: skip
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220  quick, and ended by its id
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        await until(lambda: answers(port), "Prometheus answers")
        yield Prometheus(port, process)
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(process.wait)


async def answers(port: int) -> bool:
    try:
        return (await fetch(port, "/-/ready")).status == 200
    except OSError:
        return False


async def until(condition: Callable[[], Any], what: str, limit: float = LIMIT) -> None:
    """Wait until `condition`, which is awaited, holds."""
    with trio.move_on_after(limit):
        while not await condition():  # noqa: ASYNC110  Prometheus announces nothing
            await trio.sleep(0.2)
        return
    raise AssertionError(f"not within {limit} s: {what}")


class Stage:
    """What runs, and what can be done to it."""

    def __init__(self, servers: str, directory: Path, nursery: trio.Nursery) -> None:
        self.servers = servers
        self.directory = directory
        self.nodes: list[Node] = []
        self.published = self.received = 0
        self._published_at: list[float] = []
        self._latest = -1
        """The number of the message that was received last."""
        self.prometheus: Prometheus | None = None
        self._nursery = nursery
        self._door: trio.Event | None = None
        self._streams: list[trio.SocketStream] = []
        self._clients = trio.CancelScope()

    async def begin(self) -> None:
        """Start the nodes and their clients."""
        for name in ("one", "two"):
            node = Node(self._options(name))
            self.nodes.append(node)
            self._nursery.start_soon(node.run)
            await node.started.wait()
        self._hold_reader(self.nodes[1])
        subscriber = await self._connect(self.nodes[1], "subscriber")
        await subscriber.subscribe("load/#", qos=1)
        publisher = await self._connect(self.nodes[0], "publisher")
        self._nursery.start_soon(self._load, publisher, subscriber)

    async def _load(self, publisher: TestClient, subscriber: TestClient) -> None:
        with self._clients:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._publish, publisher)
                nursery.start_soon(self._receive, subscriber)

    def _options(self, name: str) -> LoadedConfig:
        sets = [
            f"Node.Id={name}", f"Persistence.Path={self.directory / name}", "Http.Port=0",
            f"Kafka.Servers={self.servers}", "Kafka.Bus.Enabled=true", "ArchiveGroups.0.Name=All",
            "ArchiveGroups.0.Filter=#", "ArchiveGroups.0.Store=KAFKA",
            "Kafka.Topics.Messages.Enabled=true", "Kafka.Topics.Events.Enabled=true",
            "Kafka.Metrics.Enabled=true", 'Kafka.Metrics.Reporters=["kafka"]',
        ]  # fmt: skip
        return load_config(None, {}, Overrides(sets=sets, port=0, ws_port=0), {"Kafka": KafkaOptions})

    def _hold_reader(self, node: Node) -> None:
        """Put a door in front of what the bus of `node` reads: `stop_reading` shuts it."""
        consumer: Any = node.gateways["Kafka"]._bus._consumer  # type: ignore[attr-defined]
        room = consumer.room

        async def room_behind_the_door() -> None:
            if self._door is not None:
                await self._door.wait()
            await room()

        consumer.room = room_behind_the_door

    async def _connect(self, node: Node, client_id: str) -> TestClient:
        stream = await trio.open_tcp_stream("127.0.0.1", node.listeners[0].port)
        self._streams.append(stream)
        client = TestClient(stream, ProtocolVersion.MQTT_5_0)
        client.patience = LIMIT
        await client.send(Connect(client_id=client_id))
        await client.expect(ConnAck)
        return client

    async def _publish(self, client: TestClient) -> None:
        while True:
            self._published_at.append(time.monotonic())
            await client.publish(f"load/{self.published % TOPICS}", b"%d" % self.published, qos=1)
            self.published += 1
            await trio.sleep(1 / RATE)

    async def _receive(self, client: TestClient) -> None:
        client.patience = 24 * 3600
        while True:
            self._latest = int((await client.next_message()).payload)
            self.received += 1

    async def metrics(self, node: int) -> Mapping[str, float]:
        """Return a node's samples as text, and their values."""
        monitor = self.nodes[node].monitor
        assert monitor is not None
        assert monitor.listener is not None
        answer = await fetch(monitor.listener.port, "/metrics")
        assert answer.status == 200
        return {
            " ".join([sample.name, *(f"{key}={text}" for key, text in sample.labels.items())]): sample.value
            for family in text_string_to_metric_families(answer.body)
            for sample in family.samples
        }

    @property
    def watch(self) -> Prometheus:
        assert self.prometheus is not None
        return self.prometheus

    async def end(self) -> None:
        """Let the nodes shut down in good order."""
        self.go_on_reading()
        self._clients.cancel()
        for stream in self._streams:
            await trio.aclose_forcefully(stream)
        for node in self.nodes:
            for listener in node.listeners:
                listener.close()
            node.stopping.set()

    # What happens

    async def healthy(self, seconds: float) -> None:
        """Nothing is wrong for so long."""
        published = self.published
        await trio.sleep(seconds)
        assert self.published - published > seconds * RATE / 10, "there was no load to speak of"
        assert self.received > 0
        assert await self.watch.active_within(seconds) - TIMED == set()
        (looks,) = await self.watch.ask(f"min(count_over_time(mqtt_trio_ready[{int(seconds)}s]))")
        assert float(looks["value"][1]) > seconds / 2, "Prometheus did not look"

    async def fires(self, *alerts: str) -> None:
        """Wait until all of these alerts are active."""
        for alert in alerts:
            await until(partial(self._is_active, alert), f"{alert} fires")

    async def ends(self, *alerts: str) -> None:
        """Wait until none of these alerts is."""
        for alert in alerts:
            await until(partial(self._is_over, alert), f"{alert} ends")

    async def _is_active(self, alert: str) -> bool:
        return alert in await self.watch.active()

    async def _is_over(self, alert: str) -> bool:
        return alert not in await self.watch.active()

    async def stop_reading(self, seconds: float) -> tuple[float, float]:
        """The second node takes nothing from the bus for so long; return how old the oldest message is then that it has
        not taken, and its lag in seconds."""
        before = self.received
        self._door = trio.Event()
        await trio.sleep(seconds)
        lag = (await self.metrics(1))["mqtt_trio_kafka_records_lag_max_seconds client=bus-reader topic=monster"]
        age = time.monotonic() - self._published_at[self._latest + 1]
        assert self.received - before < RATE, "it was to stand still"
        return age, lag

    def go_on_reading(self) -> None:
        """It reads again."""
        if self._door is not None:
            self._door.set()
        self._door = None

    async def fill_bus(self) -> None:
        """Somebody writes what is no record of the bus."""
        await trio.to_thread.run_sync(write_junk, self.servers)

    async def throttle(self, bytes_per_second: float | None) -> None:
        """Kafka has a quota for our archive producers; None: no longer."""
        await trio.to_thread.run_sync(set_quota, self.servers, "mqtt-trio-archive", bytes_per_second)

    async def delete_bus_until(self, alert: str) -> None:
        """Somebody deletes the topic of the bus again and again; the nodes make it again."""
        for _ in range(DELETIONS):
            if await self._is_active(alert):
                return
            await trio.to_thread.run_sync(delete_topic, self.servers, "monster")
            with trio.move_on_after(DELETION_INTERVAL):
                await self.fires(alert)
        raise AssertionError(f"{alert} does not fire")


@asynccontextmanager
async def open_stage(servers: str, directory: Path) -> AsyncIterator[Stage]:
    """Run everything on a Kafka that has nothing else to do."""
    async with trio.open_nursery() as nursery:
        stage = Stage(servers, directory, nursery)
        await stage.begin()
        ports = [node.monitor.listener.port for node in stage.nodes if node.monitor and node.monitor.listener]
        async with run_prometheus(directory, ports) as prometheus:
            stage.prometheus = prometheus
            await until(lambda: prometheus.ask("mqtt_trio_ready == 1"), "a first look")
            try:
                yield stage
            finally:
                with trio.CancelScope(shield=True):
                    await stage.end()


def set_quota(servers: str, client_id: str, bytes_per_second: float | None) -> None:
    """Do what `kafka-configs.sh --alter --entity-type clients --add-config producer_byte_rate=N` does."""
    entity = Alter.EntryData.EntityData(entity_type="client-id", entity_name=client_id)
    value, remove = bytes_per_second or 0.0, bytes_per_second is None
    change = Alter.EntryData.OpData(key="producer_byte_rate", value=value, remove=remove)
    request = Alter(entries=[Alter.EntryData(entity=[entity], ops=[change])], validate_only=False)
    admin = KafkaAdminClient(bootstrap_servers=servers)
    try:
        answer = admin._manager.run(admin._manager.send, request)
        assert [entry.error_code for entry in answer.entries] == [0]
    finally:
        admin.close()


def delete_topic(servers: str, topic: str) -> None:
    admin = KafkaAdminClient(bootstrap_servers=servers)
    try:
        with contextlib.suppress(UnknownTopicOrPartitionError):  # nobody has made it again yet
            admin.delete_topics([topic])
    finally:
        admin.close()


def write_junk(servers: str) -> None:
    producer = KafkaProducer(bootstrap_servers=servers, linger_ms=50)
    try:
        for _ in range(JUNK):
            producer.send("monster", b"no record of ours", partition=0)
        producer.flush(timeout=LIMIT)
    finally:
        producer.close()
