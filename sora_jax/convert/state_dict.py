"""Finds a network's tensors in what a checkpoint holds, however they are wrapped, and says which do not fit.

A checkpoint is a tree: training scripts store `{"model": ..., "ema": ..., "opt": ...}` or `{"state_dict": ...}`,
wrappers put `module.` (DataParallel), `_orig_mod.` (torch.compile), `model.` or a name of their own before every name,
and a whole module may be stored. What is looked for is a dict of tensors in which, behind some prefix, stand names that
the network is known by. Averaged weights (EMA) are taken first, then what stands highest, then what is called a model;
what an optimizer remembers is never taken. Where two differ and nothing tells which is meant, neither is taken.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sora_jax.array_types import NumpyArray
from sora_jax.convert.pickle_reader import Stranger

_LOGGER = logging.getLogger(__name__)

_DEEPEST = 6  # dicts inside of dicts that are looked into
# What torch.compile, FSDP and activation checkpointing put into names, wherever the module that they wrap stands.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = {"ema", "averaged", "shadow", "swa"}
_OF_MODELS = {"model", "module", "net", "network", "params", "state", "weights"}
_OF_OPTIMIZERS = {"exp", "grad", "grads", "momentum", "opt", "optim", "optimizer"}


class _Found(NamedTuple):
    """Tensors behind a prefix of the names of a dict, which stands at `path` in the file."""

    path: tuple[str, ...]
    prefix: str
    tensors: dict[str, Any]

    @property
    def averaged(self) -> bool:
        """Whether its path or prefix says that the weights are averages."""
        return bool(_AVERAGED & _words(*self.path, self.prefix))

    @property
    def called_model(self) -> bool:
        """Whether its path or prefix says that this is the model."""
        return bool(_OF_MODELS & _words(*self.path, self.prefix))

    @property
    def arrays(self) -> dict[str, NumpyArray]:
        """The tensors alone."""
        return {name: value for name, value in self.tensors.items() if isinstance(value, np.ndarray)}

    def __str__(self) -> str:
        where = f"{'/'.join(self.path)!r}" if self.path else "the file itself"
        return f"{where}, behind the prefix {self.prefix!r}" if self.prefix else where


def find_tensors(values: Any, marks: Sequence[str]) -> dict[str, NumpyArray]:
    """Returns the tensors of a network by the names that its own state dict has.

    What was taken out of a wrapper is logged. An average must have every tensor that the weights beside it have, or a
    network of fewer blocks might be made of it. Only integers it may lack (`num_batches_tracked`, `position_ids`): they
    are counts and indices, which are not averaged. A network that is whole in the average may stand beside others.

    Args:
        values: what a file holds, as `read_torch` returns it, or tensors by name.
        marks: names of tensors by one of which the network is known.

    Raises:
        ValueError: no tensors at all; one among those taken that is of a kind that is not read, or of a dtype that
            weights have not; several networks of which none is the likeliest; or an average that lacks tensors. They
            are named.
    """
    try:
        dicts = list(_dicts(values, (), set()))
    except RecursionError as error:
        raise ValueError("its objects lie too deep inside of each other.") from error
    kept = [(path, tensors) for path, tensors in dicts if not _OF_OPTIMIZERS & _words(*path)]
    found = [found for path, tensors in kept for found in _behind_prefixes(path, tensors, marks)]
    if found:
        taken = _likeliest([*_averages_without_mark(kept, found), *found])
    elif kept:  # for the message that says which tensors are missing
        taken = min((_Found(path, "", tensors) for path, tensors in kept), key=lambda f: (_rank(f), -len(f.tensors)))
    elif dicts:
        raise ValueError(f"it holds no tensors but those of an optimizer, {'/'.join(dicts[0][0])!r}.")
    else:
        raise _no_tensors(values)
    for name, value in taken.tensors.items():
        if isinstance(value, Stranger) and ("_rebuild_" in value.name or value.name.endswith("Storage")):
            raise _unread(name, value)
        if np.iscomplexobj(value):
            raise ValueError(f"{name} has complex numbers, which no network here has.")
        if name.rpartition(".")[2] in ("weight", "bias"):
            check_real(name, value)
    if taken.path or taken.prefix:
        others = [str(f) for f in found if f is not taken]
        also = f" (not {', '.join(others)})" if others else ""
        _LOGGER.info("the weights are those of %s%s.", taken, also)
    return taken.arrays


def check_real(name: str, value: Any) -> None:
    """Raises ValueError where the tensor `name` holds integers or booleans, which weights are not."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iub":
        raise ValueError(f"{name} has dtype {value.dtype}; weights must be of a floating-point one, not quantised.")


