"""Records with messages at QoS 1 and 2 on their way to Kafka: what of them is where, in memory, on disk, at Kafka.

Where `Ack = "store"` and the node has a session store, each record is noted there first, in the commit of everything
else that its messages led to, and leaves behind that. So a kill at any instant leaves the record and the Packet
Identifiers of its messages, or neither; the next process sends what it finds under the old sequences, and whoever has
it knows it for a double. While Kafka is away records go over the spool instead of waiting in memory: those that are on
their way are written there as well, in front of what comes. Behind the outage it is read and sent in order, and new
records queue behind it until it is empty.

An acknowledgement that waits for its record (`Ack = "store"`) goes when Kafka has it, or, while Kafka is away, when
the disk has it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import trio

from gateways.kafka.bus_answers import FAILED, BusAnswers
from gateways.kafka.bus_notes import BusNotes
from gateways.kafka.bus_outgoing import Outgoing
from gateways.kafka.bus_records import RUN_OVERHEAD, Item
from gateways.kafka.bus_settings import BusSettings
from gateways.kafka.bus_spool import BusSpool
from gateways.kafka.bus_window import BusWindow
from gateways.kafka.records import Record, was_closed
from mqtt_trio.gateway import Answer, GatewayHost, Hold, LocalClient

log = logging.getLogger("gateways.kafka.bus")


class BusOutbox:
    """One node's records at QoS 1 and 2: the way to Kafka, and what joins it to the session store (`BusNotes`), the
    spool (`BusSpool`) and those who wait (`BusAnswers`). Trio thread only.

    Attributes:
      gated: acknowledgements wait for their record.
      notes: records are noted in the session store before they leave.
      turns_away: Kafka is away, and messages at QoS 1 and 2 are not taken; each of them asks, so it is no property.
      away: Kafka is away.
      flights: records that were offered to Kafka and are not over, in their order.
      spool: where records go while Kafka is away, if they do.
    """

    def __init__(
        self,
        settings: BusSettings,
        host: GatewayHost,
        local: LocalClient,
        offer: Callable[[Record], None],
        window: BusWindow,
    ) -> None:
        self.turns_away = self.away = False
        self.partitions = settings.partitions
        self.pack_all: Callable[[], list[Outgoing]]
        """Makes records of what waits in the slots."""
        self.pack_handed: Callable[[dict[int, list[Item]]], list[Outgoing]]
        """Makes records of what is passed on, by partition."""
        self.slot_holds: Callable[[], Iterable[Hold]] = tuple
        """What their publishers wait for."""
        self.trouble: Callable[[], str | None] = lambda: None
        """Says why Kafka takes nothing at present."""
        self.resumed = self.sent_records = self.sent_messages = self.failed_messages = 0
        self.unconfirmed = 0
        """Of the failed ones, those that Kafka had not confirmed when the producer was closed."""
        self.window = window
        self.flights: dict[Outgoing, None] = {}
        self._settings = settings
        self._host = host
        self._offer = offer
        self._open = self._running = False
        self._handed: dict[int, list[Item]] = {}
        self._early: deque[Outgoing] = deque()  # taken before anything may leave
        self._moved = trio.Event()
        self._answers = BusAnswers(settings)
        self._notes = BusNotes(host, local, self._noted)
        self.gated = settings.ack == "store"
        self.notes = self.gated and self._notes.keeps
        self.spool: BusSpool | None = None
        if settings.on_outage == "spool":
            disk = host.make_spool(f"bus-{settings.topic}", settings.spool_bytes)
            self.spool = BusSpool(disk, window, self._answers, self)

    # --- what comes

    def turn_away(self) -> Answer:
        """Say no to a message at QoS 1 or 2, or drop it: Kafka is away."""
        return self._answers.turn_away()

    def hand_over(self, partition: int, item: bytes) -> None:
        """Take a message at QoS 1 or 2 that is passed on: where the node has a store it is noted in the batch that is
        being filled, whatever `Ack` says, because there it is taken out of a queue or behind a position."""
        self.window.add(1, RUN_OVERHEAD + len(item))
        self._handed.setdefault(partition, []).append(item)

    def ship_handed(self) -> None:
        """Send what is passed on."""
        if not self._handed:
            return
        if self._notes.keeps:
            self._host.commit()  # which asks for it: it leaves behind that
        elif self._open or self.spooling:
            for outgoing in self._pack_handed():
                self.dispatch(outgoing)

    def _pack_handed(self) -> list[Outgoing]:
        handed, self._handed = self._handed, {}
        return self.pack_handed(handed) if handed else []

    def dispatch(self, outgoing: Outgoing) -> None:
        """Send a record, behind all before it."""
        if outgoing.holds:
            if self.turns_away:
                self._answers.answer_in_outage(outgoing)
            else:
                self._answers.wait_for(outgoing)
        if self.spool is not None and self.spool.is_on:
            self.spool.put(outgoing)
        elif self._open:
            self.send(outgoing, self.done)
        else:
            self._early.append(outgoing)

    def marks(self) -> dict[str, bytes | None]:
        """Return what is new, for the store (`GatewayHost.note`): records of what waits, and which are over."""
        packed = self._pack_handed()
        if self.notes:
            packed += self.pack_all()
        return self._notes.changes(packed)

    def _noted(self, packed: Sequence[Outgoing]) -> None:
        for outgoing in packed:
            self.dispatch(outgoing)
        self.wake()

    # --- to Kafka

    def open(self, partitions: int) -> None:
        """Records may leave: Kafka has told that its topic has so many partitions."""
        self.partitions = partitions
        self._open = True
        if not self.spooling:
            while self._early:
                self.send(self._early.popleft(), self.done)
        self.look()

    @property
    def takes(self) -> bool:
        """Kafka takes records."""
        return self._open and self.trouble() is None

    def send(self, outgoing: Outgoing, done: Callable[[Outgoing, Exception | None], None]) -> None:
        """Offer a record to Kafka; `done` has to call the method of this name."""
        self.flights[outgoing] = None
        record = Record(
            self._settings.topic,
            outgoing.partition % self.partitions,
            None,
            outgoing.value,
            done=partial(done, outgoing),
            messages=outgoing.messages,
        )
        record.patient = True
        self._offer(record)

    def done(self, outgoing: Outgoing, failure: Exception | None) -> None:
        """Kafka has a record, or never will."""
        if was_closed(failure) and (outgoing.number or outgoing.spool_end):
            return  # the producer was closed, nobody knows: the next process sends what the disk has
        del self.flights[outgoing]
        outgoing.over = True
        if failure is None:
            self.sent_records += 1
            self.sent_messages += outgoing.messages
        else:
            self.failed_messages += outgoing.messages
            if was_closed(failure):  # told once, by the bus
                self.unconfirmed += outgoing.messages
            else:
                log.error("%d messages did not reach the other nodes: %s", outgoing.messages, failure)
        self._answers.release(outgoing, None if failure is None else FAILED)
        self.leave(outgoing)
        if self.spool is not None and outgoing.spool_end is not None:
            self.spool.forget(outgoing)
        self._moved.set()

    def leave(self, outgoing: Outgoing) -> None:
        """It needs neither room in the window nor its note any more."""
        self._notes.forget(outgoing)
        if outgoing.counted:
            outgoing.counted = False
            self.window.settle(outgoing.messages, outgoing.size)

    # --- Kafka goes and comes

    def look(self) -> None:
        """Kafka went away or came back, or somebody thinks so."""
        if not self._running:
            return
        away = self.away = self.trouble() is not None
        turned_away, self.turns_away = self.turns_away, away and self._settings.on_outage in ("reject", "drop")
        if self.turns_away and not turned_away:
            self._let_nobody_wait()
        if self.spool is not None:
            if away:
                self._begin_spooling(self.spool)
            elif self._open:
                self.spool.end_if_empty()
        self.wake()

    def _let_nobody_wait(self) -> None:
        """Kafka is away, and what comes is turned away: an answer that waited would hold up the refusals behind it,
        since answers keep the order of their messages. What was taken is sent when Kafka is back."""
        self._answers.answer_all_in_outage()
        if not self.notes:  # else they leave the slots with the next commit, and are answered behind it
            self._answers.turn_away_held(self.slot_holds())
        self.window.release_all()

    @property
    def spooling(self) -> bool:
        """Records go over the spool at present."""
        return self.spool is not None and self.spool.is_on

    def _begin_spooling(self, spool: BusSpool) -> None:
        if not spool.is_on:
            early, self._early = self._early, deque()
            spool.begin(early)

    def _detour(self) -> bool:
        """Let what is on its way to a slow Kafka go over the spool as well, if there is one that takes it."""
        spool = self.spool
        if spool is None or spool.is_on or spool.disk.failing is not None:
            return False
        self._begin_spooling(spool)  # slow is as good as away
        return True

    def wake(self) -> None:
        """Records have left or are on disk, or Kafka went away or came back: who waits for that goes on, and answers
        leave."""
        self._moved.set()
        self._host.flush()

    async def movement(self) -> None:
        """Wait until a record is over or on disk, or Kafka went away or came back."""
        if self._moved.is_set():
            self._moved = trio.Event()
        await self._moved.wait()

    # --- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the spool, if there is one, until cancelled; `started()` once what the last process left is known."""
        async with trio.open_nursery() as nursery:
            if self.spool is not None:
                await self.spool.start(nursery)
                self.resumed += self.spool.disk.messages
            if self.gated:
                nursery.start_soon(self._answers.watch, self._detour, self._host.flush)
            for outgoing in self._notes.take_found():
                self.window.add(outgoing.messages, outgoing.size)
                self.resumed += outgoing.messages
                self.dispatch(outgoing)
            self._host.note(self.marks)
            self._running = True
            self.look()
            task_status.started()
            await trio.sleep_forever()

    async def finish(self, waits: Callable[[], bool]) -> None:
        """Wait until Kafka has everything, or, while it is away, the disk; where nothing is kept on disk, at once.
        `waits`: something is still in the slots. Bounded by the caller's cancel scope."""
        if self.spool is not None:
            self.spool.disk.take_all()
        while (self.notes or self.spool is not None) and (waits() or not self.is_safe):
            await self.movement()

    @property
    def is_safe(self) -> bool:
        """The process may end: Kafka has everything that was taken, or, while it is away, the disk."""
        if self._early or self._handed or not self._notes.is_settled:
            return False
        if self.spool is not None and not self.spool.is_settled:
            return False
        kept = all(outgoing.number or outgoing.spool_end is not None for outgoing in self.flights)
        return not self.flights or (self.trouble() is not None and kept)

    def give_up(self) -> int:
        """Forget what neither Kafka nor a disk has, such as what a full spool had no room for, since the process ends;
        return how many messages that is."""
        left = [*(self.spool.give_up() if self.spool is not None else ()), *self._early]
        self._early.clear()
        return sum(each.messages for each in left if not (each.number or each.over))

    async def stop(self) -> None:
        """Close the spool. Bounded by the caller's cancel scope."""
        if self.spool is not None:
            await self.spool.disk.stop()

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            **self._answers.counters(),
            "bus_messages_spooled": self.spool.spooled if self.spool is not None else 0,
            "bus_messages_resumed": self.resumed,
            **(self.spool.counters() if self.spool is not None else {}),
        }
