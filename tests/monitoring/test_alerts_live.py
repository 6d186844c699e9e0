"""The alert rules beside real nodes, a real Kafka and a real Prometheus [K17]: silent while all is well, firing when
something is wrong. scripts/alerts does the same with five minutes of health and a stop of one minute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from tests.kafka_support import KafkaNode
from tests.monitoring.figures_page import documented
from tests.monitoring.rules import alerts, as_grafana_asks, dashboard_queries, names_in, panel_targets
from tests.monitoring.stage import Stage, open_stage

pytestmark = [pytest.mark.kafka, pytest.mark.interop]

HEALTHY: Final = 20.0
STOP: Final = 6.0


@pytest.mark.timeout(400)
async def test_alerts(own_kafka: KafkaNode, tmp_path: Path) -> None:
    async with open_stage(own_kafka.servers, tmp_path) as stage:
        await stage.healthy(HEALTHY)
        await names_exist(stage)
        await dashboard_shows(stage)
        truth, lag = await stage.stop_reading(STOP)
        assert lag == pytest.approx(truth, rel=0.1)
        await stage.fill_bus()
        await stage.fires("KafkaRecordsLag", "KafkaSmallFetches")
        stage.go_on_reading()
        await stage.fires("KafkaDeadLetters")
        await stage.ends("KafkaRecordsLag", "KafkaSmallFetches")
        await stage.throttle(2000.0)
        await stage.fires("KafkaProduceThrottled")
        await stage.throttle(None)
        assert "KafkaFailedFetches" not in await stage.watch.active()
        await stage.delete_bus_until("KafkaFailedFetches")


async def names_exist(stage: Stage) -> None:
    """Whatever rules and dashboard name is shown by a node, and whatever that shows is told by the guides."""
    shown = {name.split(" ")[0] for name in await stage.metrics(1)}
    queries = [*(rule["expr"] for rule in alerts().values()), *dashboard_queries()]
    named = set().union(*map(names_in, queries))
    assert len(named) > 30
    assert named - shown == set()
    assert {re.split(r"[{ ]", name)[0] for name in shown} - documented() == set()


async def dashboard_shows(stage: Stage) -> None:
    """Prometheus answers each query of the dashboard, for both nodes, with the labels that the legend shows."""
    for panel, query, legend in panel_targets():
        found = await stage.watch.ask(as_grafana_asks(query, "10s"))
        assert found, f"{panel}: nothing comes of {query}"
        for sample in found:
            assert legend <= sample["metric"].keys(), f"{panel}: {query}"
    nodes = {sample["metric"]["instance"] for sample in await stage.watch.ask("mqtt_trio_info")}
    assert len(nodes) == 2
    for node in nodes:
        query = as_grafana_asks('mqtt_trio_ready{instance=~"$instance"}', instance=node)
        assert len(await stage.watch.ask(query)) == 1, "one node can be chosen"
