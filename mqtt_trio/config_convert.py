"""From tables to options: cattrs with strict hooks, and every mistake as one line with the path of its key."""

from __future__ import annotations

import enum
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as FilePath
from pathlib import PurePath
from typing import Any, Final

import attrs
import cattrs
from cattrs.errors import (
    AttributeValidationNote,
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn, override
from cattrs.preconf.tomllib import TomllibConverter, make_converter

from mqtt_trio import config_schema as schema
from mqtt_trio.config_schema import Key, Path
from mqtt_trio.errors import ConfigError

_OWN_PATH: Final = re.compile(r"([A-Z]\w*(?:\[\d+\]|\.\w+)*): ")
_STEP: Final = re.compile(r"\[(\d+)\]|(\w+)")
_ATTRS_BOUND: Final = re.compile(r"'\w+' must be ([<>]=?) ([^:]+): ")


class Unexpected(ValueError):
    """A value of the wrong kind. The text is made where it is known whether the value may be shown."""

    def __init__(self, expected: str, value: object, hint: str = "") -> None:
        super().__init__(expected)
        self.expected, self.value, self.hint = expected, value, hint

    def describe(self, *, secret: bool) -> str:
        hint = "" if secret else self.hint
        return f"expected {self.expected}, got {schema.found(self.value, secret=secret)}{hint}"


def make_strict_converter() -> TomllibConverter:
    """Return a converter that takes no value of another type for what it expects and knows our keys."""
    converter = make_converter(forbid_extra_keys=True, detailed_validation=True)
    for tp, accepts in _SCALARS.items():
        converter.register_structure_hook(tp, _scalar_hook(tp, accepts))
    converter.register_structure_hook_func(lambda tp: tp is object or tp is Any, lambda value, _: value)
    converter.register_structure_hook_func(lambda tp: bool(schema.choices(tp)), _structure_choice)
    converter.register_structure_hook_func(_is_path, _structure_path)
    converter.register_structure_hook(FilePath, _structure_path)  # cattrs has one of its own, which takes "" for "."
    converter.register_structure_hook_factory(_is_list, lambda tp: _list_hook(tp, converter))
    converter.register_structure_hook_factory(_is_free_table, lambda tp: _free_table_hook(tp, converter))
    converter.register_structure_hook_factory(_is_union, lambda tp: _union_hook(tp, converter))
    converter.register_structure_hook_factory(attrs.has, lambda tp: _table_hook(tp, converter))
    return converter


_SCALARS: Final[Mapping[type, Callable[[object], bool]]] = {
    # The stock hooks call the type, and so take "1883", 1883.7 and true for a port.
    bool: lambda value: type(value) is bool,
    int: lambda value: type(value) is int,
    float: lambda value: type(value) in (int, float) and math.isfinite(typing.cast(float, value)),
    str: lambda value: type(value) is str,
}


def _scalar_hook(tp: type, accepts: Callable[[object], bool]) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if not accepts(value):
            raise Unexpected(schema.expected(tp), value)
        return tp(value)

    return structure


def _is_path(tp: Any) -> bool:
    return isinstance(tp, type) and issubclass(tp, PurePath)


def _structure_path(value: Any, _: Any) -> FilePath:
    if not isinstance(value, str) or not value:
        raise Unexpected("the path of a file", value)
    return FilePath(value)


def _structure_choice(value: Any, tp: Any) -> Any:
    allowed = schema.choices(tp)
    if not isinstance(value, str) or value not in allowed:
        hint = schema.did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise Unexpected(schema.expected(tp), value, hint)
    return tp(value) if isinstance(tp, type) and issubclass(tp, enum.Enum) else value


def _is_union(tp: Any) -> bool:
    return schema.arms(tp) != (tp,)


def _is_list(tp: Any) -> bool:
    return not _is_union(tp) and schema.item_type(tp) is not None


def _is_free_table(tp: Any) -> bool:
    return not _is_union(tp) and schema.value_type(tp) is not None


def _fits(value: object, arm: Any) -> bool:
    """Whether the shape of `value` is that of `arm`; its hook looks closer."""
    if arm in _SCALARS:
        return _SCALARS[arm](value)
    if isinstance(value, str):
        return schema.takes_text(arm)
    if isinstance(value, list):
        return schema.item_type(arm) is not None
    if isinstance(value, dict):
        return schema.table_type(arm) is not None or schema.value_type(arm) is not None
    return arm is object or arm is Any


def _union_hook(tp: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    alternatives = schema.arms(tp)

    def structure(value: Any, _: Any) -> Any:
        fitting = [arm for arm in alternatives if _fits(value, arm)]
        if not fitting and len(alternatives) == 1:
            fitting = list(alternatives)  # its own hook says best what it expects
        if not fitting:
            raise Unexpected(schema.expected(tp), value)
        return converter.structure(value, fitting[0])

    return structure


def _list_hook(tp: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    item = schema.item_type(tp)
    make = {list: list, set: set, frozenset: frozenset}.get(typing.get_origin(tp) or tp, tuple)

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, list):
            raise Unexpected(schema.expected(tp), value)
        return make(_each(dict(enumerate(value)), item, converter).values())

    return structure


def _free_table_hook(tp: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    item = schema.value_type(tp)

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise Unexpected(schema.expected(tp), value)
        return _each(value, item, converter)

    return structure


def _each(values: Mapping[Any, Any], item: Any, converter: cattrs.Converter) -> dict[Any, Any]:
    """Structure each value; raise the mistakes of all of them together, as cattrs does."""
    done, mistakes = {}, []
    for step, value in values.items():
        try:
            done[step] = converter.structure(value, item)
        except Exception as exc:
            exc.add_note(IterableValidationNote(f"at {step!r}", step, item))
            mistakes.append(exc)
    if mistakes:
        raise IterableValidationError("items", mistakes, item)
    return done


def _table_hook(tp: type, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    overrides = {
        key.attribute.name: override(rename=key.name, struct_hook=_key_hook(key, converter))
        for key in schema.keys_of(tp).values()
        if key.attribute is not None
    }
    inner: Callable[[Any, Any], Any] = make_dict_structure_fn(
        tp,
        converter,
        _cattrs_forbid_extra_keys=True,
        _cattrs_detailed_validation=True,
        **overrides,  # type: ignore[arg-type]
    )

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise Unexpected("a table", value)
        return inner(value, tp)

    return structure


def _key_hook(key: Key, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Structure one key and run its validators here: in `__init__` the first mistake would hide the others."""

    def structure(value: Any, _: Any) -> Any:
        given = value
        if key.unit is not None:
            value = _amount(value, key)
        result = converter.structure(value, key.type)
        attribute = key.attribute
        if attribute is None:
            return result
        convert: Any = attribute.converter
        final = convert(result) if callable(convert) else result
        if attribute.validator is not None:
            try:
                attribute.validator(None, attribute, final)
            except AttributeError:  # it looks at its instance, so it waits for __init__
                pass
            except (ValueError, TypeError) as exc:
                raise _translate(exc, given) from None
        return result

    return structure


def _amount(value: object, key: Key) -> object:
    unit = typing.cast(str, key.unit)
    whole = int in schema.arms(key.type) and float not in schema.arms(key.type)
    amount = schema.read_amount(value, unit) if isinstance(value, str) else value
    if amount is None or type(amount) not in (int, float) or (whole and not isinstance(amount, int)):
        raise Unexpected(schema.expected(key.type, unit), value)
    return amount


def _translate(exc: Exception, value: object) -> Exception:
    """Turn the error of an attrs validator into ours; a text of our own validators stands as it is."""
    text = str(exc.args[0]) if exc.args else str(exc)
    if bound := _ATTRS_BOUND.match(text):
        return Unexpected(f"a value {bound[1]} {bound[2]}", value)
    if len(exc.args) == 4 and isinstance(exc.args[2], tuple | list | set | frozenset | dict):  # attrs.validators.in_
        allowed = [str(choice) for choice in exc.args[2]]
        hint = schema.did_you_mean(value, allowed) if isinstance(value, str) else ""
        return Unexpected(f"one of {', '.join(map(schema.quote, allowed))}", value, hint)
    if len(exc.args) == 4 and isinstance(exc.args[2], re.Pattern):  # attrs.validators.matches_re
        return Unexpected(f"a match of {exc.args[2].pattern}", value)
    return ValueError(text)


def problems_of(exc: BaseException, path: Path, *, secret: bool = False) -> Iterator[tuple[Path, str]]:
    """Walk what the converter raised: path and text of each mistake, in the file's own keys."""
    if isinstance(exc, ClassValidationError):
        by_attribute = {key.attribute.name: key for key in schema.keys_of(exc.cl).values() if key.attribute}
        for sub in exc.exceptions:
            note = _note(sub, AttributeValidationNote)
            key = by_attribute.get(note.name) if isinstance(note, AttributeValidationNote) else None
            if key is None:
                yield from problems_of(sub, path, secret=secret)
            else:
                yield from problems_of(sub, (*path, key.name), secret=key.secret)
    elif isinstance(exc, IterableValidationError):
        for sub in exc.exceptions:
            note = _note(sub, IterableValidationNote)
            step = (note.index,) if isinstance(note, IterableValidationNote) else ()
            yield from problems_of(sub, (*path, *step), secret=secret)
    elif isinstance(exc, ForbiddenExtraKeysError):
        known = [*schema.keys_of(exc.cl), *schema.secret_files(exc.cl)]
        for extra in sorted(exc.extra_fields):
            yield (*path, extra), f"unknown key{schema.did_you_mean(extra, known) or '; known: ' + ', '.join(known)}"
    elif isinstance(exc, ConfigError):  # an options class that names its keys itself
        yield from (split_problem(line, path) for line in exc.problems)
    else:
        yield path, _describe(exc, secret=secret or schema.looks_secret(path))


def split_problem(line: str, path: Path) -> tuple[Path, str]:
    """Split `Filter[1]: text` into a path below `path` and the text."""
    match = _OWN_PATH.match(line)
    if match is None:
        return path, line
    steps = (int(index) if index else name for index, name in _STEP.findall(match[1]))
    return (*path, *steps), line[match.end() :]


def _note(exc: BaseException, kind: type) -> object:
    return next((note for note in getattr(exc, "__notes__", ()) if type(note) is kind), None)


def _describe(exc: BaseException, *, secret: bool) -> str:
    if isinstance(exc, Unexpected):
        return exc.describe(secret=secret)
    if isinstance(exc, KeyError):
        return "is missing"
    if secret:
        return "unusable value"
    return str(exc.args[0]) if exc.args else str(exc)
