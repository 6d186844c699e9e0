"""A gateway to nowhere: it keeps what the broker shows it and publishes what a test brings from outside."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import trio

from mqtt_trio.gateway import (
    Answer,
    FrameRun,
    GatewayHost,
    Hold,
    Message,
    MessageProperties,
    ReasonCode,
    Refused,
    TapRoute,
    read_run,
)
from mqtt_trio.protocol.topics import topic_matches, validate_topic_filter
from mqtt_trio.testing.client import PATIENCE, NothingCameError


class FakeGateway:
    """A tap and a local client, as a bridge to another system has them (`mqtt_trio.gateway`).

    It takes every message at once until `hold` or `refuse` says otherwise. QoS 0 has no acknowledgement, so such
    messages are taken in any case.
    """

    def __init__(self, host: GatewayHost, topic_filters: Sequence[str] = ("#",), *, clock: Callable[[], float]) -> None:
        """Attach to `host`. `clock` gives UTC seconds since the epoch, the publish time of what comes from outside."""
        for topic_filter in topic_filters:
            validate_topic_filter(topic_filter)
        self.topic_filters = tuple(topic_filters)
        self.messages: list[Message] = []
        """What it took, in the order in which the broker accepted it; held ones are among them."""
        self.refused: list[Message] = []
        """What it refused."""
        self.patience = PATIENCE
        """Seconds that `next_message` waits unless told otherwise."""
        self._host = host
        self._clock = clock
        self._local = host.local_client("fake gateway")
        self._holds: deque[Hold] = deque()
        self._holding = False
        self._refusal: ReasonCode | None = None
        self._seen = 0
        self._lot = trio.lowlevel.ParkingLot()
        host.add_tap(self)

    # What the test says

    def accept(self) -> None:
        """Take messages at once from now on. Those that are held stay so until `release`."""
        self._holding, self._refusal = False, None

    def hold(self) -> None:
        """Take messages from now on and let their publishers wait for PUBACK or PUBREC until `release`."""
        self._holding, self._refusal = True, None

    def refuse(self, reason_code: ReasonCode = ReasonCode.QUOTA_EXCEEDED) -> None:
        """Refuse QoS 1 and 2 messages from now on: nobody gets them; a 5.0 publisher gets `reason_code`, a 3.x one is
        disconnected."""
        self._holding, self._refusal = False, reason_code

    @property
    def held(self) -> int:
        """Messages whose acknowledgement waits."""
        return len(self._holds)

    def release(self, count: int | None = None, *, refused: ReasonCode | None = None) -> None:
        """Let the acknowledgements of the `count` oldest held messages go (of all without one); with `refused` as
        negative ones."""
        for _ in range(self.held if count is None else min(count, self.held)):
            self._holds.popleft().release(refused)
        self._host.flush()

    async def next_message(self, *, timeout: float | None = None) -> Message:
        """Return the next of `messages` that this method has not returned yet.

        Raises:
          NothingCameError: none came within `timeout` seconds, `patience` by default.
        """
        limit = self.patience if timeout is None else timeout
        with trio.move_on_after(limit):
            while self._seen >= len(self.messages):
                await self._lot.park()
            self._seen += 1
            return self.messages[self._seen - 1]
        raise NothingCameError(f"no message came to the gateway of {', '.join(self.topic_filters)} within {limit:g} s")

    def publish(
        self, topic_name: str, payload: bytes = b"", *, qos: int = 0, retain: bool = False, **properties: Any
    ) -> None:
        """Bring a message from outside: subscribers get it, no gateway sees it, `retain` keeps it (or removes, with an
        empty payload, what was kept). `properties` are those of `MessageProperties`."""
        message = Message(topic_name, payload, qos, retain, MessageProperties(**properties), published_at=self._clock())
        if retain:
            self._local.set_retained(message)
        self._local.publish([message])

    # What the broker calls: Tap and TapRoute

    def route(self, topic_name: str) -> TapRoute | None:
        """Say whether messages of `topic_name` are wanted."""
        return self if any(topic_matches(each, topic_name) for each in self.topic_filters) else None

    def take_run(self, run: FrameRun) -> Answer:
        """Take a run of frames."""
        return self._answer(read_run(run), run.qos)

    def take(self, message: Message) -> Answer:
        """Take one message."""
        return self._answer([message], message.qos)

    def _answer(self, messages: list[Message], qos: int) -> Answer:
        if qos and self._refusal is not None:
            self.refused += messages
            return Refused(self._refusal)
        self.messages += messages
        self._lot.unpark_all()
        if not qos or not self._holding:
            return None
        hold = Hold()
        self._holds.append(hold)
        return hold
