"""Bounds of the broker, section [Limits] of the configuration. Reaching one has a documented outcome and a counter."""

from __future__ import annotations

from typing import Final

import attrs
from attrs.validators import ge, in_, le

from mqtt_trio.errors import ConfigError

FRAME_OVERHEAD: Final = 1024
"""Bytes by which a message may grow on its way through the broker and still fit an empty outbox: another version, a
Topic Alias, 200 Subscription Identifiers of up to five bytes. A client may have as many of them on one topic as it has
subscriptions (up to [Limits] SubscriptionsPerClient). A copy that they make larger than its outbox is dropped and
counted at QoS 0; at QoS 1 and 2 it goes alone, since a message goes wherever there is any room."""


@attrs.frozen(kw_only=True)
class Limits:
    maximum_packet_size: int = attrs.field(default=2 * 1024 * 1024, validator=[ge(1024), le(268_435_460)])
    """Bytes of the largest packet that a client may send. Outcome: DISCONNECT 0x95, the connection closes."""
    receive_maximum: int = attrs.field(default=1024, validator=[ge(1), le(65_535)])
    """QoS 1 and 2 messages of one client that may wait for our acknowledgement. Outcome: a 5.0 client that sends more
    is disconnected with 0x93; a 3.x client, which has no such rule, is not read from until acknowledgements are out."""
    inflight_messages: int = attrs.field(default=1024, validator=[ge(1), le(65_535)])
    """QoS 1 and 2 messages sent to one client and not yet acknowledged by it (the client's own Receive Maximum may be
    lower). Outcome: further messages wait in its queue."""
    queue_messages: int = attrs.field(default=10_000, validator=ge(0))
    """QoS 1 and 2 messages that wait for one session. Outcome: `queue_overflow`."""
    queue_bytes: int = attrs.field(default=64 * 1024 * 1024, validator=ge(0))
    """Bytes of the messages that wait for one session. Outcome: `queue_overflow`."""
    queue_overflow: str = attrs.field(default="drop-new", validator=in_(("drop-new", "drop-oldest")))
    """What a full queue does: refuse the new message or push out the oldest one."""
    outbox_bytes: int = attrs.field(default=8 * 1024 * 1024, validator=ge(65_536))
    """Bytes of frames on their way to one connected client that its socket has not taken yet. Outcome: QoS 0 messages
    are dropped for this client, QoS 1 and 2 messages wait in its queue."""
    topic_alias_maximum: int = attrs.field(default=16, validator=[ge(0), le(65_535)])
    """Topic Aliases of one 5.0 connection in each direction; towards a client its own Topic Alias Maximum may be lower.
    Outcome: DISCONNECT 0x94 for a client that uses a higher one; further topics go to it without alias."""
    topic_levels: int = attrs.field(default=128, validator=[ge(1), le(65_536)])
    """Levels of a Topic Name or Topic Filter (one more than it has slashes; without `$share/NAME/`). Outcome: SUBACK
    0x8F (3.1.1: 0x80); PUBACK or PUBREC 0x90, a QoS 0 message DISCONNECT 0x90, a Will CONNACK 0x90; a 3.x publisher is
    disconnected."""
    retained_messages: int = attrs.field(default=1_000_000, validator=ge(0))
    """Retained messages of the node. Outcome: a new retained message is delivered, not retained."""
    retained_bytes: int = attrs.field(default=1024 * 1024 * 1024, validator=ge(0))
    """Bytes of the retained messages of the node. Outcome: a new retained message is delivered, not retained, and the
    one that it was to replace is removed."""
    subscriptions_per_client: int = attrs.field(default=10_000, validator=ge(1))
    """Subscriptions of one session. Outcome: SUBACK 0x97 (3.1.1: 0x80)."""
    subscriptions: int = attrs.field(default=10_000_000, validator=ge(1))
    """Subscriptions of the node. Outcome: SUBACK 0x97 (3.1.1: 0x80)."""
    session_expiry_interval: int = attrs.field(default=7 * 24 * 3600, validator=[ge(0), le(0xFFFF_FFFF)])
    """Seconds that a disconnected session is kept at most, also for 3.x clients with Clean Session 0."""
    keep_alive: int = attrs.field(default=0, validator=[ge(0), le(65_535)])
    """Seconds of the longest Keep Alive; a 5.0 client that asks for more (or for none) gets this one as Server Keep
    Alive, 3.x clients keep theirs. 0: whatever clients ask for."""
    sessions: int = attrs.field(default=1_000_000, validator=ge(1))
    """Sessions of the node, connected or not. Outcome: CONNACK 0x97 (3.x: 3, server unavailable)."""

    @outbox_bytes.validator
    def _check_outbox(self, attribute: attrs.Attribute[int], value: int) -> None:
        """A QoS 0 message larger than an empty outbox would never leave."""
        if value < self.maximum_packet_size + FRAME_OVERHEAD:
            raise ConfigError(
                [
                    f"OutboxBytes: {value} bytes have no room for a packet of MaximumPacketSize, "
                    f"{self.maximum_packet_size}; at least {self.maximum_packet_size + FRAME_OVERHEAD} are needed"
                ]
            )
