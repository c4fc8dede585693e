"""Prints, as JSON, the losses of a few updates on each of several meshes, of the kinds of runs that are named.

Run with eight fake devices.
"""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "training"))
import tiny_recognition
import tiny_run

from sora_jax.config import MeshConfig
from sora_jax.data.images import StillsConfig
from sora_jax.families.diffusion import DiffusionConfig, GaussianConfig
from sora_jax.families.registry import make_task
from sora_jax.models.multiscale import MultiscaleConfig
from sora_jax.parallel import rules
from sora_jax.parallel.mesh import make_mesh
from sora_jax.parallel.multihost import to_global
from sora_jax.training import state as states
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.step import make_eval_step, make_train_step

DIGITS = DiffusionConfig(
    data=StillsConfig(batch_size=8, size=4),
    model=MultiscaleConfig(1, 2, width=8, num_layers=1, num_scales=1, num_bumps=4, num_steps=10),
    process=GaussianConfig(num_levels=10, schedule="cosine", variance="learned", loss="hybrid", discrete=True),
    optimizer=tiny_run.CONFIG.optimizer,
    num_steps=6,
)


def random_images(number, config):
    """Returns a batch of examples that depends on its number alone."""
    shape = (config.data.batch_size, *config.data.shape)
    return np.random.default_rng(number).uniform(-1, 1, shape).astype(np.float32)


def losses(config, random_batch, kernel_of, mesh):
    """Returns the loss of each update, the held-out loss after them, and the largest shard of a parameter."""
    task, tx = make_task(config), make_optimizer(config.optimizer, config.num_steps)
    shardings = states.state_shardings(task, tx, mesh)
    state = states.init_state(task, tx, shardings)
    step = make_train_step(task, tx, mesh, shardings)
    stacked, flat = rules.batch_sharding(mesh, stacked=True), rules.batch_sharding(mesh)
    rows = np.arange(config.data.batch_size, dtype=np.int32)
    found = []
    for number in range(3):
        batch = random_batch(number, config)
        batches = to_global(jax.tree.map(lambda leaf: leaf[None], batch), stacked)
        state, metrics = step(state, batches, to_global(rows[None], stacked))
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    evaluate = make_eval_step(task, mesh, shardings.params)
    index = jax.device_put(np.int32(0), rules.replicated(mesh))
    loss = evaluate(state.ema_params, to_global(batch, flat), to_global(rows, flat), index)
    kernel = kernel_of(state.params)
    share = kernel.addressable_shards[0].data.size / kernel.size
    return {"losses": found, "held_out": float(loss.total / loss.weight), "share": share}


def main():
    devices = jax.devices()
    meshes = {
        "one": make_mesh(MeshConfig(), devices[:1]),
        "eight": make_mesh(MeshConfig(data=2, fsdp=4), devices),
    }
    runs = {
        "clips": functools.partial(
            losses, tiny_run.CONFIG, tiny_run.random_batch, lambda p: p["blocks"]["mlp"]["mlp"]["fc1"]["kernel"]
        ),
        "images": functools.partial(losses, DIGITS, random_images, lambda p: p["network"]["dense_0"]["kernel"]),
    }
    for kind, config, network in (
        ("packed images", tiny_recognition.NAVIT, lambda p: p),
        ("pairs", tiny_recognition.PAIRS, lambda p: p["image"]),
    ):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8))
        kernel_of = functools.partial(lambda network, p: network(p)["blocks"]["mlp"]["mlp"]["fc1"]["kernel"], network)
        runs[kind] = functools.partial(losses, config, tiny_recognition.random_batch, kernel_of)
    found = {
        kind: {name: run(mesh) for name, mesh in meshes.items()} for kind, run in runs.items() if kind in sys.argv[1:]
    }
    print(json.dumps({"devices": len(devices), **found}))


if __name__ == "__main__":
    main()
