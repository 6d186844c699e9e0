"""Rebuilding the retained messages of the session store from an archive [K19]. Blocking."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from mqtt_trio.archive.rebuild import advanced, decode_progress, encode_progress, fresh
from mqtt_trio.archive.store import Entry, NotEmptyError, Progress
from mqtt_trio.broker.journal import frame_of
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.store import Batch, RetainedRow, StoredState
from mqtt_trio.errors import StoreError
from mqtt_trio.server.sqlite_store import SqliteStore

MARK: Final = "rebuild"
"""Name of the mark that holds how far it has come; there is none once it is finished."""


def unfinished_retained(path: Path, marks: Mapping[str, bytes]) -> Progress | None:
    """Return how far an unfinished rebuild of the session store at `path` has come, by its marks; None: there is none.

    Raises:
      StoreError: what the rebuild noted is no progress.
    """
    if (mark := marks.get(MARK)) is None:
        return None
    try:
        return decode_progress(mark.decode())
    except ValueError as exc:
        raise StoreError(f"session store {path}: {exc}; remove the file and begin anew") from None


@attrs.define(kw_only=True)
class RetainedTarget:
    """The last retained message of each topic, in a session store that holds nothing yet.

    It remembers of each topic when its message was published: less than the broker that will have them all in memory.
    """

    path: Path
    clock: Callable[[], float] = time.time
    _store: SqliteStore | None = attrs.field(default=None, init=False)
    _progress: Progress | None = attrs.field(default=None, init=False)
    _published: dict[str, tuple[float, int | None]] = attrs.field(factory=dict, init=False)
    """Topic Name -> publish time and partition of what it has, or had; None: an earlier run had it from some."""

    @property
    def name(self) -> str:
        """What people call it."""
        return "retained messages"

    def open(self) -> Progress | None:
        """See `RebuildTarget.open`."""
        self._store = SqliteStore(self.path, synchronous="NORMAL")
        state = self._store.load()
        self._progress = unfinished_retained(self.path, state.marks)
        if self._progress is None:
            self._refuse_contents(state)
            return None
        self._published = {row[0]: (row[3], None) for row in state.retained}
        return self._progress

    def _refuse_contents(self, state: StoredState) -> None:
        counts = {
            "sessions": len(state.sessions),
            "queued messages": len(state.deliveries),
            "retained messages": len(state.retained),
        }
        found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        if found:
            raise NotEmptyError(
                f"session store {self.path} is not empty ({found}): only an empty one is rebuilt; move it away, or "
                "choose another place with --set Persistence.Path=DIR"
            )

    def begin(self, progress: Progress) -> None:
        """See `RebuildTarget.begin`."""
        self._commit(progress, {})

    def store(self, entries: Sequence[Entry]) -> None:
        """See `RebuildTarget.store`. Within a partition the order of the records decides; where a topic came to be in
        two of them, because the archive was given more partitions, the later publish time."""
        assert self._progress is not None, "begin comes first"
        entries = fresh(self._progress, entries)
        rows: dict[str, RetainedRow | None] = {}
        for entry in entries:
            message = entry.message
            if message is None or not message.retain:
                continue
            topic_name, at = message.topic_name, message.published_at
            before, partition = self._published.get(topic_name, (0.0, None))
            if at < before and partition not in (None, entry.partition):
                continue
            self._published[topic_name] = (at, entry.partition)
            rows[topic_name] = (
                (topic_name, frame_of(message), message.client_id, at) if self._is_kept(message) else None
            )
        if entries:
            self._commit(advanced(self._progress, entries), rows)

    def _is_kept(self, message: Message) -> bool:
        """An empty payload removes [MQTT5-3.3.1-6], and what has expired is not kept."""
        return bool(message.payload) and (message.expires_at is None or message.expires_at > self.clock())

    def _commit(self, progress: Progress | None, rows: dict[str, RetainedRow | None]) -> None:
        assert self._store is not None, "open comes first"
        mark = None if progress is None else encode_progress(progress).encode()
        self._store.commit(Batch(retained=rows, marks={MARK: mark}))
        self._progress = progress

    def finish(self) -> list[str]:
        """See `RebuildTarget.finish`."""
        self._commit(None, {})
        self.close()
        self._store = SqliteStore(self.path, synchronous="NORMAL")
        return [f"{len(self._store.load().retained)} topics have one"]

    def close(self) -> None:
        """See `RebuildTarget.close`."""
        if self._store is not None:
            self._store.close()
            self._store = None
