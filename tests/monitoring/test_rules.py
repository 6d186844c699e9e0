"""Each alert rule fires when it should and is silent when it should, by Prometheus' own tool; what rules and dashboard
name is shown by a node (tests/monitoring/test_alerts_live.py) and told by docs/monitoring.md."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import yaml

from tests.monitoring.rules import (
    COUNTED,
    DASHBOARD,
    RULES,
    alerts,
    as_grafana_asks,
    dashboard_queries,
    names_in,
    panel_targets,
)

LABELS: Final = 'job="mqtt-trio",instance="n:8080"'
READER: Final = f'{LABELS},client="bus-reader"'
TOPIC: Final = f'{READER},topic="monster"'
MINUTES: Final = 15
"""When a rule is looked at."""


@attrs.frozen
class Case:
    """Series of a rule: values of every 15 seconds in Prometheus' notation, so often until MINUTES have passed."""

    series: dict[str, str]
    fires: bool
    more: dict[str, str] = attrs.field(factory=dict)
    """Labels of the alert beside `job`, `instance` and `severity`."""


def steady(value: float) -> str:
    return f"{value}x{4 * MINUTES}"


def growing(step: float) -> str:
    """Growing by `step` every 15 seconds."""
    return f"0+{step}x{4 * MINUTES}"


def pair(series: str, over: float, under: float, **more: str) -> list[Case]:
    """Return cases of a gauge that fires above a threshold."""
    return [Case({series: steady(over)}, True, dict(more)), Case({series: steady(under)}, False)]


def counter(series: str, **more: str) -> list[Case]:
    """Return cases of a counter that must not grow."""
    grown = f"0x{4 * MINUTES - 8} 3x8"
    return [Case({series: grown}, True, dict(more)), Case({series: steady(3)}, False)]


GROUP: Final = f'{LABELS},group="Default",store="KAFKA"'
OF_GROUP: Final = {"group": "Default", "store": "KAFKA"}
OF_TOPIC: Final = {"client": "bus-reader", "topic": "monster"}
OF_READER: Final = {"client": "bus-reader", "kind": "consumer"}
PER_REQUEST: Final = f'mqtt_trio_kafka_records_per_request_avg{{{READER},kind="consumer"}}'
LAG: Final = f"mqtt_trio_kafka_records_lag_max{{{TOPIC}}}"
WITH_THREADS = (
    "bus_consumer",
    "bus_producer",
    "archive",
    "stream_consumer",
    "stream_producer",
    "events_producer",
    "metrics_producer",
)
NETWORK: Final = "mqtt_trio_kafka_network_io_rate_bytes"

