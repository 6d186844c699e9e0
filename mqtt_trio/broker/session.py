"""Session state [MQTT5-4.1]: subscriptions, packet identifiers, QoS 1 and 2 flows, the queue of waiting messages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from mqtt_trio.broker.message import Message
from mqtt_trio.broker.outbox import ClientLink, Outbox
from mqtt_trio.broker.queues import NOTHING_WAITS, BurstQueue, MessageQueue
from mqtt_trio.broker.router import SubscriptionOptions
from mqtt_trio.protocol.codes import ReasonCode
from mqtt_trio.protocol.packets import Will

if TYPE_CHECKING:
    from mqtt_trio.broker.audience import Audience
    from mqtt_trio.broker.shares import ShareGroup

NEVER: Final = 0xFFFF_FFFF
"""Session Expiry Interval that means the session does not expire [MQTT5-3.1.2.11.2]."""


@attrs.define
class Delivery:
    """One message on its way to one client: what a redelivery must repeat."""

    message: Message
    qos: int
    retain: bool = False
    subscription_identifiers: tuple[int, ...] = ()
    group: ShareGroup | None = None
    """Whose message it is, when it came by a Shared Subscription."""
    number: int = 0
    """Of its row in the store, 0 without one; negative: it has none, and waits for others (`Journal.gated`)."""
    turn: int = 0
    """Of a delivery that waits: how many had come to its queue with it."""


FastDelivery: TypeAlias = tuple[bytes, bytes, int, int]
"""A delivery of the fast lane: the frame up to its Packet Identifier, the rest behind it, the MQTT version (4 for all
3.x), the number of its row in the store (0 without one)."""


class Released:
    """A QoS 2 delivery whose PUBREC has come: only its PUBREL is owed [MQTT5-4.3.3-4]."""

    __slots__ = ("number",)
    qos: Final = 2

    def __init__(self, number: int) -> None:
        self.number = number
        """Of its row in the store, 0 without one."""


RELEASED: Final = Released(0)
Inflight: TypeAlias = Delivery | FastDelivery | Released


def qos_of(entry: Inflight) -> int:
    """Return the QoS of a delivery."""
    return entry[0][0] >> 1 & 3 if isinstance(entry, tuple) else entry.qos


def number_of(entry: Inflight) -> int:
    """Return the number of a delivery's row in the store, 0 without one."""
    return entry[3] if isinstance(entry, tuple) else entry.number


@attrs.define
class PendingAck:
    """A PUBACK or PUBREC that may not go yet."""

    frame: bytes
    qos: int
    packet_id: int
    waiting_for: int
    """Holds that are not released."""
    on_refused: Callable[[ReasonCode], bytes]
    """What goes instead when a hold was released with a reason."""
    refused: ReasonCode | None = None
    kept: tuple[int, int] | None = None
    """Which deliveries of the message the store must have first (`journal.Kept`); None: it needs no store."""
    link: ClientLink | None = None
    """The connection among whose `Session.acks` it is."""
    negative: bool = False
    """Whether `frame` says no already, and only waits for its turn."""


