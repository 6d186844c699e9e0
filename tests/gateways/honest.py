"""A publisher that keeps its promises over broken connections: it sends again what was not answered, as [MQTT5-4.4.0-1]
asks, and notes what was."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import trio

from mqtt_trio.protocol.codes import QoS, ReasonCode
from mqtt_trio.protocol.packets import Disconnect, Packet, PubAck, PubComp, Publish, PubRec, PubRel
from mqtt_trio.testing import ConnectionEndedError, TestClient

KEPT: dict[str, Any] = {"session_expiry_interval": 1_000_000, "clean_start": False}


@attrs.define
class Honest:
    """Publishes numbers, up to `window` at a time; give it the connection to go on with when it asks for one."""

    reconnect: Callable[[], Awaitable[TestClient]]
    window: int = 5
    retain: bool = False
    payload: Callable[[int], bytes] = b"%d".__mod__
    acknowledged: list[int] = attrs.Factory(list)
    refused: list[int] = attrs.Factory(list)
    client: TestClient | None = None
    _open: dict[int, tuple[int, Publish, bool]] = attrs.Factory(dict)
    """By Packet Identifier: number, PUBLISH, whether its PUBREC has come."""
    _next_id: int = 1

    async def publish(self, *numbers: int, topic: Callable[[int], str], qos: Callable[[int], int]) -> None:
        """Publish `numbers`; back when each has its answer."""
        waiting = list(numbers)
        while waiting or self._open:
            try:
                if self.client is None:
                    await self._connect()
                assert self.client is not None
                while waiting and len(self._open) < self.window:
                    number = waiting.pop(0)
                    packet_id = self._next_id = self._next_id % 60_000 + 1
                    packet = Publish(
                        topic(number), self.payload(number), QoS(qos(number)), self.retain, packet_id=packet_id
                    )
                    self._open[packet_id] = (number, packet, False)
                    await self.client.send(packet)
                if self._open:
                    await self._take(await self.client.next_packet(timeout=3600))
            except ConnectionEndedError:
                self.client = None

    async def _connect(self) -> None:
        self.client = await self.reconnect()
        for packet_id, (_, packet, released) in list(self._open.items()):
            again: Packet = PubRel(packet_id) if released else attrs.evolve(packet, dup=True)
            await self.client.send(again)

    async def _take(self, packet: Packet) -> None:
        assert self.client is not None
        match packet:
            case PubAck(packet_id=packet_id, reason_code=code) | PubRec(packet_id=packet_id, reason_code=code) if (
                code >= 0x80
            ):
                self.refused.append(self._open.pop(packet_id)[0])
            case PubAck(packet_id=packet_id) | PubComp(packet_id=packet_id):
                number = self._open.pop(packet_id)[0]
                if isinstance(packet, PubAck):
                    self.acknowledged.append(number)
            case PubRec(packet_id=packet_id):
                number, publish, released = self._open[packet_id]
                if not released:
                    self.acknowledged.append(number)
                self._open[packet_id] = (number, publish, True)
                await self.client.send(PubRel(packet_id))
            case Disconnect(reason_code=ReasonCode.SERVER_SHUTTING_DOWN):
                self.client = None
            case _:
                raise AssertionError(f"unexpected {packet}")

    async def wait_a_moment(self) -> None:
        await trio.sleep(0.01)
