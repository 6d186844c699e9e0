"""scripts/ledger in short: what is promised holds, and a node that breaks a promise is found out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parent.parent.parent
PLANTED: Final = ROOT / "tests" / "ledger" / "planted_gateway.py"

pytestmark = [pytest.mark.interop, pytest.mark.kafka, pytest.mark.timeout(240)]  # half a minute when nobody else works


def ledger(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "ledger"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=220)


def figures(file: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Keep a short ledger; return the exit code and the figures."""
    result = ledger("--json", str(file), "--directory", str(file.parent), *arguments)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    table: dict[str, Any] = json.loads(file.read_text())
    assert f"acknowledged, lost   {sum(v['kind'] == 'lost' for v in table['violations'])}\n" in result.stdout
    return result.returncode, table


def test_an_archive_holds_what_was_acknowledged(tmp_path: Path) -> None:
    code, table = figures(tmp_path / "figures.json", "--kills", "7")
    assert (code, table["violations"]) == (0, []), f"seed {table['seed']}"
    assert sum(table["faults"].values()) >= 7
    assert table["acknowledged"] + table["refused"] == table["messages"] > 500
    assert table["records"] >= table["acknowledged"]


def test_two_nodes_hear_each_other_over_kills_of_both_and_of_kafka(tmp_path: Path) -> None:
    """What was acknowledged reaches the sessions of both nodes, and one member of a group, at QoS 2 once [K22, K23]."""
    load = ("--mode", "bus", "--ack", "store", "--kills", "7", "--faults", "broker,broker,leader,cut,term")
    code, table = figures(tmp_path / "figures.json", *load)
    assert (code, table["violations"]) == (0, []), f"seed {table['seed']}"
    assert table["acknowledged"] == table["messages"] > 500
    text = "two subscribers on each node get all but retained ones, and so does the group with a member on each"
    assert table["records"] >= 5 * 0.6 * table["messages"], text
    assert table["retained"] > 20, "a third node, which starts at the end, has them as well"


@pytest.mark.parametrize(
    "planted, faults, found",
    [
        ("lose,double,swap", "cut", {"lost", "duplicate", "order"}),
        ("acknowledge-early", "broker,slow", {"lost"}),
    ],
)
def test_planted_faults_are_found(tmp_path: Path, planted: str, faults: str, found: set[str]) -> None:
    """A message that is not written, one that is written twice, one that overtakes; one acknowledged too early."""
    broker = f"{sys.executable} {PLANTED} {planted}"
    load = ("--kills", "3", "--faults", faults, "--seed", "3", "--rate", "600", "--patience", "2")
    code, table = figures(tmp_path / "figures.json", "--broker", broker, *load)
    assert code == 1
    assert {violation["kind"] for violation in table["violations"]} == found


def test_a_broker_that_does_not_serve_is_one_message(tmp_path: Path) -> None:
    result = ledger("--broker", "sh -c 'echo no such thing'", "--directory", str(tmp_path))
    assert result.returncode == 2
    assert "scripts/ledger: node a ended by itself; its last words:\nno such thing" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage() -> None:
    result = ledger("--faults", "broker,flood")
    assert result.returncode == 2
    assert "--faults: 'flood' is none of broker, leader" in result.stderr
