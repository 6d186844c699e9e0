"""What outlives the process: sessions and everything that belongs to them, retained messages, Wills that are due, and
marks of gateways.

The core keeps all of it in memory and notes each change in a `Batch`; a store takes whole batches and gives everything
back at the next start. A batch says what holds once it is committed, not how that came about: it is a set of rows to
write and to remove. Rows are plain values in the order of the columns that their comments name, so that millions of
them cost little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

import attrs

Owner: TypeAlias = int
"""Number of a session or of a share group. Both come from one sequence that starts at 1; none is used again."""
Number: TypeAlias = int
"""Number of a delivery, from another such sequence: the deliveries of an owner leave in the order of their numbers."""

SessionRow: TypeAlias = tuple[Owner, str, str | None, int, float | None, bytes | None, float | None]
"""number, client_id, user_name, expiry_interval (seconds, 0xFFFFFFFF: never), ended_at (UTC seconds at which its last
connection ended; None: it is connected), will (a 5.0 PUBLISH without Packet Identifier; None: no Will), will_at (UTC
seconds at which the Will of an ended connection is due; of a connected session, None)."""

SubscriptionRow: TypeAlias = tuple[Owner, str, int, int | None]
"""session, topic_filter (as in SUBSCRIBE, with `$share/NAME/`), options (the byte of SUBSCRIBE [MQTT5-3.8.3.1]),
subscription_identifier."""

DeliveryRow: TypeAlias = tuple[Number, Owner, int, int, bytes | None, int, float, int, bytes | None]
"""number, owner, packet_id (0: it waits in the queue of its owner), flags (QoS of the delivery, plus 4 for RETAIN, plus
8 once its PUBREC came and only PUBREL is owed), subscription_identifiers (four bytes each, big-endian;
None: none), protocol_version (of `frame`: 4 or 5), published_at (UTC seconds), content (key of `contents`; 0: the row
has its own), frame (the PUBLISH packet as it came, its Packet Identifier means nothing; None with a `content`)."""

MoveRow: TypeAlias = tuple[Owner, int, int]
"""owner, packet_id, flags: the new values of a delivery."""

RetainedRow: TypeAlias = tuple[str, bytes, str, float]
"""topic_name, frame (a 5.0 PUBLISH with the publisher's QoS, its Packet Identifier means nothing), client_id (of the
publisher), published_at."""


MARK_SIZE: Final = 1024
"""Bytes of a mark that a store without space may still take, since it takes the place of another one; a larger one
holds messages."""


@attrs.define
class Batch:
    """Changes that are committed together. A row stands in one place only; `moves` count before owners are removed, so
    that what is moved away from an owner does not go with it."""

    sessions: dict[Owner, SessionRow | None] = attrs.Factory(dict)
    """Rows to write or replace; None removes the session with its subscriptions, deliveries and `received`."""
    groups: dict[Owner, str | None] = attrs.Factory(dict)
    """Share groups by number: `$share/NAME/FILTER`; None removes the group with its deliveries."""
    subscriptions: dict[tuple[Owner, str], SubscriptionRow | None] = attrs.Factory(dict)
    """By session and topic_filter; None removes."""
    deliveries: dict[Number, DeliveryRow] = attrs.Factory(dict)
    """New rows; their numbers grow."""
    moves: dict[Number, MoveRow] = attrs.Factory(dict)
    """Changes of rows that an earlier batch brought."""
    done: list[Number] = attrs.Factory(list)
    """Rows of earlier batches to remove; the owner's removal may have done it already."""
    contents: dict[int, bytes] = attrs.Factory(dict)
    """Frames that several deliveries share, by a key that is never used again; a delivery of the same or a later batch
    may name it."""
    contents_done: list[int] = attrs.Factory(list)
    """Keys that no delivery names any more."""
    received: dict[tuple[Owner, int], bool] = attrs.Factory(dict)
    """Inbound QoS 2 Packet Identifiers by session and id: True while PUBREL has not come, False removes. A negative id
    is that of a message which the taps had not let go when it was noted."""
    retained: dict[str, RetainedRow | None] = attrs.Factory(dict)
    """By topic_name; None removes."""
    marks: dict[str, bytes | None] = attrs.Factory(dict)
    """What gateways note beside it, by name; None removes. A value means nothing to the core: it says how far somebody
    had come when everything else of this batch was so (`Journal.sources`)."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to commit."""
        return not any(getattr(self, name) for name in _PARTS)

    @property
    def brings_messages(self) -> bool:
        """Whether there are messages to write: what needs space."""
        return bool(
            self.deliveries
            or self.contents
            or any(row is not None for row in self.retained.values())
            or any(value is not None and len(value) > MARK_SIZE for value in self.marks.values())
        )

    def copied(self) -> Batch:
        """Return a batch of the same rows."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in _PARTS}
        for name, part in parts.items():
            parts[name] = dict(part) if isinstance(part, dict) else list(part)
        return Batch(**parts)


_PARTS = tuple(field.name for field in attrs.fields(Batch))


@attrs.define
class StoredState:
    """Everything that a store holds, as rows of `Batch`."""

    sessions: Sequence[SessionRow] = ()
    groups: Sequence[tuple[Owner, str]] = ()
    subscriptions: Sequence[SubscriptionRow] = ()
    deliveries: Sequence[DeliveryRow] = ()
    """In the order of their numbers."""
    contents: dict[int, bytes] = attrs.Factory(dict)
    received: Sequence[tuple[Owner, int]] = ()
    retained: Sequence[RetainedRow] = ()
    marks: dict[str, bytes] = attrs.Factory(dict)
    last_owner: Owner = 0
    """No owner number up to this one may be used again."""
    last_number: Number = 0
    """Neither may a delivery number, nor a key of `contents`."""


class Store(Protocol):
    """Where one node keeps what must outlive the process. Every method blocks; one thread calls them, one at a time."""

    def load(self) -> StoredState:
        """Open the store and return what it holds; called once, first.

        Raises:
          StoreError: it cannot be opened. A damaged or foreign file is set aside instead, with a clear message [S3].
        """

    def commit(self, batch: Batch) -> None:
        """Make `batch` durable, all of it or nothing. It may be called again with the same or a larger batch.

        Raises:
          StoreError: it is not certain to be kept; the text says why (no space, a read-only file, ...). Nothing of it
            is there, or, where a disk reports an error behind its last write, all of it.
        """

    def close(self) -> None:
        """Give everything back; what was committed stays. Idempotent."""

    def describe(self) -> str:
        """One phrase for the start-up summary, such as `SQLite data/sessions.sqlite3`."""


class MemoryStore:
    """A Store that keeps nothing beyond its own life. Tests hand the same one to the next broker, as if it were a
    disk; a node with `[Persistence] Store = "MEMORY"` has no store at all."""

    def __init__(self) -> None:
        self.state = Batch()
        self._last_owner = 0
        self._last_number = 0

    def load(self) -> StoredState:
        """Return what was committed."""
        state = self.state
        return StoredState(
            sessions=[row for row in state.sessions.values() if row is not None],
            groups=[(number, name) for number, name in state.groups.items() if name is not None],
            subscriptions=[row for row in state.subscriptions.values() if row is not None],
            deliveries=sorted(state.deliveries.values()),
            contents=dict(state.contents),
            received=list(state.received),
            retained=[row for row in state.retained.values() if row is not None],
            marks={name: value for name, value in state.marks.items() if value is not None},
            last_owner=self._last_owner,
            last_number=self._last_number,
        )

    def commit(self, batch: Batch) -> None:
        """Apply `batch`."""
        batch = batch.copied()  # what ends the reading of it, such as want of memory, has changed nothing yet
        state = self.state
        for number, (owner, packet_id, flags) in batch.moves.items():
            if (delivery := state.deliveries.get(number)) is not None:
                state.deliveries[number] = (number, owner, packet_id, flags, *delivery[4:])
        self._last_owner = max(self._last_owner, *batch.sessions, *batch.groups, 0)
        removed = {owner for part in (batch.sessions, batch.groups) for owner, row in part.items() if row is None}
        if removed:
            self._remove(removed)
        _update(state.sessions, batch.sessions)
        _update(state.groups, batch.groups)
        _update(state.subscriptions, batch.subscriptions)
        state.deliveries.update(batch.deliveries)
        for number in batch.done:
            state.deliveries.pop(number, None)
        state.contents.update(batch.contents)
        for key in batch.contents_done:
            state.contents.pop(key, None)
        for entry, present in batch.received.items():
            if present:
                state.received[entry] = True
            else:
                state.received.pop(entry, None)
        _update(state.retained, batch.retained)
        _update(state.marks, batch.marks)
        self._last_number = max(self._last_number, *batch.deliveries, *batch.contents, 0)

    def _remove(self, owners: set[Owner]) -> None:
        """Remove what belongs to sessions and groups that go."""
        state = self.state
        state.subscriptions = {key: row for key, row in state.subscriptions.items() if key[0] not in owners}
        state.deliveries = {number: row for number, row in state.deliveries.items() if row[1] not in owners}
        state.received = {key: present for key, present in state.received.items() if key[0] not in owners}

    def close(self) -> None:
        """Nothing to do."""

    def describe(self) -> str:
        return "memory"


def _update(rows: dict[Any, Any], changes: Mapping[Any, Any]) -> None:
    for key, row in changes.items():
        if row is None:
            rows.pop(key, None)
        else:
            rows[key] = row
