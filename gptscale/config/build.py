"""Plain data → typed settings. Every mistake is answered with the key, what is wrong, and the near name."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from gptscale.runtime.errors import UserError

T = TypeVar("T")


def build(schema: type[T], values: Mapping[str, Any], key: str = "") -> T:
    """Make a `schema` from nested mappings; raises UserError naming the first wrong key."""
    assert dataclasses.is_dataclass(schema)
    hints = typing.get_type_hints(schema)
    fields = {field.name for field in dataclasses.fields(schema)}
    for name in values:
        if name not in fields:
            raise UserError(unknown_key(_join(key, str(name)), [_join(key, field) for field in sorted(fields)]))
    made = {name: _convert(hints[name], value, _join(key, name)) for name, value in values.items()}
    missing = [
        field.name
        for field in dataclasses.fields(schema)
        if field.name not in made
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{_join(key, missing[0])} is missing\nset it, e.g. {_join(key, missing[0])}=…")
    return typing.cast(T, schema(**made))


def defaults(schema: type[Any]) -> dict[str, Any]:
    """The schema's default values as plain nested data, for Hydra to compose over."""
    return typing.cast(dict[str, Any], _plain(schema()))


def plain(settings: Any) -> dict[str, Any]:
    """Settings as nested dicts and lists of JSON values."""
    return typing.cast(dict[str, Any], _plain(settings))


def flat_keys(schema: type[Any], key: str = "") -> list[str]:
    """All dotted keys of a schema, groups included: `model`, `model.layers`, …"""
    hints = typing.get_type_hints(schema)
    keys: list[str] = []
    for field in dataclasses.fields(schema):
        name = _join(key, field.name)
        keys.append(name)
        if dataclasses.is_dataclass(hints[field.name]):
            keys += flat_keys(typing.cast(type[Any], hints[field.name]), name)
    return keys


def option_keys(schema: type[Any], key: str = "") -> list[str]:
    """Dotted keys of the groups whose settings nobody knows but the author of a part of their own."""
    hints = typing.get_type_hints(schema)
    found: list[str] = []
    for field in dataclasses.fields(schema):
        hint, name = hints[field.name], _join(key, field.name)
        if get_origin(hint) is dict:
            found.append(name)
        elif dataclasses.is_dataclass(hint):
            found += option_keys(typing.cast(type[Any], hint), name)
    return found


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Two lines for a name nobody knows: the near one where there is one, else its neighbours."""
    known = list(known)
    last = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == last][:1]  # the right name in the wrong group
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        nearest = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.7)
        near = [name for name in known if nearest and name.rpartition(".")[2] == nearest[0]][:1]
    if near:
        return f"there is no setting '{key}'\ndid you mean '{near[0]}'?"
    group = key.rpartition(".")[0]
    siblings = sorted({name for name in known if name.rpartition(".")[0] == group}) or sorted(
        {name.partition(".")[0] for name in known}
    )
    return f"there is no setting '{key}'\nthere are: {', '.join(siblings)}"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return value


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{key} must be a group of settings, not {value!r}\nset its keys one by one: {key}.…=…")
        return build(typing.cast(type[Any], hint), value, key)
    if origin is Literal:
        choices = get_args(hint)
        if value not in choices:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
            fix = f"did you mean {near[0]}?" if near else f"choose one of: {', '.join(map(str, choices))}"
            raise UserError(f"{key}={value} is not known\n{fix}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), value, key)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{key} must be a group of settings, not {value!r}\nset its keys one by one: {key}.…=…")
        return {str(name): _convert_option(item, _join(key, str(name))) for name, item in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{key} must be a list, not {value!r}\nwrite it as {key}=[…,…]")
        item = get_args(hint)[0]
        return tuple(_convert(item, element, f"{key}[{index}]") for index, element in enumerate(value))
    return _convert_scalar(hint, value, key)


def _convert_union(members: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    lists = [member for member in members if get_origin(member) is tuple]
    chosen = lists[0] if lists and isinstance(value, (list, tuple)) else members[0]
    return _convert(chosen, value, key)


def _convert_option(value: Any, key: str) -> Any:
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise UserError(f"{key} must be one value, not {value!r}\nset it to a number, text, true, false or null")
    return value


def _convert_scalar(hint: Any, value: Any, key: str) -> Any:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # an unquoted 7 or 1e3 where a name is meant
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 is how people write a million
    if type(value) is not hint:
        raise UserError(f"{key} must be {names[hint]}, not {value!r}\nset it, e.g. {key}={_example(hint)}")
    return value


def _example(hint: Any) -> str:
    return {int: "4", float: "0.1", str: "name", bool: "true"}[hint]
