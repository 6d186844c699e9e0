"""The broker as gateways and archive groups see it: `gateway.GatewayHost` over a Broker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import trio

from mqtt_trio.archive.spool import Spool, spool_path
from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.connections import Newcomer
from mqtt_trio.broker.events import EventSink
from mqtt_trio.broker.local import LocalPublisher
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.spread import Spread
from mqtt_trio.broker.tap import Tap
from mqtt_trio.gateway import Figure


class Host:
    """Implements `mqtt_trio.gateway.GatewayHost`."""

    def __init__(
        self,
        broker: Broker,
        *,
        node_id: str,
        instance_id: bytes,
        data: Path = Path("data"),
        synchronous: str = "FULL",
    ) -> None:
        """`data` is where spools are made, `synchronous` what a power loss may cost them."""
        self.broker = broker
        self.node_id = node_id
        self.instance_id = instance_id
        self.complete = trio.Event()
        self.look: Callable[[], Iterable[Figure]] = tuple
        """Gathers the node's figures."""
        self._data, self._synchronous = data, synchronous

    def add_tap(self, tap: Tap) -> None:
        """Show every accepted publish to `tap`."""
        self.broker.add_tap(tap)

    def local_client(self, name: str) -> LocalPublisher:
        """Make a publisher; `name` stands in logs."""
        return LocalPublisher(self.broker, name, trio.current_time)

    @property
    def marks(self) -> Mapping[str, bytes] | None:
        """What the store held at the start; None without a store."""
        journal = self.broker.journal
        return journal.marks if journal.keeps else None

    def note(self, source: Callable[[], Mapping[str, bytes | None]]) -> None:
        """Ask `source` for marks at each commit."""
        if self.broker.journal.keeps:
            self.broker.journal.sources.append(source)

    def commit(self) -> None:
        """Have the store commit soon."""
        if self.broker.journal.keeps:
            self.broker.journal.dirty = True
            self.broker.flush()

    def make_spool(self, name: str, max_bytes: int) -> Spool:
        """Make a spool of this name."""
        return Spool(spool_path(self._data, name), max_bytes=max_bytes, synchronous=self._synchronous)

    def watch_events(self, sink: EventSink) -> None:
        """Tell `sink` of rare facts."""
        self.broker.watch_events(sink)

    def figures(self) -> Iterable[Figure]:
        """All figures of the node, as of now."""
        return self.look()

    def watch_clients(self, watcher: Callable[[Newcomer], None]) -> None:
        """Tell `watcher` of each client that connects."""
        self.broker.connections.watchers.append(watcher)

    def connected_at(self, client_id: str) -> float | None:
        """UTC seconds at which a client that is connected now did so."""
        return self.broker.connections.connected_at(client_id)

    def taken_elsewhere(self, newcomer: Newcomer, node: str) -> bool:
        """A client has connected to another node."""
        taken = self.broker.connections.taken_elsewhere(newcomer, node, trio.current_time())
        self.broker.flush()
        return taken

    def spread_groups(self, spread: Spread) -> None:
        """Ask `spread` which messages are for the members here."""
        self.broker.shares.spread_over(spread)

    def take_waiting(self, name: str, *, ends: bool = False) -> list[Message]:
        """Take what waits for a share group without a connected member."""
        return self.broker.shares.take_waiting(name, ends=ends)

    def reroute(self) -> None:
        """Ask each tap anew where messages go."""
        self.broker.router.generation += 1

    def flush(self) -> None:
        """Send what waits in the outboxes of touched clients."""
        self.broker.flush()

    def stop_publishers(self, owner: object) -> None:
        """Handle no QoS 1 or 2 PUBLISH until `owner` lets go."""
        self.broker.stop_publishers(owner)

    def resume_publishers(self, owner: object) -> None:
        """Undo `stop_publishers`; what the paused clients had sent is handled now."""
        self.broker.resume_publishers(owner)
        self.broker.flush()
