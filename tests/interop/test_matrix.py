"""matrix.toml is true of the tests, and the table of docs/mqtt.md is made of it. Needs no foreign client."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

FOLDER: Final = Path(__file__).parent
MATRIX: Final[dict[str, dict[str, dict[str, Any]]]] = tomllib.loads((FOLDER / "matrix.toml").read_text("utf-8"))
CLIENTS: Final = ("paho-mqtt", "aiomqtt", "mosquitto", "MQTT.js", "Paho JS")
CELLS: Final = [(feature, client, cell) for feature, row in MATRIX.items() for client, cell in row.items()]


@cache
def interop_tests(file: str) -> frozenset[str]:
    """Return the names of the tests of a file, all of which are marked `interop`."""
    body = ast.parse((FOLDER / file).read_text("utf-8")).body
    marks = {ast.unparse(node) for node in body if isinstance(node, ast.Assign)}
    assert "pytestmark = pytest.mark.interop" in marks, f"{file} does not mark its tests"
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))


def table() -> str:
    """Return the table that docs/mqtt.md has to have."""
    lines = [f"| | {' | '.join(CLIENTS)} |", f"|---|{'---|' * len(CLIENTS)}"]
    for feature, row in MATRIX.items():
        cells = (row[client].get("covered") or f"*{row[client]['cannot']}*" for client in CLIENTS)
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("feature, client, cell", CELLS, ids=[f"{client}-{feature}" for feature, client, _ in CELLS])
def test_cell_names_tests_or_a_reason(feature: str, client: str, cell: dict[str, Any]) -> None:
    assert set(cell) in ({"covered", "tests"}, {"cannot"})
    assert cell.get("cannot") or cell["tests"]
    for name in cell.get("tests", ()):
        file, _, function = name.partition("::")
        assert function in interop_tests(file), f"{feature}, {client}: there is no {name}"


def test_every_feature_has_every_client() -> None:
    assert {feature: tuple(row) for feature, row in MATRIX.items()} == dict.fromkeys(MATRIX, CLIENTS)


def test_the_documented_table_is_the_matrix() -> None:
    documented = (FOLDER.parents[1] / "docs" / "mqtt.md").read_text("utf-8")
    assert table() in documented, f"docs/mqtt.md needs this table:\n{table()}"
