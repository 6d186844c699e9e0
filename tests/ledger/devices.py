"""Clients of the ledger: they keep what they know of their sessions over the deaths of the broker, as real devices do
with storage of their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final, TypeAlias

from tests.ledger.sockets import SocketWorld
from tests.ledger.verdict import Legacy
from tests.simulation.client import Client, Talk
from tests.simulation.history import History, Message
from tests.simulation.network import Connection
from tests.simulation.plan import ClientPlan
from tests.wire import connect, text

Notice: TypeAlias = Callable[[int], None]
SHUTTING_DOWN: Final = 0x8B
NOTICED: Final = (4, 5, 7, 9, 11)
"""PUBACK, PUBREC, PUBCOMP, SUBACK, UNSUBACK."""
WILL_FLAGS: Final = 0x14
"""Will Flag and Will QoS 2 of a CONNECT."""
HOUR: Final = b"\x11" + (3600).to_bytes(4, "big")


class Device(Client):
    """A client whose broker may die, and which may stay away for a while."""

    def __init__(
        self, world: SocketWorld, plan: ClientPlan, history: History, rng: random.Random, notice: Notice
    ) -> None:
        super().__init__(world, plan, history, rng)
        self.sockets = world
        self.is_away = False
        for kind in NOTICED:
            self._handlers[kind] = self._noticing(kind, notice)

    def _noticing(self, kind: int, notice: Notice) -> Callable[[Talk, int, bytes], None]:
        """Return a handler that tells what came once it is dealt with."""
        handle = self._handlers[kind]

        def handle_and_tell(talk: Talk, first: int, body: bytes) -> None:
            handle(talk, first, body)
            self.is_sure = True
            notice(kind)

        return handle_and_tell

    def publish(self, messages: list[Message]) -> None:
        """Send messages as soon as it is possible."""
        self.to_send += messages
        if self.talk is not None:
            self._send(self.talk)

    def subscribe(self, wanted: bool, topic_filter: str) -> None:
        """Subscribe to a filter, or leave it."""
        self._change(wanted, topic_filter)

    def leave(self) -> None:
        """Break off the connection and stay away."""
        self.is_away = True
        if self.talk is not None:
            self.talk.connection.cut()

    def come_back(self) -> None:
        """Connect again."""
        self.is_away = False
        self._come_back()

    def _come_back(self) -> None:
        if not self.is_away:
            super()._come_back()

    def missed(self, connection: Connection, data: bytes) -> None:
        if connection.reset:
            self.complain("the broker closed the connection")

    def _disconnected(self, talk: Talk, first: int, body: bytes) -> None:
        if not (self.sockets.is_ending and body and body[0] == SHUTTING_DOWN):
            self.complain(f"DISCONNECT {body.hex()}")

    @property
    def is_ready(self) -> bool:
        """Connected, and all that it subscribes to is promised."""
        return self.talk is not None and self.talk.accepted and not self.subscriber.requests


class Mortal(Device):
    """Has a Will. After the broker's next death it stays away for ever, or comes back without a Will."""

    legacy: Legacy

    def connect_packet(self, talk: Talk) -> bytes:
        legacy = self.legacy
        if self.is_sure:
            legacy.revoked = True
            return super().connect_packet(talk)
        will: tuple[bytes, ...] = (text(legacy.topic_name), text(legacy.payload))
        if self.habits.v5:
            will = (b"\x05\x18" + legacy.delay.to_bytes(4, "big"), *will)
        return connect(self.version, text(self.name), *will, flags=WILL_FLAGS, properties=HOUR)


class Lodger(Device):
    """A 5.0 client whose session ends a second after its connection: once that is over it must be gone."""

    is_expired = False

    def connect_packet(self, talk: Talk) -> bytes:
        return super().connect_packet(talk).replace(HOUR, b"\x11" + (1).to_bytes(4, "big"))

    def _connack(self, talk: Talk, first: int, body: bytes) -> None:
        if self.is_expired:
            self.history.counts["sessions that had to be gone"] += 1
            if body[0]:
                self.complain("a session that had expired is present")
            self.has_session = self.is_sure = False
            self.talks = 1
            self.subscriber.requests.clear()
        else:
            self.has_session = False
        super()._connack(talk, first, body)
