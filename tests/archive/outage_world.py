"""One archive group with fakes, in virtual time: what was published, who waits, who was told what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from mqtt_trio.archive.groups import ArchiveGroup, ArchiveGroupOptions
from mqtt_trio.archive.shipping import LINGER
from mqtt_trio.archive.spool import Spool, inline
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import Answer, Hold
from mqtt_trio.protocol.codes import ReasonCode
from tests.archive_support import FakeHost, FakeStore, run_of

MOMENT = 4 * LINGER
NO = ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR


@attrs.define
class World:
    """One group with its fakes, as one life of a broker."""

    group: ArchiveGroup
    store: FakeStore
    host: FakeHost
    answers: dict[int, Answer] = attrs.Factory(dict)

    @property
    def spool(self) -> Spool:
        assert self.group.shipper.spool is not None
        return self.group.shipper.spool

    def publish(self, *numbers: int, qos: int = 1, size: int = 0) -> None:
        """Publish a message with each number, by turns as a run and as a message."""
        for number in numbers:
            payload = b"%d" % number + bytes(size)
            if number % 2:
                self.answers[number] = self.group.take(Message("t", payload, qos))
            else:
                self.answers[number] = self.group.take_run(run_of(payload, qos=qos))

    def acknowledged(self, *numbers: int) -> bool:
        """Whether all of these were acknowledged, in the affirmative."""
        found = [self.answers[number] for number in numbers]
        return all(answer is None or (isinstance(answer, Hold) and answer.released) for answer in found) and not any(
            isinstance(answer, Hold) and answer.refused for answer in found
        )

    def waiting(self) -> list[int]:
        return [number for number, answer in self.answers.items() if isinstance(answer, Hold) and not answer.released]

    @property
    def stored(self) -> list[int]:
        """What the store was given, in order."""
        return [int(payload.rstrip(b"\0")) for payload in self.store.payloads]

    def counters(self, *names: str) -> dict[str, int]:
        """Counters that are not zero; with names, these."""
        return {name: n for name, n in self.group.counters().items() if (name in names if names else n)}


@asynccontextmanager
async def world(spool: Path | None = None, *, spool_bytes: int = 1 << 30, **options: Any) -> AsyncIterator[World]:
    """A running group; at the end it is killed."""
    options.setdefault("on_outage", "spool" if spool is not None else None)
    store, host = FakeStore(), FakeHost()
    store.at_once = True
    made = Spool(spool, max_bytes=spool_bytes, synchronous="OFF", run_sync=inline) if spool is not None else None
    group = ArchiveGroup(ArchiveGroupOptions(name="G", **options), store, host, made)
    async with trio.open_nursery() as nursery:
        await nursery.start(group.run)
        yield World(group, store, host)
        nursery.cancel_scope.cancel()
