"""Audience: everybody whom messages of a topic reach, sorted in the ways in which the hot paths walk through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import attrs

from mqtt_trio.broker.outbox import Outbox
from mqtt_trio.broker.router import SubscriptionOptions
from mqtt_trio.broker.session import Session
from mqtt_trio.broker.tap import TapRoute

if TYPE_CHECKING:
    from mqtt_trio.broker.shares import ShareGroup

TRANSLATION = 2
"""Bytes that a 3.x frame grows by at most in 5.0: an empty Property Length, a longer Remaining Length."""


@attrs.define
class Member:
    """One session of an Audience with what its matching subscriptions ask for together [MQTT5-3.3.4-2]."""

    session: Session
    qos: int
    retain_as_published: bool
    subscription_identifiers: tuple[int, ...]


@attrs.frozen(eq=False)
class Fan:
    """How a publish at QoS 1 or 2 of one MQTT version goes to an audience on its bytes."""

    same: tuple[Session, ...]
    """They get the frame as it is but for its Packet Identifier: same version, full QoS."""
    kept: tuple[Session, ...]
    """The same, with sessions that the store has."""
    rest: tuple[tuple[bool, int, tuple[Session, ...]], ...]
    """They get it written anew: (whether in 5.0, at which QoS, who)."""
    apart: tuple[Member, ...]
    """They get it one by one: offline, or their copies differ, or these must wait for the store."""
    gated: bool = False
    """Whether copies at QoS 2 wait until the store has those of others (`Journal.gated`)."""


@attrs.define(eq=False)
class Audience:
    """One distinct set of subscribers and taps. Topics that reach the same set share it, so their runs merge.

    `valid` falls when a member's connection or subscription changes; whoever cached the audience must look first.
    """

    members: tuple[Member, ...]
    groups: tuple[ShareGroup, ...]
    """Share groups; each hands a message to one of its members."""
    taps: tuple[TapRoute, ...]
    valid: bool = True
    on_invalid: Callable[[Audience], object] | None = None
    """Told once `valid` has fallen."""
    slices: tuple[tuple[Outbox, ...], tuple[Outbox, ...]] = ((), ())
    """Outboxes that may share QoS 0 slices: of 3.x clients, of 5.0 clients."""
    singly: tuple[Member, ...] = ()
    """Online members whose copies differ (Subscription Identifier, Topic Alias, a low Maximum Packet Size)."""
    fans: list[Fan | None] = attrs.Factory(lambda: [None] * 4)
    """How publishes at QoS 1 and 2 are delivered: of 3.x and 5.0 clients at QoS 1, then at QoS 2. `fan` makes one when
    it is first needed."""

    @property
    def kept(self) -> bool:
        """Whether a message at QoS 1 or 2 must be in the store before it is acknowledged."""
        return any(member.qos and member.session.number for member in self.members) or any(
            group.number for group in self.groups
        )

    def fan(self, kind: int) -> Fan:
        """Make `fans[kind]`."""
        qos, v5 = kind // 2 + 1, kind % 2 == 1
        copies: dict[tuple[bool, int], list[Session]] = {}
        apart = []
        kept = []
        shares = {*self.slices[0], *self.slices[1]}
        gated = qos == 2 and self.kept
        for member in self.members:
            outbox = member.session.outbox
            if outbox is None or outbox not in shares:
                if outbox is not None or member.qos:  # nobody is owed a QoS 0 message while its client is away
                    apart.append(member)
                continue
            copy = (outbox.protocol_version == 5, min(qos, member.qos))
            if member.session.number and member.qos:
                if copy == (v5, qos):
                    kept.append(member.session)
                else:
                    apart.append(member)
                continue
            if gated and copy[1] == 2:
                apart.append(member)
                continue
            copies.setdefault(copy, []).append(member.session)
        same = copies.pop((v5, qos), [])
        rest = tuple((*copy, tuple(sessions)) for copy, sessions in copies.items())
        fan = self.fans[kind] = Fan(tuple(same), tuple(kept), rest, tuple(apart), gated)
        return fan

    def invalidate(self) -> None:
        """Have nobody use or keep this any more: it names outboxes that are gone, and sessions that may be."""
        self.valid = False
        for member in self.members:
            member.session.audiences.discard(self)
        for group in self.groups:
            group.audiences.discard(self)
        if self.on_invalid is not None:
            self.on_invalid(self)


def make_audience(
    members: Iterable[Member],
    groups: tuple[ShareGroup, ...],
    taps: tuple[TapRoute, ...],
    maximum_packet_size: int,
) -> Audience:
    """Sort `members` into an Audience. `maximum_packet_size`: bytes of the largest frame that a publisher may send."""
    audience = Audience(tuple(members), groups, taps)
    for group in groups:
        group.audiences.add(audience)
    slices: tuple[list[Outbox], list[Outbox]] = ([], [])
    singly: list[Member] = []
    for member in audience.members:
        session = member.session
        session.audiences.add(audience)
        outbox = session.outbox
        if outbox is None:
            continue
        if (
            member.subscription_identifiers
            or outbox.aliases is not None
            or outbox.maximum_packet_size < maximum_packet_size + TRANSLATION
        ):
            singly.append(member)
        else:
            slices[outbox.protocol_version == 5].append(outbox)
    audience.slices = (tuple(slices[0]), tuple(slices[1]))
    audience.singly = tuple(singly)
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
