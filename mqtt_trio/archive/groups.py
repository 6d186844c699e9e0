"""Archive groups: taps that keep matching messages in a bounded window and ship them to their store in batches."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol, TypeAlias

import trio

from mqtt_trio.archive.options import ArchiveGroupOptions as ArchiveGroupOptions
from mqtt_trio.archive.options import merge_groups as merge_groups
from mqtt_trio.archive.store import ArchiveStore, Outcome
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import Answer, FrameRun, Hold, TapRoute, frames_size, read_run
from mqtt_trio.errors import RemoteProtocolError, StoreError
from mqtt_trio.protocol.topics import topic_matches

BATCH: Final = 1000
"""Messages of one `submit` at most."""
LINGER: Final = 0.003
"""Seconds that the first message of a burst waits for others: one wake and one submit for all of them."""
HARD_BOUND: Final = 2
"""Times `window_bytes`, from where on publishers are stopped altogether."""
LOG_INTERVAL: Final = 10.0
"""Seconds between two lines about messages that were not stored."""

MEANINGS: Final[Mapping[str, str]] = {
    "stored": "Messages that the store of an archive group has.",
    "failed": "Messages that the store of an archive group could not take, for good.",
    "dropped_qos0": "QoS 0 messages that were not archived because the window was full.",
    "held": "Messages whose acknowledgement had to wait because the window was full.",
    "waiting": "Gauge: messages that an archive group has taken and its store has not.",
}
"""What each counter of a group counts, for metrics; those that also fall begin with `Gauge: `."""

logger = logging.getLogger(__name__)

_Pending: TypeAlias = tuple[FrameRun | Message, int]


class GroupHost(Protocol):
    """The broker as a group sees it."""

    def flush(self) -> None:
        """Send what is waiting in the outboxes of touched clients."""

    def stop_publishers(self, owner: object) -> None:
        """Let no client's QoS 1 or 2 PUBLISH be handled until `owner` lets go. Idempotent."""

    def resume_publishers(self, owner: object) -> None:
        """Undo `stop_publishers` of `owner`."""