CASES: Final[dict[str, list[Case]]] = {
    "KafkaRecordsLag": [
        *pair(LAG, 10_001, 10_000, **OF_TOPIC),
        Case({LAG: f"0x{4 * MINUTES - 2} 99999x2"}, False),  # for half a minute
    ],
    "KafkaLagSeconds": pair(f"mqtt_trio_kafka_records_lag_max_seconds{{{TOPIC}}}", 61, 60, **OF_TOPIC),
    "KafkaSmallFetches": [
        Case({PER_REQUEST: steady(99), LAG: steady(1001)}, True, OF_READER),
        Case({PER_REQUEST: steady(100), LAG: steady(1001)}, False),
        Case({PER_REQUEST: steady(1), LAG: steady(0)}, False),  # only while it is behind
        Case({PER_REQUEST: steady(1), LAG.replace("bus-reader", "another"): steady(1e6)}, False),
        Case({PER_REQUEST.replace("n:8080", "m:8080"): steady(1), LAG: steady(1e6)}, False),
    ],
    "KafkaProduceThrottled": pair(
        f'mqtt_trio_kafka_produce_throttle_time_seconds{{{LABELS},client="archive"}}', 0.001, 0, client="archive"
    ),
    "KafkaFailedFetches": [
        Case({f"mqtt_trio_kafka_failed_fetches_total{{{READER}}}": growing(0.16)}, True, {"client": "bus-reader"}),
        Case({f"mqtt_trio_kafka_failed_fetches_total{{{READER}}}": growing(0.14)}, False),
        Case({f"mqtt_trio_kafka_failed_fetches_total{{{READER}}}": f"0x{4 * MINUTES - 10} 2x10"}, False),  # a restart
    ],
    "KafkaNetworkIo": [
        Case({f'{NETWORK}{{{LABELS},client="{name}"}}': steady(51e6) for name in ("bus", "archive")}, True),
        Case({f'{NETWORK}{{{LABELS},client="{name}"}}': steady(49e6) for name in ("bus", "archive")}, False),
        Case({f'{NETWORK}{{job="j",instance="{name}"}}': steady(99e6) for name in ("n", "m")}, False),
    ],
    "KafkaAway": pair(f"mqtt_trio_kafka_away_seconds{{{LABELS}}}", 31, 30),
    "KafkaDeadLetters": counter(f"mqtt_trio_kafka_dlq_letters_total{{{LABELS}}}"),
    "KafkaThreadHung": [
        case for part in WITH_THREADS for case in pair(f"mqtt_trio_kafka_{part}_threads_left{{{LABELS}}}", 1, 0)
    ],
    "BusMessagesDropped": [
        case
        for what in ("dropped", "failed")
        for case in counter(f"mqtt_trio_kafka_bus_messages_{what}_total{{{LABELS}}}")
    ],
    "MqttNodeDown": [
        Case({f"up{{{LABELS}}}": steady(0)}, True),
        Case({f"up{{{LABELS}}}": steady(1)}, False),
        Case({'up{job="node",instance="n"}': steady(0)}, False),
    ],
    "MqttNodeNotReady": [
        Case({f"mqtt_trio_ready{{{LABELS}}}": steady(0)}, True),
        Case({f"mqtt_trio_ready{{{LABELS}}}": steady(1)}, False),
        Case({f"mqtt_trio_ready{{{LABELS}}}": f"1x{4 * MINUTES - 4} 0x4"}, False),  # a restart
    ],
    "MqttStoreFailing": pair(f"mqtt_trio_store_outage_seconds{{{LABELS}}}", 11, 10),
    "MqttMessagesDropped": [
        case for what in ("outbox", "queue") for case in counter(f"mqtt_trio_dropped_{what}_full_total{{{LABELS}}}")
    ],
    "MqttArchiveLoses": [
        *counter(f"mqtt_trio_archive_dropped_total{{{GROUP}}}", **OF_GROUP),
        *counter(f'mqtt_trio_archive_dropped_total{{{GROUP},qos="0"}}', **OF_GROUP, qos="0"),
        *counter(f"mqtt_trio_archive_failed_total{{{GROUP}}}", **OF_GROUP),
        *counter(f"mqtt_trio_archive_spool_lost_total{{{GROUP}}}", **OF_GROUP),
    ],
    "MqttSpoolFilling": [
        case
        for part, labels, more in (("archive", GROUP, OF_GROUP), ("kafka_bus", LABELS, {}))
        for size, fires in ((51.0, True), (50.0, False))
        for case in [
            Case(
                {
                    f"mqtt_trio_{part}_spool_bytes{{{labels}}}": steady(size),
                    f"mqtt_trio_{part}_spool_limit_bytes{{{labels}}}": steady(100),
                },
                fires,
                more if fires else {},
            )
        ]
    ],
    "MqttLoopLate": pair(f"mqtt_trio_loop_latency_seconds{{{LABELS}}}", 1.1, 1.0),
}


def case_for_promtool(alert: str, case: Case) -> dict[str, Any]:
    rule = alerts()[alert]
    labels = {"severity": rule["labels"]["severity"], "job": "mqtt-trio", "instance": "n:8080", **case.more}
    expected = [{"exp_labels": labels}] if case.fires else []
    return {
        "name": alert,
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [{"eval_time": f"{MINUTES}m", "alertname": alert, "exp_alerts": expected}],
    }


def promtool(*arguments: str) -> str:
    ran = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=100, check=False)
    return f"{ran.stdout}{ran.stderr}{'' if ran.returncode == 0 else 'FAILED'}"


