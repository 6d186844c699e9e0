"""A reader of bytes that knows nothing but a shipped layout, such as `mqtt_bus.layout.json`.

It accepts what the layout says and nothing else: each byte belongs to a field, so that what was read could be written
again byte by byte. It shares no code with the gateway's own reader.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

NUMBERS: Final = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i32": "i", "i64": "q", "f64": "d"}
CONTINUES: Final = 0x80
Found: TypeAlias = dict[str, Any]
Step: TypeAlias = Callable[[bytes, int, Found], int]
"""Reads some fields at a place into what is found, returns the place behind them."""


class LayoutError(Exception):
    """Bytes that the layout does not allow; the text names the field."""


class Layout:
    """The types of one layout file. Any thread."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._types = {name: _Type(name) for name in table["types"]}
        for name, fields in table["types"].items():
            self._types[name].steps = self._compile(name, fields)

    def read(self, name: str, data: bytes) -> Found:
        """Return the fields of the type `name`, which `data` are, to their end.

        Raises:
          LayoutError: they are not.
        """
        found: Found = {}
        try:
            at = self._types[name].read(data, 0, found)
        except struct.error:
            raise LayoutError(f"{name}: {len(data)} bytes are too few") from None
        except KeyError as exc:
            raise LayoutError(f"the layout has no {exc}") from None
        if at != len(data):
            raise LayoutError(f"{name}: {len(data) - at} bytes behind it")
        return found

    def _compile(self, name: str, fields: list[dict[str, Any]]) -> list[Step]:
        steps: list[Step] = []
        numbers: list[dict[str, Any]] = []
        for field in fields:
            if field.get("type") in NUMBERS and "when" not in field and "repeat" not in field:
                numbers.append(field)  # numbers side by side are read at once
                continue
            if numbers:
                steps.append(_numbers(name, numbers))
                numbers = []
            steps.append(self._step(f"{name}.{field['name']}", field))
        if numbers:
            steps.append(_numbers(name, numbers))
        return steps

    def _step(self, path: str, field: dict[str, Any]) -> Step:
        if "repeat" in field:
            return self._repeated(field)
        if "switch" in field:
            return self._switched(path, field)
        tp = field["type"]
        if tp in NUMBERS:
            step = _numbers(path.rpartition(".")[0], [field])
        elif tp == "packets":
            step = _packets(path, field)
        elif tp in ("bytes", "text", "rest"):
            step = _run_of_bytes(path, field)
        else:
            step = self._inner(field["name"], self._types[tp])
        return _conditional(step, *field["when"]) if "when" in field else step

    def _inner(self, name: str, tp: _Type) -> Step:
        def step(data: bytes, at: int, found: Found) -> int:
            inner = found[name] = {}
            return tp.read(data, at, inner)

        return step

    def _repeated(self, field: dict[str, Any]) -> Step:
        tp, name, repeat = self._types[field["type"]], field["name"], field["repeat"]

        def step(data: bytes, at: int, found: Found) -> int:
            inner: list[Found] = []
            left = -1 if repeat == "end" else found[repeat]
            while at < len(data) if left < 0 else len(inner) < left:
                one: Found = {}
                at = tp.read(data, at, one)
                inner.append(one)
            found[name] = inner
            return at

        return step

    def _switched(self, path: str, field: dict[str, Any]) -> Step:
        by, name = field["switch"], field["name"]
        cases = {int(key): self._types[tp] for key, tp in field["cases"].items()}

        def step(data: bytes, at: int, found: Found) -> int:
            if (tp := cases.get(found[by])) is None:
                raise LayoutError(f"{path}: nothing is known for {by} = {found[by]}")
            inner = found[name] = {}
            return tp.read(data, at, inner)

        return step


class _Type:
    def __init__(self, name: str) -> None:
        self.name = name
        self.steps: list[Step] = []

    def read(self, data: bytes, at: int, found: Found) -> int:
        for step in self.steps:
            at = step(data, at, found)
        return at


def _numbers(name: str, fields: list[dict[str, Any]]) -> Step:
    form = struct.Struct(">" + "".join(NUMBERS[field["type"]] for field in fields))
    names = [field["name"] for field in fields]
    bounded = [field for field in fields if field.keys() & {"enum", "minimum", "maximum"}]

    def step(data: bytes, at: int, found: Found) -> int:
        found.update(zip(names, form.unpack_from(data, at), strict=True))
        for field in bounded:
            value = found[field["name"]]
            fits = value in field["enum"] if "enum" in field else True
            if not (fits and field.get("minimum", value) <= value <= field.get("maximum", value)):
                raise LayoutError(f"{name}.{field['name']}: {value} is none of what it may be")
        return at + form.size

    return step


def _conditional(inner: Step, by: str, bit: int) -> Step:
    def step(data: bytes, at: int, found: Found) -> int:
        return inner(data, at, found) if found[by] & bit else at

    return step


def _run_of_bytes(path: str, field: dict[str, Any]) -> Step:
    name, tp, size = field["name"], field["type"], field.get("size", 0)
    printable, pattern = field.get("printable", False), re.compile(field.get("pattern", ""))

    def step(data: bytes, at: int, found: Found) -> int:
        length = len(data) - at if tp == "rest" else size if isinstance(size, int) else found[size]
        end: int = at + length
        if end > len(data):
            raise LayoutError(f"{path}: {len(data) - at} bytes, {length} are announced")
        raw = data[at:end]
        if tp != "text":
            found[name] = raw
            return end
        try:
            text = found[name] = raw.decode()
        except UnicodeDecodeError:
            raise LayoutError(f"{path}: no UTF-8") from None
        if (printable and not text.isprintable()) or pattern.search(text) is None:
            raise LayoutError(f"{path}: {text!r} is none of what it may be")
        return end

    return step


def _packets(path: str, field: dict[str, Any]) -> Step:
    name, size, count, qos = (field[key] for key in ("name", "size", "count", "qos"))

    def step(data: bytes, at: int, found: Found) -> int:
        end: int = at + found[size]
        if end > len(data):
            raise LayoutError(f"{path}: {len(data) - at} bytes, {found[size]} are announced")
        first, packets = 0x30 | found[qos] << 1, 0
        found[name] = data[at:end]
        while at < end:
            if data[at] != first:
                raise LayoutError(f"{path}: packet {packets} begins with {data[at]:#x} instead of {first:#x}")
            at = _behind_packet(path, data, at + 1)
            packets += 1
        if at != end or packets != found[count]:
            raise LayoutError(f"{path}: {packets} packets, {found[count]} are announced")
        return end

    return step


def _behind_packet(path: str, data: bytes, at: int) -> int:
    length = shift = 0
    while True:
        if at >= len(data) or shift > 21:
            raise LayoutError(f"{path}: a packet without a length")
        byte = data[at]
        at += 1
        length |= (byte & 0x7F) << shift
        if byte < CONTINUES:
            return at + length
        shift += 7
