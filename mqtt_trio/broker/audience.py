"""Audience: everybody whom messages of a topic reach, sorted in the ways in which the hot paths walk through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import attrs

from mqtt_trio.broker.outbox import Outbox
from mqtt_trio.broker.router import SubscriptionOptions
from mqtt_trio.broker.session import Session
from mqtt_trio.broker.tap import TapRoute

TRANSLATION = 2
"""Bytes that a 3.x frame grows by at most in 5.0: an empty Property Length, a longer Remaining Length."""


@attrs.define
class Member:
    """One session of an Audience with what its matching subscriptions ask for together [MQTT5-3.3.4-2]."""

    session: Session
    qos: int
    retain_as_published: bool
    subscription_identifiers: tuple[int, ...]


@attrs.define(eq=False)
class Audience:
    """One distinct set of subscribers and taps. Topics that reach the same set share it, so their runs merge.

    `valid` falls when a member's connection or subscription changes; whoever cached the audience must look first.
    """

    members: tuple[Member, ...]
    taps: tuple[TapRoute, ...]
    valid: bool = True
    on_invalid: Callable[[Audience], object] | None = None
    """Told once `valid` has fallen."""
    slices: tuple[tuple[Outbox, ...], tuple[Outbox, ...]] = ((), ())
    """Outboxes that may share QoS 0 slices: of 3.x clients, of 5.0 clients."""
    singly: tuple[Member, ...] = ()
    """Online members whose copies differ (Subscription Identifier, Topic Alias, a low Maximum Packet Size)."""
    acknowledged: tuple[Session, ...] = ()
    """Online sessions with a subscription at QoS 1 or 2."""
    at_most_once: tuple[Outbox, ...] = ()
    """Outboxes of online sessions with a subscription at QoS 0."""
    uniform: tuple[bool, bool] = (False, False)
    """Whether a QoS 1 publish of a 3.x, of a 5.0 client may be delivered on its bytes: no member is offline, singly
    or of the other version."""

    def invalidate(self) -> None:
        """Have nobody use or keep this any more: it names outboxes that are gone, and sessions that may be."""
        self.valid = False
        for member in self.members:
            member.session.audiences.discard(self)
        if self.on_invalid is not None:
            self.on_invalid(self)


def make_audience(members: Iterable[Member], taps: tuple[TapRoute, ...], maximum_packet_size: int) -> Audience:
    """Sort `members` into an Audience. `maximum_packet_size`: bytes of the largest frame that a publisher may send."""
    audience = Audience(tuple(members), taps)
    slices: tuple[list[Outbox], list[Outbox]] = ([], [])
    singly: list[Member] = []
    acknowledged: list[Session] = []
    at_most_once: list[Outbox] = []
    offline = False
    for member in audience.members:
        session = member.session
        session.audiences.add(audience)
        outbox = session.outbox
        if outbox is None:
            offline = True
        elif (
            member.subscription_identifiers
            or outbox.aliases is not None
            or outbox.maximum_packet_size < maximum_packet_size + TRANSLATION
        ):
            singly.append(member)
        else:
            slices[outbox.protocol_version == 5].append(outbox)
            if member.qos:
                acknowledged.append(session)
            else:
                at_most_once.append(outbox)
    audience.slices = (tuple(slices[0]), tuple(slices[1]))
    audience.singly = tuple(singly)
    audience.acknowledged = tuple(acknowledged)
    audience.at_most_once = tuple(at_most_once)
    plain = not offline and not singly
    audience.uniform = (plain and not slices[1], plain and not slices[0])
    return audience


def merge_members(matches: Iterable[tuple[Session, SubscriptionOptions]], publisher: str) -> list[Member]:
    """Make one member per session out of all its subscriptions that match: one copy, at the highest QoS, with all
    Subscription Identifiers [MQTT5-3.3.4-3]. No Local leaves the publisher's own out [MQTT5-3.8.3-3]."""
    members: dict[Session, Member] = {}
    for session, options in matches:
        if options.no_local and session.client_id == publisher:
            continue
        identifier = options.subscription_identifier
        identifiers = () if identifier is None else (identifier,)
        member = members.get(session)
        if member is None:
            members[session] = Member(session, options.qos, options.retain_as_published, identifiers)
        else:
            member.qos = max(member.qos, options.qos)
            member.retain_as_published = member.retain_as_published or options.retain_as_published
            member.subscription_identifiers += identifiers
    return list(members.values())
