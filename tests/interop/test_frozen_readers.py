"""Clients that stop reading, and some that read three bytes at a time, beside clients that read, under load."""

from __future__ import annotations

import itertools
import ssl
import statistics
from pathlib import Path

import pytest

from tests.certificates import Certificates
from tests.interop.broker_process import BrokerProcess, Brokers
from tests.interop.frozen import RECEIVE_BUFFER, TOPIC, Kind, Member, measure
from tests.lines import wait_until

pytestmark = [pytest.mark.interop, pytest.mark.alone]

HEALTHY = 50
FROZEN = 50
SLOW = 5
"""Of the frozen ones: they read a little."""
ROUNDS, MOST_ROUNDS = 3, 12
"""A round is one window with frozen readers between two without. One that other programs disturbed says nothing; on a
machine where most are, more rounds are played before the verdict."""
MESSAGES, INTERVAL = 200, 0.01
FLOOD = "flood"
FLOODED = 150
FLOOD_PAYLOAD = b"#" * 16_384
QUEUE_BYTES, OUTBOX_BYTES, INFLIGHT = 512 * 1024, 128 * 1024, 10
SLACK = 0.0005
"""Seconds. The whole of p99 is one or two milliseconds on a quiet machine; our own reading of fifty sockets and the
kernel's waking of two processes, which are part of it, differ by as much from window to window."""
KINDS: tuple[Kind, ...] = ("tcp", "tls", "websocket")
TLS_LINE = r"(?i)\btcp\+tls\b.*?127\.0\.0\.1:(\d+)"
CONFIG = """
[[Listeners]]
Type = "tcp"
Port = 0
Tls = {{ CertFile = "{cert}", KeyFile = "{key}" }}

[Limits]
MaximumPacketSize = "32KiB"
OutboxBytes = {outbox}
QueueMessages = 1000
QueueBytes = {queue}
InflightMessages = {inflight}

[Persistence]
Synchronous = "OFF"
"""


class Frozen:
    """Fifty clients of every kind and QoS, a third of them with sessions that are kept."""

    def __init__(self, broker: BrokerProcess, context: ssl.SSLContext) -> None:
        self.members: list[Member] = []
        ports = {"tcp": broker.port, "websocket": broker.ws_port, "tls": int(broker.output.matches(TLS_LINE)[0][1])}
        for number in range(FROZEN):
            kind = KINDS[number % 3]
            self.members.append(
                Member(
                    ports[kind],
                    f"frozen-{number}",
                    TOPIC,
                    FLOOD,
                    qos=number // 3 % 3,
                    kind=kind,
                    context=context,
                    receive_buffer=RECEIVE_BUFFER,
                    expiry=3600 if number % 9 < 3 else 0,
                )
            )

    @property
    def slow(self) -> list[Member]:
        return self.members[:SLOW]

    def close(self) -> None:
        for member in self.members:
            member.close()


def too_late(without: list[float], beside: list[float]) -> bool:
    """Whether the p99 beside frozen readers is more than twice that of the windows right before and behind, in most
    rounds."""
    around = [(before + after) / 2 for before, after in itertools.pairwise(without)]
    return statistics.median(b - 2 * a for a, b in zip(around, beside, strict=True)) > SLACK


@pytest.mark.timeout(300)  # for the most rounds
def test_frozen_readers_delay_nobody_and_cost_what_is_configured(brokers: Brokers, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    pair = certificates.server()
    config = CONFIG.format(
        cert=pair.cert_file, key=pair.key_file, outbox=OUTBOX_BYTES, queue=QUEUE_BYTES, inflight=INFLIGHT
    )
    broker = brokers.start(config)
    publisher = Member(broker.port, "publisher")
    flooder = Member(broker.port, "flooder")
    healthy = [Member(broker.port, f"healthy-{number}", TOPIC, qos=number % 2) for number in range(HEALTHY)]
    context = certificates.client_context()
    measure(publisher, healthy, (), MESSAGES, INTERVAL)
    base = broker.rss_mib
    without, beside, memory = [measure(publisher, healthy, (), MESSAGES, INTERVAL)], list[float](), list[float]()
    while len(beside) < ROUNDS or (too_late(without, beside) and len(beside) < MOST_ROUNDS):
        frozen = Frozen(broker, context)
        flooder.flood(FLOOD, FLOOD_PAYLOAD, FLOODED)
        beside.append(measure(publisher, healthy, frozen.slow, MESSAGES, INTERVAL))
        memory.append(broker.rss_mib)
        frozen.close()
        wait_until(lambda: len(broker.output.matches("'frozen-.*left:")) >= FROZEN * len(beside), "their ends")
        without.append(measure(publisher, healthy, (), MESSAGES, INTERVAL))
    bounds = FROZEN * (QUEUE_BYTES + OUTBOX_BYTES + INFLIGHT * len(FLOOD_PAYLOAD)) / 2**20
    p99, p99_beside = statistics.median(without), statistics.median(beside)
    print(
        f"p99 {1e3 * p99:.2f} ms, beside {FROZEN} frozen readers {1e3 * p99_beside:.2f} ms in {len(beside)} rounds; "
        f"{base:.0f} MiB, {max(memory):.0f} MiB with them, bounds {bounds:.0f} MiB"
    )
    for member in (publisher, flooder, *healthy):
        member.close()
    broker.stop()
    counters = broker.counters()
    print(counters)
    assert counters["dropped_outbox_full"] > 0
    assert counters["dropped_queue_full"] > 0
    assert not too_late(without, beside), f"seconds without, around each round: {without}; beside: {beside}"
    assert max(memory) <= base + bounds
