"""Every name of a counter, a figure or an event stands in the guides with its meaning, and no other does [K12, K17]."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Final

from gateways.kafka import events_out, meanings
from gateways.kafka.meanings import MEANINGS
from gateways.kafka.records import Reason
from gateways.kafka.thread_counters import OF_THREADS
from tests.monitoring.figures_page import DOCS, NAME, PAGE, ROOT, TABLES, documented, emitted, page

GUIDES: Final = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
COUNTER: Final = re.compile(r"kafka\.(?:[a-z0-9]+_[a-z0-9_]*[a-z0-9]|outages)|archive\.[A-Z]\w*\.[a-z0-9_]+")
"""In backticks; logger names such as `kafka.net` have no underscore."""


def test_the_page_is_what_the_code_says() -> None:
    written = PAGE.read_text()
    assert written == page(), "python -m tests.monitoring.figures_page > docs/figures.md"
    assert "`kafka.bus_messages_refused` | `mqtt_trio_kafka_bus_messages_refused_total`" in written


def test_every_figure_stands_in_a_table_and_no_other() -> None:
    assert len(emitted()) > 180
    assert emitted() - documented() == set(), "a figure that no guide explains"
    assert documented() - emitted() == set(), "a guide explains what there is not"


def test_what_the_guides_say_in_passing_exists() -> None:
    counters = {f"{in_log}{key}" for _, in_log, _, table in TABLES for key in table}
    figures = emitted()
    for guide in GUIDES:
        for token in re.findall(r"`([^`\n]+)`", guide.read_text()):
            if COUNTER.fullmatch(token):
                assert re.sub(r"^archive\.\w+\.", "archive.NAME.", token) in counters, f"{guide.name}: {token}"
            for name in NAME.findall(token) if not token.endswith(("_*", "_NAME_total")) else ():
                assert name in figures, f"{guide.name}: {name}"


def test_each_bound_names_counters_that_exist() -> None:
    """docs/reliability.md: a counter may stand without its section there."""
    known = {key for _, _, _, table in TABLES for key in table} | emitted()
    text = (DOCS / "reliability.md").read_text()
    bounds = text[text.index("\n## Bounds") :]
    named = set()
    for row in re.findall(r"^\| .* \| (.*) \|$", bounds, re.MULTILINE):
        named |= {re.sub(r"^(kafka|archive\.NAME)\.", "", token) for token in re.findall(r"`([a-z][\w.]+)`", row)}
    assert len(named) > 25
    assert named - known == set()


def keys_of_counters() -> set[str]:
    """Return the keys of the tables that functions named `counters` make, of gateway and spool."""
    found = set()
    for path in [*Path(meanings.__file__).parent.glob("*.py"), ROOT / "mqtt_trio/archive/spool.py"]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name == "counters":
                found |= {node.value for node in ast.walk(function)
                          if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
    return found


def test_every_meaning_is_that_of_a_counter() -> None:
    """The reverse of `test_every_counter_says_what_it_counts`: nothing is explained that is not counted any more."""
    keys = keys_of_counters() | {f"dlq_{reason}" for reason in Reason} | set(OF_THREADS)
    assert {name for name in MEANINGS if not any(name == key or name.endswith(f"_{key}") for key in keys)} == set()


def test_every_event_stands_in_the_schema_and_in_the_guide() -> None:
    returned = set()
    for function in (events_out.facts_of, events_out._of_connection):
        for node in ast.walk(ast.parse(inspect.getsource(function))):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                returned |= {part.value for part in node.value.elts if isinstance(part, ast.Constant)}
    schema = json.loads((ROOT / "gateways/kafka/schemas/mqtt_event.schema.json").read_text())
    assert returned == {one["properties"]["event"]["const"] for one in schema["oneOf"]}
    guide = (DOCS / "kafka-stream.md").read_text()
    table = guide[guide.index("| `event` | when |") :].split("\n\n", 1)[0]
    told = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    assert returned == told


def test_every_reason_of_a_dead_letter_stands_in_the_guide() -> None:
    guide = (DOCS / "kafka-errors.md").read_text()
    table = guide[guide.index("| reason | what happened |") :].split("\n\n", 1)[0]
    told = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    assert told == {str(reason) for reason in Reason}
