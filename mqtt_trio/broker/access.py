"""Who may connect, and what they may publish, subscribe to and receive."""

from __future__ import annotations

from collections.abc import Callable
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
    certificate_subject: str | None = None
    """Common Name of the client's TLS certificate, which its listener's CaFile vouches for; None: it showed none."""


@attrs.frozen
class Granted:
    """The client may connect, as `principal`."""

    principal: Principal
    data: bytes | None = None
    """Authentication Data of the CONNACK, or of the AUTH that ends a re-authentication. For methods only."""


@attrs.frozen
class Denied:
    """The client may not connect."""

    reason_code: ReasonCode = ReasonCode.NOT_AUTHORIZED
    """BAD_USER_NAME_OR_PASSWORD, NOT_AUTHORIZED, BANNED, ...: becomes the CONNACK's. A code that 3.x cannot say closes
    the connection of a 3.x client without a CONNACK."""
    reason: str = ""
    """For the log, never for the client."""
    server_reference: str | None = None
    """Where the client finds another server, for USE_ANOTHER_SERVER and SERVER_MOVED [MQTT5-4.11]."""


@attrs.frozen
class Challenge:
    """A method asks the client something: AUTH 0x18."""

    data: bytes | None
    """Authentication Data for the client."""
    answered: Callable[[bytes | None], Step]
    """Takes the Authentication Data of the client's next AUTH; called once at most."""


class Pending:
    """An answer that has to be waited for: a hash in a thread, a question to another server.

    Whoever made it calls `decide` or `fail` exactly once, on the Trio thread. Until then the broker reads nothing more
    of a client that connects, and no session is touched; the listener's ConnectTimeout goes on.
    """

    __slots__ = ("_waiter", "abandoned", "decision", "error")

    def __init__(self) -> None:
        self._waiter: Callable[[], None] | None = None
        self.decision: Granted | Denied | Challenge | None = None
        self.error: Exception | None = None
        self.abandoned = False
        """True once the connection is gone: nobody waits for the answer any more."""

    def decide(self, decision: Granted | Denied | Challenge) -> None:
        """Give the answer; the broker goes on with the client, and flushes, before this returns."""
        if not self.decided:
            self.decision = decision
            self._tell()

    def fail(self, error: Exception) -> None:
        """There will be no answer: the connection ends, `error` is logged."""
        if not self.decided:
            self.error = error
            self._tell()

    def _tell(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter()

    @property
    def decided(self) -> bool:
        """Whether the answer, or the failure, is there."""
        return self.decision is not None or self.error is not None

    def when_decided(self, waiter: Callable[[], None]) -> None:
        """Call `waiter` once the answer is there; for the broker, which asks for it while there is none."""
        self._waiter = waiter

    def abandon(self) -> None:
        """The connection is gone; for the broker."""
        self._waiter = None
        self.abandoned = True


Decision: TypeAlias = Granted | Denied | Pending
"""What an Authenticator says."""

Step: TypeAlias = Challenge | Granted | Denied | Pending
"""What an AuthenticationMethod says."""


class Authenticator(Protocol):
    """Decides on each CONNECT without an Authentication Method, before any session is looked at."""

    def authenticate(self, credentials: Credentials) -> Decision:
        """Decide; must not block. An exception ends the connection and lets nobody in."""


class AuthenticationMethod(Protocol):
    """Enhanced authentication by one method [MQTT5-4.12]. An exception ends the connection and lets nobody in."""

    name: str
    """The Authentication Method that clients ask for in CONNECT."""

    def start(self, credentials: Credentials, data: bytes | None) -> Step:
        """Begin with the Authentication Data of a CONNECT, or of an AUTH 0x19; must not block."""


class Authorizer(Protocol):
    """Decides per topic; called inside the hot stretch and its answers are cached: must not block.

    Whoever changes the rules calls `Broker.rights_changed`, so that the next message already obeys them.
    """

    def may_publish(self, principal: Principal, topic_name: str) -> bool:
        """Whether messages of `principal` to `topic_name` are accepted. Asked for a Will when its client connects and
        again when it is due."""

    def may_subscribe(self, principal: Principal, topic_filter: str) -> bool:
        """Whether the subscription is made; `topic_filter` has no share name."""

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        """Whether a message reaches a subscription of `principal`. Asked when a route is made, for each retained
        message, and again when a message leaves a queue or is repeated after a reconnect."""


class AllowAnyone:
    """Authenticator that lets everybody in as who they say they are."""

    def authenticate(self, credentials: Credentials) -> Decision:
        return Granted(Principal(credentials.client_id, credentials.user_name))


class MethodsOnly:
    """Authenticator that lets nobody in: for brokers where an AuthenticationMethod is the only way."""

    def authenticate(self, credentials: Credentials) -> Decision:
        return Denied(reason="an Authentication Method is needed")


class AllowEverything:
    """Authorizer without rules."""

    def may_publish(self, principal: Principal, topic_name: str) -> bool:
        return True

    def may_subscribe(self, principal: Principal, topic_filter: str) -> bool:
        return True

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        return True
