"""Where values come from: the file, `${NAME}`, the environment, the command line, `*File` secrets [F4].

Everything is laid over one plain tree, keys as in the file, before any of it is given a type; text from outside is
read by the type of the key that it sets. Mistakes are gathered, not raised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Final, TypeAlias

import attrs
import tomli

from mqtt_trio import config_schema as schema
from mqtt_trio.config_schema import Key, Path

Table: TypeAlias = dict[str, Any]

ENVIRONMENT_PREFIX: Final = "MQTT_TRIO__"
MAXIMUM_SECRET_SIZE: Final = 65_536
"""Bytes of a `*File` secret."""

_EXPANSION: Final = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{[^}]*\}?")
_STEP: Final = re.compile(r"\[(\d+)\]|\"([^\"]*)\"|([^.\[\]\"]+)")


@attrs.frozen
class Origin:
    """Who set a value. A higher `rank` wins."""

    rank: int
    text: str


DEFAULT: Final = Origin(0, "default")
COMMAND_LINE: Final = Origin(3, "command line")


@attrs.frozen
class Slot:
    """A key that text may be written to."""

    path: Path
    type: Any
    unit: str | None
    secret: bool


@attrs.define
class Sources:
    """The tree under construction, who set which value, and what was wrong on the way."""

    root: Mapping[str, Key]
    environ: Mapping[str, str]
    table: Table = attrs.field(factory=dict)
    origins: dict[Path, Origin] = attrs.field(factory=dict)
    problems: list[tuple[Path, str]] = attrs.field(factory=list)

    def problem(self, path: Path, text: str) -> None:
        self.problems.append((path, text))

    # The file

    def read_file(self, path: FilePath) -> None:
        """Read a TOML file, flatten what TOML split at dots, expand `${NAME}`."""
        try:
            table = tomli.loads(path.read_bytes().decode())
        except OSError as exc:
            return self.problem((), f"{path}: {exc.strerror}")
        except UnicodeDecodeError as exc:
            return self.problem((), f"{path}: is not UTF-8 (byte {exc.start})")
        except tomli.TOMLDecodeError as exc:
            hint = (
                '; of names with dots, put the longer one in quotes, "a.b.c"' if "overwrite a value" in str(exc) else ""
            )
            return self.problem((), f"{path}: {exc}{hint}")
        for name in list(table):
            key = self.root.get(name)
            self.table[name] = table[name] if key is None else self._from_file(table[name], key, (name,), path.name)
        return None

    def _from_file(self, value: Any, key: Key, path: Path, file: str) -> Any:
        """Return `value` of the file with strings expanded and free tables flattened; note its origin."""
        if isinstance(value, dict) and (free := schema.value_type(key.type)) is not None:
            if schema.table_type(free) is None:
                for name in _doubled(value):
                    self.problem((*path, name), "given twice, bare and quoted; keep one")
                value = flatten(value)
            item = attrs.evolve(key, type=free, unit=None)
            return {name: self._from_file(inner, item, (*path, name), file) for name, inner in value.items()}
        if isinstance(value, dict) and (table := schema.table_type(key.type)) is not None:
            known = {**schema.secret_files(table), **schema.keys_of(table)}
            stray = Key(name="", type=Any)
            return {
                name: self._from_file(inner, known.get(name, stray), (*path, name), file)
                for name, inner in value.items()
            }
        if isinstance(value, list) and schema.table_type(item_type := schema.item_type(key.type)) is not None:
            item = attrs.evolve(key, type=item_type)
            return [self._from_file(inner, item, (*path, index), file) for index, inner in enumerate(value)]
        self.origins[path] = Origin(1, f"{file}:{schema.show_path(path)}")
        return self._expand(value, key, path)

    def _expand(self, value: Any, key: Key, path: Path) -> Any:
        if isinstance(value, list):
            item = attrs.evolve(key, type=schema.item_type(key.type) or Any)
            return [self._expand(inner, item, (*path, index)) for index, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        before = len(self.problems)
        text = _EXPANSION.sub(lambda match: self._replacement(match, path), value)
        if len(self.problems) > before:
            return value
        if value == text.replace("${", "$${"):  # nothing but escapes: still a string of the file
            return text
        return read_text(text, key.type, key.unit, secret=key.secret)

    def _replacement(self, match: re.Match[str], path: Path) -> str:
        name, default = match.groups()
        if match[0] == "$${":
            return "${"
        if name is None:
            self.problem(
                path, f"{match[0]} is no reference; expected ${{NAME}} or ${{NAME:-default}}; $${{ is a literal"
            )
            return ""
        value = self.environ.get(name)
        if value:
            return value
        if default is not None:
            return str(default)
        if value is None:
            self.problem(path, f"the environment variable {name} is not set (${{{name}:-default}} gives a default)")
        return ""

    # Environment and command line

    def read_environment(self) -> None:
        """Lay `MQTT_TRIO__SECTION__KEY` over the tree; outer keys first, so that inner ones refine them."""
        given = [name for name in self.environ if name.upper().startswith(ENVIRONMENT_PREFIX)]
        for name in sorted(given, key=_by_depth_and_index):
            steps = name[len(ENVIRONMENT_PREFIX) :].split("__")
            self.set_text(steps, self.environ[name], Origin(2, f"environment {name}"))

    def set_text(self, steps: Sequence[str], text: str, origin: Origin) -> None:
        """Set the key that `steps` name, without regard to case, to what `text` says."""
        try:
            slot = self._resolve(steps)
            self.set_value(slot.path, read_text(text, slot.type, slot.unit, secret=slot.secret), origin)
        except LookupError as exc:
            self.problem((), f"{origin.text}: {exc.args[0]}")

    def set_value(self, path: Path, value: Any, origin: Origin) -> None:
        """Set one value; tables on its way are made, a list grows by one at its end.

        Raises:
          LookupError: the path leads through something that is no table or list, or past the end of a list.
        """
        here: Any = self.table
        for depth, step in enumerate(path[:-1]):
            if isinstance(here, list) and isinstance(step, int):
                if step > len(here):
                    raise LookupError(f"{schema.show_path(path[: depth + 1])}: the list has {len(here)} items")
                if step == len(here):
                    here.append({})
                here = here[step]
            elif isinstance(here, dict) and isinstance(step, str):
                here = here.setdefault(step, [] if isinstance(path[depth + 1], int) else {})
            if not isinstance(here, dict | list):
                raise LookupError(f"{schema.show_path(path[: depth + 1])} is no table")  # noqa: TRY004
        last = path[-1]
        if isinstance(here, list) and isinstance(last, int):
            if last > len(here):
                raise LookupError(f"{schema.show_path(path)}: the list has {len(here)} items")
            here[last : last + 1] = [value]
        elif isinstance(here, dict) and isinstance(last, str):
            here[last] = value
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        self.problems[:] = [problem for problem in self.problems if problem[0][: len(path)] != path or not problem[0]]
        self.origins[path] = origin

    def _resolve(self, steps: Sequence[str]) -> Slot:
        """Find the key that `steps` name; LookupError says which one is not known."""
        names, keys, here = list(steps), self.root, self.table
        path: Path = ()
        slot_type: Any = None
        unit, secret = None, False
        value: Any = here
        while names:
            name = names.pop(0)
            key = _find(name, keys, path)
            path, slot_type, unit, secret = (*path, key.name), key.type, key.unit, key.secret
            value = value.get(key.name) if isinstance(value, dict) else None
            if names and (item := schema.item_type(slot_type)) is not None:
                if not names[0].isdigit():
                    raise LookupError(f'{schema.show_path(path)} is a list: expected an index, got "{names[0]}"')
                index = int(names.pop(0))
                path, slot_type, unit = (*path, index), item, None
                value = value[index] if isinstance(value, list) and index < len(value) else None
            if names and (free := schema.value_type(slot_type)) is not None:
                return _free_slot(path, names, free, value)
            table = schema.table_type(slot_type)
            if names and table is None:
                raise LookupError(f"{schema.show_path(path)} has no keys of its own, got {'.'.join(names)}")
            if table is not None:
                keys = {**schema.secret_files(table), **schema.keys_of(table)}
                keys = {name: _as_file_key(name, key) for name, key in keys.items()}
        if not path:
            raise LookupError("a key is missing")
        return Slot(path, slot_type, unit, secret)

    # Secrets in files

    def read_secret_files(self) -> None:
        """Replace each `<Key>File` by the content of that file as `<Key>`."""
        for name, key in self.root.items():
            self._secrets_of(self.table.get(name), key.type, (name,))

    def _secrets_of(self, value: Any, tp: Any, path: Path) -> None:
        if isinstance(value, list):
            for index, inner in enumerate(value):
                self._secrets_of(inner, schema.item_type(tp), (*path, index))
        table = schema.table_type(tp)
        if table is None or not isinstance(value, dict):
            return
        for file_name, key in schema.secret_files(table).items():
            if file_name in value:
                self._read_secret(value, file_name, key.name, path)
        for name, key in schema.keys_of(table).items():
            self._secrets_of(value.get(name), key.type, (*path, name))

    def _read_secret(self, value: Table, file_name: str, name: str, path: Path) -> None:
        file = value.pop(file_name)
        origin = self.origins.pop((*path, file_name), DEFAULT)
        other = self.origins.get((*path, name), DEFAULT)
        if name in value and other.rank == origin.rank:
            self.problem((*path, name), f"both {name} and {file_name} are given; keep one")
            return
        if name in value and other.rank > origin.rank:
            return
        if not isinstance(file, str) or not file:
            self.problem((*path, file_name), f"expected the path of a file, got {schema.found(file)}")
            return
        try:
            with open(file, "rb") as stream:
                content = stream.read(MAXIMUM_SECRET_SIZE + 1)
            if len(content) > MAXIMUM_SECRET_SIZE:
                self.problem((*path, file_name), f"{file} holds more than {MAXIMUM_SECRET_SIZE} bytes")
            value[name] = content.decode().removesuffix("\n").removesuffix("\r")
        except OSError as exc:
            self.problem((*path, file_name), f"cannot read {file}: {exc.strerror}")
        except UnicodeDecodeError:
            self.problem((*path, file_name), f"{file} is not UTF-8")
        self.origins[(*path, name)] = Origin(origin.rank, f"{origin.text}, file {file}")


def _find(name: str, keys: Mapping[str, Key], path: Path) -> Key:
    for known, key in keys.items():
        if known.lower() == name.lower():
            return key
    where = f"{schema.show_path(path)} has no key" if path else "there is no section"
    hint = schema.did_you_mean(name, keys) or f"; known: {', '.join(keys)}"
    raise LookupError(f'{where} "{name}"{hint}')


def _as_file_key(name: str, key: Key) -> Key:
    return key if name == key.name else Key(name=name, type=str)


def _free_slot(path: Path, names: Sequence[str], item: Any, value: object) -> Slot:
    """The rest of a path inside a free table is one key: dots of the command line, `__` of the environment."""
    name = ".".join(names)
    known = value if isinstance(value, dict) else {}
    name = next((key for key in known if key.lower() == name.lower()), name if name != name.upper() else name.lower())
    return Slot((*path, name), item, None, schema.looks_secret((name,)))


def _by_depth_and_index(name: str) -> list[tuple[bool, int, str]]:
    steps = name.upper().split("__")
    return [(step.isdigit(), int(step) if step.isdigit() else 0, step) for step in steps]


def split_path(text: str) -> list[str]:
    """Split `Listeners[0].Port`, `Listeners.0.Port`, `Kafka.Producer."linger.ms"` into steps."""
    return [index or quoted or bare.strip() for index, quoted, bare in _STEP.findall(text)]


def read_text(text: str, tp: Any, unit: str | None, *, secret: bool) -> Any:
    """Return what `text` from outside means to a key of type `tp`; text that means nothing to it stays text."""
    if secret or (schema.takes_text(tp) and not (text.startswith("[") and schema.item_type(tp) is not None)):
        return text
    try:
        parsed = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        return text  # units ("7d") are read later; for anything else the mistake is described with its path
    return parsed["value"] if len(parsed) == 1 else text


def flatten(table: Mapping[str, Any]) -> Table:
    """Return `{"retention.ms": 1}` for `{"retention": {"ms": 1}}`, which TOML makes of a bare dotted key."""
    return dict(_flat(table, ""))


def _doubled(table: Mapping[str, Any]) -> list[str]:
    """Return names that a table has with and without quotes, which are two keys to TOML."""
    names = [name for name, _ in _flat(table, "")]
    return sorted({name for name in names if names.count(name) > 1})


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
