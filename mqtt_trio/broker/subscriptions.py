"""SUBSCRIBE and UNSUBSCRIBE: the checks, the subscription tables, retained messages, the confirmation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mqtt_trio.broker.events import Subscribed, Unsubscribed
from mqtt_trio.broker.outbox import ClientLink
from mqtt_trio.broker.reasons import why_not_subscribed
from mqtt_trio.broker.router import SubscriptionOptions
from mqtt_trio.broker.session import Session
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.packets import Packet, SubAck, Subscribe, UnsubAck, Unsubscribe
from mqtt_trio.protocol.topics import split_shared

if TYPE_CHECKING:
    from mqtt_trio.broker.broker import Broker


class Subscriptions:
    """What clients subscribe to: bounded by the limits of the client and of the node, refused with a reason code."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    def subscribe(self, link: ClientLink, session: Session, packet: Packet, now: float) -> bool:
        """Handle a SUBSCRIBE; False when it must wait because too many confirmations do."""
        assert isinstance(packet, Subscribe)
        broker = self.broker
        if self._must_wait(link):
            return False
        codes: list[ReasonCode] = []
        wanted: list[SubscriptionOptions] = []
        shared = False
        for subscription in packet.subscriptions:
            options = SubscriptionOptions.of(subscription, packet.subscription_identifier)
            code, is_new = self._subscribe_one(session, options, now)
            codes.append(code)
            if code >= 0x80:
                continue
            if split_shared(options.topic_filter)[0] is not None:
                shared = True  # nobody gets retained messages by it [MQTT5-4.8.2]
            elif options.retain_handling == 0 or (options.retain_handling == 1 and is_new):
                wanted.append(options)  # [MQTT5-3.3.1-9] to [MQTT5-3.3.1-11]
        if link.connection.protocol_version is ProtocolVersion.MQTT_3_1:
            # 3.1 has no code for a failure; it gets what it asked for confirmed, as from mosquitto, and no messages.
            asked = [ReasonCode(subscription.qos) for subscription in packet.subscriptions]
            codes = [qos if code >= 0x80 else code for code, qos in zip(codes, asked, strict=True)]
        self._reply_kept(link, SubAck(packet.packet_id, tuple(codes), why_not_subscribed(codes, broker.limits)))
        if wanted:
            for options in wanted:
                broker.bursts.cancel(session, options.topic_filter)
            for options in wanted:
                broker.bursts.begin(session, options)
            broker.sender.pump(session, now)
        if shared:
            broker.shares.arrived(session, now)
        return True

    def unsubscribe(self, link: ClientLink, session: Session, packet: Packet, now: float) -> bool:
        """Handle an UNSUBSCRIBE; False when it must wait because too many confirmations do."""
        assert isinstance(packet, Unsubscribe)
        broker = self.broker
        if self._must_wait(link):
            return False
        codes = []
        for topic_filter in packet.topic_filters:
            if session.subscriptions.pop(topic_filter, None) is None:
                codes.append(ReasonCode.NO_SUBSCRIPTION_EXISTED)
                continue
            broker.bursts.cancel(session, topic_filter)
            if topic_filter in session.shares:
                broker.shares.leave(session, topic_filter)
            else:
                broker.router.unsubscribe(topic_filter, session)
                session.forget_routes()
            if session.number:
                broker.keeper.unsubscribed(session, topic_filter)
            broker.metrics.subscriptions -= 1
            codes.append(ReasonCode.SUCCESS)
            broker.emit(
                Unsubscribed(at=now + broker.wall_offset, client_id=session.client_id, topic_filter=topic_filter)
            )
        self._reply_kept(link, UnsubAck(packet.packet_id, tuple(codes)))
        return True

    def _subscribe_one(self, session: Session, options: SubscriptionOptions, now: float) -> tuple[ReasonCode, bool]:
        """Make one subscription; return its reason code and whether the filter is new to the session."""
        broker, topic_filter = self.broker, options.topic_filter
        is_new = topic_filter not in session.subscriptions
        share_name, inner_filter = split_shared(topic_filter)
        if inner_filter.count("/") >= broker.limits.topic_levels:
            return ReasonCode.TOPIC_FILTER_INVALID, False
        if is_new and (
            len(session.subscriptions) >= broker.limits.subscriptions_per_client
            or broker.metrics.subscriptions >= broker.limits.subscriptions
            or (session.number and broker.journal.overfull)
        ):
            broker.metrics.subscriptions_refused += 1
            return ReasonCode.QUOTA_EXCEEDED, False
        if not broker.authorizer.may_subscribe(broker.principal(session), inner_filter):
            return ReasonCode.NOT_AUTHORIZED, False
        session.subscriptions[topic_filter] = options
        if session.number:
            broker.keeper.subscribed(session, options)
        if share_name is not None:
            broker.shares.join(session, options)
        else:
            if not is_new:
                session.forget_routes()
            broker.router.subscribe(topic_filter, session, options)  # replaces an equal filter [MQTT5-3.8.4-3]
        broker.metrics.subscriptions += is_new
        broker.emit(
            Subscribed(
                at=now + broker.wall_offset,
                client_id=session.client_id,
                topic_filter=topic_filter,
                qos=options.qos,
                replaced=not is_new,
            )
        )
        return ReasonCode(options.qos), is_new

    def _reply_kept(self, link: ClientLink, packet: SubAck | UnsubAck) -> None:
        """Confirm subscriptions once the store has them, where the session is kept; while the store fails, at once."""
        broker = self.broker
        if link.session is None or not link.session.number or broker.journal.failing is not None:
            broker.reply(link, packet)
        elif (frame := broker.encoded(link, packet)) is not None:
            broker.journal.hold(link.outbox).replies.append(frame)

    def _must_wait(self, link: ClientLink) -> bool:
        """Whether as many SUBACKs and UNSUBACKs wait for the store as Receive Maximum allows acknowledgements; then the
        client is paused."""
        held = link.outbox.held
        if not held or len(held[-1].replies) < self.broker.limits.receive_maximum:
            return False
        self.broker.stall(link)
        return True
