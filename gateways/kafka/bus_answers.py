"""Who waits for a record of the bus: publishers whose acknowledgements wait until Kafka, or a disk, has it [K22]."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import trio

from gateways.kafka.bus_outgoing import Outgoing
from gateways.kafka.bus_settings import BusSettings
from mqtt_trio.gateway import Answer, Hold, ReasonCode, Refused

FAILED: Final = ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR


class BusAnswers:
    """What one node's publishers are told, and when. Trio thread only.

    Attributes:
      rejected, turned_away: messages that were answered with a refusal, or dropped, because Kafka was away.
      timed_out: messages that were answered with a refusal because neither Kafka nor a disk had them in time.
    """

    def __init__(self, settings: BusSettings) -> None:
        self.rejected = self.turned_away = self.timed_out = 0
        self._policy = settings.on_outage
        self._timeout = settings.ack_timeout
        self._waits: deque[Outgoing] = deque()  # acknowledgements wait for them, oldest first
        self._any_waits = trio.Event()

    def wait_for(self, outgoing: Outgoing) -> None:
        """Let what waits for a record wait for AckTimeout from now."""
        outgoing.answer_by = trio.current_time() + self._timeout
        self._waits.append(outgoing)
        self._any_waits.set()

    def release(self, outgoing: Outgoing, refused: ReasonCode | None = None) -> None:
        """Answer what waits for a record."""
        holds, outgoing.holds = outgoing.holds, []
        for hold in holds:
            hold.release(refused)
        while self._waits and not self._waits[0].holds:
            self._waits.popleft()

    # --- while Kafka is away, and what comes is turned away

    def turn_away(self) -> Answer:
        """Say no to a message, or drop it."""
        if self._policy == "reject":
            self.rejected += 1
            return Refused(ReasonCode.QUOTA_EXCEEDED)
        self.turned_away += 1
        return None

    def answer_in_outage(self, outgoing: Outgoing) -> None:
        """What is on disk is acknowledged: the next process knows of it. The rest may be at Kafka, or not."""
        if outgoing.number or self._policy == "drop":
            self.release(outgoing)
        else:
            self.rejected += sum(not hold.released for hold in outgoing.holds)
            self.release(outgoing, ReasonCode.QUOTA_EXCEEDED)

    def answer_all_in_outage(self) -> None:
        """Let nobody wait any more."""
        while self._waits:
            self.answer_in_outage(self._waits[0])

    def turn_away_held(self, holds: Iterable[Hold]) -> None:
        """Answer what waits for messages that are no records yet, and on no disk."""
        refused = ReasonCode.QUOTA_EXCEEDED if self._policy == "reject" else None
        for hold in holds:
            self.rejected += refused is not None and not hold.released
            hold.release(refused)

    # --- AckTimeout

    async def watch(self, detour: Callable[[], bool], flush: Callable[[], None]) -> None:
        """See to acknowledgements that have waited for AckTimeout, until cancelled [K22]. `detour` sends what is on its
        way to the disk as well; it says whether it has done so just now. `flush` is called behind answers."""
        waits = self._waits
        while True:
            while not waits:
                self._any_waits = trio.Event()
                await self._any_waits.wait()
            await trio.sleep_until(waits[0].answer_by)
            while waits and waits[0].answer_by <= trio.current_time():
                self._time_out(waits[0], detour)
            flush()

    def _time_out(self, outgoing: Outgoing, detour: Callable[[], bool]) -> None:
        """Answer what has waited for too long; where there is a spool that takes it, let it go there first."""
        if detour():
            answer_by = trio.current_time() + self._timeout
            for each in self._waits:  # the disk gets its time, for all of them
                each.answer_by = answer_by
        elif outgoing.number:
            self.release(outgoing)
        else:
            self.timed_out += len(outgoing.holds)
            self.release(outgoing, FAILED)

    def counters(self) -> dict[str, int]:
        """Counters by name."""
        return {
            "bus_messages_rejected": self.rejected,
            "bus_messages_turned_away": self.turned_away,
            "bus_messages_timed_out": self.timed_out,
        }
