"""Keys of the configuration file and the options classes behind them: names, types, units, secrets.

A key is the PascalCase of an attribute (`connect_timeout` is `ConnectTimeout`). An options class may say more about
an attribute in its attrs metadata: `key` (another name), `unit` ("seconds" or "bytes": "7d" and "1GiB" are understood
beside numbers), `secret` (never shown; `<Key>File` names a file that holds the value).
"""

from __future__ import annotations

import collections.abc
import difflib
import enum
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final, TypeAlias

import attrs

Path: TypeAlias = tuple[str | int, ...]
"""Where a value stands: keys of tables, indices of lists."""

ACRONYMS: Final = {"ssl": "SSL", "qos": "QoS"}
"""Words of attribute names that keys do not write in PascalCase."""

UNITS: Final = {
    "timeout": "seconds",
    "retention": "seconds",
    "interval": "seconds",
    "linger": "seconds",
    "size": "bytes",
    "bytes": "bytes",
}
"""Units by the last word of an attribute that holds a number, where its metadata do not say."""

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+\Z")
_SECRET_NAME: Final = re.compile(r"password|secret|token(?!_?s?_?endpoint)|api_?key|private", re.IGNORECASE)
_SEQUENCES: Final = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Set)
_MAPPINGS: Final = (dict, collections.abc.Mapping)


@attrs.frozen(kw_only=True)
class Key:
    """One key of a table."""

    name: str
    type: Any
    """What may stand in the file; what the attribute holds where a converter makes it from something else."""
    unit: str | None = None
    secret: bool = False
    attribute: attrs.Attribute[Any] | None = None
    """None for a whole section."""


def key_name(attribute: str) -> str:
    """Return the key of an attribute: `allowed_origins` is `AllowedOrigins`."""
    return "".join(ACRONYMS.get(word, word[:1].upper() + word[1:]) for word in attribute.split("_") if word)


def keys_of(options: type[Any]) -> Mapping[str, Key]:
    """Return the keys of an options class by name."""
    hints = typing.get_type_hints(options)
    keys = {}
    for attribute in attrs.fields(options):
        if not attribute.init:
            continue
        name = attribute.metadata.get("key") or key_name(attribute.name)
        tp = _input_type(attribute, hints.get(attribute.name, Any))
        unit = UNITS.get(attribute.name.rpartition("_")[2]) if set(arms(tp)) <= {int, float} else None
        keys[name] = Key(
            name=name,
            type=tp,
            unit=attribute.metadata.get("unit", unit),
            secret=bool(attribute.metadata.get("secret")),
            attribute=attribute,
        )
    return keys


def _input_type(attribute: attrs.Attribute[Any], declared: Any) -> Any:
    """Return what a converter of the attribute takes, where it says so, else the attribute's own type.

    A converter that takes anything is one that makes the attribute's type of a string as well.
    """
    converter: object = attribute.converter
    if isinstance(converter, types.FunctionType):
        hints = typing.get_type_hints(converter)
        hints.pop("return", None)
        if hints:
            taken = next(iter(hints.values()))
            return declared | str if taken in (object, Any) else taken
    return declared


def secret_files(options: type[Any]) -> Mapping[str, Key]:
    """Return the `<Key>File` keys of an options class, each with the secret that it fills."""
    keys = keys_of(options)
    return {f"{name}File": key for name, key in keys.items() if key.secret and f"{name}File" not in keys}


