"""The table of normative statements: every id that a test or a comment cites is in it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "spec_coverage"
STATEMENTS = {
    version: tomllib.loads((ROOT / "tests" / "spec" / f"mqtt{version}.toml").read_text())["statements"]
    for version in (3, 5)
}
CITATION = re.compile(r"MQTT[35]-\d+\.\d+\.\d+-\d+\b(?!\.)")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_the_numbers_of_statements_are_those_of_the_specifications() -> None:
    assert {version: len(statements) for version, statements in STATEMENTS.items()} == {3: 141, 5: 251}
    for version, statements in STATEMENTS.items():
        assert all(re.fullmatch(rf"MQTT{version}-\d+\.\d+\.\d+-\d+", clause) for clause in statements)


@pytest.mark.parametrize("folder", ["mqtt_trio", "gateways", "tests"])
def test_comments_cite_statements_that_exist(folder: str) -> None:
    known = {clause for statements in STATEMENTS.values() for clause in statements}
    cited = {
        (path.relative_to(ROOT).as_posix(), clause)
        for path in (ROOT / folder).rglob("*.py")
        if "node_modules" not in path.parts
        for clause in CITATION.findall(path.read_text())
    }
    assert cited
    assert sorted(entry for entry in cited if entry[1] not in known) == []


def test_marks_cite_statements_that_exist() -> None:
    done = run()
    assert done.returncode in (0, 1), done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("no test asserts")] == []


def test_one_version_only() -> None:
    done = run("--version", "5", "--empty")
    assert "MQTT3-" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("MQTT 5.0: 251 rows, ")