def missing(kind: str, names: Sequence[str], state: Collection[str]) -> ValueError:
    """Returns the error of tensors that a file lacks.

    Args:
        kind: what messages call the file's weights.
        names: of the tensors, at least one.
        state: names that the file has.
    """
    return ValueError(f"{kind}: tensor {names[0]} is missing{_more(names)}{_closest(names[0], state, 'the file has')}.")


def unknown(kind: str, names: Collection[str], expected: Collection[str]) -> ValueError:
    """Returns the error of tensors that the network has not.

    Args:
        kind: what messages call the file's weights.
        names: of the tensors, at least one.
        expected: names that the network has.
    """
    names = sorted(names)
    return ValueError(
        f"{kind}: tensor {names[0]} is unknown{_more(names)}{_closest(names[0], expected, 'the network has')}."
    )


def check_depth(kind: str, blocks: Collection[int], prefix: str) -> int:
    """Returns the number of blocks, which must be all that are numbered up to the last.

    Args:
        kind: what messages call the file's weights.
        blocks: numbers that names of the file have.
        prefix: what stands before the number.

    Raises:
        ValueError: a block that is missing.
    """
    for number in range(len(blocks)):
        if number not in blocks:
            raise ValueError(f"{kind}: tensors of {prefix}{number} are missing, and there is a {prefix}{max(blocks)}.")
    return len(blocks)


def check_size(kind: str, depth: int, state: Collection[str]) -> None:
    """Raises ValueError where a config asks for more blocks than a file has tensors."""
    if depth > len(state):
        raise ValueError(f"{kind}: the config has {depth} blocks and the file {len(state)} tensors.")


def _rank(found: _Found) -> tuple[bool, int, bool]:
    """Returns what is smallest for the likeliest weights."""
    return not found.averaged, len(found.path), bool(found.prefix)


def _likeliest(found: Sequence[_Found]) -> _Found:
    """Returns the weights that are meant; raises ValueError where that cannot be told, or where they are not whole."""
    best = min(map(_rank, found))
    alike = [f for f in found if _rank(f) == best]
    if not alike[0].averaged:
        alike = [f for f in alike if f.called_model] or alike
    taken = alike[0]
    for other in alike[1:]:
        if not _equal(taken.arrays, other.arrays):
            raise ValueError(
                f"it holds several networks, {taken} and {other}, and nothing tells which is meant: save one alone."
            )
    if not taken.averaged:
        return taken
    lacking = {}
    for index, other in enumerate(found):
        if other.averaged:
            continue
        # What stands behind a longer prefix of the same dict is another network.
        inner = tuple(
            f.prefix[len(other.prefix) :]
            for f in found
            if f.path == other.path and f.prefix != other.prefix and f.prefix.startswith(other.prefix)
        )
        lacking[index] = [
            name
            for name, value in other.arrays.items()
            if name not in taken.tensors and value.dtype.kind not in "iub" and not name.startswith(inner)
        ]
    if lacking and all(lacking.values()):  # whatever else is there, it is not the average of less
        index, names = min(lacking.items(), key=lambda item: len(item[1]))
        raise ValueError(
            f"the average, {taken}, lacks {names[0]}{_more(names)}, which {found[index]} has: save the one that is "
            "meant alone."
        )
    return taken


def _averages_without_mark(
    dicts: Sequence[tuple[tuple[str, ...], dict[str, Any]]], found: Sequence[_Found]
) -> Iterator[_Found]:
    """Yields averages that are known by half of the tensors of what was found and not by a mark, which they lack."""
    known = max((f.arrays.keys() for f in found), key=len)
    for path, tensors in dicts:
        if not _AVERAGED & _words(*path) or any(f.path == path for f in found):
            continue
        behind = list(_behind_prefixes(path, tensors, tuple(known)))
        if behind and 2 * len(known & (part := min(behind, key=lambda f: len(f.prefix))).tensors.keys()) >= len(known):
            yield part


