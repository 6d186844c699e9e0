"""What happened in one simulation, as its clients saw it. Knows nothing of the broker; `oracle` judges it."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cached_property
from typing import Final, TypeAlias

import attrs

NEVER: Final = float("inf")

Flow: TypeAlias = tuple[str, str]
"""(publisher, Topic Name)."""


@attrs.define(eq=False)
class Message:
    """One message that a publisher is to send."""

    publisher: str
    topic_name: str
    number: int
    """Counts the messages of this publisher."""
    qos: int
    payload: bytes
    user_properties: bytes = b""
    sent_at: float = NEVER
    """When it was first sent."""
    retain: bool = False
    removes: bool = False
    """Sent with an empty payload: it removes the retained message."""
    taken_at: float = NEVER
    """When its PUBACK or PUBREC came to the publisher."""
    refused_at: float = NEVER
    """When a negative one came: the publisher gave it up."""
    attempts: int = 0
    """PUBLISH packets sent for it."""

    @property
    def flow(self) -> Flow:
        return self.publisher, self.topic_name

    def __str__(self) -> str:
        return f"message {self.number} of {self.publisher} to {self.topic_name} at QoS {self.qos}"


@attrs.define
class Span:
    """A time in which a client is subscribed. The broker has its choice between `may` and `must`."""

    may_from: float
    """SUBSCRIBE was sent."""
    must_from: float = NEVER
    """SUBACK came."""
    must_until: float = NEVER
    """UNSUBSCRIBE was sent."""
    may_until: float = NEVER
    """UNSUBACK came."""


@attrs.define
class Delivery:
    """One message as a client handed it to its application."""

    topic_name: str
    payload: bytes
    qos: int
    user_properties: bytes
    at: float
    retained: bool = False
    """It came with RETAIN: for the sake of a new subscription."""
    life: int = 0
    """How often the broker had begun anew."""


@attrs.define
class Interest:
    """What one client subscribes to, and what it got."""

    filters: dict[str, int]
    """Topic Filter -> QoS. Those that match one topic are subscribed to together or not at all."""
    v5: bool
    lasts: bool = True
    """Its sessions outlive their connections."""
    spans: defaultdict[str, list[Span]] = attrs.Factory(lambda: defaultdict(list))
    deliveries: list[Delivery] = attrs.Factory(list)
    first_sent: Counter[bytes] = attrs.Factory(Counter)
    """Payload -> PUBLISH packets without DUP that the broker wrote for it, the lost ones too."""
    sessions_ended: int = 0
    """How often its session ended."""
    left: bool = False
    """It has ever unsubscribed."""
    asked: Counter[str] = attrs.Factory(Counter)
    """Topic Filter -> SUBSCRIBE packets with it."""

    @property
    def shared(self) -> bool:
        """Whether it is a member of share groups, and nothing else."""
        return any(topic_filter.startswith("$share/") for topic_filter in self.filters)


@attrs.define
class Note:
    """One line of the trace."""

    at: float
    who: str
    what: str
    message: Message | None

    def __str__(self) -> str:
        return f"{self.at:9.4f} {self.who:4} {self.what}" + (f" {self.message}" if self.message else "")


@attrs.define
class History:
    """Everything that the oracle needs, and a trace where one is wanted."""

    messages: list[Message]
    interests: dict[str, Interest] = attrs.Factory(dict)
    """By client."""
    complaints: list[tuple[str, str]] = attrs.Factory(list)
    """(client, what it saw on the wire that no broker may do)."""
    counts: Counter[str] = attrs.Factory(Counter)
    """How often something happened that the simulation is for."""
    connections: Counter[str] = attrs.Factory(Counter)
    """How many network connections each client opened."""
    kills: int = 0
    """How often the broker was killed."""
    restless: bool = False
    """It was killed, or its store took nothing for a while."""
    lives: int = 0
    """How often the broker began anew."""
    last_life_at: float = 0.0
    """When the broker began anew last."""
    trace: list[Note] | None = None

    @cached_property
    def by_payload(self) -> dict[bytes, Message]:
        return {message.payload: message for message in self.messages}

    def note(self, at: float, who: str, what: str, payload: bytes | None = None) -> None:
        """Write a line of the trace."""
        if self.trace is not None:
            message = None if payload is None else self.by_payload.get(payload)
            self.trace.append(Note(at, who, what, message))
