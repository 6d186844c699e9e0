"""The client's end of an MQTT connection over WebSocket [MQTT5-6], as a stream of MQTT bytes."""

from __future__ import annotations

from typing import Final

import trio

from mqtt_trio.errors import MqttTrioError
from mqtt_trio.protocol.frames import FrameDecoder, client_frame
from mqtt_trio.protocol.wire import MAXIMUM_POSSIBLE_PACKET_SIZE

REQUEST: Final = (
    b"GET /mqtt HTTP/1.1\r\nHost: memory\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Protocol: mqtt\r\n\r\n"
)
MAXIMUM_ANSWER_SIZE: Final = 16_384
RECEIVE_SIZE: Final = 65_536


class UpgradeRefusedError(MqttTrioError):
    """The broker did not answer 101 to the request; the text is its answer."""


class WebSocketStream(trio.abc.Stream):
    """Packs what is sent into one binary frame each and unpacks what comes."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        """What carries the frames: send other ones here."""
        self.decoder = FrameDecoder(MAXIMUM_POSSIBLE_PACKET_SIZE, masked=False)
        self._received = b""

    async def upgrade(self) -> None:
        """Send the request and read the answer.

        Raises:
          UpgradeRefusedError: the answer is not 101.
          trio.BrokenResourceError: the connection broke.
        """
        await self.stream.send_all(REQUEST)
        answer = b""
        while b"\r\n\r\n" not in answer and len(answer) < MAXIMUM_ANSWER_SIZE:
            data = await self.stream.receive_some(RECEIVE_SIZE)
            if not data:
                break
            answer += data
        head, _, rest = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            raise UpgradeRefusedError(answer.decode(errors="replace"))
        self._received = self.decoder.feed(rest)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send one frame."""
        await self.stream.send_all(client_frame(bytes(data)))

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until a frame might be sent at once."""
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return MQTT bytes; nothing behind the broker's close frame or the end of the connection."""
        while not self._received:
            data = await self.stream.receive_some(RECEIVE_SIZE)
            self._received = self.decoder.feed(bytes(data))
            if replies := self.decoder.take_replies():
                await self.stream.send_all(replies)
            if not data or (self.decoder.closed is not None and not self._received):
                return b""
        size = len(self._received) if max_bytes is None else max_bytes
        data, self._received = self._received[:size], self._received[size:]
        return data

    async def aclose(self) -> None:
        """Close the connection, without a close frame."""
        await self.stream.aclose()
