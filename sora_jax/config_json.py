"""Configs as JSON and back, strictly: a wrong or unknown key is an error that names its dotted path.

    {"version": 2, "kind": "sora", "data": {...}, "model": {...}, ..., "components": {...}}

An object whose class has a `kind` says it, so that of several classes that a field may hold the right one is read. A
key that a file lacks takes its field's default, at any depth: the file is older than the field. Files of older versions
are brought up to this one by `sora_jax.migrations`.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from sora_jax.components import Components
from sora_jax.migrations import MIGRATIONS

CONFIG_VERSION = 2
T = TypeVar("T")


class Document(NamedTuple):
    """What a file holds, as this version would have written it.

    Attributes:
        kind: of the config; None where it has none (a manifest), or where an older file does not tell.
        values: of its fields, by name.
        components: that the model was trained with.
    """

    kind: str | None
    values: dict[str, Any]
    components: Components


def kind_of(cls: type) -> str | None:
    """Returns the `kind` that a dataclass names as a class variable, None where it names none."""
    kind = None if "kind" in {field.name for field in dataclasses.fields(cls)} else getattr(cls, "kind", None)
    return kind or None


def to_values(config: Any) -> Any:
    """Returns a dataclass as nested dicts and lists; those of classes that have a `kind` begin with it."""
    if dataclasses.is_dataclass(config):
        kind = kind_of(type(config))
        fields = {field.name: to_values(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return fields if kind is None else {"kind": kind, **fields}
    return [to_values(value) for value in config] if isinstance(config, tuple) else config


def to_json(config: Any, components: Components | None = None) -> str:
    """Returns a dataclass as indented JSON, with the version of the format.

    Args:
        config: of a run or a model, or whatever else is written like one.
        components: that the model was trained with; None writes nothing of them.
    """
    values = {"version": CONFIG_VERSION, **to_values(config)}
    if components is not None:
        values["components"] = to_values(components)
    return json.dumps(values, indent=2) + "\n"


def parse(text: str) -> Document:
    """Reads what `to_json` of this or an older version wrote, whatever it is of.

    Raises:
        ValueError: no JSON object, another version, a kind that is no text, or components that cannot be read.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}.")
    version = values.pop("version", None)
    if type(version) is not int or version not in (*MIGRATIONS, CONFIG_VERSION):
        raise ValueError(f"this code reads versions up to {CONFIG_VERSION} of the config, got {version!r}.")
    for old in range(version, CONFIG_VERSION):
        values = MIGRATIONS[old](values)
    kind = values.pop("kind", None)
    if not isinstance(kind, str | None):
        raise ValueError(f"kind: expected a string, got {kind!r}.")
    return Document(kind, values, _from_value(Components, values.pop("components", {}), "components"))


def as_first_written(document: Document) -> str:
    """Returns a network's config as version 1 wrote it, which digests are of: newer versions do not change them."""
    return json.dumps({"version": 1, **document.values}, indent=2) + "\n"


def config_of(cls: type[T], document: Document) -> T:
    """Returns the config of a document.

    Args:
        cls: its dataclass.
        document: of `parse`.

    Raises:
        ValueError: another kind's, an unknown key, a missing one whose field has no default, or a value that its field
            does not allow, each named by its dotted path.
    """
    values = document.values if document.kind is None else {"kind": document.kind, **document.values}
    return _from_value(cls, values, cls.__name__)


def from_json(cls: type[T], text: str) -> T:
    """Returns the config that `to_json` wrote, whatever its version; raises what `parse` and `config_of` do."""
    try:
        document = parse(text)
    except ValueError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error
    return config_of(cls, document)


def _from_value(annotation: Any, value: Any, path: str) -> Any:
    """Returns `value` as what `annotation` says; ValueError with the dotted `path` where it does not fit."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return _from_object(annotation, value, path)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        arguments = tuple(argument for argument in arguments if argument is not type(None))
        if len(arguments) > 1 and all(map(dataclasses.is_dataclass, arguments)):
            return _from_object(_class_of(arguments, value, path), value, path)
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


def _from_object(cls: type, value: Any, path: str) -> Any:
    """Returns the dataclass of a JSON object."""
    value = dict(_object(value, path))
    kind = kind_of(cls)
    if kind is not None and (found := value.pop("kind", kind)) != kind:
        raise ValueError(f"{path}.kind: expected {kind!r}, got {found!r}.")
    hints, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(value.keys() - fields.keys()):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; the keys are {', '.join(fields)}.")
    if missing := sorted(name for name in fields.keys() - value.keys() if not _has_default(fields[name])):
        raise ValueError(f"{path}: missing key {missing[0]!r}.")
    return cls(**{name: _from_value(hints[name], value[name], f"{path}.{name}") for name in fields if name in value})


def _class_of(classes: tuple[type, ...], value: Any, path: str) -> type:
    """Returns which of several dataclasses a JSON object is of: by its kind, or, where it is older, by its keys."""
    keys = _object(value, path).keys()
    kinds = {kind_of(cls): cls for cls in classes}
    if "kind" in keys:
        if value["kind"] not in kinds:
            raise ValueError(f"{path}.kind: expected one of {', '.join(map(repr, kinds))}, got {value['kind']!r}.")
        return kinds[value["kind"]]

    def misfits(cls: type) -> tuple[int, int]:
        names = {field.name for field in dataclasses.fields(cls)}
        return len(keys - names), len(names - keys)  # what is unknown is worse than what is lacking

    return min(classes, key=misfits)


def _object(value: Any, path: str) -> Mapping[str, Any]:
    """Returns a JSON object as it is; ValueError where it is something else."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {value!r}.")
    return value


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
