"""A broker with a store, which is killed, stopped and started again, and whose disk now and then takes nothing."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from typing import Final

import attrs
import trio
import trio.testing

from mqtt_trio.broker.broker import Broker
from mqtt_trio.broker.fast_lane import FastLane
from mqtt_trio.broker.journal import Journal
from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.recovery import Recovery
from mqtt_trio.broker.store import Batch
from mqtt_trio.protocol.codes import ReasonCode
from tests.simulation.direct import EPOCH, DirectConnection, DirectWorld
from tests.simulation.disks import Disk
from tests.simulation.network import Peer
from tests.simulation.plan import CALM_AT

AFTER_ALL: Final = 0.3
"""How likely a disk that reports an error has kept the batch all the same."""
NOBODY: Final = -1
"""Who the events of the broker itself belong to."""


@attrs.frozen(kw_only=True)
class Fate:
    """What happens to a broker and its store."""

    kills: tuple[float, ...] = ()
    stops: tuple[float, ...] = ()
    """Instants at which it is stopped as an operator would, and started again."""
    outages: tuple[tuple[float, float], ...] = ()
    """From when to when the store takes nothing."""
    commit_time: float = 0.01
    """Seconds that a commit takes at most."""


def make_fate(seed: int) -> Fate:
    """Choose the fate of a seed: one that ends with the calm."""
    rng = random.Random(f"fate {seed}")

    def instants(most: int) -> tuple[float, ...]:
        return tuple(sorted(0.3 + rng.random() * (CALM_AT - 0.3) for _ in range(most)))

    outages: tuple[tuple[float, float], ...] = ()
    if rng.random() < 0.5:
        outages = tuple((at, at + 0.1 + rng.random() * 2) for at in instants(rng.randint(1, 3)))
    return Fate(
        kills=instants(rng.randint(1, 4)),
        stops=instants(rng.choice((0, 0, 1, 2))),
        outages=outages,
        commit_time=rng.choice((0.002, 0.02, 0.1, 0.4)),
    )


class DurableWorld(DirectWorld):
    """Broker after broker on one disk."""

    holds = True

    def __init__(
        self, clock: trio.testing.MockClock, limits: Limits, lane: type[FastLane], disk: Disk, fate: Fate, seed: int
    ) -> None:
        self.disk = disk
        self.fate = fate
        self.rng = random.Random(f"disk {seed}")
        self.out: Batch | None = None
        """The batch that is being written."""
        self.connections: list[DirectConnection] = []
        self.past: Counter[str] = Counter()
        """The metrics of brokers that are gone."""
        super().__init__(clock, limits, lane)
        for at in fate.kills:
            self.after(at, NOBODY, self.kill)
        for at in fate.stops:
            self.after(at, NOBODY, self.stop)

    def make_broker(self) -> Broker:
        numbers = iter(range(1_000_000))
        broker = Broker(
            self.limits,
            random_id=lambda: f"auto-{next(numbers)}",
            wall_offset=EPOCH - self.began_at,
            journal=Journal(),
        )
        broker.connections.make_lane = self.lane
        broker.journal.changed = self._begin_commit
        Recovery(broker, self.disk.load(), trio.current_time()).run()
        return broker

    def open(self, peer: Peer) -> DirectConnection:
        connection = super().open(peer)
        assert isinstance(connection, DirectConnection)
        self.connections.append(connection)
        return connection

    def settle(self) -> None:
        if self.broker.journal.failing is not None:
            self.failed_at = self.now
        if self.broker.touched or self.broker.journal.dirty:
            self.broker.flush()

    def excuses(self, reason_code: ReasonCode | None) -> bool:
        if reason_code is ReasonCode.SERVER_SHUTTING_DOWN:
            return True
        return reason_code is ReasonCode.QUOTA_EXCEEDED and self.broker.journal.failing is not None

    # Commits

    def _begin_commit(self) -> None:
        if self.out is None:
            self.out = self.broker.keeper.take()
            self._commit_later()

    def _commit_later(self, delay: float = 0.0) -> None:
        delay += self.rng.random() * self.fate.commit_time
        self.after(delay, NOBODY, partial(self._end_commit, self.life))

    def _end_commit(self, life: int) -> None:
        if life != self.life:
            return
        assert self.out is not None
        batch, keeper = self.out, self.broker.keeper
        if self.failing:
            if self.rng.random() < AFTER_ALL and not self._ends_doubtful:
                self.disk.commit(batch)
            self.outages += self.broker.journal.failing is None
            keeper.failed(batch, "no space", trio.current_time())
            self.settle()
            self.out = keeper.take()
            self._commit_later(0.05)
            return
        self._commit(batch)
        self.settle()

    @property
    def failing(self) -> bool:
        """Whether the disk takes nothing."""
        return any(begin <= self.now < end for begin, end in self.fate.outages)

    @property
    def _ends_doubtful(self) -> bool:
        """Whether the broker will be killed before its disk takes something again: what publishers were told is not
        kept would then come."""
        until = max(end for begin, end in self.fate.outages) + self.fate.commit_time + 1
        return any(self.now <= at <= until for at in (*self.fate.kills, *self.fate.stops))

    def _commit(self, batch: Batch) -> None:
        self.disk.commit(batch)
        self.out = None
        self.commits += 1
        self.broker.keeper.committed(trio.current_time())

    def commit_all(self) -> None:
        """Have the disk take what there is."""
        if self.out is not None:
            self._commit(self.out)
        while self.broker.journal.dirty:
            self._commit(self.broker.keeper.take())

    # Ends and beginnings

    def kill(self) -> None:
        """The broker is killed; the next one begins at once with what the disk has."""
        self.kills += 1
        for connection in self.connections:
            connection.killed(arrives=connection.peer.rng.random() < 0.6)
        self.disk.crash(self.out, self.rng)
        self._begin_again(killed=True)

    def stop(self) -> None:
        """The broker is stopped and started again; while its disk takes nothing, it can only be killed."""
        if self.failing:
            self.kill()
            return
        for connection in self.connections:
            if not connection.link.ended:
                connection.link.end(ReasonCode.SERVER_SHUTTING_DOWN, "the server shuts down")
        self.commit_all()
        self.broker.flush()
        self.disk.close()
        for connection in self.connections:
            connection.killed(arrives=True)
        self._begin_again(killed=False)

    def _begin_again(self, *, killed: bool) -> None:
        self.past.update(self.broker.metrics.snapshot())
        self.connections.clear()
        self.life += 1
        self.last_life_at = self.now
        self.out = None
        self.outages_before_kill = self.outages * killed
        self.outages = 0
        for client in self.clients:
            client.restarted(killed=killed)
        self.broker = self.make_broker()
        self.settle()
