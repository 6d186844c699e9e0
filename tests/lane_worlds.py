"""A broker with a few clients for the differential test of the fast lane: what happens there, and all of its state."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs

from mqtt_trio.broker.access import AllowEverything, Principal
from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.events import Event, MessageDropped
from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.recovery import Recovery
from mqtt_trio.broker.session import Delivery, Inflight, Session
from mqtt_trio.broker.shares import ShareGroup
from mqtt_trio.broker.store import MemoryStore
from mqtt_trio.broker.tap import Answer, FrameRun, Hold, Refused, TapRoute, read_run
from mqtt_trio.protocol.codes import ProtocolVersion, ReasonCode
from mqtt_trio.protocol.encode import encode
from mqtt_trio.protocol.packets import Connect
from mqtt_trio.server.link import Link

V31, V4, V5 = ProtocolVersion.MQTT_3_1, ProtocolVersion.MQTT_3_1_1, ProtocolVersion.MQTT_5_0


class NoLane(FastLane):
    """Takes nothing: everything goes the full path."""

    __slots__ = ()

    def handle(self, data: bytes, pos: int, now: float) -> int:
        return pos


class RecordingLink(Link):
    """A Link whose frames are collected; `frozen` makes it a reader that stops."""

    __slots__ = ("again", "frozen", "now", "sent")

    def __init__(self, broker: Broker, name: str) -> None:
        super().__init__(broker, peer=name, listener="test", connect_timeout=10)
        self.sent = b""
        self.now = 0.0
        self.frozen = self.again = False

    def flush(self) -> None:
        if self.frozen:
            return
        frames, self.outbox.frames = self.outbox.frames, []
        self.sent += b"".join(frames)
        self.outbox.room = self.outbox.limit
        if self.outbox.starved and not self.ended:
            self.broker.has_room(self.outbox, self.now)

    def send_raw(self, data: bytes) -> None:
        raise AssertionError("no WebSocket here")

    def reading_changed(self) -> None:
        pass

    def resume_soon(self) -> None:
        self.again = True


class MoodyTap:
    """A tap that keeps what it sees. It holds some messages, some holds are over at once, and it may refuse some."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.seen: list[tuple[object, ...]] = []
        self.holds: list[Hold] = []

    def route(self, topic_name: str) -> TapRoute | None:
        return self if topic_name.startswith("a") else None

    def take_run(self, run: FrameRun) -> Answer:
        messages = read_run(run)
        assert len(messages) == run.count
        answer: Answer = None
        for message in messages:
            answer = self.take(message)
        return answer

    def take(self, message: Message) -> Answer:
        self.seen.append(attrs.astuple(message, recurse=False))
        if not message.qos:
            return None
        turn = len(self.seen) % 12
        if self.refuses and turn == 5:
            return Refused(ReasonCode.QUOTA_EXCEEDED)
        if turn % 3 == 0:
            hold = Hold()
            if turn == 3:
                hold.release(ReasonCode.UNSPECIFIED_ERROR if self.refuses else None)
            else:
                self.holds.append(hold)
            return hold
        return None


class Rules(AllowEverything):
    """Nobody but c0 may publish to x; c1 does not get a/b."""

    def may_publish(self, principal: Principal, topic_name: str) -> bool:
        return topic_name != "x" or principal.client_id == "c0"

    def may_receive(self, principal: Principal, topic_name: str) -> bool:
        return topic_name != "a/b" or principal.client_id != "c1"


@attrs.define(kw_only=True)
class Setup:
    """What a world is made of."""

    limits: Limits
    outbox_bytes: int
    """Less than `Limits` allows, so that outboxes fill quickly."""
    tapped: bool = False
    refuses: bool = False
    ruled: bool = False
    kept: bool = False
    """Whether sessions that last are in a store; then events `commit` and `fail` say what becomes of changes."""


