"""One network connection: its bytes in, its frames out, and the one task that supervises it.

`Link` knows no transport. `poller.SocketLink` drives it from one epoll, `streams.StreamLink` from tasks on any trio
Stream; the broker sees no difference.
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.session import Session
from mqtt_trio.errors import RemoteProtocolError
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.connection import ServerConnection
from mqtt_trio.protocol.frames import FrameDecoder, WebSocketError, close_frame, frame
from mqtt_trio.protocol.packets import ConnAck, Disconnect, Packet

logger = logging.getLogger(__name__)

CLOSE_GRACE: Final = 2.0
"""Seconds that an ended client may take to read its farewell."""
LAST_READS: Final = 64
"""Reads from a client to whom nothing can be sent any more: what it sent before is in some buffer of the kernel."""
PACKETS_PER_WAKE: Final = 1000
"""Packets of one client that the full path handles before everybody else gets their turn: some milliseconds. The fast
lane needs no such bound, what it takes from one read costs as much."""
EXPLAINED: Final = (
    ReasonCode.MALFORMED_PACKET,
    ReasonCode.PROTOCOL_ERROR,
    ReasonCode.TOPIC_FILTER_INVALID,
    ReasonCode.TOPIC_NAME_INVALID,
    ReasonCode.TOPIC_ALIAS_INVALID,
    ReasonCode.PACKET_TOO_LARGE,
)
"""Reason codes whose text, which names the client's own mistake, helps it as Reason String; others say all."""
UNSUPPORTED_VERSION_3: Final = b"\x20\x02\x00\x01"
"""CONNACK 'unacceptable protocol version', which every version's clients can read [MQTT3-3.1.2-2]."""