class ArchiveGroup:
    """One group: a tap, and the one route of all topics that it wants. Trio thread only.

    Its window counts what was taken and is not stored yet. What a window is full of is said in `ArchiveGroupOptions`;
    an item larger than the whole window passes while the window is empty.

    Attributes:
      stored, failed, dropped_qos0: messages, by what became of them.
      held: messages whose acknowledgement had to wait.
    """

    def __init__(self, options: ArchiveGroupOptions, store: ArchiveStore, host: GroupHost) -> None:
        self.options = options
        self.store = store
        self.stored = self.failed = self.dropped_qos0 = self.held = 0
        self._host = host
        self._pending: deque[_Pending] = deque()
        # All four only grow; the window is what lies between taken and done.
        self._taken_messages = self._taken_bytes = self._done_messages = self._done_bytes = 0
        self._holds: deque[tuple[Hold, int, int]] = deque()  # with the totals taken, the held message included
        self._stopped_publishers = False
        self._stopping = False
        self._scope: trio.CancelScope | None = None
        self._taken, self._done, self._hurry = trio.Event(), trio.Event(), trio.Event()
        self._unlogged, self._reason = 0, ""
        self._log_at = float("-inf")

    # --- the tap: inside the hot stretch ---

    def route(self, topic_name: str) -> TapRoute | None:
        """Return this group when it wants `topic_name`. $SYS is never archived [K7]."""
        if topic_name.startswith("$SYS") and topic_name[4:5] in ("", "/"):
            return None
        wanted = any(topic_matches(topic_filter, topic_name) for topic_filter in self.options.filter)
        return self if wanted else None

    def take_run(self, run: FrameRun) -> Answer:
        """Keep a run as it is; it is decoded when it is shipped."""
        return self._take(run, run.count, frames_size(run), run.qos)

    def take(self, message: Message) -> Answer:
        """Keep one message."""
        return self._take(message, 1, message.size, message.qos)

    def _take(self, item: FrameRun | Message, count: int, size: int, qos: int) -> Answer:
        options = self.options
        messages, used = self._taken_messages + count, self._taken_bytes + size
        waiting = messages - self._done_messages
        full = waiting > options.window_messages or used - self._done_bytes > options.window_bytes
        if full and not qos and waiting > count:
            self.dropped_qos0 += count
            return None
        self._taken_messages, self._taken_bytes = messages, used
        self._pending.append((item, size))
        if not self._taken.is_set():
            self._taken.set()
        if not full or not qos or waiting == count:
            return None
        self.held += count
        hold = Hold()
        self._holds.append((hold, messages, used))
        if used - self._done_bytes > HARD_BOUND * options.window_bytes and not self._stopped_publishers:
            self._stopped_publishers = True
            self._host.stop_publishers(self)
        return hold

    # --- from the window to the store ---

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the store and ship to it until `stop` or cancelled; `started()` once the store is open.

        Raises:
          StoreError: the store cannot be opened.
        """
        refusal: StoreError | None = None
        async with trio.open_nursery() as nursery:
            try:
                await nursery.start(self.store.run)
            except StoreError as exc:
                refusal = exc
                nursery.cancel_scope.cancel()
            else:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._ship)
                nursery.start_soon(self._answer)
                task_status.started()
        self._scope = None
        if refusal is not None:
            raise refusal

    async def stop(self) -> None:
        """Ship and store what was taken, close the store. Cancelled, it closes at once and says what is not stored."""
        if self._scope is None:
            return
        scope, self._stopping = self._scope, True
        self._taken.set()
        self._hurry.set()
        try:
            while self.waiting_messages:
                await self._done.wait()
            self._release()
            await self.store.stop()
        finally:
            self._log_failures()
            if self.waiting_messages:
                logger.warning(
                    "archive group %s: stopped with %d messages not stored", self.options.name, self.waiting_messages
                )
            scope.cancel()

    async def _ship(self) -> None:
        while True:
            await self._taken.wait()
            if not self._stopping:
                with trio.move_on_after(LINGER):
                    await self._hurry.wait()
            self._taken = trio.Event()
            while self._pending:
                self._submit(*self._next_batch())
                await trio.lowlevel.checkpoint()  # decoding a batch takes about a millisecond: let others in

    def _next_batch(self) -> tuple[list[Message], int]:
        """Take up to BATCH messages off the window's end, and the bytes that are given back when they are stored."""
        batch: list[Message] = []
        size = 0
        while self._pending and len(batch) < BATCH:
            item, item_size = self._pending.popleft()
            if isinstance(item, Message):
                batch.append(item)
            else:
                batch += self._read(item)
            size += item_size
        return batch, size

    def _read(self, run: FrameRun) -> list[Message]:
        try:
            return read_run(run)
        except RemoteProtocolError as exc:
            # The fast lane looked at every frame, so this is a bug; it must cost its run, not the archive.
            logger.exception("archive group %s: a run of %d frames is unreadable", self.options.name, run.count)
            self._finish(run.count, 0, dict.fromkeys(range(run.count), exc))
            return []

    def _submit(self, batch: list[Message], size: int) -> None:
        for start in range(0, len(batch), BATCH):
            part = batch[start : start + BATCH]
            last = start + BATCH >= len(batch)
            self.store.submit(part, partial(self._finish, len(part), size if last else 0))
        if not batch:
            self._finish(0, size, {})

    def _finish(self, count: int, size: int, outcome: Outcome) -> None:
        self._done_messages += count
        self._done_bytes += size
        self.failed += len(outcome)
        self.stored += count - len(outcome)
        if outcome:
            if not self._unlogged:
                self._reason = str(next(iter(outcome.values())))
            self._unlogged += len(outcome)
        if not self._done.is_set():
            self._done.set()

    async def _answer(self) -> None:
        """Release acknowledgements after each burst of outcomes, then have all of them sent at once."""
        while True:
            await self._done.wait()
            self._done = trio.Event()
            self._release()
            if self._unlogged and trio.current_time() >= self._log_at:
                self._log_failures()

    def _release(self) -> None:
        options, touched = self.options, False
        while self._holds:
            hold, messages, used = self._holds[0]
            outside = used - self._done_bytes > options.window_bytes
            if (outside or messages - self._done_messages > options.window_messages) and self._ahead(messages):
                break
            self._holds.popleft()
            hold.release()
            touched = True
        if self._stopped_publishers and not self._holds:
            self._stopped_publishers = False
            self._host.resume_publishers(self)
            touched = True
        if touched:
            self._host.flush()

    def _ahead(self, messages: int) -> bool:
        """Whether anything is left in front of the held message that was number `messages`."""
        return messages - self._done_messages > 1

    def _log_failures(self) -> None:
        if self._unlogged:
            self._log_at = trio.current_time() + LOG_INTERVAL
            logger.warning(
                "archive group %s: %d messages not stored: %s", self.options.name, self._unlogged, self._reason
            )
            self._unlogged = 0

    # --- what others read ---

    @property
    def waiting_messages(self) -> int:
        """Messages in the window."""
        return self._taken_messages - self._done_messages

    @property
    def waiting_bytes(self) -> int:
        """Bytes in the window."""
        return self._taken_bytes - self._done_bytes

    def counters(self) -> dict[str, int]:
        """Counters by name, for metrics and the line that is logged at the end."""
        return {
            "stored": self.stored,
            "failed": self.failed,
            "dropped_qos0": self.dropped_qos0,
            "held": self.held,
            "waiting": self.waiting_messages,
        }

    def describe(self) -> str:
        """One line for the start-up summary."""
        return f"{self.options.name}: {', '.join(self.options.filter)} -> {self.store.describe()}"


def build_groups(
    options: Sequence[ArchiveGroupOptions],
    make_store: Callable[[ArchiveGroupOptions], ArchiveStore],
    host: GroupHost,
    *,
    default_kafka_topic: str = "mqtt.archive",
) -> list[ArchiveGroup]:
    """Make a group for each distinct target (see `merge_groups`); `make_store` is called once for each.

    Raises:
      ConfigError: the groups contradict each other.
    """
    merged = merge_groups(options, default_kafka_topic=default_kafka_topic)
    return [ArchiveGroup(group, make_store(group), host) for group in merged]
