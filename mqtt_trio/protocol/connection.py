"""One network connection without the network: bytes in, packets out; order of packets, sizes, Topic Aliases.

`ServerConnection` is the Server's end, `ClientConnection` the Client's. Both give one packet per call, so that good
packets in front of a bad one still count; nothing comes out behind a DISCONNECT or an error.
"""

from __future__ import annotations

import enum
from typing import Final

import attrs

from mqtt_trio.errors import LocalProtocolError, MalformedPacketError, PacketTooLargeError, RemoteProtocolError
from mqtt_trio.protocol import packets as p
from mqtt_trio.protocol.codes import SERVER_DISCONNECT_CODES, PacketType, ProtocolVersion, ReasonCode
from mqtt_trio.protocol.decode import DECODERS, decode_publish, read_protocol_version
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.wire import MAXIMUM_POSSIBLE_PACKET_SIZE, Header, read_header

V3_1: Final = ProtocolVersion.MQTT_3_1
V5: Final = ProtocolVersion.MQTT_5_0


class State(enum.IntEnum):
    """Where the conversation stands, as the packets that came in tell it."""

    AWAIT_CONNECT = enum.auto()
    AUTHENTICATING = enum.auto()
    """CONNECT with an Authentication Method came, the successful CONNACK has not gone."""
    AWAIT_CONNACK = enum.auto()
    CONNECTED = enum.auto()
    DISCONNECTED = enum.auto()
    """The peer said its last word."""
    FAILED = enum.auto()
    """The peer broke the specification."""


_BOTH_WAYS: Final = (PacketType.PUBLISH, PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP)

SERVER_NEXT_STATE: Final[dict[tuple[int, int], State]] = {
    (State.AWAIT_CONNECT, PacketType.CONNECT): State.CONNECTED,  # [MQTT5-3.1.0-1]; packets may follow at once
    # Without an Authentication Method; with one, nothing but AUTH and DISCONNECT until CONNACK [MQTT5-3.1.2-30].
    (State.AUTHENTICATING, PacketType.AUTH): State.AUTHENTICATING,
    (State.AUTHENTICATING, PacketType.DISCONNECT): State.DISCONNECTED,
    **{(State.CONNECTED, packet_type): State.CONNECTED for packet_type in _BOTH_WAYS},
    (State.CONNECTED, PacketType.SUBSCRIBE): State.CONNECTED,
    (State.CONNECTED, PacketType.UNSUBSCRIBE): State.CONNECTED,
    (State.CONNECTED, PacketType.PINGREQ): State.CONNECTED,
    (State.CONNECTED, PacketType.AUTH): State.CONNECTED,
    (State.CONNECTED, PacketType.DISCONNECT): State.DISCONNECTED,
}
"""(state, packet received) -> state; an absent pair is a Protocol Error, e.g. a second CONNECT [MQTT5-3.1.0-2]."""

CLIENT_NEXT_STATE: Final[dict[tuple[int, int], State]] = {
    (State.AWAIT_CONNACK, PacketType.CONNACK): State.CONNECTED,  # [MQTT5-3.2.0-1]; a refusal ends in DISCONNECTED
    (State.AWAIT_CONNACK, PacketType.AUTH): State.AWAIT_CONNACK,
    **{(State.CONNECTED, packet_type): State.CONNECTED for packet_type in _BOTH_WAYS},
    (State.CONNECTED, PacketType.SUBACK): State.CONNECTED,
    (State.CONNECTED, PacketType.UNSUBACK): State.CONNECTED,
    (State.CONNECTED, PacketType.PINGRESP): State.CONNECTED,
    (State.CONNECTED, PacketType.AUTH): State.CONNECTED,
    (State.CONNECTED, PacketType.DISCONNECT): State.DISCONNECTED,
}

FLAGS: Final[dict[int, int]] = {
    **{packet_type: 0 for packet_type in PacketType if packet_type != PacketType.PUBLISH},
    PacketType.PUBREL: 2,
    PacketType.SUBSCRIBE: 2,
    PacketType.UNSUBSCRIBE: 2,
}
"""The flags of the fixed header; PUBLISH has its own meaning for them [MQTT5-2.1.3-1]."""

_OPTIONAL_TEXT: Final = (
    p.ConnAck,
    p.PubAck,
    p.PubRec,
    p.PubRel,
    p.PubComp,
    p.SubAck,
    p.UnsubAck,
    p.Disconnect,
    p.Auth,
)
"""Packets whose Reason String and User Properties may be left out."""


