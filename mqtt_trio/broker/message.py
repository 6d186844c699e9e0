"""The Application Message as it lives inside the broker."""

from __future__ import annotations

from typing import Final

import attrs

from mqtt_trio.protocol.packets import NO_PROPERTIES, MessageProperties, Publish

MESSAGE_OVERHEAD: Final = 128
"""Bytes that a message counts for beside its topic and payload."""


@attrs.define
class Message:
    """One accepted PUBLISH. Shared by every queue, tap and store that holds it, so never changed."""

    topic_name: str
    payload: bytes = b""
    qos: int = 0
    retain: bool = False
    """The RETAIN flag as its publisher set it."""
    properties: MessageProperties = NO_PROPERTIES
    client_id: str = ""
    """Client Identifier of the publisher."""
    published_at: float = 0.0
    """UTC seconds since the epoch."""

    @classmethod
    def of(cls, packet: Publish, client_id: str, published_at: float) -> Message:
        """Make the message of a PUBLISH packet whose Topic Alias, if any, is resolved."""
        return cls(
            packet.topic_name,
            packet.payload,
            int(packet.qos),
            packet.retain,
            packet.properties,
            client_id,
            published_at,
        )

    @property
    def expires_at(self) -> float | None:
        """UTC seconds since the epoch after which nobody gets the message any more, or None [MQTT5-3.3.2-5]."""
        interval = self.properties.message_expiry_interval
        return None if interval is None else self.published_at + interval

    @property
    def size(self) -> int:
        """Bytes that the message counts for in queues: topic, payload and an estimate of everything else."""
        return len(self.topic_name) + len(self.payload) + MESSAGE_OVERHEAD
