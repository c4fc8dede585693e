"""How the command lines read values that tyro knows nothing of."""

from __future__ import annotations

import tyro

from sora_jax.config import MixturePart

REGISTRY = tyro.constructors.ConstructorRegistry()


class UnusableArgumentError(Exception):
    """A value cannot be read; unlike a ValueError, tyro lets its words reach the user."""


@REGISTRY.primitive_rule
def _mixture_part(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Reads a part of `data.mixture` as PATH=WEIGHT; what else it may have is for a config's file to say."""
    if info.type is not MixturePart:
        return None

    def read(words: list[str]) -> MixturePart:
        path, _, weight = words[0].rpartition("=")
        try:
            part = MixturePart(path, float(weight))
        except ValueError as error:
            raise UnusableArgumentError(f"--data.mixture must be PATH=WEIGHT ..., got {words[0]!r}: {error}") from error
        if not path:
            raise UnusableArgumentError(f"--data.mixture must be PATH=WEIGHT ..., got {words[0]!r}, without a path.")
        return part

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH=WEIGHT",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, MixturePart),
        str_from_instance=lambda part: [f"{part.path}={part.weight:g}"],
    )
