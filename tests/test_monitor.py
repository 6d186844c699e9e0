"""A node's health, readiness and figures, asked for over a real port [O3]."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, cast

import attrs
import pytest
import trio
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock

from mqtt_trio.app import Node
from mqtt_trio.broker.metrics import Metrics
from mqtt_trio.broker.store import Batch
from mqtt_trio.config import LoadedConfig, Overrides, load_config
from mqtt_trio.gateway import Figure, Gateway
from mqtt_trio.monitor import LATENCY_LIMIT, TICK, WINDOW, LoopWatch, meanings_of_metrics
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.packets import ConnAck, Connect
from mqtt_trio.server.http import CONNECTIONS
from mqtt_trio.testing import TestClient
from tests.certificates import Certificates
from tests.http_support import answers, fetch, read_all, request

LIMIT: Final = 30.0


def load(tmp_path: Path, *sets: str) -> LoadedConfig:
    given = [f"Persistence.Path={tmp_path}", "Http.Port=0", *sets]
    return load_config(None, {}, Overrides(sets=given, port=0, ws_port=0))


@asynccontextmanager
async def run_node(node: Node) -> AsyncIterator[int]:
    """Run a node in this process; give the port of its HTTP interface."""
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.run)
            await node.started.wait()
            assert node.monitor is not None
            assert node.monitor.listener is not None
            try:
                yield node.monitor.listener.port
            finally:
                for listener in node.listeners:
                    listener.close()
                node.stopping.set()


async def readiness(port: int) -> tuple[int, list[str]]:
    answer = await fetch(port, "/readyz")
    assert answer.headers["content-type"] == "application/json"
    table = json.loads(answer.body)
    assert table["status"] == ("ready" if answer.status == 200 else "not ready")
    return answer.status, table["reasons"]


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(found: dict[str, Metric], name: str, **labels: str) -> float:
    """Return the one sample of a family that has these labels."""
    (sample,) = (s for s in found[name].samples if labels.items() <= s.labels.items())
    return sample.value


# Figures


async def test_metrics_of_a_node_at_work(tmp_path: Path) -> None:
    node = Node(load(tmp_path, "ArchiveGroups.0.Name=Default", "ArchiveGroups.0.Filter=#", "Node.Id=n1"))
    async with run_node(node) as port, await trio.open_tcp_stream("127.0.0.1", node.listeners[0].port) as stream:
        client = TestClient(stream, ProtocolVersion.MQTT_5_0)
        await client.send(Connect(client_id="c"))
        await client.expect(ConnAck)
        for qos in (0, 1, 1):
            await client.publish("a", b"payload", qos=qos)
        answer = await fetch(port, "/metrics")
        told = {(figure.name, *sorted(figure.labels.items())) for figure in node.host.figures()}
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = families(answer.body)
    shown = {(one.name, *sorted(one.labels.items())) for family in found.values() for one in family.samples}
    assert {one for one in told if one[0] != "mqtt_trio_http_answers_total"} == shown
    assert value(found, "mqtt_trio_messages_received", qos="0") == 1
    assert value(found, "mqtt_trio_messages_received", qos="1") == 2
    assert value(found, "mqtt_trio_clients_connected") == 1
    assert value(found, "mqtt_trio_ready") == 1
    assert value(found, "mqtt_trio_info", node="n1") == 1
    stored = value(found, "mqtt_trio_archive_stored", group="Default", store="SQLITE")
    assert stored + value(found, "mqtt_trio_archive_waiting", group="Default") == 3
    assert value(found, "mqtt_trio_listener_connections", listener=node.listeners[0].name) == 1
    assert value(found, "process_resident_memory_bytes") > 1e7
    assert value(found, "process_cpu_seconds") > 0
    check_form(answer.body, found)


def check_form(text: str, found: dict[str, Metric]) -> None:
    """Every figure has help and type, each family stands together, counters and only they end in _total."""
    names = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert len(names) == len({name for name, _ in names}) == len(found)
    for name, kind in names:
        assert kind in ("counter", "gauge")
        assert name.endswith("_total") == (kind == "counter"), name
        assert name.startswith(("mqtt_trio_", "process_")), name
    for family in found.values():
        assert family.documentation[-1:] == ".", family.name
        assert family.documentation[:1].isupper() or family.documentation[:1].isdigit(), family.name
        assert family.samples, family.name


def test_every_counter_says_what_it_counts() -> None:
    meanings = meanings_of_metrics()
    assert set(meanings) == {field.name for field in attrs.fields(Metrics)}
    assert meanings["messages_sent_qos0"] == meanings["messages_sent_qos2"] != meanings["messages_received_qos0"]
    assert meanings["sessions"].startswith("Gauge: ")


# Readiness


async def test_reasons(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = Node(load(tmp_path, "ArchiveGroups.0.Name=Default", "ArchiveGroups.0.Filter=#"))
    async with run_node(node) as port:
        assert await readiness(port) == (200, [])
        keeper = node.broker.keeper
        keeper.failed(Batch(), "the disk is full", trio.current_time())
        assert await readiness(port) == (503, ["the session store takes nothing: the disk is full"])
        assert value(families((await fetch(port, "/metrics")).body), "mqtt_trio_ready") == 0
        keeper.outage_since = None
        assert await readiness(port) == (200, [])
        node.gateways["Other"] = cast(Gateway, FakeGateway(["the other system is away"]))
        assert await readiness(port) == (503, ["the other system is away"])
        found = families((await fetch(port, "/metrics")).body)
        assert value(found, "mqtt_trio_other_things") == 7
        assert value(found, "mqtt_trio_other_lag", part="a") == 2.5
        assert (await fetch(port, "/healthz")).status == 200, "it lives all the same"


class FakeGateway:
    def __init__(self, reasons: Sequence[str]) -> None:
        self.unready = lambda: reasons

    def counters(self) -> dict[str, int]:
        return {"things": 7}

    def meanings(self) -> dict[str, str]:
        return {"things": "Gauge: things."}

    def figures(self) -> list[Figure]:
        return [Figure("lag", "How far it is behind.", 2.5, {"part": "a", "kind": "b"})]

    async def stop_intake(self) -> None: ...

    async def stop(self) -> None: ...


async def test_a_node_that_starts_or_stops_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so from before the store is read until everything is closed."""
    node = Node(load(tmp_path))
    assert node.storage is not None
    gate, seen, load_store = trio.Event(), trio.Event(), node.storage.load

    async def slow_load() -> None:
        seen.set()
        await gate.wait()
        await load_store()

    monkeypatch.setattr(node.storage, "load", slow_load)
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.run)
            await seen.wait()
            assert node.monitor is not None
            assert node.monitor.listener is not None
            port = node.monitor.listener.port
            assert await readiness(port) == (503, ["the node starts"])
            assert (await fetch(port, "/healthz")).status == 200
            gate.set()
            await node.started.wait()
            assert await readiness(port) == (200, [])
            closing, closed = trio.Event(), trio.Event()

            async def slow_stop() -> None:
                closing.set()
                await closed.wait()

            monkeypatch.setattr(node.storage, "stop", slow_stop)
            node.stopping.set()
            await closing.wait()
            assert await readiness(port) == (503, ["the node shuts down"])
            closed.set()
    with pytest.raises(OSError, match="attempts to connect"):
        await fetch(port, "/readyz")


