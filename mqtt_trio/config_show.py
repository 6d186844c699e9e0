"""What `mqtt-trio check` prints: every effective value, TOML-like, with its origin; secrets as stars."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

from mqtt_trio import config_schema as schema
from mqtt_trio import config_status as status
from mqtt_trio.archive.options import acknowledging
from mqtt_trio.config import LoadedConfig
from mqtt_trio.config_schema import Key, Path
from mqtt_trio.config_sources import Origin

HIDDEN: Final = '"********"'
_COLUMN: Final = 48


def show(loaded: LoadedConfig) -> list[str]:
    """Return the lines: tables with their keys, each with who set it."""
    lines: list[str] = []
    for name, key in schema.keys_of(type(loaded.options)).items():
        attribute = key.attribute
        if attribute is not None:
            _table(lines, loaded, getattr(loaded.options, attribute.name), key, (name,))
    for name, options in loaded.gateways.items():
        _table(lines, loaded, options, Key(name=name, type=type(options)), (name,))
        lines.extend(_derived(options, name))
    while lines and not lines[0]:
        del lines[0]
    return lines


def advice(loaded: LoadedConfig) -> list[str]:
    """Return what the gateways would have otherwise, a line each; their options class may have `advice(groups)`, with
    the names of the archive groups that keep acknowledgements waiting for that gateway's store [K20]."""
    lines: list[str] = []
    for section, options in loaded.gateways.items():
        if callable(advise := getattr(options, "advice", None)):
            lines += advise(acknowledging(loaded.options.archive_groups, section.upper()))
    return lines


def _table(lines: list[str], loaded: LoadedConfig, value: object, key: Key, path: Path) -> None:
    """Add a table, or each table of a list, after it the tables below it."""
    if isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _table(lines, loaded, inner, key, (*path, index))
        return
    if isinstance(value, Mapping):
        pairs = [(name, inner, Key(name=name, type=Any)) for name, inner in value.items()]
    else:
        pairs = [
            (name, getattr(value, inner.attribute.name), inner)
            for name, inner in schema.keys_of(type(value)).items()
            if inner.attribute is not None
        ]
    below = [pair for pair in pairs if _is_table(pair[1])]
    heading = ".".join(step if step.replace("_", "").isalnum() else schema.quote(step) for step in _names(path))
    lines += ["", f"[[{heading}]]" if isinstance(path[-1], int) else f"[{heading}]"]
    for name, inner, inner_key in pairs:
        if not _is_table(inner):
            lines.append(_line(loaded, inner, inner_key, (*path, name)))
    if lines[-1].startswith("[") and below:  # nothing but tables: their own headings say it
        del lines[-2:]
    for name, inner, inner_key in below:
        if isinstance(inner, Mapping) and not inner:
            continue
        _table(lines, loaded, inner, inner_key, (*path, name))


def _names(path: Path) -> list[str]:
    return [step for step in path if isinstance(step, str)]


def _is_table(value: object) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and attrs.has(type(value[0]))
    return isinstance(value, Mapping) or attrs.has(type(value))


def _line(loaded: LoadedConfig, value: object, key: Key, path: Path) -> str:
    name = schema.show_path(path[-1:])
    hidden = (key.secret or schema.looks_secret(path)) and value is not None
    text = f"# {name} =" if value is None else f"{name} = {HIDDEN if hidden else show_value(value)}"
    origin = loaded.origin(path)
    note = status.note(path, value, is_set=origin.rank > 0)
    return f"{text:<{_COLUMN}} # {_origin_text(origin, path, value)}{note}"


def _origin_text(origin: Origin, path: Path, value: object) -> str:
    if path == ("Node", "Id") and origin.rank == 0:
        return "default: the host name"
    return "default: not set" if value is None and origin.rank == 0 else origin.text


def show_value(value: object) -> str:
    """Return a value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(show_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{schema.show_path((str(k),))} = {show_value(v)}" for k, v in value.items()) + "}"
    return schema.quote(str(value))


def _derived(options: object, section: str) -> Iterator[str]:
    """Lines of values that a gateway derives from its options, such as those of `Profile` [K16].

    The options class may have `effective() -> Mapping[key, (value, origin)]`, keys relative to its section.
    """
    effective = getattr(options, "effective", None)
    if not callable(effective):
        return
    yield ""
    yield f"# [{section}] as its clients get it"
    for name, (value, origin) in effective().items():
        text = HIDDEN if schema.looks_secret((name,)) else show_value(value)
        yield f"{f'# {section}.{name} = {text}':<{_COLUMN}} # {origin}"
