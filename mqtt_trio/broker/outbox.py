"""Frames on their way to one client, counted in bytes, and what the broker sees of a network connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from mqtt_trio.protocol.codes import ReasonCode
from mqtt_trio.protocol.connection import ServerConnection

if TYPE_CHECKING:
    from mqtt_trio.broker.aliases import OutboundAliases
    from mqtt_trio.broker.fast_lane import FastLane
    from mqtt_trio.broker.journal import Held
    from mqtt_trio.broker.session import Session


def _nothing_to_flush() -> None:
    """Until a driver takes the outbox over."""


class Outbox:
    """What waits for one network connection. Filled by the hot stretch, emptied by `flush` behind it.

    A slice of QoS 0 frames is one entry shared by all its receivers. Whoever appends to `frames` in place (the two
    hot loops) puts the outbox on `touched` when it was empty and takes the bytes from `room`; everybody else uses
    `put` and `offer`.
    """

    __slots__ = (
        "aliases",
        "flush",
        "frames",
        "held",
        "held_acks",
        "held_size",
        "limit",
        "maximum_packet_size",
        "protocol_version",
        "room",
        "session",
        "starved",
        "touched",
    )

    def __init__(self, touched: list[Outbox], limit: int) -> None:
        self.frames: list[bytes] = []
        self.limit = limit
        """Bytes [Limits.OutboxBytes]."""
        self.room = limit
        """Bytes that may still be offered; control packets may push it below zero, messages may not."""
        self.touched = touched
        self.flush: Callable[[], None] = _nothing_to_flush
        self.session: Session | None = None
        self.protocol_version = 4
        self.maximum_packet_size = 0xFFFF_FFFF
        """Bytes of the largest packet that the client accepts [MQTT5-3.1.2-24]."""
        self.aliases: OutboundAliases | None = None
        """Of a 5.0 client that takes Topic Aliases."""
        self.held: list[Held] = []
        """What waits for the store, by batch."""
        self.held_acks = 0
        """PUBACKs among it."""
        self.held_size = 0
        """Bytes of the PUBLISH packets among it."""
        self.starved = False
        """A message waits in the session's queue because there was no room: the flusher pumps when there is."""

    @property
    def answers_wait(self) -> bool:
        """Whether answers to publishes wait for the store: later ones go behind them."""
        return any(held.acks for held in self.held)

    def put(self, frame: bytes) -> None:
        """Append a control packet; it is never refused, its number is bounded by what the client may have open."""
        if not self.frames:
            self.touched.append(self)
        self.frames.append(frame)
        self.room -= len(frame)

    def offer(self, frame: bytes) -> bool:
        """Append a message's frame if there is room for it."""
        if self.room < len(frame):
            return False
        if not self.frames:
            self.touched.append(self)
        self.frames.append(frame)
        self.room -= len(frame)
        return True


class ClientLink(Protocol):
    """One network connection as the broker sees it; `server.link.Link` is the real one."""

    connection: ServerConnection
    outbox: Outbox
    session: Session | None
    lane: FastLane | None
    """Set by the broker once CONNECT was accepted."""
    peer: str
    listener: str
    certificate_subject: str | None
    """Common Name of the client's verified TLS certificate, where it showed one."""
    silence_limit: float | None
    """Seconds of silence after which the client is ended, None for no limit."""
    end_reason: ReasonCode | None
    end_text: str
    """What the first `end` said."""

    def end(self, reason_code: ReasonCode | None, text: str = "", server_reference: str | None = None) -> None:
        """End the connection; the first call wins, parts the session from the link at once and leaves the rest to the
        supervising task. None: close without a DISCONNECT."""

    def failed(self, exc: Exception) -> None:
        """End the connection because of our own error, which is logged."""

    def pause(self, owner: object) -> None:
        """Stop handling this client's bytes until `resume`."""

    def resume(self, owner: object) -> None:
        """Go on where `pause` of the same owner stopped."""

    def deadline_changed(self) -> None:
        """A deadline moved earlier: look again."""
