"""What happens on this node, as JSON records in mqtt.events [K12]; `schemas/mqtt_event.schema.json` describes them.

Events wait for Kafka in a window, also while it is away; beyond it they are dropped and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import orjson
import trio

from gateways.kafka.bridge import ProducerBridge
from gateways.kafka.cluster import Cluster
from gateways.kafka.cluster_watch import follow, stop_unless_away
from gateways.kafka.dlq import clean_text, iso_time
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import Record
from gateways.kafka.thread_counters import thread_counters
from mqtt_trio.gateway import (
    ClientConnected,
    ClientDisconnected,
    Event,
    GatewayHost,
    NodeDown,
    NodeUp,
    OutageBegan,
    OutageEnded,
    SessionTakenOver,
    Subscribed,
    Unsubscribed,
)

WINDOW_RECORDS: Final = 10_000
WINDOW_BYTES: Final = 8 * 1024 * 1024
"""Events that Kafka has not confirmed, and bytes of them. Outcome: further ones are dropped, counted."""
SYSTEM: Final = "kafka"
PRODUCER: Final = "events"


def facts_of(event: Event) -> tuple[str, str, dict[str, Any]] | None:
    """Return what an event is about (its key), its name and its facts; None: it is none of those in mqtt.events."""
    if isinstance(event, ClientConnected | ClientDisconnected):
        return event.client_id, *_of_connection(event)
    if isinstance(event, Subscribed):
        facts = {"topicFilter": event.topic_filter, "qos": int(event.qos), "replaced": event.replaced}
        return event.client_id, "subscribe", {"clientId": event.client_id, **facts}
    if isinstance(event, Unsubscribed):
        return event.client_id, "unsubscribe", {"clientId": event.client_id, "topicFilter": event.topic_filter}
    if isinstance(event, SessionTakenOver):
        facts = {"clientId": event.client_id, "oldPeer": event.old_peer, "newPeer": event.new_peer}
        return event.client_id, "takeover", facts
    if isinstance(event, NodeUp):
        return event.node_id, "node_up", {"nodeId": event.node_id}
    if isinstance(event, NodeDown):
        return event.node_id, "node_down", {"nodeId": event.node_id, "reason": clean_text(event.reason)}
    if isinstance(event, OutageBegan):
        return event.system, "outage_begin", {"system": event.system, "reason": clean_text(event.reason)}
    if isinstance(event, OutageEnded):
        return event.system, "outage_end", {"system": event.system, "duration": max(0.0, event.duration)}
    return None


def _of_connection(event: ClientConnected | ClientDisconnected) -> tuple[str, dict[str, Any]]:
    facts: dict[str, Any] = {"clientId": event.client_id, "peer": event.peer, "listener": event.listener}
    if isinstance(event, ClientDisconnected):
        code = event.reason_code
        facts["reasonCode"] = None if code is None else int(code)
        facts["reason"] = clean_text(event.reason)
        facts["byClient"] = event.by_client
        return "disconnect", facts
    facts["userName"] = event.user_name
    facts["protocolVersion"] = int(event.protocol_version)
    facts["cleanStart"], facts["sessionPresent"] = event.clean_start, event.session_present
    facts["keepAlive"] = event.keep_alive
    return "connect", facts


class EventsOut:
    """Writes the events of one node. Trio thread only."""

    def __init__(
        self,
        options: KafkaOptions,
        cluster: Cluster,
        host: GatewayHost,
        *,
        utc: Callable[[], float] = time.time,
        producer: ProducerBridge | None = None,
    ) -> None:
        """`utc`: seconds since the epoch; `producer` is for tests."""
        self.topic = options.topics.events.name or "mqtt.events"
        self.written = self.dropped = 0
        self._cluster = cluster
        self._host = host
        self._utc = utc
        self._away_since: float | None = None
        self._stopping = False
        self._producer = producer or ProducerBridge(
            options,
            cluster,
            name=PRODUCER,
            compression=None,
            window_records=WINDOW_RECORDS,
            window_bytes=WINDOW_BYTES,
            lazy=True,
        )

    def note(self, event: Event) -> None:
        """Write an event, if it is one of those. Never blocks, never raises for what is in it."""
        if self._stopping or (found := facts_of(event)) is None:
            return
        if self._producer.full:
            self.dropped += 1
            return
        about, name, facts = found
        milliseconds = round(event.at * 1000)
        head = {"timestamp": iso_time(milliseconds), "event": name, "brokerId": self._host.node_id}
        value = orjson.dumps(head | facts)
        self._producer.offer(Record(self.topic, None, about.encode(), value, (), milliseconds, self._done, messages=0))

    def _done(self, error: Exception | None) -> None:
        if error is None:
            self.written += 1
        else:
            self.dropped += 1

    def node_silent(self, node_id: str) -> None:
        """Another node is heard no more."""
        self.note(NodeDown(at=self._utc(), node_id=node_id, reason="it fell silent"))

    def _look(self) -> None:
        """Kafka went away or is back."""
        reason = self._cluster.reason
        if reason is not None and self._away_since is None:
            self._away_since = self._utc()
            self.note(OutageBegan(at=self._away_since, system=SYSTEM, reason=reason))
        elif reason is None and self._away_since is not None:
            since, self._away_since = self._away_since, None
            now = self._utc()
            self.note(OutageEnded(at=now, system=SYSTEM, duration=now - since))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write until cancelled; `started()` at once."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._producer.run)
            self._host.watch_events(self.note)
            self.note(NodeUp(at=self._utc(), node_id=self._host.node_id))
            nursery.start_soon(follow, self._cluster, self._look)
            task_status.started()

    async def stop(self) -> None:
        """Say that this node goes, ship what waits, close. Bounded by the caller's cancel scope; while Kafka is away
        nobody waits."""
        self.note(NodeDown(at=self._utc(), node_id=self._host.node_id, reason="it was stopped"))
        self._stopping = True
        await stop_unless_away(self._cluster, self._producer)

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            "events_written": self.written,
            "events_dropped": self.dropped,
            **thread_counters("events_producer", self._producer.counters()),
        }
