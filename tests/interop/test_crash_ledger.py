"""scripts/crash_ledger: a broker that is killed holds, brokers with a planted fault are found out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parent.parent.parent
PLANTED: Final = ROOT / "tests" / "ledger" / "planted_broker.py"

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]  # half a minute when nobody else works


def crash_ledger(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "crash_ledger"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=220)


def figures(file: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Keep a short ledger; return the exit code and the figures."""
    result = crash_ledger("--json", str(file), *arguments)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    table: dict[str, Any] = json.loads(file.read_text())
    assert f"acknowledged, lost   {sum(v['kind'] == 'lost' for v in table['violations'])}\n" in result.stdout
    return result.returncode, table


def test_nothing_acknowledged_is_lost_doubled_or_out_of_order(tmp_path: Path) -> None:
    code, table = figures(tmp_path / "figures.json", "--kills", "8", "--directory", str(tmp_path))
    assert (code, table["violations"]) == (0, []), f"seed {table['seed']}"
    assert sum(table["kills"].values()) == 8
    assert table["starts"] == 9 + table["stops"]
    assert table["acknowledged"] == table["messages"] > 500
    assert table["deliveries"] > table["messages"]
    assert table["retained"]
    assert table["expired"] == 2


@pytest.mark.parametrize(
    "faults, found",
    [
        ("acknowledge-early", {("lost", "subscriber")}),
        (
            "forget-received,load-backwards,forget-retained",
            {("duplicate", "subscriber"), ("order", "subscriber"), ("retained", "publisher")},
        ),
    ],
)
def test_planted_faults_are_found(tmp_path: Path, faults: str, found: set[tuple[str, str]]) -> None:
    broker = f"{sys.executable} {PLANTED} {faults}"
    load = ("--kills", "6", "--rate", "1000", "--seed", "3", "--directory", str(tmp_path))
    code, table = figures(tmp_path / "figures.json", "--broker", broker, *load)
    assert code == 1
    assert found <= {(violation["kind"], violation["client"].split("-")[0]) for violation in table["violations"]}


def test_a_broker_that_does_not_serve_is_one_message() -> None:
    result = crash_ledger("--broker", "sh -c 'echo no such thing'")
    assert result.returncode == 2
    assert "scripts/crash_ledger: the broker ended by itself; its last words:\nno such thing" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_broker_that_cannot_be_run_is_one_message() -> None:
    result = crash_ledger("--broker", "no-such-broker")
    assert result.returncode == 2
    assert result.stderr == "scripts/crash_ledger: no-such-broker cannot be run: No such file or directory\n"


def test_wrong_usage() -> None:
    result = crash_ledger("--kills", "0")
    assert result.returncode == 2
    assert "--kills: expected a number from 1, got '0'" in result.stderr
