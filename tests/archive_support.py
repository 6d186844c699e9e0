"""Fakes and helpers for tests of archive groups."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from mqtt_trio.archive.groups import ArchiveGroup
from mqtt_trio.archive.store import Outcome
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.tap import Answer, FrameRun, Hold
from mqtt_trio.errors import StoreError
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.protocol.properties import with_length


class FakeStore:
    """Keeps batches until told what becomes of them."""

    def __init__(self, refusal: str | None = None) -> None:
        self.batches: list[list[Message]] = []
        self.waiting: list[Callable[[Outcome], None]] = []
        self.stopped = False
        self.at_once = False
        """Store what is submitted immediately, while nothing waits."""
        self._away: str | None = None
        self._changed: Callable[[], None] | None = None
        self._refusal = refusal
        self._stop = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        if self._refusal is not None:
            raise StoreError(self._refusal)
        task_status.started()
        await self._stop.wait()

    def submit(self, batch: Sequence[Message], done: Callable[[Outcome], None]) -> None:
        assert not self.stopped
        self.batches.append(list(batch))
        self.waiting.append(done)
        if self.at_once and self._away is None:
            self.finish_all()

    def finish(self, batches: int = 1, outcome: Outcome | None = None) -> None:
        for _ in range(batches):
            self.waiting.pop(0)(outcome or {})

    def finish_all(self) -> None:
        self.finish(len(self.waiting))

    def go_away(self, reason: str = "it is gone") -> None:
        self._away = reason
        if self._changed is not None:
            self._changed()

    def come_back(self) -> None:
        self._away = None
        if self._changed is not None:
            self._changed()

    def trouble(self) -> str | None:
        return self._away

    def watch(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    async def stop(self) -> None:
        self.stopped = True
        self._stop.set()

    def describe(self) -> str:
        return "a fake"

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for batch in self.batches for message in batch]


class FakeHost:
    """Records what a group asks of the broker."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def flush(self) -> None:
        self.calls.append("flush")

    def stop_publishers(self, owner: object) -> None:
        self.calls.append("stop")

    def resume_publishers(self, owner: object) -> None:
        self.calls.append("resume")


@asynccontextmanager
async def running(group: ArchiveGroup) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: group.run(task_status=task_status))
        yield
        nursery.cancel_scope.cancel()


def run_of(*payloads: bytes, qos: int = 0, version: ProtocolVersion = ProtocolVersion.MQTT_5_0) -> FrameRun:
    packet_id = b"\x00\x07" if qos else b""
    block = b"\x00" if version == ProtocolVersion.MQTT_5_0 else b""
    bodies = [b"\x00\x01t" + packet_id + block + payload for payload in payloads]
    frames = b"".join(bytes((0x30 | qos << 1,)) + with_length(body) for body in bodies)
    return FrameRun(frames, len(payloads), qos, version, "c", 5.0)


def held(answer: Answer) -> Hold:
    assert isinstance(answer, Hold)
    return answer
