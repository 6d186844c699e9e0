"""Keys whose feature is not built yet: accepted and named, or refused where they promise security or durability."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from mqtt_trio.config_schema import Path, show_path
from mqtt_trio.config_sources import Origin


@attrs.frozen
class Refusal:
    """Values of a key, or of a whole table, that the broker cannot honour. One of `accepted` may be set."""

    pattern: str
    accepted: tuple[object, ...]
    reason: str


_OUTAGE: Final = (
    "while the store is away, a full window slows QoS 1 and 2 publishers and drops QoS 0; leave the key out"
)

REFUSED: Final = (
    Refusal("Kafka.Bus.Ack", ("none",), 'only "none" is built yet: PUBACK means that this node has the message'),
    Refusal("Kafka.Bus.OnOutage", (), f"outage policies are not built yet: {_OUTAGE}"),
)

INACTIVE: Final[Mapping[str, tuple[object, ...]]] = {
    "ArchiveGroups[].Format": ("JSON", "json"),
    "ArchiveGroups[].TimestampFormat": ("iso",),
    "Kafka.Metrics": (),
    "Kafka.Topics.Messages.Enabled": (False,),
    "Kafka.Topics.Sessions": (),
}
"""Keys, or whole tables, that mean nothing yet -> values that say what is done anyway."""


def refusals(table: Mapping[str, Any], origins: Mapping[Path, Origin]) -> Iterator[tuple[Path, str]]:
    """Yield path and reason of each key that was set and cannot be honoured."""
    for path, origin in origins.items():
        if origin.rank == 0:
            continue
        refusal = next((refusal for refusal in REFUSED if _covers(refusal.pattern, path)), None)
        if refusal is not None and _value(table, path) not in refusal.accepted:
            yield path[: len(_steps(refusal.pattern))], refusal.reason


def inactive(table: Mapping[str, Any], origins: Mapping[Path, Origin]) -> tuple[str, ...]:
    """Return the keys that were set and mean nothing yet."""
    paths = (path for path, origin in origins.items() if origin.rank > 0)
    return tuple(show_path(path) for path in paths if _is_inactive(path, _value(table, path)))


def note(path: Path, value: object, *, is_set: bool) -> str:
    """Return what `check` says about a key whose feature is not built, else nothing."""
    if any(_covers(refusal.pattern, path) and not refusal.accepted for refusal in REFUSED):
        return " (not built yet)"
    return " (not active yet)" if is_set and _is_inactive(path, value) else ""


def _is_inactive(path: Path, value: object) -> bool:
    return any(_covers(pattern, path) and value not in active for pattern, active in INACTIVE.items())


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
