"""The figures that kafka-python keeps of its clients, without their traps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import attrs
import pytest

from gateways.kafka.client_metrics import RATE_WINDOW, ClientFigures, ClientMetrics, FetchFailures, FetchWatch
from gateways.kafka.exposed import MOST_PARTITIONS, ClientReport, figures_of
from gateways.kafka.lag import Behind
from mqtt_trio.gateway import Figure


@attrs.frozen
class Name:
    group: str
    name: str
    tags: tuple[str, ...] = ("client-id",)


@attrs.define
class Client:
    """A client of kafka-python: its metrics by name."""

    table: dict[Name, float] | None
    asked: int = 0

    def metrics(self, raw: bool = False) -> Any:
        assert raw, "without it tags are lost"
        self.asked += 1
        if self.table is None:
            return None
        return {name: SimpleNamespace(value=lambda name=name: self.table[name]) for name in self.table}


def table(kind: str, records_group: str) -> dict[Name, float]:
    return {
        Name(records_group, "records-per-request-avg"): 550.0,
        Name(records_group, "records-per-request-avg", ("client-id", "topic")): 50.0,
        Name(f"{kind}-metrics", "throttle-time-max"): 1500.0,
        Name(f"{kind}-node-metrics.node-1", "throttle-time-max"): 7.0,
        Name(f"{kind}-metrics", "network-io-rate"): 3.0,
        Name(f"{kind}-metrics", "incoming-byte-rate"): 1e6,
        Name(f"{kind}-metrics", "outgoing-byte-rate"): 2e6,
        Name(f"{kind}-node-metrics.node-1", "incoming-byte-rate"): 1e5,
    }


@pytest.mark.parametrize(
    "kind, group", [("producer", "producer-metrics"), ("consumer", "consumer-fetch-manager-metrics")]
)
def test_the_figures_of_the_client_are_read_in_our_units(kind: Any, group: str) -> None:
    client = Client(table(kind, group))
    figures = ClientMetrics(client, kind).read()
    assert figures == ClientFigures(records_per_request=550.0, throttle=1.5, network=3e6)


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1.0])
def test_no_sample_is_nothing(value: float) -> None:
    client = Client(dict.fromkeys(table("producer", "producer-metrics"), value))
    assert ClientMetrics(client, "producer").read() == ClientFigures()


def test_metrics_may_come_later_or_never() -> None:
    client = Client({})
    metrics = ClientMetrics(client, "producer")
    assert metrics.read() == ClientFigures()
    client.table = table("producer", "producer-metrics")
    assert metrics.read().network == 3e6
    asked = client.asked
    assert metrics.read().network == 3e6
    assert client.asked == asked, "what was found is not looked for again"
    assert ClientMetrics(Client(None), "producer").read() == ClientFigures(), "they are switched off"


class ClosedError(Exception):
    """The consumer was closed."""


class Fetcher:
    def __init__(self) -> None:
        self.told: list[object] = []

    def _handle_fetch_response(self, *arguments: object) -> None:
        self.told.append(arguments)

    def _handle_fetch_error(self, *arguments: object) -> None:
        self.told.append(arguments)


def response(*codes: int) -> Any:
    partitions = [SimpleNamespace(error_code=code) for code in codes]
    return SimpleNamespace(responses=[SimpleNamespace(partitions=partitions)])


def test_failed_fetches_are_counted_and_handled_as_before() -> None:
    fetcher: Any = Fetcher()
    watch = FetchWatch(fetcher, ClosedError)
    watch.answered_at = 0.0
    fetcher._handle_fetch_error(1, ConnectionError("gone"))
    assert (watch.failed, watch.answered_at) == (1, 0.0)
    good = response(0, 0)
    fetcher._handle_fetch_response(1, {}, 0.0, good)
    assert watch.failed == 1
    assert watch.answered_at > 0
    fetcher._handle_fetch_response(1, {}, 0.0, response(0, 6, 6))
    assert watch.failed == 2, "one fetch, whatever number of partitions it failed for"
    fetcher._handle_fetch_error(1, ClosedError())
    assert watch.failed == 2
    assert fetcher.told[1] == (1, {}, 0.0, good)
    assert len(fetcher.told) == 4


def test_the_rate_forgets() -> None:
    failures = FetchFailures()
    failures.note(0, 0.0)
    failures.note(3, 10.0)
    failures.note(6, 20.0)
    assert failures.rate(20.0) == 9 / RATE_WINDOW
    assert failures.rate(15.0 + RATE_WINDOW) == 6 / RATE_WINDOW
    assert failures.rate(30.0 + RATE_WINDOW) == 0
    assert failures.total == 9


@attrs.define
class Reader:
    name: str
    lag: dict[tuple[str, int], Behind]

    def report(self) -> ClientReport:
        return ClientReport(kind="consumer", lag=self.lag, skew={"t": 2.5}, failed_fetches=7, failed_fetch_rate=0.5)


def samples(figures: Iterator[Figure]) -> dict[tuple[str, ...], float]:
    return {(figure.name, *figure.labels.values()): figure.value for figure in figures}


def test_a_topic_of_many_partitions_has_bounded_figures() -> None:
    lag = {("t", number): Behind(number, float(number)) for number in range(MOST_PARTITIONS + 50)}
    found = samples(figures_of([Reader("r", lag | {("u", 3): Behind(4, 0.5)})]))
    assert found["records_lag", "r", "t", "99"] == 99
    assert ("records_lag", "r", "t", "100") not in found
    assert found["records_lag_max", "r", "t"] == found["records_lag_max_seconds", "r", "t"] == MOST_PARTITIONS + 49
    assert found["records_lag_sum", "r", "t"] == sum(range(MOST_PARTITIONS + 50))
    assert found["records_lag_seconds", "r", "u", "3"] == 0.5
    assert found["partition_skew", "r", "t"] == 2.5
    assert found["partition_skew", "r", "u"] == 1.0
    assert found["failed_fetches_total", "r"] == 7
    assert found["failed_fetch_rate", "r"] == 0.5
    assert len(found) < 2 * MOST_PARTITIONS + 20
