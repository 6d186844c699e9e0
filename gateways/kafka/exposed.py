"""Figures of the gateway's clients for metrics [K17]: those that the alert rules of docs/monitoring.md look at.

Names, units and thresholds stand there, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Protocol

import attrs

from gateways.kafka.client_metrics import NO_FIGURES, ClientFigures, Kind
from gateways.kafka.lag import Behind, Partition
from mqtt_trio.gateway import Figure

MOST_PARTITIONS: Final = 100
"""Partitions of a topic, the first ones, that have figures of their own: every one of them is a time series for each
node. Outcome: the others count in the figures of their topic."""


@attrs.frozen(kw_only=True)
class ClientReport:
    """What a part of the gateway says about its client of Kafka at the moment."""

    kind: Kind
    figures: ClientFigures = NO_FIGURES
    lag: Mapping[Partition, Behind] = {}
    """Of a consumer: how far what was processed is behind, by topic and partition."""
    skew: Mapping[str, float] = {}
    """Of a consumer: see `Lag.skew`."""
    failed_fetches: int = 0
    """Of a consumer, since the start."""
    failed_fetch_rate: float = 0.0
    """Of a consumer, per second, over RATE_WINDOW."""


class Client(Protocol):
    """A part of the gateway that has a client of Kafka; `Cluster.clients` knows them all. Trio thread."""

    name: str

    def report(self) -> ClientReport:
        """Say how the client fares. Called for each look at the metrics: it must be quick."""


def figures_of(clients: Iterable[Client]) -> Iterator[Figure]:
    """Yield the figures of all clients."""
    for client in clients:
        report = client.report()
        yield from _of_client(client.name, report)
        if report.kind == "consumer":
            yield from _of_consumer(client.name, report)


def worst_of(clients: Iterable[Client]) -> dict[str, dict[str, float]]:
    """Return the figures that alert rules look at, by client, as of now: for a line of the log."""
    found = {}
    for client in clients:
        report = client.report()
        figures = {
            "records_per_request_avg": report.figures.records_per_request,
            "throttle_time_seconds": report.figures.throttle,
            "network_io_rate_bytes": report.figures.network,
        }
        if report.kind == "consumer":
            figures["records_lag_max"] = max((behind.records for behind in report.lag.values()), default=0)
            figures["records_lag_max_seconds"] = max((behind.seconds for behind in report.lag.values()), default=0.0)
            figures["failed_fetch_rate"] = report.failed_fetch_rate
        found[client.name] = {name: round(value, 3) for name, value in figures.items()}
    return found


def _of_client(name: str, report: ClientReport) -> Iterator[Figure]:
    figures, labels = report.figures, {"client": name, "kind": report.kind}
    text = "Records in a request to Kafka, or in the answer to one, on average over half a minute."
    yield Figure("records_per_request_avg", text, figures.records_per_request, labels)
    text = "Bytes per second to and from Kafka, over half a minute."
    yield Figure("network_io_rate_bytes", text, figures.network, labels)
    verb, what = ("produce", "sends") if report.kind == "producer" else ("fetch", "reads")
    text = f"Longest pause of half a minute, in seconds, that Kafka asked for because a client {what} beyond its quota."
    yield Figure(f"{verb}_throttle_time_seconds", text, figures.throttle, {"client": name})


def _of_consumer(name: str, report: ClientReport) -> Iterator[Figure]:
    labels = {"client": name}
    text = "Fetches that Kafka did not answer, or not for all partitions."
    yield Figure("failed_fetches_total", text, report.failed_fetches, labels, kind="counter")
    yield Figure("failed_fetch_rate", "The same per second, over five minutes.", report.failed_fetch_rate, labels)
    by_topic: dict[str, list[Behind]] = {}
    for (topic, partition), behind in sorted(report.lag.items()):
        by_topic.setdefault(topic, []).append(behind)
        if partition < MOST_PARTITIONS:
            one = {"client": name, "topic": topic, "partition": str(partition)}
            text = f"Records that Kafka has and that were not processed, by partition; those below {MOST_PARTITIONS}."
            yield Figure("records_lag", text, behind.records, one)
            text = "For how long the record that is processed next has waited, by partition; 0: none waits."
            yield Figure("records_lag_seconds", text, behind.seconds, one)
    for topic, found in by_topic.items():
        of_topic = {"client": name, "topic": topic}
        text = "Records that were not processed, of the partition that is furthest behind."
        yield Figure("records_lag_max", text, max(behind.records for behind in found), of_topic)
        text = "For how long the record has waited that has waited longest; 0: none waits."
        yield Figure("records_lag_max_seconds", text, max(behind.seconds for behind in found), of_topic)
        text = "Records that were not processed, of all partitions."
        yield Figure("records_lag_sum", text, sum(behind.records for behind in found), of_topic)
        text = "Records that came into the busiest partition in a minute, in multiples of the average; 1: even."
        yield Figure("partition_skew", text, report.skew.get(topic, 1.0), of_topic)
