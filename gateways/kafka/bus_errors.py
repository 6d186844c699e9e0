"""What a receiver of the bus says of bytes that it cannot use."""

from __future__ import annotations

from typing import Final

from mqtt_trio.errors import MqttTrioError

FORMAT_VERSION: Final = 2
"""Goes up with every change that an older node would misread."""


class BusRecordError(MqttTrioError):
    """These bytes are no bus record that this node can read."""


class UnknownVersionError(BusRecordError):
    """A node of another format version wrote this; `version` is what it says."""

    def __init__(self, version: int) -> None:
        super().__init__(f"bus record of format version {version}, this node reads {FORMAT_VERSION}")
        self.version = version
