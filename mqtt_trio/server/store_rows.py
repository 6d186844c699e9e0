"""Tables of the session store: their columns, and how a row goes in with a checksum and comes out again, checked.

SQLite notices damage to the structure of its pages, but not a flipped bit inside a value. Every row has a checksum, so
that such a row is never taken for good. It is a CRC-32 of the row's texts and bytes; deliveries add their numbers, each
times a prime, because a move changes three of them inside SQLite, which has no CRC but can add.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, Final, TypeAlias
from zlib import crc32

import attrs

from mqtt_trio.broker.store import DeliveryRow, Owner, RetainedRow, SessionRow, SubscriptionRow

Values: TypeAlias = tuple[Any, ...]
"""Values of a table's columns, the checksum last."""

OWNER_WEIGHT: Final = 131_071
PACKET_ID_WEIGHT: Final = 524_287
FLAGS_WEIGHT: Final = 8_191
NUMBER_WEIGHT: Final = 127
CONTENT_WEIGHT: Final = 31
"""Primes: what changes in one number of a delivery, whatever it is, changes the sum. The sum stays below 2**63 for
numbers below 2**45; SQLite has no larger integers."""

IDS_PER_SESSION: Final = 65_536
"""`received` holds session and Packet Identifier as one number, so that a table with an integer key suffices."""


def delivery_checksum(row: DeliveryRow) -> int:
    """Return the checksum of a delivery. `published_at` counts in microseconds."""
    number, owner, packet_id, flags, ids, version, published_at, content, frame = row
    return (
        crc32(frame or b"", version if ids is None else crc32(ids, version))
        + int(published_at * 1e6)
        + number * NUMBER_WEIGHT
        + content * CONTENT_WEIGHT
        + owner * OWNER_WEIGHT
        + packet_id * PACKET_ID_WEIGHT
        + flags * FLAGS_WEIGHT
    )


MOVE: Final = (
    "UPDATE deliveries SET owner = moved.column2, packet_id = moved.column3, flags = moved.column4,"
    f" checksum = checksum + (moved.column2 - owner) * {OWNER_WEIGHT}"
    f" + (moved.column3 - packet_id) * {PACKET_ID_WEIGHT} + (moved.column4 - flags) * {FLAGS_WEIGHT}"
    " FROM (VALUES {}) AS moved WHERE number = moved.column1"
)
"""Moves deliveries, given as (number, owner, packet_id, flags); {} stands for their placeholders. Done twice it changes
nothing more."""


def _crc(*values: object, data: bytes = b"") -> int:
    return crc32(data, crc32("\0".join(map(str, values)).encode()))


def session_values(row: SessionRow) -> Values:
    """Return what stands in the file for a session."""
    number, client_id, user_name, expiry_interval, ended_at, will, will_at = row
    # A whole number comes back as a float: the checksum is made of what comes back.
    ended_at = None if ended_at is None else float(ended_at)
    will_at = None if will_at is None else float(will_at)
    checksum = _crc(
        int(number), client_id, user_name, int(expiry_interval), ended_at, will_at, will is None, data=will or b""
    )
    return (number, client_id, user_name, expiry_interval, ended_at, will, will_at, checksum)


def group_values(row: tuple[Owner, str]) -> Values:
    """Return what stands in the file for a share group."""
    return (*row, _crc(int(row[0]), row[1]))


def subscription_values(row: SubscriptionRow) -> Values:
    """Return what stands in the file for a subscription."""
    session, topic_filter, options, identifier = row
    return (*row, _crc(int(session), topic_filter, int(options), None if identifier is None else int(identifier)))


def delivery_values(row: DeliveryRow) -> Values:
    """Return what stands in the file for a delivery."""
    return (*row, delivery_checksum(row))


def content_values(row: tuple[int, bytes]) -> Values:
    """Return what stands in the file for the frame that several deliveries share."""
    return (*row, crc32(row[1], row[0] & 0xFFFFFFFF))


def received_values(row: tuple[Owner, int]) -> Values:
    """Return what stands in the file for an inbound QoS 2 Packet Identifier."""
    entry = received_entry(row)
    return (entry, crc32(b"%d" % entry))


def received_entry(row: tuple[Owner, int]) -> int:
    """Return the key of `received`: negative as the Packet Identifier is."""
    session, packet_id = row
    return session * IDS_PER_SESSION + packet_id if packet_id > 0 else packet_id - session * IDS_PER_SESSION


def retained_values(row: RetainedRow) -> Values:
    """Return what stands in the file for a retained message."""
    topic_name, frame, client_id, published_at = row
    at = float(published_at)
    return (topic_name, frame, client_id, at, crc32(frame, crc32(f"{topic_name}\0{client_id}\0{at!r}".encode())))


def mark_values(row: tuple[str, bytes]) -> Values:
    """Return what stands in the file for a mark of a gateway."""
    return (*row, crc32(row[1], crc32(row[0].encode())))


def meta_values(row: tuple[str, int]) -> Values:
    """Return what stands in the file for a number with a name."""
    return (*row, _crc(*row))


def _whole(values: Values) -> Values:
    return values[:-1]


def _received_row(values: Values) -> Values:
    session, packet_id = divmod(abs(values[0]), IDS_PER_SESSION)
    return (session, packet_id if values[0] > 0 else -packet_id)


