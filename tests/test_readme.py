"""What README shows works: the pytest example runs as it stands, the files that it names exist."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []
