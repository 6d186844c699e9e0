"""Rare facts about the broker, one frozen class each. Frequent facts are counters in `metrics`.

The broker hands each event to the sink that it was made with; sinks run inside the hot stretch: they must not block
and must not call back into the broker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import attrs

from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode


@attrs.frozen(kw_only=True)
class ClientConnected:
    """A client got its successful CONNACK."""

    at: float
    """UTC seconds since the epoch (in every event)."""
    client_id: str
    peer: str
    """Network address of the client, as its listener names it."""
    listener: str
    protocol_version: ProtocolVersion
    user_name: str | None = None
    clean_start: bool = True
    session_present: bool = False
    keep_alive: int = 0
    """Seconds that are in force; 0: none."""


@attrs.frozen(kw_only=True)
class ClientRefused:
    """A CONNECT was answered with a refusal."""

    at: float
    client_id: str
    peer: str
    listener: str
    reason_code: ReasonCode
    reason: str = ""


@attrs.frozen(kw_only=True)
class ClientDisconnected:
    """A client that was connected is gone."""

    at: float
    client_id: str
    peer: str
    listener: str
    reason_code: ReasonCode | None
    """What ended the connection; None: the network closed without DISCONNECT."""
    reason: str = ""
    """The same for people."""
    by_client: bool = False
    """True when the client ended it, with or without DISCONNECT."""


@attrs.frozen(kw_only=True)
class SessionTakenOver:
    """Another connection with the same Client Identifier replaced the first one [MQTT5-3.1.4-3]."""

    at: float
    client_id: str
    old_peer: str
    new_peer: str


@attrs.frozen(kw_only=True)
class SessionExpired:
    """A disconnected session reached its Session Expiry Interval: its subscriptions and its queue are gone."""

    at: float
    client_id: str
    queued_messages: int = 0
    """Messages that nobody gets any more."""


@attrs.frozen(kw_only=True)
class Subscribed:
    """A subscription was made or replaced."""

    at: float
    client_id: str
    topic_filter: str
    qos: int
    replaced: bool = False


@attrs.frozen(kw_only=True)
class Unsubscribed:
    """A client gave up a subscription (the end of its session is no such event)."""

    at: float
    client_id: str
    topic_filter: str


@attrs.frozen(kw_only=True)
class WillPublished:
    """A Will Message was published."""

    at: float
    client_id: str
    topic_name: str


@attrs.frozen(kw_only=True)
class MessageDropped:
    """Somebody does not get a message. Sent for the first one of a burst; the counters have them all."""

    at: float
    reason: str
    """A drop reason of `metrics`, such as `queue_full`."""
    topic_name: str
    client_id: str = ""
    """Who does not get it; empty: nobody gets it."""
    count: int = 1
    """Messages that the event stands for."""


@attrs.frozen(kw_only=True)
class ListenerStarted:
    """A listener accepts connections."""

    at: float
    listener: str
    address: str
    """Host and port that are bound."""


@attrs.frozen(kw_only=True)
class ListenerStopped:
    """A listener accepts no connections any more."""

    at: float
    listener: str
    reason: str = ""


@attrs.frozen(kw_only=True)
class OutageBegan:
    """A system that a gateway or a store needs is away."""

    at: float
    system: str
    reason: str = ""


@attrs.frozen(kw_only=True)
class OutageEnded:
    """The system is back."""

    at: float
    system: str
    duration: float
    """Seconds that it was away."""


@attrs.frozen(kw_only=True)
class NodeUp:
    """A node of the bus was seen for the first time, or again."""

    at: float
    node_id: str


@attrs.frozen(kw_only=True)
class NodeDown:
    """A node of the bus said goodbye or fell silent."""

    at: float
    node_id: str
    reason: str = ""


Event: TypeAlias = (
    ClientConnected
    | ClientRefused
    | ClientDisconnected
    | SessionTakenOver
    | SessionExpired
    | Subscribed
    | Unsubscribed
    | WillPublished
    | MessageDropped
    | ListenerStarted
    | ListenerStopped
    | OutageBegan
    | OutageEnded
    | NodeUp
    | NodeDown
)

EventSink: TypeAlias = Callable[[Event], None]
