"""Which nodes are on the bus, and which of two live nodes with one `Node.Id` is the later one [K21].

Kafka's log decides: every node writes a HELLO when it listens; where it lies in the log is the node's rank. A live
node that reads the HELLO of a later one with its own `Node.Id` answers ALIVE, and the later one ends. All records
about nodes go to one partition, so all nodes see them in one order. Nodes announce themselves every few
seconds with their rank, so two that could not see each other at the start (Kafka was away) find out later. What a
node wrote before it was killed proves nothing: only records behind the reader's own HELLO count.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from typing import Final

import attrs
import trio

from gateways.kafka.bus_records import Header, Kind
from gateways.kafka.node_facts import NodeFacts

log = logging.getLogger("gateways.kafka.nodes")

GRACE: Final = 0.5
"""Seconds that a new node waits behind its own HELLO for the answer of an earlier node with its id."""
ANNOUNCE_INTERVAL: Final = 5.0
"""Seconds between announcements."""
SILENCE: Final = 4
"""Announcements that a node may miss before it no longer counts as live."""
MAX_NODES: Final = 4096
"""Nodes that are remembered. Outcome: the one that was silent for longest is forgotten."""

UNTOLD: Final = NodeFacts("", 0, 0.0)
"""Facts of a node that has not told any."""

Send = Callable[[Kind, NodeFacts, Callable[[], None]], None]
"""Writes a record about this node; the callback is called when its outcome is known."""


@attrs.define
class KnownNode:
    """Another instance, as it announced itself."""

    node_id: str
    facts: NodeFacts
    seen_at: float
    """Monotonic seconds."""


class Nodes:
    """Announces this node and watches the others. Trio thread only.

    Attributes:
      joined: set when this node's HELLO was read back and nobody objected within the grace.
      conflict: set when this node has to end; `conflict_text` says why and what to do.
    """

    def __init__(self, node_id: str, instance_id: bytes, facts: NodeFacts, send: Send) -> None:
        self.node_id = node_id
        self.instance_id = instance_id
        self.facts = facts
        self.joined = trio.Event()
        self.conflict = trio.Event()
        self.conflict_text = ""
        self.known: dict[bytes, KnownNode] = {}
        self.changed: Callable[[str, bytes, bool], None] = lambda node_id, instance_id, live: None
        """Told of each instance that is live, or is so no more."""
        self.silent: Callable[[str], None] = lambda node_id: None
        """Told of each node that fell silent without a goodbye."""
        self.deaf: Callable[[], bool] = lambda: False
        """Kafka is away: that nobody is heard then says nothing about them."""
        self._send = send
        self._hello_read = trio.Event()
        self._unsettled = 0
        self._ended = False
        self._answered: dict[bytes, float] = {}

    # --- this node

    async def run(self) -> None:
        """Join, then announce until cancelled. Begin when every position is known."""
        self._say(Kind.HELLO, self.facts)
        await self._hello_read.wait()
        await trio.sleep(GRACE)
        if self.conflict.is_set():
            return
        self.joined.set()
        while True:
            if not self._unsettled:  # Kafka is away: one announcement waits already
                self._say(Kind.ANNOUNCE, self.facts)
            await trio.sleep(ANNOUNCE_INTERVAL)
            self._forget_silent()

    def goodbye(self) -> None:
        """Tell the others that this node ends in good order; the last word."""
        self._say(Kind.GOODBYE, self.facts)
        self._ended = True

    def _say(self, kind: Kind, facts: NodeFacts) -> None:
        if not self._ended:
            self._unsettled += 1
            self._send(kind, facts, self._settled)

    def _settled(self) -> None:
        self._unsettled -= 1

    def read_back(self, kind: Kind, partition: int, offset: int) -> None:
        """A record of this very instance came back. A HELLO that a retry doubled counts where it was first."""
        if kind is Kind.HELLO and not self._hello_read.is_set():
            self.facts = attrs.evolve(self.facts, hello_partition=partition, hello_offset=offset)
            self._hello_read.set()

    # --- the others

    def heard(self, header: Header, facts: NodeFacts, partition: int, offset: int) -> None:
        """Another instance wrote a record about itself; it lies at `offset` of `partition`."""
        if header.kind is Kind.GOODBYE:
            if (node := self._pop(header.instance_id)) is not None:
                log.info("node %s (%s, pid %d) left the bus", node.node_id, facts.host, facts.pid)
            return
        if header.kind is not Kind.HELLO:  # a HELLO may be refused yet
            self._remember(header, facts)
        if header.node_id == self.node_id:
            self._same_id(header, facts, partition, offset)

    def is_alive(self, header: Header) -> None:
        """Another instance wrote something that only a live node writes, perhaps before this one heard its facts."""
        known = self.known.get(header.instance_id)
        self._remember(header, known.facts if known is not None else UNTOLD)

    def _remember(self, header: Header, facts: NodeFacts) -> None:
        known = self.known.pop(header.instance_id, None)
        if facts is not UNTOLD and (known is None or known.facts is UNTOLD):
            log.info("node %s (%s, pid %d) is on the bus", header.node_id, facts.host, facts.pid)
        if known is None and len(self.known) >= MAX_NODES:
            self._pop(next(iter(self.known)))
        self.known[header.instance_id] = KnownNode(header.node_id, facts, trio.current_time())
        if known is None:
            self.changed(header.node_id, header.instance_id, True)

    def _pop(self, instance_id: bytes) -> KnownNode | None:
        node = self.known.pop(instance_id, None)
        if node is not None:
            self.changed(node.node_id, instance_id, False)
        return node

    def _same_id(self, header: Header, facts: NodeFacts, partition: int, offset: int) -> None:
        own = self.facts
        if header.kind is Kind.HELLO:
            facts = attrs.evolve(facts, hello_partition=partition, hello_offset=offset)
        if header.kind is Kind.ALIVE and facts.target != self.instance_id:
            return
        if own.hello_offset < 0 or facts.hello_offset < 0:
            return  # whoever has no rank yet will have the later one, and is told then
        if partition == own.hello_partition and offset < own.hello_offset:
            return  # written before we began: its writer may be dead by now
        if _is_earlier(own, facts):
            self._object(header.instance_id)
        elif header.kind is not Kind.HELLO:
            self._give_way(header.instance_id, facts)

    def _object(self, instance_id: bytes) -> None:
        now = trio.current_time()
        if now - self._answered.get(instance_id, -GRACE) < GRACE / 2:
            return  # a flood is not answered with a flood
        if len(self._answered) >= MAX_NODES:
            self._answered.clear()
        self._answered[instance_id] = now
        log.error("a second node with Node.Id %s has come; it is told to end", self.node_id)
        self._say(Kind.ALIVE, attrs.evolve(self.facts, target=instance_id))

    def _give_way(self, instance_id: bytes, other: NodeFacts) -> None:
        if self.conflict.is_set():
            return
        since = datetime.datetime.fromtimestamp(other.started_at, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.conflict_text = (
            f"Node.Id {self.node_id!r} is taken: the node on host {other.host}, pid {other.pid}, running since {since} "
            f"(instance {instance_id.hex()}), has it on the same Kafka bus. Give this node an id of its own (Node.Id), "
            "or stop the other one first"
        )
        self.conflict.set()

    def _forget_silent(self) -> None:
        now = trio.current_time()
        if self.deaf():
            for node in self.known.values():
                node.seen_at = now
        limit = now - SILENCE * ANNOUNCE_INTERVAL
        for instance_id, node in list(self.known.items()):
            if node.seen_at < limit:
                self._pop(instance_id)
                self.silent(node.node_id)
                log.warning("node %s (%s, pid %d) is silent", node.node_id, node.facts.host, node.facts.pid)


def _is_earlier(one: NodeFacts, other: NodeFacts) -> bool:
    """Say which of two nodes was first: by their place in the log, by the clock where that has no order."""
    if one.hello_partition == other.hello_partition:
        return one.hello_offset < other.hello_offset
    return one.started_at <= other.started_at  # the topic grew in between: the id lives in another partition now