class _Connection:
    """What both ends share.

    Attributes:
      buffer, start: bytes received and not handled yet are `buffer[start:]`. The fast lane reads from `start` and
        advances it over whole packets.
      state: see State.
      protocol_version: of the connection; a Server knows it once `version_known` is True.
      maximum_packet_size: bytes of the largest packet that the peer may send.
      peer_maximum_packet_size: bytes of the largest packet that the peer takes [MQTT5-3.1.2-24].
      topic_alias_maximum: the highest Topic Alias that the peer may use.
    """

    __slots__ = (
        "_aliases",
        "_gathered",
        "_needed",
        "_next_state",
        "buffer",
        "maximum_packet_size",
        "peer_maximum_packet_size",
        "protocol_version",
        "start",
        "state",
        "topic_alias_maximum",
    )

    def __init__(self, state: State, next_state: dict[tuple[int, int], State], maximum_packet_size: int) -> None:
        self.state = state
        self.buffer = b""
        self.start = 0
        self.protocol_version = ProtocolVersion.MQTT_3_1_1
        self.maximum_packet_size = maximum_packet_size
        self.peer_maximum_packet_size = MAXIMUM_POSSIBLE_PACKET_SIZE
        self.topic_alias_maximum = 0
        self._next_state = next_state
        self._aliases: dict[int, str] = {}
        self._gathered: bytearray | None = None
        """The beginning of a packet that is larger than what was read so far; `buffer` is empty meanwhile."""
        self._needed = 0
        """Bytes of the incomplete packet that `buffer` begins with; 0: not known."""

    def receive_data(self, data: bytes) -> None:
        """Take one read. Copies only what an earlier read left over."""
        if self.state >= State.DISCONNECTED:
            return
        if (gathered := self._gathered) is not None:
            gathered += data
            if len(gathered) < self._needed:
                return
            self.buffer, self.start, self._gathered = bytes(gathered), 0, None
        elif self.start >= len(self.buffer):
            self.buffer, self.start = data, 0
        else:
            rest = self.buffer[self.start :] if self.start else self.buffer
            if self._needed > len(rest) + len(data):
                self._gathered = bytearray(rest)
                self._gathered += data
                self.buffer, self.start = b"", 0
                return
            self.buffer, self.start = rest + data, 0
        self._needed = 0

    def next_packet(self) -> p.Packet | None:
        """Return the next whole packet, or None until `receive_data` brings more.

        Raises:
          RemoteProtocolError: the peer broke the spec; send ``reason_code`` and close. Anything else raised here is
            our bug.
        """
        buffer, start = self.buffer, self.start
        if start >= len(buffer):
            if buffer:
                self.buffer, self.start = b"", 0  # a silent connection keeps nothing alive
            return None
        if self.state >= State.DISCONNECTED:
            self._stop(self.state)
            return None
        try:
            header = read_header(buffer, start)
            if header is None:
                self._keep(start, 0)
                return None
            new_state = self._check_header(buffer, start, header)
            body_end = header[1]
            if body_end > len(buffer):
                self._keep(start, body_end - start)
                return None
            packet: p.Packet
            if (packet_type := buffer[start] >> 4) == PacketType.PUBLISH:
                packet = decode_publish(buffer[start] & 15, buffer, header[0], body_end, self.protocol_version)
                if packet.topic_alias is not None or packet.subscription_identifiers:
                    self._check_publish(packet)
            else:
                packet = self._decode(packet_type, buffer[start] & 15, buffer, header)
                new_state = self._after(packet, new_state)
        except RemoteProtocolError:
            self._stop(State.FAILED)
            raise
        self.state, self.start = new_state, body_end
        if new_state is State.DISCONNECTED:
            self._stop(new_state)  # whatever comes behind the last word is ignored
        return packet

    def encode(self, packet: p.Packet) -> bytes:
        """Return the bytes of `packet` in the version of the connection.

        Where the peer's Maximum Packet Size has no room for them, User Properties are left out [MQTT5-3.4.2-3], and
        where that is not enough the Reason String, too [MQTT5-3.4.2-2]; of every packet that may have them.

        Raises:
          LocalProtocolError: not allowed here, or larger than the peer takes without them [MQTT5-3.1.2-24].
        """
        maximum = self.peer_maximum_packet_size
        frame = encode(packet, self.protocol_version)
        if len(frame) > maximum and isinstance(packet, _OPTIONAL_TEXT):
            if packet.user_properties:
                packet = attrs.evolve(packet, user_properties=())
                frame = encode(packet, self.protocol_version)
            if len(frame) > maximum and packet.reason_string is not None:
                frame = encode(attrs.evolve(packet, reason_string=None), self.protocol_version)
        if len(frame) > maximum:
            raise LocalProtocolError(f"a {type(packet).__name__} of {len(frame)} bytes; the peer takes {maximum}")
        return frame

    def _stop(self, state: State) -> None:
        self.state = state
        self.buffer, self.start, self._gathered, self._needed = b"", 0, None, 0

    def _keep(self, start: int, needed: int) -> None:
        """Keep the incomplete packet at `start` and let the rest of the read go."""
        if start:
            self.buffer, self.start = self.buffer[start:], 0
        self._needed = needed

    def _check_header(self, buffer: bytes, start: int, header: Header) -> State:
        """Look at a fixed header before the body arrives; return the state that the packet leads to."""
        first_byte = buffer[start]
        packet_type = first_byte >> 4
        body_start, body_end = header
        new_state = self._next_state.get((self.state, packet_type))
        if new_state is None:
            if not packet_type:
                raise MalformedPacketError("packet type 0 is reserved")  # [MQTT5-2.1.2]
            raise RemoteProtocolError(f"{PacketType(packet_type).name} while {self.state.name}")
        if first_byte & 15 != FLAGS.get(packet_type, first_byte & 15) and not (
            # 3.1 knows DUP on these packets and has no rule for the flags of the others.
            self.protocol_version is V3_1 and self.state is State.CONNECTED
        ):
            hint = "; TLS at a port that speaks plain MQTT begins like this" if first_byte == 0x16 else ""
            raise MalformedPacketError(f"reserved flags of {PacketType(packet_type).name} are wrong{hint}")
        if body_end - start > self.maximum_packet_size:
            text = f"a packet of {body_end - start} bytes; the maximum is {self.maximum_packet_size}"
            raise PacketTooLargeError(text)
        if body_start - start > 2 and self.protocol_version is V5:
            self._check_shortest(buffer, start, body_start)
        return new_state

    @staticmethod
    def _check_shortest(buffer: bytes, start: int, body_start: int) -> None:
        """5.0 alone demands the shortest form of the Remaining Length [MQTT5-1.5.5-1]."""
        if body_start - start > 2 and not buffer[body_start - 1]:
            raise MalformedPacketError("the Remaining Length has more bytes than it needs")

    def _decode(self, packet_type: int, flags: int, buffer: bytes, header: Header) -> p.Packet:
        packet = DECODERS[packet_type](flags, buffer, header[0], header[1], self.protocol_version)
        self._check(packet)
        return packet

    def _check(self, packet: p.Packet) -> None:
        """Raise RemoteProtocolError where the packet (no PUBLISH) is fine by itself but not on this connection."""

    def _check_publish(self, packet: p.Publish) -> None:
        """Handle what a PUBLISH has beyond the message: Topic Alias, Subscription Identifiers."""
        if packet.topic_alias is not None:
            self._resolve_alias(packet, packet.topic_alias)

    def _after(self, packet: p.Packet, new_state: State) -> State:
        """Learn from an accepted packet (no PUBLISH); return the state that follows."""
        return new_state

    def _resolve_alias(self, packet: p.Publish, alias: int) -> None:
        """Replace an empty Topic Name by what the alias stands for, or remember the alias."""
        if alias > self.topic_alias_maximum:
            text = f"Topic Alias {alias}; the maximum is {self.topic_alias_maximum}"
            raise RemoteProtocolError(text, ReasonCode.TOPIC_ALIAS_INVALID)  # [MQTT5-3.3.2-9], [MQTT5-3.3.2-11]
        if packet.topic_name:
            self._aliases[alias] = packet.topic_name
        elif (topic_name := self._aliases.get(alias)) is None:
            raise RemoteProtocolError(f"Topic Alias {alias} stands for nothing yet")  # [MQTT5-3.3.4]
        else:
            packet.topic_name = topic_name