class Link:
    """One client's network connection. Implements `broker.outbox.ClientLink`."""

    __slots__ = (
        "_paused_by",
        "_stalled",
        "broken",
        "broker",
        "certificate_subject",
        "changed",
        "codec",
        "connect_timeout",
        "connection",
        "end_reason",
        "end_text",
        "ended",
        "lane",
        "last_packet_at",
        "listener",
        "opened_at",
        "outbox",
        "peer",
        "session",
        "silence_limit",
    )

    def __init__(
        self, broker: Broker, *, peer: str, listener: str, connect_timeout: float, codec: FrameDecoder | None = None
    ) -> None:
        self.broker = broker
        limits = broker.limits
        self.connection = ServerConnection(
            maximum_packet_size=limits.maximum_packet_size, topic_alias_maximum=limits.topic_alias_maximum
        )
        self.outbox = broker.outbox()
        self.outbox.flush = self.flush
        self.session: Session | None = None
        self.lane: FastLane | None = None
        self.peer = peer
        self.listener = listener
        self.certificate_subject: str | None = None
        self.codec = codec
        """Takes WebSocket frames apart; None for plain connections."""
        self.connect_timeout = connect_timeout
        self.silence_limit: float | None = None
        self.last_packet_at = self.opened_at = trio.current_time()
        self.broken: str | None = None
        """Why nothing can be sent any more; what the client sent before is still handled, then it ends."""
        self.ended = False
        self.end_reason: ReasonCode | None = None
        self.end_text = ""
        self.changed = trio.Event()
        self._paused_by: set[int] = set()
        self._stalled: Packet | None = None
        broker.metrics.connections_opened += 1

    # Bytes in

    def receive(self, data: bytes, now: float) -> None:
        """Handle one read. Errors of the client end it; anything else raised is our bug and the driver's to log."""
        if self.ended:
            return
        self.broker.metrics.bytes_received += len(data)
        try:
            if self.codec is not None:
                self._unwrap(self.codec, data, now)
            else:
                self.connection.receive_data(data)
                if not self._paused_by:
                    self._handle(now)
        except RemoteProtocolError as exc:
            self._protocol_error(exc)

    def _unwrap(self, codec: FrameDecoder, data: bytes, now: float) -> None:
        """Take WebSocket frames off, handle what was in them, answer pings and closes."""
        error = None
        try:
            data = codec.feed(data)
        except WebSocketError as exc:
            error, data = exc, exc.received
        if data:
            self.connection.receive_data(data)
            if not self._paused_by:
                # What came in front of the end of the connection is handled before it ends.
                self._handle(now, PACKETS_PER_WAKE if error is None and codec.closed is None else len(data) + 1)
        if codec.replies:
            self.send_raw(codec.take_replies())
        if error is not None:
            raise error
        if codec.closed is not None:
            self.end(None, "WebSocket close by the client")

    def _handle(self, now: float, budget: int = PACKETS_PER_WAKE) -> None:
        """Handle every whole packet that is there: the fast lane as far as it goes, then one on the full path."""
        connection = self.connection
        broker = self.broker
        while not self.ended:
            lane = self.lane
            if lane is not None and connection.start < len(connection.buffer):
                start = connection.start
                connection.start = stop = lane.handle(connection.buffer, start, now)
                if stop != start:
                    self.last_packet_at = now
                    if stop == len(connection.buffer) or self.lane is not lane:  # taken, or ended by it
                        connection.buffer, connection.start = b"", 0
                        return
            packet = connection.next_packet()
            if packet is None:
                break
            self.last_packet_at = now
            if not broker.handle(self, packet, now):
                self._stalled = packet
                return
            budget -= 1
            if not budget and connection.start < len(connection.buffer) and not self.ended:
                self.pause(self)  # everybody else first
                self.resume_soon()
                return

    def _protocol_error(self, exc: RemoteProtocolError) -> None:
        self.broker.metrics.protocol_errors += 1
        if self.ended:
            return
        if self.session is None:
            logger.info("client at %s refused at %s: %s", self.peer, self.listener, exc)
        code = ReasonCode(exc.reason_code)
        if isinstance(exc, WebSocketError):
            self.send_raw(close_frame(exc.close_code))
            self.end(None, str(exc))
            return
        connection = self.connection
        if self.session is None and connection.version_known:
            if connection.protocol_version == ProtocolVersion.MQTT_5_0:
                refusal = ConnAck(reason_code=code, reason_string=str(exc))
                self.outbox.put(connection.encode(refusal))  # [MQTT5-3.1.4-1]
            elif code is ReasonCode.UNSUPPORTED_PROTOCOL_VERSION:
                self.outbox.put(UNSUPPORTED_VERSION_3)
        self.end(code, str(exc))

    # What the broker asks for

    def end(self, reason_code: ReasonCode | None, text: str = "", server_reference: str | None = None) -> None:
        """End the connection; see ClientLink. DISCONNECT is for 5.0 clients after their CONNACK [MQTT5-3.14.0-1]."""
        if self.ended:
            return
        self.ended = True
        self.end_reason, self.end_text = reason_code, text
        try:
            try:
                if (
                    reason_code is not None
                    and self.lane is not None
                    and self.connection.protocol_version == ProtocolVersion.MQTT_5_0
                ):
                    told = text if reason_code in EXPLAINED else None
                    farewell = Disconnect(reason_code, reason_string=told, server_reference=server_reference)
                    self.outbox.put(self.connection.encode(farewell))
            finally:
                self.broker.connection_lost(self, trio.current_time())
        except Exception as exc:
            # Whoever ends a client is seldom that client's own driver: our error must not become theirs.
            self._log_failure(exc)
        self.reading_changed()
        self.changed.set()

    def sending_failed(self, text: str) -> None:
        """Nothing can be sent any more. The client's task reads what has arrived, then ends it: a DISCONNECT, a last
        message or acknowledgement may be there, sent by a client that closed while we were writing to it."""
        if self.broken is None:
            self.broken = text
            self.changed.set()

    def pause(self, owner: object) -> None:
        """Stop handling this client's bytes."""
        self._paused_by.add(id(owner))
        self.reading_changed()

    def resume(self, owner: object) -> None:
        """Handle what is there, in order, and read on."""
        self._paused_by.discard(id(owner))
        if self._paused_by or self.ended:
            return
        now = trio.current_time()
        self.last_packet_at = now  # silence while we did not listen is not the client's
        packet, self._stalled = self._stalled, None
        try:
            if packet is not None and not self.broker.handle(self, packet, now):
                self._stalled = packet
                return
            self._handle(now)
        except RemoteProtocolError as exc:
            self._protocol_error(exc)
        except Exception as exc:  # whoever resumes drives the link; the error stays this client's
            self.failed(exc)
        self.deadline_changed()
        self.reading_changed()

    @property
    def paused(self) -> bool:
        """True while the client's bytes are not handled."""
        return bool(self._paused_by)

    def deadline_changed(self) -> None:
        """Wake the supervising task to look at its deadline again."""
        self.changed.set()

    # The one task

    def silence_deadline(self) -> float:
        """Monotonic instant at which the client has been silent for too long."""
        if self.session is None:  # whatever it says meanwhile, and however long we think about it
            return self.opened_at + self.connect_timeout
        if self.silence_limit is None or self._paused_by:
            return float("inf")
        return self.last_packet_at + self.silence_limit

    def _is_silent(self) -> bool:
        return not self.ended and trio.current_time() >= self.silence_deadline()

    async def supervise(self) -> None:
        """The client's one task, from its first byte to its last. Cancelled, it ends the client without a farewell."""
        try:
            while not self.ended and self.broken is None:
                self.changed = trio.Event()
                with trio.move_on_at(self.silence_deadline()):
                    await self.changed.wait()
                await self._end_silent()
            await self._read_rest()
            self.broker.flush()
            with trio.move_on_after(CLOSE_GRACE):
                await self.drained()
                if self.codec is not None and self.codec.closed is None:
                    self.send_raw(close_frame(1000))
                    await self.drained()
        finally:
            self.end(None, "cancelled")
            self.broker.flush()
            self.release()
            self.broker.metrics.connections_closed += 1

    async def _read_rest(self) -> None:
        """Of a broken connection handle what has arrived, in no more than CLOSE_GRACE, then end it."""
        if self.broken is None:
            return
        with trio.move_on_after(CLOSE_GRACE):
            for _ in range(LAST_READS):
                while self.paused and not self.ended:
                    self.changed = trio.Event()
                    await self.changed.wait()
                if self.ended or not await self.read_more():
                    break
        self.end(None, self.broken)

    async def _end_silent(self) -> None:
        """End the client if it was silent for too long. What it sent and we have not read is no silence of its own."""
        if not self._is_silent():
            return
        before = self.last_packet_at
        await self.read_more()
        if self.last_packet_at != before or not self._is_silent():
            return
        metrics = self.broker.metrics
        if self.session is None:
            metrics.connections_timed_out += 1
            missing = "authentication" if self.connection.version_known else "CONNECT"
            self.end(None, f"no {missing} within {self.connect_timeout:g} s")
        else:
            metrics.keep_alive_timeouts += 1
            self.end(ReasonCode.KEEP_ALIVE_TIMEOUT, "silent for 1.5 times its Keep Alive")

    def end_unread(self) -> None:
        """End a client that does not read the answers to its own packets."""
        if not self.ended:
            self.broker.metrics.answers_unread += 1
            self.end(None, "the client does not read the answers to its own packets")

    def failed(self, exc: Exception) -> None:
        """Our own error while this client's bytes were handled: it ends this client and nobody else."""
        self._log_failure(exc)
        self.end(ReasonCode.UNSPECIFIED_ERROR, "internal error")

    def _log_failure(self, exc: Exception) -> None:
        self.broker.metrics.client_failures += 1
        client_id = self.session.client_id if self.session is not None else ""
        logger.error("client %r at %s ended by an error of the broker", client_id, self.peer, exc_info=exc)

    def wrap(self, data: bytes) -> bytes:
        """Make one WebSocket frame of what leaves, where the client speaks WebSocket (drivers with time for a call)."""
        return data if self.codec is None else frame(data)

    # What drivers do

    def flush(self) -> None:
        """Send what is in the outbox, or have it sent. Never blocks; a failure ends this link only."""
        raise NotImplementedError

    def send_raw(self, data: bytes) -> None:
        """Send bytes that are no MQTT (WebSocket control frames), behind what was flushed before."""
        raise NotImplementedError

    def reading_changed(self) -> None:
        """`paused` or `ended` changed: read from the client, or do not."""
        raise NotImplementedError

    def resume_soon(self) -> None:
        """Call `resume(self)` once the other clients have had their turn."""
        raise NotImplementedError

    async def read_more(self) -> bool:
        """Read once more and handle it; False when nothing has arrived."""
        raise NotImplementedError

    async def drained(self) -> None:
        """Wait until everything flushed has left."""
        raise NotImplementedError

    def release(self) -> None:
        """Leave the driver and close. Never blocks."""
        raise NotImplementedError
