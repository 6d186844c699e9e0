"""Who may connect, and what they may publish, subscribe to and receive."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import attrs

from mqtt_trio.protocol.codes import ReasonCode


@attrs.frozen
class Principal:
    """Whom a connection belongs to, once that is known: what access rules are about."""

    client_id: str
    """Client Identifier, the assigned one where the client sent none."""
    user_name: str | None = None
    """As the Authenticator knows it, which need not be what CONNECT said; None: anonymous."""


@attrs.frozen
class Credentials:
    """What a client shows with its CONNECT. The password is not part of `repr`, so it cannot get into a log."""

    client_id: str
    user_name: str | None = None
    password: bytes | None = attrs.field(default=None, repr=False)
    peer: str = ""
    listener: str = ""


@attrs.frozen
class Granted:
    """The client may connect, as `principal`."""

    principal: Principal


@attrs.frozen
class Denied:
    """The client may not connect."""

    reason_code: ReasonCode = ReasonCode.NOT_AUTHORIZED
    """BAD_USER_NAME_OR_PASSWORD, NOT_AUTHORIZED, BANNED, ...: becomes the CONNACK's."""
    reason: str = ""
    """For the log, never for the client."""


Decision: TypeAlias = Granted | Denied
"""Known at once. An answer that has to be waited for will be one more member: the broker stops the client's bytes
(`ClientLink.pause`) until it is there, and no session is touched before."""


class Authenticator(Protocol):
    """Decides on each CONNECT, before any session is looked at."""

    def authenticate(self, credentials: Credentials) -> Decision:
        """Decide; must not block. An exception ends the connection and lets nobody in."""


class Authorizer(Protocol):
    """Decides per topic; called inside the hot stretch and its answers are cached: must not block.

    Whoever changes the rules has the broker empty its route caches.
    """

    def may_publish(self, principal: Principal, topic_name: str) -> bool:
        """Whether messages of `principal` to `topic_name` are accepted; asked for Wills, too."""

    def may_subscribe(self, principal: Principal, topic_filter: str) -> bool:
        """Whether the subscription is made; `topic_filter` has no share name."""

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        """Whether a message reaches a subscription of `principal`: live, queued or retained."""


class AllowAnyone:
    """Authenticator that lets everybody in as who they say they are."""

    def authenticate(self, credentials: Credentials) -> Decision:
        return Granted(Principal(credentials.client_id, credentials.user_name))


class AllowEverything:
    """Authorizer without rules."""

    def may_publish(self, principal: Principal, topic_name: str) -> bool:
        return True

    def may_subscribe(self, principal: Principal, topic_filter: str) -> bool:
        return True

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        return True