class ServerConnection(_Connection):
    """The Server's end: receives what Clients send.

    `encode` of a successful ConnAck opens what it announces: Topic Alias Maximum, and packets other than AUTH after
    enhanced authentication.
    """

    __slots__ = (
        "_accepted",
        "_problem_information",
        "_session_expires_at_end",
        "authentication_method",
        "version_known",
    )

    def __init__(
        self, *, maximum_packet_size: int = MAXIMUM_POSSIBLE_PACKET_SIZE, topic_alias_maximum: int = 16
    ) -> None:
        super().__init__(State.AWAIT_CONNECT, SERVER_NEXT_STATE, maximum_packet_size)
        self.topic_alias_maximum = topic_alias_maximum
        self.version_known = False
        self._accepted = False
        self.authentication_method: str | None = None
        """Of the CONNECT; every AUTH and the CONNACK name the same [MQTT5-4.12.0-5]."""
        self._problem_information = True
        self._session_expires_at_end = True

    def encode(self, packet: p.Packet) -> bytes:
        if isinstance(packet, p.ConnAck):
            return self._encode_connack(packet)
        if isinstance(packet, p.Disconnect):
            if self.protocol_version is not V5 or not self._accepted:
                raise LocalProtocolError("DISCONNECT is for 5.0 Clients after their CONNACK")  # [MQTT5-3.14.0-1]
        elif not self._problem_information and isinstance(packet, _OPTIONAL_TEXT):  # [MQTT5-3.1.2-29]
            packet = attrs.evolve(packet, reason_string=None, user_properties=())
        return super().encode(packet)

    def _encode_connack(self, packet: p.ConnAck) -> bytes:
        frame = super().encode(packet)
        if not packet.reason_code:
            self._accepted = True
            self.topic_alias_maximum = packet.topic_alias_maximum or 0
            if self.state is State.AUTHENTICATING:
                self.state = State.CONNECTED
        return frame

    def _decode(self, packet_type: int, flags: int, buffer: bytes, header: Header) -> p.Packet:
        if packet_type == PacketType.CONNECT:
            self._look_at_version(buffer, header)  # whoever refuses a bad CONNECT needs to know how
        packet = super()._decode(packet_type, flags, buffer, header)
        if packet_type == PacketType.CONNECT and self.protocol_version is V5:
            self._check_shortest(buffer, self.start, header[0])
        return packet

    def _look_at_version(self, buffer: bytes, header: Header) -> None:
        _, level = read_protocol_version(buffer, *header)
        if level == V3_1:
            self.protocol_version = V3_1
        elif V5 <= level < 0x80:  # what comes after 5.0 can read its CONNACK; bridges set 0x80 on 3.x
            self.protocol_version = V5
        self.version_known = True

    def _check(self, packet: p.Packet) -> None:
        if isinstance(packet, p.Disconnect):
            if packet.session_expiry_interval and self._session_expires_at_end:
                raise RemoteProtocolError("Session Expiry Interval was 0 and cannot be raised")  # [MQTT5-3.14.2.2.2]
            if packet.server_reference is not None:
                raise MalformedPacketError("a Client's DISCONNECT with a Server Reference")
            if packet.reason_code in SERVER_DISCONNECT_CODES:  # [MQTT5-3.14.2.1]
                raise RemoteProtocolError(f"a Client's DISCONNECT with {packet.reason_code.name}")
        elif isinstance(packet, p.Auth):
            self._check_auth(packet)

    def _check_publish(self, packet: p.Publish) -> None:
        if packet.subscription_identifiers:
            raise RemoteProtocolError("a Client's PUBLISH with a Subscription Identifier")  # [MQTT5-3.3.4-6]
        super()._check_publish(packet)

    def _check_auth(self, packet: p.Auth) -> None:
        if self.authentication_method is None:
            raise RemoteProtocolError("AUTH without an Authentication Method in CONNECT")  # [MQTT5-4.12.0-7]
        if packet.authentication_method != self.authentication_method:
            raise RemoteProtocolError("AUTH with another Authentication Method than CONNECT")  # [MQTT5-4.12.0-5]
        if packet.reason_code is ReasonCode.SUCCESS or (
            packet.reason_code is ReasonCode.RE_AUTHENTICATE and self.state is State.AUTHENTICATING
        ):
            raise RemoteProtocolError(f"AUTH {packet.reason_code.name} while {self.state.name}")  # [MQTT5-3.15.2-1]

    def _after(self, packet: p.Packet, new_state: State) -> State:
        if isinstance(packet, p.Connect):
            self._session_expires_at_end = not packet.session_expiry_interval
            self._problem_information = packet.request_problem_information != 0
            self.authentication_method = packet.authentication_method
            if packet.maximum_packet_size is not None:
                self.peer_maximum_packet_size = packet.maximum_packet_size
            if packet.authentication_method is not None:
                return State.AUTHENTICATING
        return new_state


