"""Publishers of numbered messages that go on whatever happens, and know what was acknowledged."""

from __future__ import annotations

import threading
from typing import Any, Final

from paho.mqtt.client import Client
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from tests.interop.broker_process import BrokerProcess
from tests.interop.paho_support import V5, PahoClient

BURST: Final = 5
PAUSE: Final = 0.02
"""Seconds between two bursts: at most BURST / PAUSE messages/s and publisher. Paho in the same interpreter receives
what six such publishers send."""
PADDING: Final = b"." * 100


def payload_of(number: int) -> bytes:
    """Return the payload of message `number`."""
    return b"%d " % number + PADDING


def number_of(payload: bytes) -> int:
    """Return the number of a message."""
    return int(payload.partition(b" ")[0])


class NumberedPublisher(threading.Thread):
    """Publishes 0, 1, 2, ... to one topic until `finish`, with at most `window` messages on their way.

    Attributes:
      published: how many messages were given to paho.
      acknowledged: how many of them are done: sent at QoS 0, PUBACK or PUBCOMP above.
    """

    def __init__(
        self, broker: BrokerProcess, topic: str, qos: int, *, window: int = 50, version: MQTTProtocolVersion = V5
    ) -> None:
        super().__init__(name=f"publisher of {topic}")
        self.topic, self.qos, self.window = topic, qos, window
        self.published = self.acknowledged = 0
        self.refusals: list[str] = []
        self._changed = threading.Condition()
        self._finish = threading.Event()
        self.paho = PahoClient(broker, version=version, inflight=window)
        self.paho.client.on_publish = self._on_publish
        self.start()

    def _on_publish(
        self, client: Client, userdata: Any, mid: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        with self._changed:
            self.acknowledged += 1
            if reason.is_failure:
                self.refusals.append(str(reason))
            self._changed.notify_all()

    def run(self) -> None:
        while not self._finish.wait(PAUSE):
            for _ in range(BURST):
                if not self._wait_for_room():
                    return
                result = self.paho.client.publish(self.topic, payload_of(self.published), self.qos)
                assert result.rc == MQTTErrorCode.MQTT_ERR_SUCCESS, result.rc
                self.published += 1

    def _wait_for_room(self) -> bool:
        """Wait until there is room in the window; False when it is time to end."""
        with self._changed:
            while self.published - self.acknowledged >= self.window:
                if self._finish.is_set():
                    return False
                self._changed.wait(PAUSE)
        return not self._finish.is_set()

    def wait_for(self, count: int, limit: float) -> None:
        """Wait until `count` messages are acknowledged."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.acknowledged >= count, limit), (
                f"{self.topic}: {self.acknowledged} of {count} acknowledged within {limit} s"
            )

    def finish(self, limit: float) -> None:
        """Publish no more; everything published must be acknowledged within `limit` seconds, nothing refused."""
        self.stop_publishing()
        self.wait_for(self.published, limit)
        assert self.refusals == []
        assert not self.paho.ended.is_set(), f"{self.topic}: disconnected: {self.paho.reason}"

    def stop_publishing(self) -> None:
        """Publish no more."""
        self._finish.set()
        self.join()

    def close(self) -> None:
        """End thread and connection."""
        self.stop_publishing()
        self.paho.close()