def _equal(one: Mapping[str, NumpyArray], other: Mapping[str, NumpyArray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(value, other[name]) for name, value in one.items())


def _no_tensors(values: Any) -> ValueError:
    """Returns the error of what has no tensors by name."""
    for path, value in _leaves(values, (), set()):
        where = "/".join(path)
        if isinstance(value, np.ndarray):
            at = f" (those at {where!r})" if where else ""
            return ValueError(f"its tensors have no names{at}: expected a state dict (names to tensors).")
        if "_rebuild_" in value.name:
            return _unread(where or "it", value)
    shown = f" with {next(iter(values))!r}" if isinstance(values, dict) and values else ""
    return ValueError(f"expected a state dict (names to tensors), got {_kind(values)}{shown}: it holds no tensors.")


def _leaves(values: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields tensors and strangers with their paths, which are the list's of a tensor in a list."""
    if id(values) in seen or len(path) > _DEEPEST:
        return
    seen.add(id(values))
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _leaves(value, (*path, str(name)), seen)
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            if isinstance(value, np.ndarray):
                yield path, value
            else:
                yield from _leaves(value, (*path, str(index)), seen)
    elif isinstance(values, np.ndarray | Stranger):
        yield path, values
        if isinstance(values, Stranger):
            yield from _leaves([values.state, values.items], path, seen)


def _unread(name: str, value: Stranger) -> ValueError:
    """Returns the error of a tensor that stayed a stranger."""
    if "_rebuild_meta_tensor" in value.name:
        return ValueError(f"{name} has no values: its tensors hold no data (device meta).")
    return ValueError(f"{name} is {value}, a kind of tensor that is not read.")


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _closest(name: str, names: Collection[str], who: str) -> str:
    close = difflib.get_close_matches(name, [n for n in names if n != name], n=1, cutoff=0.7)
    return f"; {who} {close[0]}" if close else ""


def _words(*names: str) -> set[str]:
    return set(re.split(r"[._\d]+", ".".join(names).lower()))


def _kind(value: Any) -> str:
    return str(value) if isinstance(value, Stranger) else type(value).__name__


def _dicts(values: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yields the dicts with tensors in them, each with its path; a module is the dict of its parameters."""
    if id(values) in seen or len(path) > _DEEPEST:
        return
    seen.add(id(values))
    if isinstance(values, Stranger):
        if tensors := dict(_module_tensors(values, "", set())):
            yield path, tensors
            return
        for argument in values.arguments:
            yield from _dicts(argument, path, seen)
        values = (values.state if isinstance(values.state, dict) else {}) | values.items
    if isinstance(values, list | tuple):
        values = {str(index): value for index, value in enumerate(values) if isinstance(value, dict | Stranger)}
    if not isinstance(values, dict):
        return
    named = {name: value for name, value in values.items() if isinstance(name, str)}
    if any(isinstance(value, np.ndarray) for value in named.values()):
        yield path, named
    for name, value in named.items():
        yield from _dicts(value, (*path, name), seen)


def _module_tensors(module: Stranger, prefix: str, seen: set[int]) -> Iterator[tuple[str, NumpyArray]]:
    """Yields the tensors of a module that was stored whole, by the names that its state dict would have."""
    state = module.state
    if id(module) in seen:
        return
    seen.add(id(module))
    if state is None:  # torch.compile's is called with the module
        for child in module.arguments:
            if isinstance(child, Stranger):
                yield from _module_tensors(child, prefix, seen)
    if not isinstance(state, dict):
        return
    for part in ("_parameters", "_buffers"):
        if isinstance(tensors := state.get(part), dict):
            yield from ((prefix + name, v) for name, v in tensors.items() if isinstance(v, np.ndarray))
    if isinstance(modules := state.get("_modules"), dict):
        for name, child in modules.items():
            if isinstance(name, str) and isinstance(child, Stranger):
                yield from _module_tensors(child, f"{prefix}{name}.", seen)


def _behind_prefixes(path: tuple[str, ...], tensors: Mapping[str, Any], marks: Sequence[str]) -> Iterator[_Found]:
    """Yields what stands behind each prefix of names behind which there is a mark."""
    plain = {_WRAPPERS.sub("", name): value for name, value in tensors.items()}

    if len(plain) < len(tensors):  # both are there, wrapped and not
        plain = dict(tensors)
    prefixes = dict.fromkeys(
        name[: -len(mark)]
        for name, value in plain.items()
        if isinstance(value, np.ndarray)
        for mark in marks
        if name == mark or name.endswith(f".{mark}")
    )
    for prefix in prefixes:
        inside = {name[len(prefix) :]: value for name, value in plain.items() if name.startswith(prefix)}
        yield _Found(path, prefix, inside)
