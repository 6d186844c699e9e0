"""That the tests bite: each planted violation of `planted.toml` makes a test fail that cites its statement [M4]."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest

ROOT: Final = Path(__file__).parents[2]
TESTS_FAILED: Final = 1
"""Exit code of pytest when tests ran and some failed; anything else is no proof."""
LIMIT: Final = 100
"""Seconds for one violation."""
TEST_LIMIT: Final = 20
"""Seconds for one test. What only makes it hang was not found: that says nothing about the statement."""
TIMEOUT: Final = "from pytest-timeout"
"""What pytest says of a test that ended so."""


@attrs.frozen
class Mutation:
    statement: str
    violation: str
    file: str
    old: str
    new: str


MUTATIONS: Final = [
    Mutation(**table) for table in tomllib.loads((Path(__file__).parent / "planted.toml").read_text())["mutation"]
]
_stamps: Final = itertools.count(2_000_000_000)


class Copy:
    """A copy of the sources in which one file at a time is changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        skip = shutil.ignore_patterns("__pycache__", "node_modules", "mutations", "interop", "browser")
        for name in ("mqtt_trio", "gateways", "tests", "scripts", "examples"):
            shutil.copytree(ROOT / name, root / name, ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", root)

    def write(self, file: str, text: str) -> None:
        """Write a source file; an ever new time has Python compile it anew."""
        path = self.root / "mqtt_trio" / file
        path.write_text(text)
        stamp = next(_stamps)
        os.utime(path, (stamp, stamp))

    def run(self, statement: str) -> subprocess.CompletedProcess[str]:
        """Run the tests that cite `statement`, up to the first failure."""
        files = sorted(str(path) for path in (self.root / "tests").rglob("test_*.py") if statement in path.read_text())
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-m",
            "not kafka and not interop",
        ]
        command += [f"--timeout={TEST_LIMIT}", "--timeout-method=signal", f"--spec={statement}", *files]
        return subprocess.run(command, cwd=self.root, capture_output=True, text=True, timeout=LIMIT, check=False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    root = tmp_path_factory.mktemp("mutations")
    yield Copy(root)
    shutil.rmtree(root)


def test_there_are_enough() -> None:
    assert len(MUTATIONS) >= 50
    assert len({(mutation.file, mutation.old) for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.statement} {mutation.violation}")
def test_violation_is_found(sources: Copy, mutation: Mutation) -> None:
    original = (sources.root / "mqtt_trio" / mutation.file).read_text()
    assert original.count(mutation.old) == 1, "`old` must stand exactly once in the file"
    sources.write(mutation.file, original.replace(mutation.old, mutation.new))
    try:
        finished = sources.run(mutation.statement)
    finally:
        sources.write(mutation.file, original)
    assert finished.returncode == TESTS_FAILED, f"no test noticed that {mutation.violation}:\n{finished.stdout}"
    assert "error" not in finished.stdout.splitlines()[-1], finished.stdout  # a failure, no broken import
    hung = f"a hang is no proof that {mutation.violation}: have an assertion notice\n{finished.stdout}"
    assert TIMEOUT not in finished.stdout, hung
