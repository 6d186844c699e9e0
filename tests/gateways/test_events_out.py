"""What happens on a node, in mqtt.events [K12]: a whole broker in memory, on the fake clock."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import attrs
import pytest
import trio
from jsonschema import Draft202012Validator
from trio.testing import MockClock

from gateways.kafka.bridge import ProducerBridge
from gateways.kafka.cluster import Cluster
from gateways.kafka.events_out import EventsOut
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import Record
from gateways.kafka.schema_files import load_schema
from mqtt_trio.broker import events
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import Unsubscribe
from mqtt_trio.testing import MemoryBroker, open_memory_broker
from tests.record_check.watch import check

VALIDATOR = Draft202012Validator(load_schema("mqtt_event.schema.json"))
V5 = ProtocolVersion.MQTT_5_0


@attrs.define
class FakeProducer:
    records: list[Record] = attrs.Factory(list)
    full: bool = False
    stopped: bool = False
    cut_off: bool = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()

    def offer(self, record: Record) -> None:
        check("events", record, record.partition)
        self.records.append(record)
        assert record.done is not None
        record.done(None)

    async def stop(self) -> None:
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.cut_off = True
            raise
        self.stopped = True

    def counters(self) -> dict[str, int]:
        return {}


@attrs.define
class World:
    memory: MemoryBroker
    cluster: Cluster
    producer: FakeProducer
    out: EventsOut

    @property
    def values(self) -> list[dict[str, Any]]:
        found = []
        for record in self.producer.records:
            value = json.loads(record.value or b"")
            VALIDATOR.validate(value)
            assert record.topic == "mqtt.events"
            assert value.pop("brokerId") == "memory"
            del value["timestamp"]
            found.append({"key": (record.key or b"").decode(), **value})
        return found


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with open_memory_broker() as memory:
        cluster, producer = Cluster(["k"]), FakeProducer()
        out = EventsOut(
            KafkaOptions(), cluster, memory.host, utc=memory.utc_now, producer=cast(ProducerBridge, producer)
        )
        await memory.nursery.start(out.run)
        yield World(memory, cluster, producer, out)


async def test_what_clients_do_is_told_in_order(autojump_clock: MockClock) -> None:
    async with world() as w:
        client = await w.memory.connect("c", keep_alive=30)
        await client.subscribe("a/#", qos=1)
        await client.send(Unsubscribe(packet_id=9, topic_filters=("a/#",)))
        await client.next_packet()
        await w.memory.connect("c")
        await trio.sleep(1)
        names = [(value["key"], value["event"]) for value in w.values]
        assert names[:4] == [("memory", "node_up"), ("c", "connect"), ("c", "subscribe"), ("c", "unsubscribe")]
        assert sorted(names[4:]) == [("c", "connect"), ("c", "disconnect"), ("c", "takeover")]
        connect = w.values[1]
        assert (connect["keepAlive"], connect["protocolVersion"], connect["userName"]) == (30, 5, None)
        (left,) = [value for value in w.values if value["event"] == "disconnect"]
        assert (left["reasonCode"], left["byClient"]) == (0x8E, False)
        assert w.out.counters()["events_written"] == 7


async def test_outages_are_told_when_they_are_over(autojump_clock: MockClock) -> None:
    async with world() as w:
        w.cluster.away("bus", "nobody\nanswers")
        await trio.sleep(60)
        w.cluster.back("bus")
        await trio.sleep(1)
        begin, end = w.values[1:]
        assert begin == {"key": "kafka", "event": "outage_begin", "system": "kafka", "reason": "nobody answers"}
        assert (end["event"], end["duration"]) == ("outage_end", 60.0)


async def test_beyond_the_window_events_are_dropped_and_counted(autojump_clock: MockClock) -> None:
    async with world() as w:
        w.producer.full = True
        client = await w.memory.connect("c")
        await client.subscribe("t")
        assert w.out.counters() == {"events_written": 1, "events_dropped": 2}


@pytest.mark.parametrize("away", [False, True])
async def test_a_stop_is_the_last_event(autojump_clock: MockClock, away: bool) -> None:
    async with world() as w:
        if away:
            w.cluster.away("bus", "planned")
            await trio.sleep(1)
        await w.out.stop()
        assert w.values[-1] == {
            "key": "memory", "event": "node_down", "nodeId": "memory", "reason": "it was stopped"
        }  # fmt: skip
        assert w.producer.stopped is not away
        await w.memory.connect("late")
        assert w.values[-1]["event"] == "node_down"


CLIENT = {"at": 1.0, "client_id": "c", "peer": "p", "listener": "l"}
ALL = [
    events.ClientConnected(**CLIENT, protocol_version=ProtocolVersion.MQTT_3_1, user_name="u"),  # type: ignore[arg-type]
    events.ClientDisconnected(**CLIENT, reason_code=None, reason="x" * 5000),  # type: ignore[arg-type]
    events.ClientDisconnected(**CLIENT, reason_code=ReasonCode.SERVER_BUSY),  # type: ignore[arg-type]
    events.SessionTakenOver(at=1.0, client_id="c", old_peer="a", new_peer="b"),
    events.Subscribed(at=1.0, client_id="c", topic_filter="t", qos=2, replaced=True),
    events.Unsubscribed(at=1.0, client_id="c", topic_filter="t"),
    events.OutageBegan(at=1.0, system="store", reason="no space"),
    events.OutageEnded(at=1.0, system="store", duration=-0.1),
    events.NodeUp(at=1.0, node_id="n"),
    events.NodeDown(at=1.0, node_id="n", reason="it fell silent"),
]
"""One of each kind."""


@pytest.mark.parametrize("event", ALL, ids=lambda event: type(event).__name__)
async def test_every_event_fits_the_schema(autojump_clock: MockClock, event: events.Event) -> None:
    async with world() as w:
        w.out.note(event)
        assert len(w.values) == 2


async def test_other_facts_are_not_in_it(autojump_clock: MockClock) -> None:
    async with world() as w:
        w.out.note(events.MessageDropped(at=1.0, reason="queue_full", topic_name="t"))
        w.out.note(events.SessionExpired(at=1.0, client_id="c"))
        assert len(w.values) == 1
