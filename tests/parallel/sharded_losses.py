"""Prints, as JSON, the losses of a few updates on each of several meshes. Run with eight fake devices."""

import functools
import json
import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "training"))
import tiny_run

from sora_jax.array_types import PackedBatch
from sora_jax.config import MeshConfig
from sora_jax.parallel import rules
from sora_jax.parallel.mesh import make_mesh
from sora_jax.parallel.multihost import to_global
from sora_jax.training import state as states
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.step import make_eval_step, make_train_step
from sora_jax.training.tasks.sora import SoraTask


def losses(config, mesh):
    """Returns the loss of each update, the held-out loss after them, and the largest shard of a parameter."""
    task, tx = SoraTask(config), make_optimizer(config.optimizer, config.num_steps)
    shardings = states.state_shardings(task, tx, mesh)
    state = states.init_state(task, tx, shardings)
    step = make_train_step(task, tx, mesh, shardings)
    stacked, flat = rules.batch_sharding(mesh, stacked=True), rules.batch_sharding(mesh)
    rows = np.arange(config.data.batch_size, dtype=np.int32)
    found = []
    for number in range(3):
        batch = tiny_run.random_batch(number, config)
        batches = to_global(PackedBatch(*(leaf[None] for leaf in batch)), stacked)
        state, metrics = step(state, batches, to_global(rows[None], stacked))
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    evaluate = make_eval_step(task, mesh, shardings.params)
    index = jax.device_put(np.int32(0), rules.replicated(mesh))
    total, weight = evaluate(state.ema_params, to_global(batch, flat), to_global(rows, flat), index)
    kernel = state.params["blocks"]["mlp"]["mlp"]["fc1"]["kernel"]
    share = kernel.addressable_shards[0].data.size / kernel.size
    return {"losses": found, "held_out": float(total / weight), "share": share}


def main():
    devices = jax.devices()
    meshes = {
        "one": make_mesh(MeshConfig(), devices[:1]),
        "data": make_mesh(MeshConfig(data=8), devices),
        "fsdp": make_mesh(MeshConfig(data=2, fsdp=4), devices),
    }
    run = functools.partial(losses, tiny_run.CONFIG)
    print(json.dumps({"devices": len(devices), **{name: run(mesh) for name, mesh in meshes.items()}}))


if __name__ == "__main__":
    main()
