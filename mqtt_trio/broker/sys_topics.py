"""`$SYS` topics [M6]: counters of the node as retained messages, under mosquitto's names where it has them.

Nothing is done per message: `publish`, called every few seconds, reads what `Metrics` has and publishes what changed.
The values are this node's own. No tap sees them, so that neither archive nor bus nor Kafka has them, and they go to
the table of retained messages directly: whoever keeps retained messages elsewhere sees `Inbound.retain` only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from mqtt_trio.broker.message import Message

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker
    from mqtt_trio.broker.metrics import Metrics

PREFIX: Final = "$SYS/broker/"
QOS: Final = 2
"""As in mosquitto; a subscriber gets them with the QoS of its subscription."""
MINUTES: Final = (1, 5, 15)
"""Of the load averages."""


class SysTopics:
    """Publishes the `$SYS` topics of one node."""

    def __init__(self, broker: Broker, *, version: str, started_at: float) -> None:
        """`version` is the value of `$SYS/broker/version`, `started_at` the monotonic instant that uptime counts
        from."""
        self.broker = broker
        self.version = version
        self.started_at = started_at
        self._loads = LoadAverages()
        self._most_clients = 0
        self._published: dict[str, str] = {}

    def publish(self, now: float) -> None:
        """Publish each value that is not what was published last; the caller flushes."""
        broker = self.broker
        for name, value in self.values(now).items():
            if self._published.get(name) == value:
                continue
            self._published[name] = value
            message = Message(PREFIX + name, value.encode(), QOS, True, published_at=now + broker.wall_offset)
            broker.retained.set(message)
            broker.publish(message, now, tapped=False)
        broker.metrics.retained_messages = len(broker.retained)

    def values(self, now: float) -> Mapping[str, str]:
        """Return all values by the name of their topic without PREFIX. Averages move on with each call."""
        metrics = self.broker.metrics
        counts = self._gauges(metrics) | totals(metrics)
        values = {name: str(count) for name, count in counts.items()}
        values["version"] = self.version
        values["uptime"] = f"{int(now - self.started_at)} seconds"
        self._loads.move_on(load_totals(metrics), now)
        return values | self._loads.values()

    def _gauges(self, metrics: Metrics) -> dict[str, int]:
        broker = self.broker
        self._most_clients = max(self._most_clients, metrics.clients_connected)
        away = metrics.sessions - metrics.clients_connected
        retained = len(broker.retained)
        stored = metrics.messages_queued + retained
        queued_bytes = 0
        if metrics.messages_queued:  # only then is a look at each session worth its time
            queued_bytes = sum(session.queue.size for session in broker.connections.sessions.values())
            queued_bytes += sum(group.queue.size for group in broker.shares.groups.values())
        return {
            "clients/connected": metrics.clients_connected,
            "clients/active": metrics.clients_connected,
            "clients/disconnected": away,
            "clients/inactive": away,
            "clients/total": metrics.sessions,
            "clients/maximum": self._most_clients,
            "messages/stored": stored,
            "store/messages/count": stored,
            "store/messages/bytes": queued_bytes + broker.retained.size,
            "retained messages/count": retained,
            "subscriptions/count": metrics.subscriptions,
            "shared_subscriptions/count": metrics.shared_subscriptions,
        }


def published(metrics: Metrics) -> int:
    """PUBLISH packets that left."""
    return metrics.messages_sent_qos0 + metrics.messages_sent_qos1 + metrics.messages_sent_qos2


def received(metrics: Metrics) -> int:
    """PUBLISH packets that came and were accepted."""
    return metrics.messages_received_qos0 + metrics.messages_received_qos1 + metrics.messages_received_qos2


def dropped(metrics: Metrics) -> int:
    """Messages that a client did not get because a bound of its outbox or its queue was reached."""
    return metrics.dropped_outbox_full + metrics.dropped_queue_full


def totals(metrics: Metrics) -> dict[str, int]:
    """Return what only grows. `messages` are MQTT Control Packets of every type, as mosquitto calls them."""
    return {
        "clients/expired": metrics.sessions_expired,
        "connections/socket/count": metrics.connections_opened,
        "messages/received": metrics.packets_received,
        "messages/sent": metrics.packets_sent + published(metrics),
        "publish/messages/received": received(metrics),
        "publish/messages/sent": published(metrics),
        "publish/messages/dropped": dropped(metrics),
        "bytes/received": metrics.bytes_received,
        "bytes/sent": metrics.bytes_sent,
    }


def load_totals(metrics: Metrics) -> dict[str, int]:
    """Return the totals that have averages."""
    return {
        "messages/received": metrics.packets_received,
        "messages/sent": metrics.packets_sent + published(metrics),
        "publish/dropped": dropped(metrics),
        "publish/received": received(metrics),
        "publish/sent": published(metrics),
        "bytes/received": metrics.bytes_received,
        "bytes/sent": metrics.bytes_sent,
        "sockets": metrics.connections_opened,
        "connections": metrics.connections_accepted + metrics.connections_refused,
    }


class LoadAverages:
    """How much of each total came per minute, averaged over the last 1, 5 and 15 minutes with exponential decay."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._totals: Mapping[str, int] = {}
        self._averages: dict[tuple[str, int], float] = {}

    def move_on(self, totals: Mapping[str, int], now: float) -> None:
        """Take in what came since the last call; at the first one every average is 0."""
        if self._at is None or now <= self._at:
            self._averages = self._averages or {(name, minutes): 0.0 for name in totals for minutes in MINUTES}
        else:
            elapsed = now - self._at
            kept = {minutes: math.exp(-elapsed / (60.0 * minutes)) for minutes in MINUTES}
            for name, minutes in self._averages:
                per_minute = (totals[name] - self._totals[name]) * 60.0 / elapsed
                average = self._averages[name, minutes]
                self._averages[name, minutes] = per_minute + kept[minutes] * (average - per_minute)
        self._at, self._totals = now, totals

    def values(self) -> dict[str, str]:
        """Return the averages by the name of their topic, with two digits."""
        return {f"load/{name}/{minutes}min": f"{value:.2f}" for (name, minutes), value in self._averages.items()}
