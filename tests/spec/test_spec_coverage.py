"""The table of normative statements: every id that a test or a comment cites is in it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

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


@pytest.fixture(scope="module")
def whole() -> subprocess.CompletedProcess[str]:
    """One run of the script for the tests that look at all it says: collecting takes seconds."""
    return run()


STALE = "docs/conformance.md is not "


def test_every_statement_has_a_test_or_a_reason(whole: subprocess.CompletedProcess[str]) -> None:
    """What keeps the table whole: no unknown statement, no empty row, few reasons, none beside a test."""
    assert whole.returncode in (0, 1), whole.stderr
    assert [line for line in whole.stderr.splitlines() if not line.startswith(STALE)] == []


def test_the_page_is_what_the_script_writes(whole: subprocess.CompletedProcess[str]) -> None:
    """It says itself what to do about it: scripts/spec_coverage --markdown."""
    assert [line for line in whole.stderr.splitlines() if line.startswith(STALE)] == []


def test_one_version_only() -> None:
    done = run("--version", "5", "--empty")
    assert "MQTT3-" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("MQTT 5.0: 251 rows, ")


# What fails


@pytest.fixture
def script() -> Iterator[ModuleType]:
    """The script as a module, since it has no suffix."""
    loader = importlib.machinery.SourceFileLoader("spec_coverage_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    yield module
    del sys.modules[loader.name]


def row(number: int) -> str:
    """An invented statement; its id is put together here, so that the test above does not take it for a citation."""
    return f"MQTT3-1.0.0-{number}"


ROWS = {row(number): f"statement {number}" for number in range(1, 41)}
REASONS_ALLOWED = 2
"""5 % of 40."""


def found(script: ModuleType, *, untested: int, reasons: dict[str, str]) -> list[str]:
    """What the script complains about where all but the first `untested` rows have a test."""
    citations = {clause: ["tests/a.py::test"] for clause in list(ROWS)[untested:]}
    return list(script.problems([script.Table(3, ROWS, reasons)], citations))


def test_a_whole_table_is_fine(script: ModuleType) -> None:
    assert found(script, untested=0, reasons={}) == []
    reasons = dict.fromkeys(list(ROWS)[:REASONS_ALLOWED], "why")
    assert found(script, untested=REASONS_ALLOWED, reasons=reasons) == []


def test_an_empty_row_fails(script: ModuleType) -> None:
    empty = found(script, untested=2, reasons={row(1): "why"})
    assert empty == [f"no test asserts {row(2)}: statement 2"]


def test_too_many_reasons_fail(script: ModuleType) -> None:
    many = REASONS_ALLOWED + 1
    reasons = dict.fromkeys(list(ROWS)[:many], "why")
    assert found(script, untested=many, reasons=reasons) == ["MQTT 3.1.1: 3 reasons are more than 5%"]


def test_a_reason_beside_a_test_fails(script: ModuleType) -> None:
    beside = found(script, untested=0, reasons={row(7): "why"})
    assert beside == [f"{row(7)} has a reason and the test tests/a.py::test"]


@pytest.mark.parametrize("reason", ["", "  "])
def test_a_reason_says_something(script: ModuleType, reason: str) -> None:
    assert found(script, untested=1, reasons={row(1): reason}) == [f"{row(1)} has an empty reason"]


def test_a_reason_for_nothing_fails(script: ModuleType) -> None:
    assert found(script, untested=0, reasons={row(99): "why"}) == [f"unknown statement {row(99)} has a reason"]


@pytest.fixture
def citations(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[str]]:
    """What the tests cite, as the script believes it finds them; its page is in a folder of its own."""
    citations = {clause: ["tests/a.py::test"] for clause in ROWS}
    monkeypatch.setattr(script, "load", lambda version: script.Table(version, ROWS if version == 3 else {}, {}))
    monkeypatch.setattr(script, "collect", lambda: citations)
    monkeypatch.setattr(script, "PAGE", tmp_path / "conformance.md")
    return citations


def test_what_is_found_is_the_exit_code(script: ModuleType, citations: dict[str, list[str]]) -> None:
    assert script.main(["--markdown"]) == 0
    assert script.main([]) == 0
    del citations[row(40)]
    assert script.main([]) == 1
    assert script.main(["--version", "5"]) == 0


def test_a_page_that_is_old_or_missing_fails(
    script: ModuleType, citations: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([]) == 1
    assert script.main(["--markdown"]) == 0
    assert f"| {row(1).partition('-')[2]} | statement 1 | `a` test |\n" in script.PAGE.read_text()
    citations[row(1)] = ["tests/b/c.py::test_two", "tests/a.py::test", "tests/b/c.py::test_one"]
    capsys.readouterr()
    assert script.main([]) == 1
    assert capsys.readouterr().err.startswith(STALE)
    assert script.main(["--markdown"]) == 0
    assert "| `a` test; `b/c` test_one, test_two |" in script.PAGE.read_text()
    citations[row(1)].reverse()  # tests that were only moved
    assert script.main([]) == 0


def test_the_page_is_not_written_by_halves(script: ModuleType) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(["--markdown", "--version", "5"])
    assert caught.value.code == 2


def test_without_the_packages_of_the_tests_the_mend_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a clone that only ran scripts/run, whose environment has no `dev`."""
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.setitem(sys.modules, "pytest", None)
    assert script.main([]) == 2
    assert re.search("has no hypothesis, pytest; scripts/check installs", capsys.readouterr().err)