class World:
    """A broker and its clients; `do` makes one thing happen."""

    def __init__(self, lane: type[FastLane], setup: Setup) -> None:
        numbers = iter(range(1000))
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.broker = Broker(
            setup.limits,
            random_id=lambda: f"auto-{next(numbers)}",
            wall_offset=1000.0,
            authorizer=Rules() if setup.ruled else None,
            events=self._event,
            journal=Journal() if setup.kept else None,
        )
        self.store = MemoryStore()
        self.broker.connections.make_lane = lane
        self.setup = setup
        self.now = 0.0
        self.tap = MoodyTap(setup.refuses)
        if setup.tapped:
            self.broker.add_tap(self.tap)
        self.clients: dict[str, RecordingLink] = {}
        self.links: list[RecordingLink] = []
        self.trace: list[int] = []

    def _event(self, event: Event) -> None:
        if isinstance(event, MessageDropped):
            self.dropped[event.reason, event.client_id] += event.count

    def connect(self, client_id: str, version: ProtocolVersion = V4, **fields: Any) -> RecordingLink:
        link = RecordingLink(self.broker, f"{client_id}#{len(self.links)}")
        link.outbox.limit = link.outbox.room = self.setup.outbox_bytes
        self.links.append(link)
        self.clients[client_id] = link
        self.feed(link, encode(Connect(client_id=client_id, protocol_version=version, **fields), version))
        return link

    def feed(self, link: RecordingLink, data: bytes) -> None:
        link.now = self.now
        link.receive(data, self.now)
        self._settle()

    def _settle(self) -> None:
        """Let links go on that gave others their turn, send what is to be sent."""
        waiting = True
        while waiting:
            waiting = False
            for link in self.links:
                if link.again:
                    link.again, waiting = False, True
                    link.resume(link)
        self.broker.flush()
        while self.broker.run_deferred(self.now):
            self.broker.flush()

    def do(self, what: str, who: str, argument: Any) -> None:
        """Make one event of a script happen."""
        if what == "feed":
            self.feed(self.clients[who], argument)
        elif what == "connect":
            self.connect(who, **argument)
        elif what == "cut":
            self.clients[who].end(None, "cut")
        elif what == "freeze":
            self.clients[who].frozen = True
        elif what == "thaw":
            self.clients[who].frozen = False
            self.clients[who].flush()
        elif what == "release":
            holds, self.tap.holds = self.tap.holds, []
            for hold in holds:
                hold.release(argument)
        elif what == "stop":
            self.broker.stop_publishers(self)
        elif what == "go":
            self.broker.resume_publishers(self)
        elif what == "rights":
            self.broker.rights_changed()
        elif what == "commit":
            self.commit()
        elif what == "fail":
            if self.broker.journal.dirty:
                self.broker.keeper.failed(self.broker.keeper.take(), "no space", self.now)
        else:
            self.now += argument
        self._settle()
        self.trace.append(sum(len(link.sent) for link in self.links))

    def commit(self) -> None:
        """Have the store take what there is to take."""
        if self.broker.journal.dirty:
            batch = self.broker.keeper.take()
            self.store.commit(batch)
            self.broker.keeper.committed(self.now)

    def restarted(self) -> dict[str, Any]:
        """The state of the broker that the store would make."""
        self.broker.retained.drop_expired(self.now + self.broker.wall_offset)
        while self.broker.journal.dirty:  # a commit may let a publisher go on
            self.commit()
            self._settle()
        world = World(FastLane, self.setup)
        world.now = self.now
        Recovery(world.broker, self.store.load(), self.now).run()
        return world.state()

    def state(self) -> dict[str, Any]:
        """Everything that anybody could tell the two ways apart by."""
        metrics = self.broker.metrics.snapshot()
        metrics.pop("fast_lane_messages")
        state: dict[str, Any] = {
            "trace": self.trace,
            "sent": {link.peer: link.sent for link in self.links},
            "ended": {link.peer: (link.ended, link.end_reason, link.end_text, link.paused) for link in self.links},
            "room": {link.peer: (link.outbox.room, link.outbox.starved) for link in self.links},
            "held": {
                link.peer: (
                    link.outbox.held_acks,
                    link.outbox.held_size,
                    [(held.number, held.release()) for held in link.outbox.held],
                )
                for link in self.links
            },
            "metrics": metrics,
            "dropped": self.dropped,
            "seen": self.tap.seen,
            "retained": sorted((m.topic_name, m.payload) for m in self.broker.retained),
            "publishers stopped": len(self.broker.stopped),
            "groups": {group.name: self._group(group) for group in self.broker.shares.groups.values()},
        }
        for client_id, session in self.broker.connections.sessions.items():
            state[client_id] = self._session(session)
        return state

    @staticmethod
    def _group(group: ShareGroup) -> dict[str, Any]:
        return {
            "members": [(session.client_id, options) for session, options in group.members.items()],
            "kept": group.number != 0,
            "turns": [session.client_id for session in group.turns],
            "queue": [(d.qos, d.number != 0, _told(d.message)) for d in group.queue],
            "queue size": group.queue.size,
        }

    def _session(self, session: Session) -> dict[str, Any]:
        return {
            "inflight": [(packet_id, self._inflight(session, entry)) for packet_id, entry in session.inflight.items()],
            "resending": list(session.resending),
            "queue": [
                (d.qos, d.retain, d.subscription_identifiers, d.number != 0, _told(d.message)) for d in session.queue
            ],
            "queue size": session.queue.size,
            "next_id": session.next_id,
            "received": session.received,
            "received, kept": session.received_kept,
            "kept": session.number != 0,
            "expiry interval": session.expiry_interval,
            "expiry": (session.ended_at, session.will_at),
            "subscriptions": session.subscriptions,
            "acks": [(ack.frame, ack.qos, ack.packet_id, ack.waiting_for) for ack in session.acks],
        }

    def _inflight(self, session: Session, entry: Inflight) -> object:
        if isinstance(entry, tuple):
            entry = self.broker.sender.from_fast(entry, session, self.now)
        if isinstance(entry, Delivery):
            group = entry.group.name if entry.group is not None else None
            kept = entry.number != 0
            return entry.qos, entry.retain, entry.subscription_identifiers, group, kept, _told(entry.message)
        return "released", entry.number != 0


def _told(message: Message) -> tuple[object, ...]:
    """What a message tells its receiver."""
    return message.topic_name, message.payload, message.properties