def arms(tp: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union without None; of any other type, the type itself."""
    if typing.get_origin(tp) in (typing.Union, types.UnionType):
        return tuple(arm for arm in typing.get_args(tp) if arm is not types.NoneType)
    return (tp,)


def table_type(tp: Any) -> type[Any] | None:
    """Return the options class among the alternatives of `tp`."""
    return next((arm for arm in arms(tp) if isinstance(arm, type) and attrs.has(arm)), None)


def item_type(tp: Any) -> Any:
    """Return the type of the items when a list is among the alternatives of `tp`, else None."""
    for arm in arms(tp):
        if (typing.get_origin(arm) or arm) in _SEQUENCES:
            return (*typing.get_args(arm), Any)[0]
    return None


def value_type(tp: Any) -> Any:
    """Return the type of the values when a table of free keys is among the alternatives of `tp`, else None."""
    for arm in arms(tp):
        if (typing.get_origin(arm) or arm) in _MAPPINGS:
            return (*typing.get_args(arm), Any, Any)[1]
    return None


def choices(tp: Any) -> tuple[str, ...]:
    """Return the strings that a Literal or an Enum of strings allows, else nothing."""
    if typing.get_origin(tp) is typing.Literal:
        return tuple(str(value) for value in typing.get_args(tp))
    if isinstance(tp, type) and issubclass(tp, enum.Enum):
        return tuple(str(member.value) for member in tp)
    return ()


def takes_text(tp: Any) -> bool:
    """Whether a string is what the key takes: such keys read text from outside verbatim."""
    return any(arm is str or choices(arm) or (isinstance(arm, type) and issubclass(arm, PurePath)) for arm in arms(tp))


def expected(tp: Any, unit: str | None = None) -> str:
    """Say what may stand for `tp`: "a whole number", "a string or a list"."""
    if unit is not None:
        return EXPECTED_UNIT[unit]
    return " or ".join(dict.fromkeys(_expected(arm) for arm in arms(tp)))


_WORDS: Final[Mapping[Any, str]] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _expected(arm: Any) -> str:
    if arm in _WORDS:
        return _WORDS[arm]
    if allowed := choices(arm):
        return f"one of {', '.join(quote(choice) for choice in allowed)}"
    if table_type(arm) is not None or value_type(arm) is not None:
        return "a table"
    item = item_type(arm)
    if item is None:
        return "a string" if takes_text(arm) else "a value"
    plural = {str: " of strings", int: " of whole numbers"}.get(item, " of tables" if table_type(item) else "")
    return f"a list{plural}"


def found(value: object, *, secret: bool = False) -> str:
    """Say what stands there instead; of a secret only its kind."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return "a string" if secret else quote(value)
    if isinstance(value, bool):
        return "a boolean" if secret else str(value).lower()
    return "a number" if secret else str(value)


def quote(text: str) -> str:
    """Return `text` as a TOML basic string."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(c, c if c.isprintable() else f"\\u{ord(c):04X}") for c in text) + '"'


def show_path(path: Sequence[str | int]) -> str:
    """Return `ArchiveGroups[1].Filter` for ("ArchiveGroups", 1, "Filter")."""
    parts: list[str] = []
    for step in path:
        if isinstance(step, int):
            parts.append(f"[{step}]")
        else:
            parts.append(("." if parts else "") + (step if _BARE_KEY.match(step) else quote(step)))
    return "".join(parts) or "the file"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean "Port"?` when one of the known names is close, else nothing."""
    by_folded = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), by_folded, n=1, cutoff=0.6)
    return f', did you mean "{by_folded[close[0]]}"?' if close else ""


def looks_secret(path: Sequence[str | int]) -> bool:
    """Whether a key of a free table must not be shown, by its name (`ssl_password` of `[Kafka.Producer]`)."""
    last = next((step for step in reversed(path) if isinstance(step, str)), "")
    return bool(_SECRET_NAME.search(last)) and not last.lower().endswith(("file", "location"))


_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_BYTES: Final = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_AMOUNT: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*\Z")
EXPECTED_UNIT: Final = {
    "seconds": 'seconds as a number or a time such as "7d", "12h", "30s"',
    "bytes": 'bytes as a number or a size such as "1GiB", "500MB"',
}


def read_amount(text: str, unit: str) -> float | None:
    """Return seconds of "12h", bytes of "1GiB", by `unit`; None when `text` is no such amount."""
    table: Mapping[str, float] = _SECONDS if unit == "seconds" else _BYTES
    match = _AMOUNT.match(text)
    if match is None:
        return None
    number, suffix = match.groups()
    folded = {name.lower(): factor for name, factor in table.items()}
    factor = folded.get(suffix.lower())
    if factor is None:
        return None
    amount = float(number) * factor
    return int(amount) if amount.is_integer() else amount
