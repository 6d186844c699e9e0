"""docs/figures.md, written from what the code says about its counters:

python -m tests.monitoring.figures_page > docs/figures.md
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from gateways.kafka.exposed import ClientReport, figures_of
from gateways.kafka.lag import Behind
from gateways.kafka.meanings import MEANINGS
from mqtt_trio.archive.groups import MEANINGS as GROUP_MEANINGS
from mqtt_trio.monitor import meanings_of_metrics
from mqtt_trio.server.exposition import GAUGE, PREFIX, metric_name, sentence

ROOT: Final = Path(__file__).parent.parent.parent
DOCS: Final = ROOT / "docs"
PAGE: Final = DOCS / "figures.md"
TABLES: Final[tuple[tuple[str, str, str, Mapping[str, str]], ...]] = (
    ("The broker", "", "", meanings_of_metrics()),
    ("An archive group", "archive.NAME.", "archive_", GROUP_MEANINGS),
    ("The Kafka gateway", "kafka.", "kafka_", MEANINGS),
)
"""Heading, prefix in the log, prefix in /metrics, name -> meaning."""
INTRODUCTION: Final = """\
# Counters

Everything that the node counts, by two names: the one of the `stopped` line, of summaries and of these guides, and the
one of `/metrics` and `mqtt.metrics`. A gauge also falls; everything else counts from the start of the process and only
grows. What has labels of its own is described in [operations.md](operations.md#figures) and
[monitoring.md](monitoring.md#figures-of-the-clients-of-kafka). This page is written from the code
(`python -m tests.monitoring.figures_page`), and a test compares the two.
"""
NOTES: Final = {
    "An archive group": "`NAME` is the `Name` of the group; in `/metrics` it is the label `group`, beside `store`.\n",
    "The Kafka gateway": "Those of a feature are there while it is on.\n",
}
NAME: Final = re.compile(r"\b(?:mqtt_trio|process)_[a-z0-9_]+[a-z0-9]")


def exposed(prefix: str, key: str, meaning: str) -> tuple[str, dict[str, str]]:
    """Return name and labels of a counter in /metrics."""
    name, labels = metric_name(prefix, key)
    return (name if meaning.startswith(GAUGE) else f"{name}_total"), labels


def page() -> str:
    """Return what stands in docs/figures.md."""
    return "".join(_lines())


def _lines() -> Iterator[str]:
    yield INTRODUCTION
    for heading, in_log, prefix, meanings in TABLES:
        yield f"\n## {heading}\n\n"
        if heading in NOTES:
            yield f"{NOTES[heading]}\n"
        yield "| counter | in `/metrics` | counts |\n|---|---|---|\n"
        for key, meaning in meanings.items():
            name, labels = exposed(prefix, key, meaning)
            shown = name + "".join(f'{{{label}="{value}"}}' for label, value in labels.items())
            is_gauge = meaning.startswith(GAUGE)
            text = " ".join(sentence(meaning.removeprefix(GAUGE)).split())
            yield f"| `{in_log}{key}` | `{shown}` | {'gauge: ' * is_gauge}{text} |\n"


def emitted() -> set[str]:
    """Return the names of all figures that /metrics can show."""
    names = {exposed(prefix, key, text)[0] for _, _, prefix, meanings in TABLES for key, text in meanings.items()}
    names |= {f"{PREFIX}kafka_{figure.name}" for figure in figures_of([_Reporting("consumer"), _Reporting("producer")])}
    names |= {f"{PREFIX}kafka_{name}" for name in _first_arguments(ROOT / "gateways/kafka/kafka_gateway.py", "Figure")}
    return names | set(_first_arguments(ROOT / "mqtt_trio/monitor.py", "add"))


class _Reporting:
    """A client with something to say about everything."""

    def __init__(self, kind: str) -> None:
        self.name = kind
        self._kind = kind

    def report(self) -> ClientReport:
        if self._kind == "producer":
            return ClientReport(kind="producer")
        return ClientReport(kind="consumer", lag={("t", 0): Behind(1, 1.0)}, skew={"t": 1.0})


def _first_arguments(path: Path, function: str) -> Iterator[str]:
    """Yield the names that a module's source gives to the figures that it makes."""
    tree = ast.parse(path.read_text())
    texts = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):  # `name, labels = f"...", {...}`
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            for target, value in zip(node.targets[0].elts, node.value.elts, strict=True):
                if isinstance(target, ast.Name):
                    texts[target.id] = value
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not call.args:
            continue
        called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if called == function and (found := _text(call.args[0], texts)):
            yield found


def _text(node: ast.expr, texts: Mapping[str, ast.expr]) -> str:
    """Return a text of which all parts are known; else an empty one."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id="PREFIX"):
            return PREFIX
        case ast.Name(id=name) if name in texts:
            return _text(texts[name], {})
        case ast.JoinedStr(values=values):
            parts = [_text(part.value if isinstance(part, ast.FormattedValue) else part, texts) for part in values]
            return "".join(parts) if all(parts) else ""
    return ""


def documented() -> set[str]:
    """Return the names of figures that the guides explain: those in the first two columns of their tables."""
    found: set[str] = set()
    for name in ("figures.md", "operations.md", "monitoring.md"):
        for line in (DOCS / name).read_text().splitlines():
            if line.startswith("| `"):
                found.update(*map(NAME.findall, line.split(" | ")[:2]))
    return found


if __name__ == "__main__":
    print(page(), end="")