async def test_a_listener_that_cannot_accept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(load(tmp_path))
    async with run_node(node) as port:
        monkeypatch.setattr(node.listeners[0], "_failing", True)
        assert await readiness(port) == (503, [f"{node.listeners[0].name} cannot accept connections"])


# Health


async def test_a_loop_that_is_late(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    watch = LoopWatch()
    autojump_clock.autojump_threshold = float("inf")
    nursery.start_soon(watch.run)
    await trio.testing.wait_all_tasks_blocked()
    for late, worst in ((0.0, 0.0), (7.0, 7.0), (0.5, 7.0)):
        autojump_clock.jump(TICK + late)
        await trio.testing.wait_all_tasks_blocked()
        assert (watch.latest, watch.worst) == (late, worst)
    for _ in range(WINDOW):
        autojump_clock.jump(TICK)
        await trio.testing.wait_all_tasks_blocked()
    assert watch.worst == 0.0


async def test_health_asks_for_a_restart_when_the_loop_is_late(tmp_path: Path) -> None:
    node = Node(load(tmp_path))
    async with run_node(node) as port:
        assert node.monitor is not None
        table = json.loads((await fetch(port, "/healthz")).body)
        assert table["status"] == "ok"
        assert table["loop_latency_seconds"] < LATENCY_LIMIT
        node.monitor.watch.latest = LATENCY_LIMIT + 1
        answer = await fetch(port, "/healthz")
        assert (answer.status, json.loads(answer.body)["status"]) == (503, "the loop is late")


# Beside MQTT


async def test_many_connections_are_bounded_and_disturb_nobody(tmp_path: Path) -> None:
    node = Node(load(tmp_path))
    async with run_node(node) as port, AsyncExitStack() as stack:
        assert node.monitor is not None
        listener = node.monitor.listener
        assert listener is not None
        idle = [
            await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port)) for _ in range(CONNECTIONS)
        ]
        while listener.connections < CONNECTIONS:
            await trio.lowlevel.checkpoint()
        async with await trio.open_tcp_stream("127.0.0.1", port) as further:
            assert await further.receive_some(1) == b"", "closed at once"
        async with await trio.open_tcp_stream("127.0.0.1", node.listeners[0].port) as stream:
            client = TestClient(stream, ProtocolVersion.MQTT_5_0)
            await client.send(Connect(client_id="c"))
            await client.expect(ConnAck)
        assert node.broker.metrics.connections_over_limit == 1
        await idle[0].aclose()
        while listener.connections == CONNECTIONS:
            await trio.lowlevel.checkpoint()
        assert (await fetch(port, "/healthz")).status == 200


