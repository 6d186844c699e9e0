"""Will Messages: when they are due, and their publication [MQTT5-3.1.2.5]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mqtt_trio.broker.events import MessageDropped, WillPublished
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.session import Session

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker


def will_due_at(session: Session, now: float) -> float | None:
    """Instant at which the Will of a connection that ends now is due: after its delay, or with the session
    [MQTT5-3.1.2-8]. None without a Will."""
    if session.will is None:
        return None
    return now + min(session.will.will_delay_interval, session.expiry_interval)


def publish_will(broker: Broker, session: Session, now: float) -> None:
    """Publish the Will Message of a session, if there is one, and forget it [MQTT5-3.1.2-8], [MQTT5-3.1.2-10].

    Rights are looked at again: they may have been revoked since the client connected.
    """
    will, session.will, session.will_at = session.will, None, None
    if will is None:
        return
    at = now + broker.wall_offset
    if not broker.may_publish(broker.principal(session), will.topic_name):
        broker.metrics.dropped_not_authorized += 1
        broker.emit(MessageDropped(at=at, reason="not_authorized", topic_name=will.topic_name))
        return
    message = Message(will.topic_name, will.payload, int(will.qos), will.retain, will.properties, session.client_id, at)
    broker.metrics.wills_published += 1
    broker.emit(WillPublished(at=at, client_id=session.client_id, topic_name=will.topic_name))
    if message.retain:
        broker.inbound.retain(message)  # [MQTT5-3.1.2-15]
    broker.publish(message, now, tapped=True)
