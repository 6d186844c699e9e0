"""Archive groups: taps that keep matching messages in a bounded window, and say when they may be acknowledged."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import trio

from mqtt_trio.archive.options import ArchiveGroupOptions as ArchiveGroupOptions
from mqtt_trio.archive.options import merge_groups as merge_groups
from mqtt_trio.archive.shipping import LINGER, Shipper
from mqtt_trio.archive.spool import Spool
from mqtt_trio.archive.store import ArchiveStore
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import Answer, FrameRun, Hold, Rank, Refused, TapRoute, frames_size
from mqtt_trio.errors import StoreError
from mqtt_trio.protocol.codes import ReasonCode
from mqtt_trio.protocol.topics import topic_matches

HARD_BOUND: Final = 2
"""Times `window_bytes`, from where on publishers are stopped altogether."""
RELEASE_LIMIT: Final = 500
"""Acknowledgements that go out before other tasks get their turn."""
LOG_INTERVAL: Final = 10.0
"""Seconds between two lines about messages that were not stored."""

MEANINGS: Final[Mapping[str, str]] = {
    "stored": "Messages that the store of an archive group has.",
    "failed": "Messages that the store of an archive group could not take, for good.",
    "dropped_qos0": "QoS 0 messages that were not archived because the window was full.",
    "held": "Messages whose acknowledgement had to wait because the window was full.",
    "waiting": "Gauge: messages in the window of an archive group: neither stored nor handed to the spool.",
    "rejected": "QoS 1 and 2 messages that were refused because the store was away (OnOutage = reject); with Ack = "
    "store those that were on their way are among them, and are stored nevertheless.",
    "dropped": "Messages that were not archived because the store was away (OnOutage = reject: QoS 0; drop: all).",
    "timed_out": "Messages that got a negative answer because neither store nor spool had them within AckTimeout.",
    "spooled": "Messages that went over the spool.",
    "spool_messages": "Gauge: messages in the spool that the store has not confirmed.",
    "spool_bytes": "Gauge: what the spool takes on disk.",
    "spool_lost": "Messages that the spool could not give back because of damage.",
    "spool_failures": "Attempts to write to the spool that failed, such as on a full disk.",
}
"""What each counter of a group counts, for metrics; those that also fall begin with `Gauge: `."""

logger = logging.getLogger(__name__)


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

    Its window counts what was taken and is neither stored nor handed to the spool. What a window is full of is said in
    `ArchiveGroupOptions`; an item larger than the whole window passes while the window is empty.

    Attributes:
      dropped_qos0: messages dropped because the window was full.
      held: messages whose acknowledgement had to wait for room in the window.
      rejected, dropped: messages refused, and dropped, because the store was away; what was refused under way is stored
        nevertheless.
      timed_out: messages refused because neither store nor spool had them within `ack_timeout`.
    """

    def __init__(
        self, options: ArchiveGroupOptions, store: ArchiveStore, host: GroupHost, spool: Spool | None = None
    ) -> None:
        self.options = options
        self.store = store
        self.shipper = Shipper(options.name, store, spool)
        self.dropped_qos0 = self.held = self.rejected = self.dropped = self.timed_out = 0
        self.rank = Rank.REFUSES if options.outage_policy == "reject" else Rank.KEEPS
        self._host = host
        self._gated = options.ack == "store"
        self._turns_away = False
        self._taken_messages = self._taken_bytes = 0  # totals, as those of the shipper
        self._holds: deque[tuple[Hold, int, int]] = deque()  # with the totals taken, the held message included
        self._deadlines: deque[tuple[float, int]] = deque()  # with how many messages were taken by then
        self._stopped_publishers = False
        self._scope: trio.CancelScope | None = None
        self._done, self._waits = trio.Event(), trio.Event()
        self._unlogged, self._reason = 0, ""
        self._log_at = float("-inf")
        self._outage = False  # as it was told last
        self._turned_away = 0  # how many were turned away in earlier outages
        self.shipper.changed = self._look
        self.shipper.store_changed = self._look_at_store

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
        if self._turns_away:
            return self._turn_away(count, qos)
        options, shipper = self.options, self.shipper
        messages, used = self._taken_messages + count, self._taken_bytes + size
        waiting = messages - shipper.left_messages
        full = waiting > options.window_messages or used - shipper.left_bytes > options.window_bytes
        if full and not qos and waiting > count:
            self.dropped_qos0 += count
            return None
        self._taken_messages, self._taken_bytes = messages, used
        shipper.pending.append((item, size))
        if not shipper.taken.is_set():
            shipper.taken.set()
        full = full and waiting > count
        if not qos or not (full or self._gated):
            return None
        hold = Hold()
        self._holds.append((hold, messages, used))
        if self._gated and not self._waits.is_set():
            self._waits.set()
        if full:
            self._hold_back(used, count)
        return hold

    def _hold_back(self, used: int, count: int) -> None:
        self.held += count
        if used - self.shipper.left_bytes > HARD_BOUND * self.options.window_bytes and not self._stopped_publishers:
            self._stopped_publishers = True
            self._host.stop_publishers(self)

    def _turn_away(self, count: int, qos: int) -> Answer:
        """The store is away, and the policy is not to keep what comes meanwhile [K10]."""
        if qos and self.options.outage_policy == "reject":
            self.rejected += count
            return Refused(ReasonCode.QUOTA_EXCEEDED)
        self.dropped += count
        return None

    # --- from the window to the store ---

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the store and the spool and ship to them until `stop` or cancelled; `started()` once both are open.

        Raises:
          StoreError: one of them cannot be opened.
        """
        refusal: StoreError | None = None
        async with trio.open_nursery() as nursery:
            try:
                await nursery.start(self.shipper.run)
            except StoreError as exc:
                refusal = exc
                nursery.cancel_scope.cancel()
            else:
                self._scope = nursery.cancel_scope
                self._taken_messages = self.shipper.left_messages
                nursery.start_soon(self._answer)
                if self._gated:
                    nursery.start_soon(self._watch_deadlines)
                task_status.started()
        self._scope = None
        if refusal is not None:
            raise refusal

    async def stop(self) -> None:
        """Have what was taken stored or in the spool, close both. Cancelled, it says how much is in neither."""
        if self._scope is None:
            return
        scope = self._scope
        try:
            await self.shipper.stop()
            while self._release():
                pass
        finally:
            self._log_failures()
            if missing := self._taken_messages - self.shipper.safe:
                logger.warning("archive group %s: stopped with %d messages not stored", self.options.name, missing)
            scope.cancel()

    def _look(self) -> None:
        if not self._done.is_set():
            self._done.set()

    async def _answer(self) -> None:
        """Release acknowledgements after each burst of outcomes, then have all of them sent at once."""
        while True:
            await self._done.wait()
            self._done = trio.Event()
            while self._release():
                await trio.lowlevel.checkpoint()  # thousands may be due at once: let others in
            if self.shipper.failures:
                self._note_failures()

    def _release(self) -> bool:
        """Release what may go, RELEASE_LIMIT at a time; say whether there may be more."""
        released = self._release_safe() if self._gated else self._release_inside()
        if self._stopped_publishers and not self._is_outside(self._taken_messages, self._taken_bytes):
            self._stopped_publishers = False
            self._host.resume_publishers(self)
            released = released or 1
        if released:
            self._host.flush()
        return released >= RELEASE_LIMIT

    def _release_safe(self) -> int:
        """Acknowledge what the store or the spool has [K9]; return how many."""
        holds, safe, refused = self._holds, self.shipper.safe, self.shipper.refused
        released = 0
        while holds and holds[0][1] <= safe:
            if released >= RELEASE_LIMIT:
                return released
            hold, messages, _ = holds.popleft()
            hold.release(ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR if refused and messages - 1 in refused else None)
            released += 1
        if refused:
            refused.difference_update([number for number in refused if number < safe])
        return released

    def _release_inside(self) -> int:
        """Acknowledge what is inside the window now; return how many."""
        released = 0
        self.shipper.refused.clear()
        while self._holds and released < RELEASE_LIMIT:
            hold, messages, used = self._holds[0]
            if self._is_outside(messages, used):
                break
            self._holds.popleft()
            hold.release()
            released += 1
        return released

    def _is_outside(self, messages: int, used: int) -> bool:
        """Whether the message up to which so much was taken does not fit the window, and is not the only one there."""
        options, waiting = self.options, messages - self.shipper.left_messages
        fits = waiting <= options.window_messages and used - self.shipper.left_bytes <= options.window_bytes
        return not fits and waiting > 1

    def _release_all(self, refused: ReasonCode | None, up_to: int | None = None) -> int:
        """Answer every message that waits, or those of the first `up_to` that were taken; return how many."""
        count = 0
        while self._holds and (up_to is None or self._holds[0][1] <= up_to):
            self._holds.popleft()[0].release(refused)
            count += 1
        if count:
            self._host.flush()
        return count

    # --- waiting for the store [K9], and doing without it [K10] ---

    async def _watch_deadlines(self) -> None:
        """Note when acknowledgements began to wait, a burst at a time; see to those that waited too long."""
        while True:
            with trio.move_on_at(self._deadlines[0][0] if self._deadlines else float("inf")):
                await self._waits.wait()
                await trio.sleep(LINGER)
                self._waits = trio.Event()
                self._deadlines.append((trio.current_time() + self.options.ack_timeout, self._taken_messages))
            while self._deadlines and self._deadlines[0][1] <= self.shipper.safe:
                self._deadlines.popleft()
            if self._deadlines and self._deadlines[0][0] <= trio.current_time():
                self._time_out(self._deadlines.popleft()[1])

    def _time_out(self, messages: int) -> None:
        shipper = self.shipper
        if shipper.spool is not None and not shipper.spooling and shipper.spool.failing is None:
            shipper.begin_spooling()  # slow is as good as away
            self._deadlines.appendleft((trio.current_time() + self.options.ack_timeout, messages))
            return
        self.timed_out += self._release_all(ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR, messages)

    def _look_at_store(self) -> None:
        """The store went away, or is back."""
        reason, policy = self.store.trouble(), self.options.outage_policy
        if policy is None or (reason is not None) == self._outage:
            return
        self._outage = reason is not None
        self._turns_away = self._outage and policy != "spool"
        name = self.options.name
        if policy == "spool":
            text = "messages go to the spool" if self._outage else "the spool drains"
            logger.info("archive group %s: %s; %s", name, reason or "its store is back", text)
            return
        turned_away = self.rejected + self.dropped - self._turned_away
        if reason is None:
            self._turned_away += turned_away
            logger.warning("archive group %s: its store is back; %d messages were turned away", name, turned_away)
            return
        waited = self._let_nobody_wait()
        done = "refused" if policy == "reject" else "dropped"
        if waited:
            done = f"{done} meanwhile, and {waited} that were on their way, which are stored when it is back"
        logger.warning("archive group %s: %s; messages are %s", name, reason, done if waited else f"{done} meanwhile")

    def _let_nobody_wait(self) -> int:
        """The store is away, and what comes is turned away: an answer that waited would hold up the refusals behind it,
        since answers keep the order of their messages. What is in the window is stored later. Return how many messages
        were refused although they may be stored: a store that has gone away cannot say which of them it has."""
        while self._release():
            pass
        refused = ReasonCode.QUOTA_EXCEEDED if self._gated and self.options.outage_policy == "reject" else None
        count = self._release_all(refused)
        if self._stopped_publishers:  # nothing is added to the window meanwhile
            self._stopped_publishers = False
            self._host.resume_publishers(self)
        if refused is None:
            return 0
        self.rejected += count
        return count

    def _note_failures(self) -> None:
        failures = self.shipper.failures
        if not self._unlogged:
            self._reason = str(failures[0])
        self._unlogged += len(failures)
        failures.clear()
        if trio.current_time() >= self._log_at:
            self._log_failures()

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
        return self._taken_messages - self.shipper.left_messages

    @property
    def waiting_bytes(self) -> int:
        """Bytes in the window."""
        return self._taken_bytes - self.shipper.left_bytes

    def counters(self) -> dict[str, int]:
        """Counters by name, for metrics and the line that is logged at the end."""
        shipper = self.shipper
        counters = {
            "stored": shipper.stored,
            "failed": shipper.failed,
            "dropped_qos0": self.dropped_qos0,
            "held": self.held,
            "waiting": self.waiting_messages,
            "rejected": self.rejected,
            "dropped": self.dropped,
            "timed_out": self.timed_out,
        }
        if shipper.spool is not None:
            counters |= {"spooled": shipper.spooled, **shipper.spool.counters()}
        return counters

    def describe(self) -> str:
        """One line for the start-up summary."""
        return f"{self.options.name}: {', '.join(self.options.filter)} -> {self.describe_store()}"

    def describe_store(self) -> str:
        """Where messages go, and what happens while that is away."""
        policy = self.options.outage_policy
        if self.shipper.spool is not None:
            return f"{self.store.describe()}, while it is away {self.shipper.spool.describe()}"
        if policy in ("reject", "drop"):
            return f"{self.store.describe()}; OnOutage = {policy}"
        return self.store.describe()


def build_groups(
    options: Sequence[ArchiveGroupOptions],
    make_store: Callable[[ArchiveGroupOptions], ArchiveStore],
    host: GroupHost,
    *,
    make_spool: Callable[[ArchiveGroupOptions], Spool] | None = None,
    default_kafka_topic: str = "mqtt.archive",
) -> list[ArchiveGroup]:
    """Make a group for each distinct target (see `merge_groups`); `make_store` is called once for each, `make_spool`
    once for each that spools. Without it there are no spools: windows fill instead.

    Raises:
      ConfigError: the groups contradict each other.
    """
    groups = []
    for group in merge_groups(options, default_kafka_topic=default_kafka_topic):
        spool = make_spool(group) if make_spool is not None and group.outage_policy == "spool" else None
        groups.append(ArchiveGroup(group, make_store(group), host, spool))
    return groups
