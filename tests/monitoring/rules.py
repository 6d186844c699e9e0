"""The alert rules that ship, and what they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

FOLDER: Final = Path(__file__).parent.parent.parent / "mqtt_trio" / "monitoring"
RULES: Final = FOLDER / "alerts.yml"
DASHBOARD: Final = FOLDER / "dashboard.json"
NAME: Final = re.compile(r"\b(?:mqtt_trio|process)_[a-z0-9_]+")
LABEL: Final = re.compile(r"\{\{\s*(\w+)\s*\}\}")
COUNTED: Final = re.compile(r"\b(?:rate|increase)\((\w+)")


def alerts() -> dict[str, dict[str, Any]]:
    """Return the rules by the name of their alert."""
    found: dict[str, dict[str, Any]] = {}
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["alert"] not in found, "two rules of one name"
            found[rule["alert"]] = rule
    return found


def dashboard_queries() -> Iterator[str]:
    """Yield what the dashboard asks Prometheus for."""
    board = json.loads(DASHBOARD.read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def panel_targets() -> Iterator[tuple[str, str, set[str]]]:
    """Yield panel, query and the labels that its legend shows, of each line of the dashboard."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"], set(LABEL.findall(target["legendFormat"]))


def as_grafana_asks(query: str, interval: str = "1m", instance: str = ".+") -> str:
    """Return a query with the variables of the dashboard filled in; `.+` is what "All" stands for."""
    return query.replace("$__rate_interval", interval).replace("$instance", instance)


def names_in(expression: str) -> set[str]:
    """Return the metrics of ours that an expression names."""
    return set(NAME.findall(expression))


def without_delay(text: str) -> str:
    """Return rules that fire as soon as their condition holds."""
    return re.sub(r"^ +for: \S+\n", "", text, flags=re.MULTILINE)