async def test_over_tls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificates = Certificates(tmp_path)
    pair = certificates.server()
    node = Node(load(tmp_path, f"Http.Tls.CertFile={pair.cert_file}", f"Http.Tls.KeyFile={pair.key_file}"))
    async with run_node(node) as port:
        plain = await trio.open_tcp_stream("127.0.0.1", port)
        stream = trio.SSLStream(
            plain, certificates.client_context(), server_hostname="localhost", https_compatible=True
        )
        async with stream:
            await stream.send_all(request("Connection: close", line="GET /readyz HTTP/1.1"))
            (answer,) = answers(await read_all(stream))
        assert answer.status == 200
        with caplog.at_level("INFO"):
            async with await trio.open_tcp_stream("127.0.0.1", port) as confused:
                await confused.send_all(request())
                with pytest.raises(trio.BrokenResourceError):
                    await confused.receive_some(100)
        assert "plain HTTP came; this port speaks TLS" in caplog.text
        assert node.monitor is not None
        assert node.monitor.http.failures == 0


async def test_it_is_off_without_a_port(tmp_path: Path) -> None:
    node = Node(load_config(None, {}, Overrides(sets=[f"Persistence.Path={tmp_path}"])))
    assert node.monitor is None
    figures = {figure.name: figure.value for figure in node.host.figures()}
    assert figures["mqtt_trio_clients_connected"] == 0
    assert figures["process_resident_memory_bytes"] > 1e7


async def test_a_port_that_is_taken_is_one_message(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.RaisesGroup(pytest.RaisesExc(Exception, match=f"^Http .http on 127.0.0.1:{port}.: the port is in")):
            await Node(load(tmp_path, f"Http.Port={port}")).run()


async def test_the_index_names_the_pages(tmp_path: Path) -> None:
    node = Node(load(tmp_path))
    async with run_node(node) as port:
        answer = await fetch(port, "/")
        for path in ("/healthz", "/readyz", "/metrics"):
            assert path in answer.body
            assert (await fetch(port, path, method="HEAD")).status == 200
