"""The 15 MQTT Control Packets, data only: `decode` makes them, `encode` writes them.

Attributes carry the specification's names in snake_case. A property that is absent is None (or empty, where it may
be repeated). 3.1 and 3.1.1 packets leave everything that only 5.0 knows at its default.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import attrs

from mqtt_trio.protocol.codes import ProtocolVersion, QoS, ReasonCode

UserProperties: TypeAlias = tuple[tuple[str, str], ...]
"""User Properties in the order in which they were sent [MQTT5-3.3.2-18]."""


@attrs.define(kw_only=True)
class MessageProperties:
    """The properties of an Application Message: they travel from the publisher to every subscriber unaltered.

    Shared between messages and links, so never changed after construction.
    """

    payload_format_indicator: int | None = None
    message_expiry_interval: int | None = None
    """Seconds, as the publisher sent it; what is forwarded counts down [MQTT5-3.3.2-6]."""
    content_type: str | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    user_properties: UserProperties = ()


NO_PROPERTIES: Final = MessageProperties()


@attrs.define(kw_only=True)
class Will:
    """The Will Message of a CONNECT."""

    topic_name: str
    payload: bytes = b""
    qos: QoS = QoS.AT_MOST_ONCE
    retain: bool = False
    will_delay_interval: int = 0
    """Seconds between the end of the connection and the publication."""
    properties: MessageProperties = NO_PROPERTIES


@attrs.define(kw_only=True)
class Connect:
    client_id: str = ""
    protocol_version: ProtocolVersion = ProtocolVersion.MQTT_5_0
    clean_start: bool = True
    """Clean Session of 3.x, Clean Start of 5.0: the same bit."""
    keep_alive: int = 0
    """Seconds; 0 switches keep alive off."""
    will: Will | None = None
    user_name: str | None = None
    password: bytes | None = None
    session_expiry_interval: int | None = None
    receive_maximum: int | None = None
    maximum_packet_size: int | None = None
    topic_alias_maximum: int | None = None
    request_response_information: int | None = None
    request_problem_information: int | None = None
    authentication_method: str | None = None
    authentication_data: bytes | None = None
    user_properties: UserProperties = ()


@attrs.define(kw_only=True)
class ConnAck:
    """For 3.x `encode` maps `reason_code` through CONNECT_RETURN_CODES, and `decode` maps it back."""

    session_present: bool = False
    reason_code: ReasonCode = ReasonCode.SUCCESS
    session_expiry_interval: int | None = None
    receive_maximum: int | None = None
    maximum_qos: int | None = None
    retain_available: int | None = None
    maximum_packet_size: int | None = None
    assigned_client_identifier: str | None = None
    topic_alias_maximum: int | None = None
    reason_string: str | None = None
    user_properties: UserProperties = ()
    wildcard_subscription_available: int | None = None
    subscription_identifier_available: int | None = None
    shared_subscription_available: int | None = None
    server_keep_alive: int | None = None
    response_information: str | None = None
    server_reference: str | None = None
    authentication_method: str | None = None
    authentication_data: bytes | None = None


@attrs.define
class Publish:
    topic_name: str
    payload: bytes = b""
    qos: QoS = QoS.AT_MOST_ONCE
    retain: bool = False
    dup: bool = False
    packet_id: int | None = None
    """Present if and only if qos > 0."""
    properties: MessageProperties = NO_PROPERTIES
    topic_alias: int | None = None
    subscription_identifiers: tuple[int, ...] = ()


@attrs.define
class PubAck:
    packet_id: int
    reason_code: ReasonCode = ReasonCode.SUCCESS
    reason_string: str | None = None
    user_properties: UserProperties = ()


@attrs.define
class PubRec:
    packet_id: int
    reason_code: ReasonCode = ReasonCode.SUCCESS
    reason_string: str | None = None
    user_properties: UserProperties = ()


@attrs.define
class PubRel:
    packet_id: int
    reason_code: ReasonCode = ReasonCode.SUCCESS
    reason_string: str | None = None
    user_properties: UserProperties = ()


@attrs.define
class PubComp:
    packet_id: int
    reason_code: ReasonCode = ReasonCode.SUCCESS
    reason_string: str | None = None
    user_properties: UserProperties = ()


@attrs.define
class Subscription:
    """One Topic Filter of a SUBSCRIBE with its Subscription Options. 3.x knows the QoS only."""

    topic_filter: str
    qos: QoS = QoS.AT_MOST_ONCE
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0


@attrs.define
class Subscribe:
    packet_id: int
    subscriptions: tuple[Subscription, ...]
    subscription_identifier: int | None = None
    user_properties: UserProperties = ()


@attrs.define
class SubAck:
    """`reason_codes` has one entry per subscription, in order; for 3.x every failure is written as 0x80."""

    packet_id: int
    reason_codes: tuple[ReasonCode, ...]
    reason_string: str | None = None
    user_properties: UserProperties = ()


@attrs.define
class Unsubscribe:
    packet_id: int
    topic_filters: tuple[str, ...]
    user_properties: UserProperties = ()


@attrs.define
class UnsubAck:
    """`reason_codes` is written by 5.0 only."""

    packet_id: int
    reason_codes: tuple[ReasonCode, ...] = ()
    reason_string: str | None = None
    user_properties: UserProperties = ()


@attrs.define
class PingReq:
    pass


@attrs.define
class PingResp:
    pass


@attrs.define
class Disconnect:
    reason_code: ReasonCode = ReasonCode.NORMAL_DISCONNECTION
    session_expiry_interval: int | None = None
    reason_string: str | None = None
    server_reference: str | None = None
    user_properties: UserProperties = ()


@attrs.define
class Auth:
    reason_code: ReasonCode = ReasonCode.SUCCESS
    authentication_method: str | None = None
    authentication_data: bytes | None = None
    reason_string: str | None = None
    user_properties: UserProperties = ()


Packet: TypeAlias = (
    Connect
    | ConnAck
    | Publish
    | PubAck
    | PubRec
    | PubRel
    | PubComp
    | Subscribe
    | SubAck
    | Unsubscribe
    | UnsubAck
    | PingReq
    | PingResp
    | Disconnect
    | Auth
)
