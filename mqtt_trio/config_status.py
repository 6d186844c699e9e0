"""Keys whose feature is not built yet: they are accepted and named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mqtt_trio.config_schema import Path, show_path
from mqtt_trio.config_sources import Origin

INACTIVE: Final[Mapping[str, str | None]] = {
    "Kafka.Topics.Sessions": None,
}
"""Keys, or whole tables, that mean nothing yet -> the item of a list that is meant; None: all of it."""


def inactive(table: Mapping[str, Any], origins: Mapping[Path, Origin]) -> tuple[str, ...]:
    """Return the keys that were set and mean nothing yet."""
    paths = (path for path, origin in origins.items() if origin.rank > 0)
    return tuple(show_path(path) for path in paths if _is_inactive(path, _value(table, path)))


def note(path: Path, value: object, *, is_set: bool) -> str:
    """Return what `check` says about a key whose feature is not built, else nothing."""
    return " (not active yet)" if is_set and _is_inactive(path, value) else ""


def _is_inactive(path: Path, value: object) -> bool:
    return any(_covers(pattern, path) and _means(value, item) for pattern, item in INACTIVE.items())


def _means(value: object, item: str | None) -> bool:
    return item is None or (isinstance(value, list | tuple) and item in value)


def _covers(pattern: str, path: Path) -> bool:
    """Whether `path` is the key of `pattern` or stands below it."""
    steps = _steps(pattern)
    if len(steps) > len(path):
        return False
    return all(
        isinstance(given, int) if step == "[]" else step == given for step, given in zip(steps, path, strict=False)
    )


def _steps(pattern: str) -> list[str]:
    return pattern.replace("[]", ".[]").split(".")


def _value(table: Any, path: Path) -> object:
    for step in path:
        try:
            table = table[step]
        except (KeyError, IndexError, TypeError):
            return None
    value: object = table
    return value
