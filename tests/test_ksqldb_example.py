"""examples/ksqldb.sql without a server of ksqlDB [K15]: columns and types are those of the shipped schema, each query
names columns that its source has, and it means what examples/sensor_streams.py means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from hypothesis import given
from hypothesis import strategies as st

from gateways.kafka.schema_files import load_schema
from gateways.kafka.topic_plan import DEFAULTS

FOLDER: Final = Path(__file__).parent.parent / "examples"
PROGRAM: Final = (FOLDER / "sensor_streams.py").read_text()
TYPES: Final = {"VARCHAR", "INT", "BIGINT", "DOUBLE", "BOOLEAN"}
FUNCTIONS: Final = {"CAST", "TRIM", "COUNT", "AVG", "MIN", "MAX", "REGEXP_EXTRACT"}
WORDS: Final = FUNCTIONS | TYPES | {"AS", "LIKE", "AND", "OR", "IS", "NOT", "NULL"}
PSEUDO: Final = {"ROWTIME": "BIGINT", "WINDOWSTART": "BIGINT", "WINDOWEND": "BIGINT"}
"""Columns that every row has, or every row of a window."""
AGGREGATES: Final = {"COUNT": "BIGINT", "AVG": "DOUBLE", "MIN": "DOUBLE", "MAX": "DOUBLE"}
CREATE: Final = re.compile(r"CREATE (STREAM|TABLE) (\w+)(?: \((.*?)\))? WITH \((.*?)\)(?: AS (SELECT .*))?")
SELECT: Final = re.compile(
    r"SELECT (?P<what>.*?) FROM (?P<source>\w+)(?: WINDOW (?P<window>TUMBLING \(.*?\)))?(?: WHERE (?P<where>.*?))?"
    r"(?: GROUP BY (?P<group>\w+))? EMIT CHANGES"
)


@attrs.frozen
class Relation:
    """A stream or a table."""

    kind: str
    name: str
    columns: Mapping[str, str]
    """Name as it stands there -> type; those of a query in upper case."""
    keys: tuple[str, ...]
    properties: Mapping[str, str]
    query: re.Match[str] | None = None


def statements() -> list[str]:
    text = re.sub(r"^\s*--.*$", "", (FOLDER / "ksqldb.sql").read_text(), flags=re.MULTILINE)
    return [" ".join(one.split()) for one in text.split(";") if one.strip()]


def relations() -> dict[str, Relation]:
    """Return what the statements make, each from what stands before it."""
    found: dict[str, Relation] = {}
    first, *others = statements()
    assert first == "SET 'auto.offset.reset' = 'earliest'"
    for statement in others:
        made = CREATE.fullmatch(statement)
        assert made is not None, statement
        kind, name, columns, properties, query = made.groups()
        assert (columns is None) == (query is not None), name
        options = dict(re.findall(r"(\w+) = '([^']*)'", properties))
        found[name] = (
            declared(kind, name, columns, options) if query is None else selected(kind, name, query, options, found)
        )
    return found


def declared(kind: str, name: str, columns: str, options: Mapping[str, str]) -> Relation:
    types, keys = {}, []
    for column in columns.split(","):
        words = column.split()
        assert words[1] in TYPES
        assert words[2:] in ([], ["KEY"]), column
        types[words[0]] = words[1]
        keys += [words[0]] * (words[2:] == ["KEY"])
    return Relation(kind, name, types, tuple(keys), options)


def selected(kind: str, name: str, text: str, options: Mapping[str, str], before: Mapping[str, Relation]) -> Relation:
    query = SELECT.fullmatch(text)
    assert query is not None, name
    source = before[query["source"]]
    known = {column.strip("`").upper(): tp for column, tp in source.columns.items()} | PSEUDO
    types = {}
    for expression in re.split(r",\s*(?![^()]*\))", query["what"]):
        bare, _, alias = expression.strip().rpartition(" AS ") if " AS " in expression else (expression.strip(), "", "")
        if "CAST(" in expression:
            bare, alias = re.fullmatch(r"(CAST\(.* AS \w+\)) AS (\w+)", expression.strip()).groups()  # type: ignore[union-attr]
        types[(alias or bare).upper()] = type_of(bare, known)
    for clause in ("what", "where", "group"):
        aliases = set(types) if clause == "what" else set()
        assert words_of(query[clause] or "") - known.keys() - WORDS - aliases == set(), f"{name}: {clause}"
    keys = (query["group"].upper(),) if query["group"] else tuple(key.upper() for key in source.keys)
    return Relation(kind, name, types, keys, options, query)


def words_of(text: str) -> set[str]:
    """Return the names in a clause, texts left out."""
    return {word.upper() for word in re.findall(r"\b[A-Za-z_]\w*", re.sub(r"'[^']*'", "''", text))}


def type_of(expression: str, known: Mapping[str, str]) -> str:
    if cast := re.fullmatch(r"CAST\(.* AS (\w+)\)", expression):
        return cast[1]
    if aggregate := re.fullmatch(r"(\w+)\((\*|\w+)\)", expression):
        assert aggregate[2] == "*" or known[aggregate[2].upper()] == "DOUBLE"
        return AGGREGATES[aggregate[1]]
    return known[expression.upper()]


def types_for(field: Mapping[str, Any]) -> set[str]:
    """Return the types of a column that can hold each value of a field of the schema. Numbers can be read as text."""
    if "oneOf" in field:
        return set.intersection(*(types_for(one) | {"VARCHAR"} for one in field["oneOf"]))
    kind = field.get("type") or {str: "string"}[type(field["const"])]
    return {"string": {"VARCHAR"}, "integer": {"INT", "BIGINT"}, "boolean": {"BOOLEAN"}, "object": set()}[kind]


def test_the_stream_has_the_columns_of_the_schema() -> None:
    fields = load_schema("mqtt_message.schema.json")["properties"]
    stream = relations()["mqtt_messages"]
    assert stream.keys == ("mqtt_topic",)
    columns = {name: tp for name, tp in stream.columns.items() if name not in stream.keys}
    exact = {name.lower(): name for name in fields}
    for name, tp in columns.items():
        field = exact[name.strip("`").lower()]
        assert not name.startswith("`") or name.strip("`") == field, "quoted, a name counts as it is written"
        assert tp in types_for(fields[field]), name
    left_out = set(fields) - {exact[name.strip("`").lower()] for name in columns}
    assert left_out == {name for name, field in fields.items() if not types_for(field)} == {"headers"}
    formats = {"KAFKA_TOPIC": DEFAULTS["messages"].name, "KEY_FORMAT": "KAFKA", "VALUE_FORMAT": "JSON"}
    assert stream.properties == formats


def test_types_that_do_not_fit_are_noticed() -> None:
    fields = load_schema("mqtt_message.schema.json")["properties"]
    assert types_for(fields["timestamp"]) == {"VARCHAR"}, "it was BIGINT where the queries come from"
    assert "INT" not in types_for(fields["payload"])


def test_each_query_stands_on_what_is_there() -> None:
    """Names of columns are looked at while the statements are read."""
    found = relations()
    assert list(found) == ["mqtt_messages", "sensor_values", "sensor_stats", "anomalies"]
    assert {name: one.kind for name, one in found.items() if one.kind == "TABLE"} == {"sensor_stats": "TABLE"}
    for one in found.values():
        assert set(map(str.upper, one.keys)) <= {name.upper() for name in one.columns}, "ksqlDB wants the key selected"
        assert (one.kind == "TABLE") == (one.query is not None and one.query["group"] is not None), one.name
    topics = [one.properties["KAFKA_TOPIC"] for one in found.values()]
    ours = {plan.name for plan in DEFAULTS.values()} | {"mqtt.aggregates", "mqtt.anomalies"}
    assert len(set(topics)) == len(topics)
    assert set(topics[1:]).isdisjoint(ours), "what ksqlDB writes looks otherwise"


def test_columns_of_the_results() -> None:
    found = relations()
    assert found["sensor_values"].columns == {"MQTT_TOPIC": "VARCHAR", "TOPIC": "VARCHAR", "VALUE": "DOUBLE"}
    assert found["sensor_stats"].keys == ("TOPIC",)
    assert found["sensor_stats"].columns == {
        "TOPIC": "VARCHAR", "MESSAGE_COUNT": "BIGINT", "AVG_VALUE": "DOUBLE", "MIN_VALUE": "DOUBLE",
        "MAX_VALUE": "DOUBLE", "WINDOW_START": "BIGINT", "WINDOW_END": "BIGINT",
    }  # fmt: skip
    anomaly = {"MQTT_TOPIC": "VARCHAR", "TOPIC": "VARCHAR", "VALUE": "DOUBLE", "PUBLISHED_AT": "BIGINT"}
    assert found["anomalies"].columns == anomaly


# --- the same as the program in Python


def said(name: str) -> str:
    """Return what a constant of the program is, from its source: its library is not needed for that."""
    found = re.search(rf"^{name} = (.*)$", PROGRAM, re.MULTILINE)
    assert found is not None
    return found[1]


def test_windows_and_bounds_are_those_of_the_program() -> None:
    found = relations()
    values, stats, anomalies = (found[name].query for name in ("sensor_values", "sensor_stats", "anomalies"))
    assert values is not None
    assert stats is not None
    assert anomalies is not None
    minutes = re.findall(r"(\d+) MINUTE", stats["window"])
    assert [said("WINDOW"), said("GRACE")] == [f"timedelta(minutes={number})" for number in minutes]
    low, high = said("LOW, HIGH").split(", ")
    assert anomalies["where"] == f"value > {float(high):g} OR value < {float(low):g}"
    assert said("PREFIX") == '"sensors/"'
    assert "topic LIKE 'sensors/%'" in values["where"]
    assert "payloadEncoding IS NULL" in values["where"]


PATTERN: Final = re.compile(r"REGEXP_EXTRACT\('([^']+)', payload\) IS NOT NULL")


@given(st.text("0123456789.+-eE \tx,", max_size=8) | st.floats().map(str) | st.integers().map(str))
def test_what_counts_as_a_number_is_what_the_program_takes(payload: str) -> None:
    pattern = PATTERN.search((FOLDER / "ksqldb.sql").read_text())
    of_program = said("NUMBER").removeprefix('re.compile(r"').removesuffix('")')
    assert pattern is not None
    assert (re.search(pattern[1], payload) is None) == (re.fullmatch(of_program, payload) is None)