class ClientConnection(_Connection):
    """The Client's end: receives what Servers send.

    `encode` of a Connect sets the version and what it announces. It holds the caller to what the CONNACK said about
    PUBLISH and to silence behind a DISCONNECT; the order of everything else that is sent is the caller's.
    """

    __slots__ = ("_clean_start", "_limits", "_said_goodbye")

    def __init__(
        self,
        *,
        protocol_version: ProtocolVersion = V5,
        maximum_packet_size: int = MAXIMUM_POSSIBLE_PACKET_SIZE,
    ) -> None:
        super().__init__(State.AWAIT_CONNACK, CLIENT_NEXT_STATE, maximum_packet_size)
        self.protocol_version = protocol_version
        self._clean_start = False
        self._limits: p.ConnAck | None = None
        """The CONNACK of a 5.0 Server, which bounds what may be published."""
        self._said_goodbye = False

    def encode(self, packet: p.Packet) -> bytes:
        if self._said_goodbye:  # [MQTT5-3.14.4-1], [MQTT3-3.14.4-2]
            raise LocalProtocolError(f"a {type(packet).__name__} behind a DISCONNECT")
        if isinstance(packet, p.Connect):
            self._announce(packet)
        elif isinstance(packet, p.Publish) and self._limits is not None:
            _check_against_connack(packet, self._limits)
        frame = super().encode(packet)
        self._said_goodbye = isinstance(packet, p.Disconnect)
        return frame

    def _announce(self, packet: p.Connect) -> None:
        self.protocol_version = packet.protocol_version
        self._clean_start = packet.clean_start
        if packet.protocol_version is V5:
            self.topic_alias_maximum = packet.topic_alias_maximum or 0
            if packet.maximum_packet_size is not None:
                self.maximum_packet_size = packet.maximum_packet_size

    def _check(self, packet: p.Packet) -> None:
        if isinstance(packet, p.Disconnect):
            if self.protocol_version is not V5:
                raise MalformedPacketError("a 3.x Server does not send DISCONNECT")
            if packet.session_expiry_interval is not None:
                raise RemoteProtocolError("a Server's DISCONNECT with Session Expiry Interval")  # [MQTT5-3.14.2-2]
            if packet.reason_code is ReasonCode.DISCONNECT_WITH_WILL_MESSAGE:  # [MQTT5-3.14.2.1]
                raise RemoteProtocolError("a Server's DISCONNECT with Will Message")
        elif isinstance(packet, p.ConnAck) and packet.session_present and self._clean_start:
            # Who asked for a clean start has no Session State [MQTT5-3.2.2-4].
            raise RemoteProtocolError("Session Present after a clean start")

    def _after(self, packet: p.Packet, new_state: State) -> State:
        if isinstance(packet, p.ConnAck):
            if self.protocol_version is V5:
                self._limits = packet
            if packet.maximum_packet_size is not None:
                self.peer_maximum_packet_size = packet.maximum_packet_size
            if packet.reason_code:
                return State.DISCONNECTED
        return new_state


def _check_against_connack(packet: p.Publish, connack: p.ConnAck) -> None:
    """See that a Client publishes nothing that the Server said it does not take.

    Raises:
      LocalProtocolError: it would.
    """
    if connack.maximum_qos is not None and packet.qos > connack.maximum_qos:  # [MQTT5-3.2.2-11]
        raise LocalProtocolError(f"a PUBLISH with QoS {packet.qos}; the Maximum QoS is {connack.maximum_qos}")
    if packet.retain and connack.retain_available == 0:  # [MQTT5-3.2.2-14]
        raise LocalProtocolError("a PUBLISH with RETAIN; the Server retains nothing")
    maximum = connack.topic_alias_maximum or 0
    if packet.topic_alias is not None and packet.topic_alias > maximum:  # [MQTT5-3.2.2-17], [MQTT5-3.2.2-18]
        raise LocalProtocolError(f"a PUBLISH with Topic Alias {packet.topic_alias}; the maximum is {maximum}")
