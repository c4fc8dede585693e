"""Configs as JSON and back, strictly: a wrong, unknown or missing key is an error that names its dotted path."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Literal, TypeVar

CONFIG_VERSION = 1
T = TypeVar("T")


def to_json(config: Any) -> str:
    """Returns a dataclass as indented JSON, with the version of the format."""
    return json.dumps({"version": CONFIG_VERSION, **dataclasses.asdict(config)}, indent=2) + "\n"


def from_json(cls: type[T], text: str) -> T:
    """Reads what `to_json` wrote. A key may be missing where its default is None: the file is older than the field.

    Raises:
        ValueError: another version, an unknown or a missing key, or a value that its field does not allow, each
            named by its dotted path.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}: expected a JSON object, got {type(values).__name__}.")
    version = values.pop("version", None)
    if version != CONFIG_VERSION:
        raise ValueError(f"{cls.__name__}: this code reads version {CONFIG_VERSION} of the config, got {version!r}.")
    return _from_value(cls, values, cls.__name__)


def _from_value(annotation: Any, value: Any, path: str) -> Any:
    """Returns `value` as what `annotation` says; ValueError with the dotted `path` where it does not fit."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        every = typing.get_type_hints(annotation)
        hints = {field.name: every[field.name] for field in dataclasses.fields(annotation)}
        if not isinstance(value, dict):
            raise ValueError(f"{path}: expected an object, got {value!r}.")
        if unknown := sorted(set(value) - set(hints)):
            raise ValueError(f"{path}: unknown key {unknown[0]!r}; the keys are {', '.join(hints)}.")
        optional = {field.name for field in dataclasses.fields(annotation) if field.default is None}
        if missing := sorted(set(hints) - set(value) - optional):
            raise ValueError(f"{path}: missing key {missing[0]!r}.")
        return annotation(
            **{name: _from_value(hint, value[name], f"{path}.{name}") for name, hint in hints.items() if name in value}
        )
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        arguments = tuple(argument for argument in arguments if argument is not type(None))
        if len(arguments) > 1 and all(map(dataclasses.is_dataclass, arguments)):  # no two have the same keys
            kinds = {frozenset(field.name for field in dataclasses.fields(kind)): kind for kind in arguments}
            if not isinstance(value, dict) or (kind := kinds.get(frozenset(value))) is None:
                names = ", ".join(kind.__name__ for kind in arguments)
                raise ValueError(f"{path}: expected the keys of one of {names}, got {value!r}.")
            return _from_value(kind, value, path)
        return _from_value(arguments[0], value, path)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{path}: expected one of {', '.join(map(repr, arguments))}, got {value!r}.")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{path}: expected a list, got {value!r}.")
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(value):
            raise ValueError(f"{path}: expected {len(kinds)} values, got {value!r}.")
        return tuple(_from_value(kind, v, f"{path}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        raise ValueError(f"{path}: expected {annotation.__name__}, got {value!r}.")
    return value
