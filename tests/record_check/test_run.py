"""The check over a whole run of pytest: planted faults of each way to write make it fail, and are named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.record_check.book import FOLDER, Book, findings
from tests.record_check.rules import Kind
from tests.record_check.test_rules import RIGHT, redriven
from tests.record_check.watch import check

ROOT: Final = Path(__file__).parents[2]
LIMIT: Final = 60.0
INI: Final = """[pytest]
addopts = -p tests.record_check.plugin -p no:cacheprovider -m 'not java'
testpaths = .
markers =
    java: none here
"""
SEND: Final = """
import contextlib, json
from gateways.kafka import workers
from gateways.kafka.options import KafkaOptions
from gateways.kafka.records import Record

def write(**wrong):
    figure = {"name": "messages_total", "labels": {}, "value": 1}
    fields = {"timestamp": "2026-01-01T00:00:00.000Z", "brokerId": "node-1", "interval": 10, "counters": [figure]}
    fields = {name: value for name, value in (fields | {"gauges": []} | wrong).items() if value is not None}
    producer = workers.Producer.__new__(workers.Producer)  # not connected: it is looked at before it is taken
    producer.checked_as = ("metrics", KafkaOptions())
    with contextlib.suppress(AttributeError):
        producer.send(Record("planted", None, b"node-1", json.dumps(fields).encode(), (), 1), 0, None, None)
"""
"""Gives a producer a record for mqtt.metrics."""
TESTS: Final = (
    SEND
    + """
import os, pathlib, subprocess, sys

def test_right():
    write()

def test_missing_field():
    write(brokerId=None)

def test_wrong_type():
    write(interval="10")

def test_in_a_process_that_is_killed():
    code = pathlib.Path(__file__).with_name("send.py").read_text()
    code += "write()\\nwrite(unheardOf=1)\\nimport os; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
"""
)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a folder."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *paths]), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text(INI)
    return tmp_path


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_a_run_with_records_that_do_not_validate_fails_and_names_them(folder: Path, workers: tuple[str, ...]) -> None:
    (folder / "test_it.py").write_text(TESTS)
    (folder / "send.py").write_text(SEND)
    ran = run(folder, "test_it.py", *workers)
    assert "4 passed" in ran.stdout, ran.stdout + ran.stderr
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    assert "5 metrics (2 process, 3 test)" in ran.stdout
    assert ran.stdout.count("INVALID metrics in topic planted, written by") == 3
    for test, problem in (
        ("test_missing_field", '"brokerId" is a required property'),
        ("test_wrong_type", 'interval: "10" is not of type "number"'),
        ("test_in_a_process_that_is_killed", "'unheardOf' was unexpected"),
    ):
        told = ran.stdout.partition(f"test_it.py::{test} (call):")[2].partition("INVALID")[0]
        assert problem in told, ran.stdout
        assert "'key': b'node-1'" in told
        assert '"counters"' in told


def test_a_run_with_right_records_passes_and_says_what_it_saw(folder: Path) -> None:
    (folder / "test_it.py").write_text(SEND + "def test_it():\n    write()\n")
    ran = run(folder, "test_it.py")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 metrics (1 test)" in ran.stdout
    assert "ERROR" not in ran.stdout


@pytest.mark.parametrize("chosen", [("-k", "it"), ("-m", "not kafka")])
def test_a_part_of_the_tests_need_not_write_everything(folder: Path, chosen: tuple[str, ...]) -> None:
    (folder / "test_it.py").write_text("def test_it():\n    pass\n")
    assert run(folder, *chosen).returncode == 0


def test_all_tests_have_to_write_records_of_every_kind(folder: Path) -> None:
    (folder / "test_it.py").write_text(SEND + "def test_it():\n    write()\n")
    ran = run(folder)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    missing = [kind for kind in Kind if f"ERROR: no record of this kind was written: {kind}\n" in ran.stdout]
    assert missing == [kind for kind in Kind if kind is not Kind.METRICS]


def test_what_no_schema_describes_is_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    check("new producer", RIGHT[Kind.EVENT](), 0)
    (violation,) = findings(tmp_path).violations
    assert violation.problems == ("no schema is known for such a record of the producer 'new producer'",)
    assert "test_what_no_schema_describes" in violation.test


def test_a_message_that_is_written_again_has_to_be_what_its_topic_holds(tmp_path: Path) -> None:
    book = Book(tmp_path, "test")
    record = redriven()
    book.check(Kind.REDRIVEN, record, 0)
    assert findings(tmp_path).violations == ()
    book.check(Kind.ARCHIVE_JSON, RIGHT[Kind.ARCHIVE_JSON](), 0)
    assert findings(tmp_path).violations == ()
    record.value = b'{"topic": "a/b"}'
    book.check(Kind.REDRIVEN, record, 0)
    (violation,) = findings(tmp_path).violations
    assert (violation.kind, violation.topic) == (Kind.REDRIVEN, "archive")
    assert any("brokerId" in problem for problem in violation.problems)
    assert findings(tmp_path).counts == {"test": {Kind.REDRIVEN: 2, Kind.ARCHIVE_JSON: 1}}


def test_a_check_that_cannot_be_made_is_told_and_nothing_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    record = RIGHT[Kind.EVENT]()
    record.headers = None  # type: ignore[assignment]  # such a record could not be sent either
    check("redrive", record, 0)
    record.value = None
    check("redrive", record, 0)
    assert [violation.kind for violation in findings(tmp_path).violations] == [Kind.REDRIVEN, "unchecked"]
    monkeypatch.setenv(FOLDER, str(tmp_path / "gone"))
    check("events", record, 0)