class Session:
    """One client's session; it outlives its network connections by its expiry interval."""

    __slots__ = (
        "acks",
        "audiences",
        "bursts",
        "carried",
        "client_id",
        "connected_at",
        "deadline",
        "ended_at",
        "expiry_interval",
        "gates",
        "inflight",
        "last_number",
        "link",
        "next_id",
        "number",
        "outbox",
        "queue",
        "received",
        "received_kept",
        "resending",
        "send_maximum",
        "shares",
        "subscriptions",
        "user_name",
        "will",
        "will_at",
    )

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.user_name: str | None = None
        self.link: ClientLink | None = None
        self.outbox: Outbox | None = None
        self.subscriptions: dict[str, SubscriptionOptions] = {}
        self.shares: dict[str, ShareGroup] = {}
        """Its share groups, by `$share/NAME/FILTER`."""
        self.inflight: dict[int, Inflight] = {}
        """Outbound, by Packet Identifier, in the order of sending [MQTT3-4.6.0-1]."""
        self.resending: OrderedDict[int, None] = OrderedDict()
        """Packet Identifiers of `inflight` that this connection has still to repeat, in order, before anything new."""
        self.bursts = BurstQueue()
        """Retained messages for new subscriptions, still to be sent, before the queue."""
        self.queue: MessageQueue = NOTHING_WAITS
        """`own_queue` is the one to add to."""
        self.received: set[int] = set()
        """Inbound QoS 2 Packet Identifiers whose PUBREL has not come [MQTT5-4.3.3-10]."""
        self.carried: set[int] | None = None
        """Those of them that were there when this connection began."""
        self.received_kept: dict[int, int] = {}
        """Those of them that are in the store, and what stands there for them (`Batch.received`)."""
        self.gates: dict[int, PendingAck | None] = {}
        """Those of them whose message went to its subscribers but has not been let go by all taps; it may outlive the
        connection. None: what they said is not known any more, or was no; they are asked again when it comes again."""
        self.number = 0
        """In the store; 0: the session ends with its connection or with the process."""
        self.last_number = 0
        """In the store, of the delivery that was sent last on the full path."""
        self.next_id = 1
        self.send_maximum = 65_535
        """Outbound QoS 1 and 2 messages that may be unacknowledged: the lower of both sides' bounds."""
        self.acks: list[PendingAck] = []
        """Acknowledgements that wait, in the order in which they must go [MQTT3-4.6.0-2]; of this connection only."""
        self.expiry_interval = 0
        self.will: Will | None = None
        self.will_at: float | None = None
        """Monotonic instant at which the Will of the ended connection is due."""
        self.connected_at = 0.0
        """Monotonic instant at which its last connection began."""
        self.ended_at: float | None = None
        """Monotonic instant at which its last connection ended."""
        self.deadline: float | None = None
        """Monotonic instant at which the disconnected session ends."""
        self.audiences: set[Audience] = set()
        """Route cache entries that name this session."""

    def forget_messages(self) -> None:
        """The session is at its end: route caches may still name it, its messages must not stay with it."""
        self.queue.drop_all()
        self.bursts = BurstQueue()
        self.inflight.clear()
        self.resending.clear()
        self.received.clear()
        self.received_kept.clear()
        self.gates.clear()

    def own_queue(self) -> MessageQueue:
        """Return the queue of this session alone, made when the first message waits."""
        if self.queue is NOTHING_WAITS:
            self.queue = MessageQueue()
        return self.queue

    def take_id(self) -> int:
        """Return a free Packet Identifier. There is one: `send_maximum` is below their number [MQTT5-2.2.1-4]."""
        packet_id = self.next_id
        while packet_id in self.inflight:
            packet_id = packet_id + 1 if packet_id < 65_535 else 1
        self.next_id = packet_id + 1 if packet_id < 65_535 else 1
        return packet_id

    def forget_routes(self) -> None:
        """Invalidate every route that names this session: its connection or its subscriptions changed."""
        for audience in list(self.audiences):
            audience.invalidate()

    @property
    def can_take_now(self) -> bool:
        """Whether a QoS 1 or 2 message of a share group may go out at once, with nothing of its own in front."""
        outbox = self.outbox
        return (
            outbox is not None
            and outbox.room > outbox.held_size
            and not self.queue
            and not self.resending
            and not self.bursts
            and len(self.inflight) < self.send_maximum
        )

    @property
    def waiting(self) -> bool:
        """Whether anything waits for a free slot of its window."""
        return bool(self.queue or self.resending or self.bursts) or any(group.queue for group in self.shares.values())

    @property
    def persistent(self) -> bool:
        """True when the session outlives its network connection."""
        return self.expiry_interval > 0
