"""Prometheus' text format 0.0.4: figures by name, each with its help, its type and its labels. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final, Literal, TypeAlias

import attrs

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
PREFIX: Final = "mqtt_trio_"
GAUGE: Final = "Gauge: "
"""Begins the meaning of a figure that also falls; every other one only grows."""

Kind: TypeAlias = Literal["counter", "gauge"]

_UNITS: Final = ("bytes", "seconds")
_NOT_IN_NAMES: Final = re.compile(r"[^a-z0-9_]+")


@attrs.define
class _Family:
    kind: Kind
    meaning: str
    samples: dict[tuple[tuple[str, str], ...], float] = attrs.Factory(dict)


class Exposition:
    """Gathers figures; those of one name stand together, as the format wants it, in the order of their first one."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}

    def add(self, name: str, kind: Kind, meaning: str, value: float, /, **labels: str) -> None:
        """Add a figure under its whole name. A second one with the same labels replaces it.

        Raises:
          ValueError: the name has another type already.
        """
        family = self._families.setdefault(name, _Family(kind, meaning))
        if family.kind != kind:
            raise ValueError(f"{name} is a {family.kind} and a {kind}")
        family.samples[tuple(labels.items())] = value

    def add_counters(self, prefix: str, values: Mapping[str, int], meanings: Mapping[str, str], **labels: str) -> None:
        """Add a table of counters below `prefix`; what `meanings` says about each begins with GAUGE where it falls."""
        for key, value in values.items():
            meaning = meanings.get(key, key.replace("_", " "))
            is_gauge = meaning.startswith(GAUGE)
            name, more = metric_name(prefix, key)
            if is_gauge:
                self.add(name, "gauge", sentence(meaning.removeprefix(GAUGE)), value, **labels, **more)
            else:
                self.add(f"{name}_total", "counter", meaning, value, **labels, **more)

    def samples(self) -> Iterator[tuple[str, Kind, str, dict[str, str], float]]:
        """Yield name, kind, meaning, labels and value of each figure."""
        for name, family in self._families.items():
            for labels, value in family.samples.items():
                yield name, family.kind, family.meaning, dict(labels), value

    def render(self) -> str:
        """Return the page."""
        return "".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for name, family in self._families.items():
            meaning = " ".join(family.meaning.split())
            yield f"# HELP {name} {escape(meaning)}\n# TYPE {name} {family.kind}\n"
            for labels, value in family.samples.items():
                pairs = ",".join(f'{key}="{escape(text, quotes=True)}"' for key, text in labels)
                yield f"{name}{{{pairs}}} {value}\n" if pairs else f"{name} {value}\n"


def metric_name(prefix: str, key: str) -> tuple[str, dict[str, str]]:
    """Return name and labels of a counter: a unit goes to its end, the QoS in it becomes a label."""
    words = [word for word in _NOT_IN_NAMES.sub("_", key.lower()).split("_") if word]
    labels = {}
    if words[-1:] in (["qos0"], ["qos1"], ["qos2"]):
        labels["qos"] = words.pop()[-1]
    words.sort(key=lambda word: word in _UNITS)  # stable: the others stay as they are
    return PREFIX + prefix + "_".join(words), labels


def sentence(text: str) -> str:
    """Return a text with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


def escape(text: str, *, quotes: bool = False) -> str:
    """Return a help text, or the value of a label, as the format has it."""
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text
