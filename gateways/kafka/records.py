"""What crosses the boundary between the Trio thread and the Kafka threads: records out, records in."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import attrs

from mqtt_trio.errors import GatewayError
from mqtt_trio.gateway import Message

RECORD_OVERHEAD = 70
"""Bytes that a record takes in its batch beside key, value and headers, at most (varints, CRC share, batch header)."""
HEADER_OVERHEAD = 10
"""Bytes that a header takes beside its key and value, at most."""

Headers = Sequence[tuple[str, bytes]]


class Reason(enum.StrEnum):
    """Why a message or a record ended as a dead letter."""

    TOO_LARGE = "too_large"
    """The record exceeds max.message.bytes of its topic, or what one request may hold."""
    REFUSED = "refused"
    """Kafka refuses the record for what it is."""
    NO_TOPIC = "no_topic"
    """There is no topic to write it to, and nobody made one in time."""
    DENIED = "denied"
    """This node may not write to the topic, and nobody allowed it in time."""
    UNENCODABLE = "unencodable"
    """No record can be made of the message."""
    MALFORMED = "malformed"
    """A record that was read is none of ours."""
    UNKNOWN_VERSION = "unknown_version"
    """A record that was read has a format version that this node does not know."""
    UNDELIVERED = "undelivered"
    """A record that was read met an error on its way to the subscribers."""


class RecordRefusedError(GatewayError):
    """A record can never be stored. It becomes a dead letter with `reason`."""

    def __init__(self, text: str, reason: Reason) -> None:
        super().__init__(text, retriable=False)
        self.reason = reason


def was_closed(failure: Exception | None) -> bool:
    """Whether a record has no outcome because its producer was closed before Kafka confirmed it: Kafka may have it."""
    return isinstance(failure, GatewayError) and failure.retriable


class Record:
    """One record on its way to Kafka. `done(None)` is called on the Trio thread when Kafka has it, `done(exc)` when
    this very record can never be stored or the bridge was closed before it was confirmed.

    One is made for each archived message, so what has its default is left to the class.
    """

    partition: int | None = None
    """None: murmur2 of `key`, as Java clients choose it, taken when the record is sent for the first time."""
    key: bytes | None = None
    value: bytes | None = None
    headers: Headers = ()
    timestamp_ms: int | None = None
    done: Callable[[Exception | None], None] | None = None
    messages = 1
    """How many MQTT messages the record carries; for counters."""
    message: Message | None = None
    """The one message that the record was made of, for its dead letter; None: there is none, or there are many."""
    size = 0
    """Bytes that the record counts for in windows and against max.message.bytes, an upper bound."""
    sent_at = 0.0
    """`time.monotonic()` when the present producer got it."""
    settled = False
    """Its outcome is known; written by the Kafka threads."""
    error: Exception | None = None
    """Its outcome, once it is settled; None: Kafka has it."""
    finished = False
    """Its outcome was handed out; written by the Trio thread."""
    suspect = False
    """A batch with it was refused for the fault of one record: it is sent alone, to see whether it was this one."""
    patient = False
    """It is on disk as well, or its publisher waits: it is not given up for want of its topic, and stays in front of
    what comes behind it."""
    watched = False
    """Whoever offered it looks for `settled` itself, in one of `ProducerBridge.collectors`: there is no `done`."""

    def __init__(
        self,
        topic: str,
        partition: int | None,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
        done: Callable[[Exception | None], None] | None = None,
        messages: int = 1,
        message: Message | None = None,
    ) -> None:
        self.topic = topic
        self.partition, self.key, self.value = partition, key, value
        self.headers, self.timestamp_ms = headers, timestamp_ms
        self.done, self.messages, self.message = done, messages, message

    def prepare(self) -> None:
        """Make what is missing of it; called by the feeder, each time before it is sent."""

    def settle(self, error: Exception | None) -> None:
        """Note its outcome (the Kafka threads)."""
        self.error = error
        self.settled = True

    def measure(self) -> int:
        """Return the bytes of the record in a batch, an upper bound."""
        size = RECORD_OVERHEAD + len(self.key or b"") + len(self.value or b"")
        for name, value in self.headers:
            size += HEADER_OVERHEAD + len(name) + len(value)
        return size


@attrs.define(eq=False)
class ConsumedRecord:
    """One record that came from Kafka."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int
    defect: str | None = None
    """Why kafka-python could not read it: it stands for the rest of a batch, and `value` is the batch, or empty."""