def _of_types(*columns: tuple[type, ...]) -> frozenset[tuple[type, ...]]:
    return frozenset(product(*columns, (int,)))


_INT, _TEXT, _BLOB, _REAL = (int,), (str,), (bytes,), (float,)
_NONE = type(None)


@attrs.frozen
class Table:
    """One table of the file."""

    name: str
    columns: str
    """As in CREATE TABLE, without the checksum."""
    key: str
    """Columns of the key, for WHERE and ORDER BY."""
    types: frozenset[tuple[type, ...]]
    """The combinations of types that its rows may have."""
    values: Callable[[Any], Values]
    """Makes of a row of `Batch` what stands in the file."""
    row: Callable[[Values], Values] = _whole
    """The way back."""
    options: str = ""
    since: int = 1
    """Version of the file that had it first."""

    @property
    def create(self) -> str:
        """The statement that makes it."""
        return f"CREATE TABLE {self.name} ({self.columns.format(checksum='checksum INTEGER NOT NULL')}){self.options};"

    @property
    def insert(self) -> str:
        """The statement that writes or replaces rows; {} stands for their placeholders."""
        return f"INSERT OR REPLACE INTO {self.name} VALUES {{}}"

    def read(self, values: Values) -> Values | None:
        """Return the row that `values` are, None when they are damaged."""
        if tuple(map(type, values)) not in self.types:
            return None
        try:
            row = self.row(values)
            good = self.values(row)[-1] == values[-1]
        except (ValueError, OverflowError):  # such as a text that is no UTF-8, a time that is not a number
            return None
        return row if good else None


SESSIONS: Final = Table(
    "sessions",
    "number INTEGER PRIMARY KEY, client_id TEXT NOT NULL, user_name TEXT, expiry_interval INTEGER NOT NULL,"
    " ended_at REAL, will BLOB, will_at REAL, {checksum}",
    "number",
    _of_types(_INT, _TEXT, (str, _NONE), _INT, (float, _NONE), (bytes, _NONE), (float, _NONE)),
    session_values,
)
GROUPS: Final = Table(
    "groups",
    "number INTEGER PRIMARY KEY, name TEXT NOT NULL, {checksum}",
    "number",
    _of_types(_INT, _TEXT),
    group_values,
)
SUBSCRIPTIONS: Final = Table(
    "subscriptions",
    "session INTEGER NOT NULL, topic_filter TEXT NOT NULL, options INTEGER NOT NULL, identifier INTEGER, {checksum},"
    " PRIMARY KEY (session, topic_filter)",
    "session, topic_filter",
    _of_types(_INT, _TEXT, _INT, (int, _NONE)),
    subscription_values,
    options=" WITHOUT ROWID",
)
DELIVERIES: Final = Table(
    "deliveries",
    "number INTEGER PRIMARY KEY, owner INTEGER NOT NULL, packet_id INTEGER NOT NULL, flags INTEGER NOT NULL,"
    " subscription_identifiers BLOB, protocol_version INTEGER NOT NULL, published_at REAL NOT NULL,"
    " content INTEGER NOT NULL, frame BLOB, {checksum}",
    "number",
    _of_types(_INT, _INT, _INT, _INT, (bytes, _NONE), _INT, _REAL, _INT, (bytes, _NONE)),
    delivery_values,
)
CONTENTS: Final = Table(
    "contents",
    "number INTEGER PRIMARY KEY, frame BLOB NOT NULL, {checksum}",
    "number",
    _of_types(_INT, _BLOB),
    content_values,
)
RECEIVED: Final = Table(
    "received",
    "entry INTEGER PRIMARY KEY, {checksum}",
    "entry",
    _of_types(_INT),
    received_values,
    _received_row,
)
RETAINED: Final = Table(
    "retained",
    "topic_name TEXT PRIMARY KEY, frame BLOB NOT NULL, client_id TEXT NOT NULL, published_at REAL NOT NULL, {checksum}",
    "topic_name",
    _of_types(_TEXT, _BLOB, _TEXT, _REAL),
    retained_values,
    options=" WITHOUT ROWID",
)
MARKS: Final = Table(
    "marks",
    "name TEXT PRIMARY KEY, value BLOB NOT NULL, {checksum}",
    "name",
    _of_types(_TEXT, _BLOB),
    mark_values,
    options=" WITHOUT ROWID",
    since=2,
)
META: Final = Table(
    "meta",
    "name TEXT PRIMARY KEY, value INTEGER NOT NULL, {checksum}",
    "name",
    _of_types(_TEXT, _INT),
    meta_values,
    options=" WITHOUT ROWID",
)
TABLES: Final = (SESSIONS, GROUPS, SUBSCRIPTIONS, DELIVERIES, CONTENTS, RECEIVED, RETAINED, META, MARKS)

SCHEMA: Final = "\n".join(
    [table.create for table in TABLES if table.since == 1]
    # A delivery on its way is found by its number; only those that wait are many per owner and stay for long. An index
    # of all would make each insert and each removal three to five times as expensive.
    + ["CREATE INDEX deliveries_waiting ON deliveries (owner) WHERE packet_id = 0;"]
    # In the order in which they came to be: a file that was brought here has its tables in the same places as a new
    # one, which is how a damaged list of tables is mended.
    + [table.create for table in TABLES if table.since > 1]
)
