"""How far a node has come in the bus topic, and what it must remember to go on there after a crash [K5].

The positions are marks in the node's own store: they are committed together with the deliveries that the records before
them led to, so that after a kill at any instant each message is either delivered and behind the position, or neither.
With the position goes what tells a record that a producer wrote twice: the last sequence of each writer. The offsets of
the group `mqtt-trio-bus-NODE` in Kafka follow, for people and tools to see.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Mapping
from typing import Final

import attrs

from gateways.kafka.poller import Began as BeganAt

log = logging.getLogger("gateways.kafka.bus")

MARK_VERSION: Final = 1
HEAD: Final = struct.Struct(">BQQH")
WRITER: Final = struct.Struct(">18sQ")
ABOUT: Final = struct.Struct(">Bd")
INSTANCE_SIZE: Final = 16
MAX_WRITERS: Final = 4096
"""Writers of one partition whose last sequence is remembered. Outcome: the one that was silent for longest is
forgotten, and a record of it that comes twice then counts twice."""
NOTED_WRITERS: Final = 64
"""Of them, those that are noted in the store."""
MAX_LIVES: Final = 60
"""Lives of this node, this one included, whose records it takes for its own; a KiB of ids."""
PATIENCE: Final = 600.0
"""Seconds for which the rest of a body that came in part is waited for over a restart."""

Writer = bytes
"""An instance id and the number of one of its streams (`Header.writer`)."""


@attrs.define
class Begun:
    """Parts of a body that are there already."""

    offset: int
    """Of the first one."""
    at: float = 0.0
    """UTC seconds at which the last one came."""
    parts: list[bytes] = attrs.Factory(list)
    size: int = 0
    next_sequence: int = 0


@attrs.define(eq=False)
class Position:
    """Where one partition stands. What lies in front of `applied` was dealt with in an earlier life, and is read again
    at most for the sake of a body that began there; what lies in front of `backlog_end` was published before this life.
    """

    applied: int = 0
    next: int = 0
    """Offset behind the last record that came."""
    backlog_end: int = 0
    writers: dict[Writer, int] = attrs.Factory(dict)
    """Last sequence of each, those that spoke last behind."""
    begun: dict[Writer, Begun] = attrs.Factory(dict)
    noted: bool = True
    """Nothing has changed since it was handed out as a mark."""

    def passed(self, offset: int) -> None:
        """The record at `offset` has been dealt with."""
        self.next = offset + 1
        self.noted = False

    def mark(self, now: float) -> bytes:
        """Write it down."""
        waiting = [begun.offset for begun in self.begun.values() if now - begun.at < PATIENCE]
        writers = list(self.writers.items())[-NOTED_WRITERS:]
        head = HEAD.pack(MARK_VERSION, min([self.next, *waiting]), max(self.applied, self.next), len(writers))
        return head + b"".join([WRITER.pack(writer, sequence) for writer, sequence in writers])

    @classmethod
    def of_mark(cls, mark: bytes) -> Position:
        """Read what `mark` wrote.

        Raises:
          ValueError: it did not.
        """
        try:
            version, start, applied, count = HEAD.unpack_from(mark)
            if version != MARK_VERSION or len(mark) != HEAD.size + count * WRITER.size:
                raise ValueError(f"a position of version {version}, {len(mark)} bytes")
            writers = dict(WRITER.iter_unpack(mark[HEAD.size :]))
        except struct.error as exc:
            raise ValueError(f"no position: {exc}") from None
        return cls(applied=applied, next=start, writers=writers)


class Positions:
    """Positions in one topic, from the node's store and back. Trio thread only.

    Attributes:
      offsets: where to go on reading, by partition; empty: at the end.
      noted_at: UTC seconds of the checkpoint that `offsets` are from.
      lives: instance ids of earlier lives of this node, the last one first.
      identity: what tells the topic from an earlier one of its name, None: not known.
    """

    def __init__(
        self,
        topic: str,
        instance_id: bytes,
        marks: Mapping[str, bytes] | None,
        *,
        age: float,
        utc: Callable[[], float],
    ) -> None:
        """`marks`: what the store held, None without one; `age`: seconds, an older checkpoint is not used."""
        self.offsets: dict[int, int] = {}
        self.noted_at = 0.0
        self.lives: tuple[bytes, ...] = ()
        self._prefix = f"kafka.bus/{topic}/"
        self._about = f"kafka.bus/{topic}"
        self._identity = f"kafka.bus.topic/{topic}"
        self.identity: str | None = None
        self._utc = utc
        self._partitions: dict[int, Position] = {}
        self._gone: dict[str, bytes | None] = {}
        """Marks that are not true any more."""
        self._known = False
        self._read(marks or {}, age)
        self._own = [instance_id, *self.lives][:MAX_LIVES]

    def _read(self, marks: Mapping[str, bytes], age: float) -> None:
        about = marks.get(self._about)
        if about is None:
            return
        if (identity := marks.get(self._identity)) is not None:
            self.identity = identity.decode(errors="replace")
        self._gone = {name: None for name in marks if name.startswith(self._prefix)}
        try:
            self.noted_at, self.lives = read_about(about)
            found = {
                int(name.removeprefix(self._prefix)): Position.of_mark(mark)
                for name, mark in marks.items()
                if name.startswith(self._prefix)
            }
        except ValueError as exc:
            log.warning("the checkpoint of the bus in the session store cannot be read and is not used: %s", exc)
            return
        passed = self._utc() - self.noted_at
        if passed > age:
            log.warning(
                "this node was away for %.0f s, longer than [Kafka.Bus] CheckpointAge (%g s): what other nodes "
                "published meanwhile does not reach its sessions",
                *(passed, age),
            )
            return
        self._gone = {}
        self._partitions = found
        self.offsets = {number: position.next for number, position in found.items()}

    def begin(self, at: Mapping[int, BeganAt]) -> None:
        """Reading begins there, and there in all partitions that exist; before the first record."""
        self._known = True
        missing = sum(began.missing for began in at.values())
        if missing:
            log.warning("%d records of the bus were deleted by Kafka before this node could read them", missing)
        for number, began in at.items():
            position = self.of(number)
            if began.moved or began.another or began.start < position.next:  # they are wanted again, or others
                position.writers, position.applied = {}, began.start
            position.next = began.start
            position.applied = max(position.applied, began.start)
            position.backlog_end = began.end
            position.noted = False

    def begin_another(self, identity: str | None) -> None:
        """What comes now is of another topic of the same name, from its beginning on."""
        self.identity = identity
        for position in self._partitions.values():
            position.next = position.applied = position.backlog_end = 0
            position.noted = False

    def of(self, partition: int) -> Position:
        """Return where a partition stands."""
        position = self._partitions.get(partition)
        if position is None:
            position = self._partitions[partition] = Position()
        return position

    def longest_begun(self) -> tuple[Position, Writer]:
        """Return where a body waits for its next part, and has for longest. There is one."""
        waiting = ((p, writer, begun.at) for p in self._partitions.values() for writer, begun in p.begun.items())
        position, writer, _ = min(waiting, key=lambda each: each[2])
        return position, writer

    def marks(self) -> dict[str, bytes | None]:
        """Return what is new, for the store (`GatewayHost.note`). Until reading begins that is the id of this life."""
        if not self._known:
            return {self._about: ABOUT.pack(MARK_VERSION, self.noted_at) + b"".join(self._own)}
        now = self._utc()
        changed, self._gone = self._gone, {}
        for number, position in self._partitions.items():
            if not position.noted:
                position.noted = True
                changed[f"{self._prefix}{number}"] = position.mark(now)
        changed[self._about] = ABOUT.pack(MARK_VERSION, now) + b"".join(self._own)
        changed[self._identity] = self.identity.encode() if self.identity is not None else None
        return changed

    def commits(self) -> dict[int, int]:
        """Return the offsets as tools are to see them."""
        return {number: position.next for number, position in self._partitions.items()}


def read_about(mark: bytes) -> tuple[float, tuple[bytes, ...]]:
    """Return when a checkpoint was made, and the lives of its node, the last one first.

    Raises:
      ValueError: it is none.
    """
    size = len(mark) - ABOUT.size
    if size < 0 or size % INSTANCE_SIZE or mark[0] != MARK_VERSION:
        raise ValueError(f"a checkpoint of {len(mark)} bytes")
    _, noted_at = ABOUT.unpack_from(mark)
    return noted_at, tuple(mark[at : at + INSTANCE_SIZE] for at in range(ABOUT.size, len(mark), INSTANCE_SIZE))
