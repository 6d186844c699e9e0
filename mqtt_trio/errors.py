"""The one exception tree of mqtt_trio. Foreign exceptions are translated into it where they enter."""

from __future__ import annotations

from collections.abc import Sequence


class MqttTrioError(Exception):
    """Base class of everything that mqtt_trio raises on purpose."""


class RemoteProtocolError(MqttTrioError):
    """The peer broke the specification: send `reason_code` where the version allows it and close.

    Attributes:
      reason_code: the number that a 5.0 DISCONNECT or CONNACK carries (a `protocol.codes.ReasonCode`; this
        module is below the protocol and imports nothing).
    """

    def __init__(self, text: str, reason_code: int = 0x82) -> None:
        super().__init__(text)
        self.reason_code = reason_code


class MalformedPacketError(RemoteProtocolError):
    """The bytes are no packet of this protocol version [MQTT5-4.13.1-1]."""

    def __init__(self, text: str, reason_code: int = 0x81) -> None:
        super().__init__(text, reason_code)


class PacketTooLargeError(RemoteProtocolError):
    """The packet is larger than the Maximum Packet Size that its receiver set."""

    def __init__(self, text: str, reason_code: int = 0x95) -> None:
        super().__init__(text, reason_code)


class LocalProtocolError(MqttTrioError):
    """Our own side asked for something that the specification forbids: a bug in the caller."""


class ConfigError(MqttTrioError):
    """The configuration cannot be used. `problems` holds every mistake, each one line with its path."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class StoreError(MqttTrioError):
    """A store could not read or keep what it was given."""


class GatewayError(MqttTrioError):
    """A gateway cannot do its work.

    Attributes:
      retriable: True when the same attempt may succeed later without anybody's help.
    """

    def __init__(self, text: str, *, retriable: bool) -> None:
        super().__init__(text)
        self.retriable = retriable


class StartError(MqttTrioError):
    """The broker cannot start or go on (a port in use, a second live node with the same Node.Id): exit code 1."""


class WrongUsageError(MqttTrioError):
    """A command is asked for what cannot be; the text names it and the mend: exit code 2."""
