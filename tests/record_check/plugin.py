"""The pytest side: a folder for the run, a summary at its end, a failure where a record did not validate."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import pytest

from tests.record_check.book import FOLDER, Findings, findings
from tests.record_check.watch import watch

HOOK: Final = str(Path(__file__).parent / "hook")
SHOWN: Final = 25
"""Violations that are shown."""
FOUND: Final = pytest.StashKey[Findings]()
WHOLE: Final = pytest.StashKey[bool]()
OWN: Final = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Have this process, its workers, and whatever they start check what they write."""
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist has it all from its controller
        folder = tempfile.mkdtemp(prefix="mqtt-trio-records-")
        config.stash[OWN] = folder
        os.environ[FOLDER] = folder
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != HOOK]
        os.environ["PYTHONPATH"] = os.pathsep.join((HOOK, *paths))
    watch("test")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the run for a record that does not validate, and a whole run for a kind that nobody wrote."""
    config = session.config
    if (folder := config.stash.get(OWN, None)) is None:
        return
    found = config.stash[FOUND] = findings(Path(folder))
    config.stash[WHOLE] = is_whole(config) and exitstatus == pytest.ExitCode.OK  # what failed may not have got so far
    is_bad = bool(found.violations) or (config.stash[WHOLE] and bool(found.missing))
    if is_bad and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was checked."""
    if (found := config.stash.get(FOUND, None)) is None:
        return
    if found.seen or found.violations or config.stash[WHOLE]:
        terminalreporter.section(f"{found.seen.total()} records written to Kafka, checked against their schemas")
        for kind, number in found.seen.items():
            parts = [f"{counts[kind]} {source}" for source, counts in found.counts.items() if counts[kind]]
            terminalreporter.write_line(f"{number:>9} {kind} ({', '.join(parts)})")
    if config.stash[WHOLE]:
        for kind in found.missing:
            terminalreporter.write_line(f"ERROR: no record of this kind was written: {kind}", red=True)
    for violation in found.violations[:SHOWN]:
        terminalreporter.write_line(f"INVALID {violation}", red=True)
    if len(found.violations) > SHOWN:
        terminalreporter.write_line(f"... and {len(found.violations) - SHOWN} more", red=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Take the folder away."""
    if (folder := config.stash.get(OWN, None)) is not None:
        shutil.rmtree(folder, ignore_errors=True)


def is_whole(config: pytest.Config) -> bool:
    """Whether all tests run but for those that measure time: what nobody wrote then, nobody checks."""
    option = config.option
    chosen = option.keyword or option.deselect or option.ignore or option.ignore_glob
    chosen = chosen or getattr(option, "lf", False) or option.collectonly or getattr(option, "spec", None)
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and option.markexpr == "not java"
    return everything and not chosen and getattr(option, "alone", None) != "only"
