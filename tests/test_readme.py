"""What README and docs/ show works: the examples in Python run as they stand, the files that are named exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio.testing

from mqtt_trio.testing import MemoryBroker

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


async def test_the_example_for_tests_runs(memory_broker: MemoryBroker, autojump_clock: trio.testing.MockClock) -> None:
    text = (ROOT / "README.md").read_text()
    example = re.search(r"```python\n(# conftest\.py.*?)```", text, re.DOTALL)
    assert example is not None
    names: dict[str, Callable[..., Awaitable[None]]] = {}
    exec(compile(example[1], "README.md", "exec"), names)
    tests = [test for name, test in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    await tests[0](memory_broker, autojump_clock)


async def test_the_example_for_access_runs() -> None:
    text = (ROOT / "docs" / "mqtt.md").read_text()
    example = re.search(r"```python\n(# access\.py.*?)```", text, re.DOTALL)
    assert example is not None
    names: dict[str, Callable[..., Awaitable[None]]] = {}
    exec(compile(example[1], "docs/mqtt.md", "exec"), names)
    await names["test_alice_and_bob"]()


def test_the_guide_to_testing_is_a_test_suite_that_passes(tmp_path: Path) -> None:
    """Every block of the guide is a file; a pytest of their own runs them all."""
    text = (ROOT / "docs" / "testing.md").read_text()
    blocks = re.findall(r"```(?:python|ini)\n# (\S+)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```python") + text.count("```ini"), "a block does not begin with its file name"
    for name, block in blocks:
        assert not (tmp_path / name).exists(), f"two blocks are {name}"
        (tmp_path / name).write_text(block)
    count = sum(block.count("def test_") for _, block in blocks)
    assert count > 10
    assert f"{count} passed" in output_of_pytest(tmp_path)


def test_a_conftest_may_import_the_kit_as_well(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    (tmp_path / "conftest.py").write_text(
        'from mqtt_trio.testing import open_memory_broker\npytest_plugins = ["mqtt_trio.testing"]\n'
    )
    (tmp_path / "test_it.py").write_text("async def test_it(memory_broker):\n    await memory_broker.connect()\n")
    assert "1 passed" in output_of_pytest(tmp_path)


def output_of_pytest(folder: Path) -> str:
    """Run the tests of a folder in a pytest of their own, warnings as errors; all must pass."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-W", "error", "-q", "-p", "no:cacheprovider", "."],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_headings(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*\.md|)#([^)]+)\)", document.read_text())
    missing = [
        (target, anchor)
        for target, anchor in links
        if anchor not in anchors_of(document.parent / target if target else document)
    ]
    assert missing == []


def anchors_of(document: Path) -> set[str]:
    """Return what a link may name behind `#`: headings as GitHub writes them there."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}
