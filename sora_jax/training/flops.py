"""Floating-point operations, counted over a jaxpr.

A multiply-accumulate is two operations. XLA's own count takes a scanned body once, so it cannot be used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from sora_jax.training import state, step
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.task import Task


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Returns the operations of the matrix products and convolutions in `function(*args)`.

    Args:
        function: is traced, never run.
        *args: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: a loop whose length is not known when tracing.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def jaxpr_flops(jaxpr: Jaxpr) -> int:
    """Returns the operations of a jaxpr: bodies of scans times their length, kernels times their grid."""
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            sizes = _shape(eqn.invars[0])
            total += 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(sizes[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = _shape(eqn.invars[1])
            out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) // out_features
        elif name == "cond":
            total += max(jaxpr_flops(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(jaxpr_flops(sub) for sub in sub_jaxprs(params))
            if name == "while" and inner:
                raise ValueError("a while loop with matrix products has no length that tracing could know.")
            times = {"scan": params.get("length", 1), "pallas_call": _grid_size(params)}.get(name, 1)
            total += inner * times
    return total


def _shape(atom: Var | Literal) -> tuple[int, ...]:
    """Returns the shape of an operand or a result."""
    return cast(jax.core.ShapedArray, atom.aval).shape  # the operands of products are arrays and no tokens


def sub_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """Yields the jaxprs in an equation's params; of a custom derivative, the function itself and not its rules."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _grid_size(params: dict[str, Any]) -> int:
    """Returns how often a Pallas kernel's body runs (1 where there is no grid)."""
    return math.prod(getattr(params.get("grid_mapping"), "grid", ()))


def step_flops(task: Task) -> int:
    """Returns the operations of one update as XLA would run it, padding and what `remat` computes again included.

    It is traced with shapes alone. An attention kernel counts what its own code does, the dense one full rows.
    """
    config = task.config
    tx = make_optimizer(config.optimizer, config.num_steps)
    shapes = jax.eval_shape(lambda: state.fresh_state(state.unboxed_params(task), tx))
    batches, rows = state.abstract_batches(task)
    return count_flops(lambda *args: step.update(*args, task=task, tx=tx), shapes, batches, rows)
