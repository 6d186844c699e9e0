"""A session store with as much in it as a start must take in five seconds, made by a broker as clients make it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import attrs
import trio

from mqtt_trio.broker.limits import Limits
from mqtt_trio.broker.message import Message
from mqtt_trio.broker.session import NEVER
from mqtt_trio.protocol.codes import ProtocolVersion
from mqtt_trio.server.sqlite_store import SqliteStore
from mqtt_trio.testing import MemoryBroker, open_memory_broker

CLIENTS_AT_ONCE: Final = 200
MESSAGES_AT_ONCE: Final = 5000
"""Messages of one batch of the journal."""
PAYLOAD: Final = b"." * 92


@attrs.frozen
class Size:
    """How much is stored."""

    sessions: int = 10_000
    queued: int = 20
    """Messages per session."""
    retained: int = 100_000

    @property
    def messages(self) -> int:
        return self.sessions * self.queued


async def build(path: Path, size: Size) -> None:
    """Fill the store at `path`: half of the sessions 5.0, half 3.1.1, each with a queue of messages of its own."""
    store = SqliteStore(path, synchronous="OFF")
    async with open_memory_broker(Limits(session_expiry_interval=NEVER), store=store) as memory:
        for first in range(0, size.sessions, CLIENTS_AT_ONCE):
            async with trio.open_nursery() as nursery:
                for number in range(first, min(first + CLIENTS_AT_ONCE, size.sessions)):
                    nursery.start_soon(_leave_a_session, memory, number)
        for at in range(size.messages):
            number, turn = at % size.sessions, at // size.sessions
            publish(memory, f"site/{number}/orders", b"%d %d " % (number, turn) + PAYLOAD, retain=False)
            await _let_commit(memory, at)
        for at in range(size.retained):
            publish(memory, f"plant/{at % 100}/line/{at // 100}/temperature", b"%d " % at + PAYLOAD, retain=True)
            await _let_commit(memory, at)
        assert memory.broker.metrics.messages_queued == size.messages
        await memory.stop()


async def _leave_a_session(memory: MemoryBroker, number: int) -> None:
    if number % 2:
        client = await memory.connect(f"device-{number}", session_expiry_interval=NEVER)
    else:
        client = await memory.connect(f"device-{number}", version=ProtocolVersion.MQTT_3_1_1, clean_start=False)
    await client.subscribe(f"site/{number}/#", qos=1)
    await client.cut()


def publish(memory: MemoryBroker, topic_name: str, payload: bytes, *, retain: bool) -> None:
    """Publish at QoS 1 without a client."""
    broker = memory.broker
    message = Message(topic_name, payload, 1, retain, client_id="press-1", published_at=memory.utc_now())
    if retain:
        broker.inbound.retain(message)
    broker.publish(message, trio.current_time(), tapped=False)


async def _let_commit(memory: MemoryBroker, at: int) -> None:
    if at % MESSAGES_AT_ONCE == 0:
        memory.broker.flush()
        await trio.lowlevel.checkpoint()
