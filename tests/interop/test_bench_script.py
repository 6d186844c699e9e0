"""scripts/bench: the load generator builds, both brokers serve it, the figures come out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="scripts/bench measures the checkout's .venv"),
]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def test_a_row_is_measured_beside_mosquitto(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    result = bench("--seconds", "0.3", "--runs", "1", "--v5", "--rows", "p2p QoS 1", "--json", str(file))
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["row"] for row in rows] == ["p2p QoS 1, 10 pairs, window 100", "5.0: p2p QoS 1, 10 pairs, window 100"]
    for row in rows:
        assert set(row["brokers"]) == {"mosquitto", "mqtt_trio"}
        assert all(figures["delivered"] > 0 for figures in row["brokers"].values())
        assert f"| {row['row']} |" in result.stdout


def test_a_broker_that_does_not_serve_is_one_message(tmp_path: Path) -> None:
    result = bench(
        "--quick", "--rows", "fan-out", "--json", str(tmp_path / "f.json"), "--other", "sh -c 'echo no such thing'"
    )
    assert result.returncode == 1
    assert "scripts/bench: other does not serve; its last words:\nno such thing" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_rows_are_wrong_usage() -> None:
    result = bench("--rows", "nothing like it")
    assert result.returncode == 2
    assert "fan-out 1 to 50" in result.stderr