def test_each_rule_has_both_cases() -> None:
    assert CASES.keys() == alerts().keys()
    assert [name for name, cases in CASES.items() if {case.fires for case in cases} != {True, False}] == []


@pytest.mark.interop
def test_each_rule_fires_and_is_silent(tmp_path: Path) -> None:
    """One run of promtool for all cases: annotations are left out, since they hold values."""
    rules = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]
    bare, tests = tmp_path / "rules.yml", tmp_path / "tests.yml"
    bare.write_text(yaml.safe_dump(rules))
    cases = [case_for_promtool(alert, case) for alert, of_alert in CASES.items() for case in of_alert]
    tests.write_text(yaml.safe_dump({"rule_files": [str(bare)], "evaluation_interval": "15s", "tests": cases}))
    assert promtool("test", "rules", str(tests)).split()[-1] == "SUCCESS"
    cases[0]["alert_rule_test"][0]["exp_alerts"] = []
    tests.write_text(yaml.safe_dump({"rule_files": [str(bare)], "evaluation_interval": "15s", "tests": cases[:1]}))
    assert promtool("test", "rules", str(tests)).endswith("FAILED"), "the tool does not look"


@pytest.mark.interop
def test_prometheus_takes_the_rules_and_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    assert f"SUCCESS: {len(alerts())} rules found" in promtool("check", "rules", str(RULES))
    recorded = [
        {"record": f"query_{number}", "expr": as_grafana_asks(query)}
        for number, query in enumerate(dashboard_queries())
        if not query.startswith("label_values(")
    ]
    queries = tmp_path / "queries.yml"
    queries.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    assert f"SUCCESS: {len(recorded)} rules found" in promtool("check", "rules", str(queries))


def test_every_rule_says_what_is_wrong_and_stands_in_the_guide() -> None:
    guide = (RULES.parent.parent.parent / "docs" / "monitoring.md").read_text()
    for name, rule in alerts().items():
        assert rule["annotations"]["summary"], name
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert f"`{name}`" in guide, name


def test_what_a_rule_says_names_labels_that_its_alert_has() -> None:
    """A label that is not there would be an empty place in the text."""
    for name, rule in alerts().items():
        said = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        for case in CASES[name]:
            if case.fires:
                assert said <= {"job", "instance", "severity", *case.more}, name


def test_counters_are_shown_as_rates_and_nothing_else_is() -> None:
    queries = [*(rule["expr"] for rule in alerts().values()), *(query for _, query, _ in panel_targets())]
    for query in queries:
        counted = set(COUNTED.findall(query))
        assert counted == {name for name in names_in(query) if name.endswith("_total")}, query


def test_every_query_of_the_dashboard_is_of_the_chosen_nodes() -> None:
    for panel, query, legend in panel_targets():
        assert query.count('{instance=~"$instance"}') == len(names_in(query)) == 1, panel
        assert "instance" in legend, panel


def test_grafana_finds_the_data_source_everywhere() -> None:
    board = json.loads(DASHBOARD.read_text())
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", DASHBOARD.read_text()))
    assert used == variables, "variables that are not defined, or not used"
    for panel in board["panels"]:
        targets = panel.get("targets", [])
        assert panel["type"] == "row" or panel["datasource"] == source
        assert all(target["datasource"] == source for target in targets)
        assert len({target["refId"] for target in targets}) == len(targets), panel["title"]


def test_the_dashboard_is_whole() -> None:
    board = json.loads(DASHBOARD.read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        where = panel["gridPos"]
        assert where["x"] + where["w"] <= 24, panel["title"]
    cells = [(p["gridPos"]["y"] + dy, p["gridPos"]["x"] + dx)
             for p in panels for dy in range(p["gridPos"]["h"]) for dx in range(p["gridPos"]["w"])]  # fmt: skip
    assert len(set(cells)) == len(cells), "two panels lie upon each other"
    shown = set().union(*map(names_in, dashboard_queries()))
    needed = set().union(*(names_in(rule["expr"]) for name, rule in alerts().items() if name.startswith("Kafka")))
    counted_otherwise = {"mqtt_trio_kafka_failed_fetches_total"}
    assert needed - counted_otherwise - shown == set(), "whoever is told of it will look for it there"
