"""What the gateway says about Kafka being there, and how a node without traffic finds out [K1]."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio

from gateways.kafka import meanings, presence
from gateways.kafka.cluster import Cluster, TopicFacts
from gateways.kafka.kafka_gateway import KafkaGateway
from gateways.kafka.meanings import MEANINGS
from gateways.kafka.options import BusOptions, KafkaOptions, MessagesOptions, TopicsOptions
from tests.gateway_support import told, without_stream
from tests.gateways.memory_bus import FakeHost

KAFKA = "127.0.0.1:1"


def test_nobody_misses_kafka_while_nothing_uses_it() -> None:
    gateway = KafkaGateway(without_stream(KafkaOptions(servers=KAFKA)))
    gateway.cluster.away("topics", "nothing listens")
    assert gateway.unready() == []


@pytest.mark.parametrize("enabled", [None, True])
def test_the_stream_misses_kafka_and_its_topic_where_somebody_asked_for_it(enabled: bool | None) -> None:
    """[K1, K11]: on by itself, it takes no node out of service that lacks the rights for it."""
    topics = TopicsOptions(messages=MessagesOptions(enabled=enabled, name="m"))
    gateway = KafkaGateway(KafkaOptions(servers=KAFKA, topics=topics))
    missing = ["Kafka topic m is missing or without a leader"]
    assert gateway.unready() == (missing if enabled else [])
    gateway.cluster.away("topics", "nothing listens")
    assert gateway.unready() == [f"Kafka at {KAFKA} is away: nothing listens"]


def test_an_archive_group_misses_kafka_and_its_topic() -> None:
    gateway = KafkaGateway(KafkaOptions(servers=KAFKA))
    gateway.archive_store("own", "Sensors")
    assert gateway.unready() == ["Kafka topic own is missing or without a leader"]
    gateway.cluster.away("topics", "nothing listens")
    gateway.cluster.away("archive", "no confirmation")
    assert gateway.unready() == [f"Kafka at {KAFKA} is away: nothing listens"]
    gateway.cluster.back("topics")
    assert gateway.unready() == [f"Kafka at {KAFKA} is away: no confirmation"]
    gateway.cluster.back("archive")
    gateway.cluster.know("own", TopicFacts(partitions=1))
    assert gateway.unready() == []
    gateway.cluster.forget("own")
    assert gateway.unready() == ["Kafka topic own is missing or without a leader"]


def test_the_bus_misses_its_topics() -> None:
    gateway = KafkaGateway(KafkaOptions(servers=KAFKA, bus=BusOptions(enabled=True, topic="b")))
    assert gateway.unready() == [f"Kafka topic {t} is missing or without a leader" for t in ("b", "mqtt.retained")]


@pytest.mark.parametrize("reporter", ["dlq", "events", "metrics"])
def test_what_reports_and_serves_no_client_is_not_missed(reporter: str) -> None:
    gateway = KafkaGateway(KafkaOptions(servers=KAFKA))
    gateway.archive_store("own", "Sensors")
    gateway.cluster.know("own", TopicFacts(partitions=1))
    gateway.cluster.away(reporter, "TopicAuthorizationFailedError")
    assert gateway.unready() == []
    gateway.cluster.away("archive", "no confirmation")
    assert gateway.unready() == [f"Kafka at {KAFKA} is away: no confirmation"]


def test_a_reason_that_asks_something_ends_with_its_question_mark(caplog: pytest.LogCaptureFixture) -> None:
    Cluster(["k"]).away("bus", "k refuses connections; is this its port?")
    assert caplog.messages == [
        "Kafka at k is away for bus: k refuses connections; is this its port? MQTT goes on; trying until it is back"
    ]


def counters_in(path: Path) -> Iterator[str]:
    """Yield the keys of the tables that functions named `counters` make."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and function.name == "counters":
            for table in ast.walk(function):
                for key in table.keys if isinstance(table, ast.Dict) else ():
                    if isinstance(key, ast.Constant):
                        yield str(key.value)


def test_every_counter_says_what_it_counts() -> None:
    """Read from the source: to see them all at work takes a Kafka."""
    found = {name for path in Path(meanings.__file__).parent.glob("*.py") for name in counters_in(path)}
    assert len(found) > 30
    assert {name for name in found if not any(f"_{known}".endswith(f"_{name}") for known in MEANINGS)} == set()
    assert [name for name, meaning in MEANINGS.items() if not meaning.endswith(".")] == []


async def test_a_node_without_traffic_finds_out(monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery) -> None:
    monkeypatch.setattr(presence, "INTERVAL", 0.01)
    monkeypatch.setattr(presence, "CONFIRMATION", 0.01)
    answers: list[str | None] = [None, None, "once", None, "gone", "gone", "gone", None]

    def probe(_servers: Sequence[str]) -> str | None:
        return answers.pop(0) if answers else None

    cluster = Cluster([KAFKA], probe)
    nursery.start_soon(presence.watch_presence, cluster)
    await told(cluster, lambda: cluster.is_away)
    assert cluster.reason == "gone"
    await told(cluster, lambda: not cluster.is_away)
    assert (cluster.outages, answers) == (1, []), "one look that failed is no outage"


@pytest.mark.parametrize("bus", [False, True])
async def test_an_archive_group_that_nobody_publishes_to_learns_of_an_outage(bus: bool) -> None:
    """Beside a bus, too, whose clients find out for themselves alone: else the first messages of a group that rejects
    or drops would be taken, long after the outage is known."""
    gateway = KafkaGateway(KafkaOptions(servers=KAFKA, bus=BusOptions(enabled=bus, on_outage="drop")))
    gateway.archive_store("own", "Sensors")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gateway.run, FakeHost("n", b"i" * 16))
        await told(gateway.cluster, lambda: gateway.cluster.away_for(presence.PART) is not None)
        nursery.cancel_scope.cancel()
