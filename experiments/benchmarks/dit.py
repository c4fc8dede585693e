"""DiT beside diffusers' PyTorch network: forward, training step and guided sample, on one machine in one run.

Both have the same weights, inputs and threads, and are checked to compute the same before anything is timed:

    forward  the network with learned variance on a batch of latents, each at a step and of a class of its own
    train    one update of `sora_jax.training.step.make_train_step` on packed rows of an image each: draws of steps,
             noise and dropped classes, squared error of the noise (of a network without learned variance), gradient,
             clipping, AdamW and the running average of the parameters; checked by its loss and gradient
    sample   ancestral steps with learned variance and guidance of the first three channels, both with the same noise
             for the check, each with noise of its own when timed

The two take turns, and each turn starts with the other one. PyTorch takes diffusers' default attention (fused), fused
AdamW and `foreach` for the average. In bfloat16 its network is converted as a whole for forward and sample; in training
parameters stay float32 on both sides.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.training_step import device_name
from sora_jax.array_types import NumpyArray, PackedBatch, PyTree
from sora_jax.commands.train import config_names, load_config
from sora_jax.config import MeshConfig, OptimizerConfig, PatchConfig
from sora_jax.data.latents import LatentDataConfig, image_rows
from sora_jax.families.diffusion import GaussianConfig
from sora_jax.families.dit import (
    ClassConditionalConfig,
    ClassConditionalTask,
    ClassSampleConfig,
)
from sora_jax.families.registry import make_task
from sora_jax.generation.class_conditional import ClassConditionalSampler, sample_noise
from sora_jax.models.dit import DIT_SIZES, DiT, DiTConfig
from sora_jax.parallel.attention import attention_for
from sora_jax.parallel.mesh import make_mesh
from sora_jax.patches.patchify import patchify
from sora_jax.provenance import flat_names
from sora_jax.training.flops import count_flops
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.state import state_from_params, state_shardings
from sora_jax.training.step import make_train_step

if TYPE_CHECKING:
    import torch

GUIDANCE_SCALE, GUIDED_CHANNELS = 1.5, 3
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-4, warmup_steps=0, b2=0.999, weight_decay=0.0, final_share=1.0, ema_decay=0.9999
)
# Largest root mean squared difference, as a share of the root mean square.
TOLERANCES = {
    "float32": {"forward": 1e-4, "loss": 1e-4, "gradient": 1e-3, "sample": 1e-3},
    "bfloat16": {"forward": 3e-2, "loss": 3e-2, "gradient": 1e-1, "sample": 1e-1},
}
PAUSE = 0.05  # seconds; threads of the one that ran before wait for work in a loop, for a while


@dataclasses.dataclass(frozen=True)
class DiTOptions:
    """Measures DiT beside diffusers' network in PyTorch; needs the extra `.[parity]`.

    Attributes:
        config: a size, such as dit_s_2, a DiT's name in sora_jax/configs/ or the path of a Python file.
        batch_size: images of a batch; a guided sample computes twice as many.
        num_steps: of the guided sample.
        repeats: that are timed, after one that compiles.
        dtype: of the computation.
        threads: of each of the two (default: all that this process may use).
        compile: let torch.compile compile PyTorch's network (default: on a GPU).
        seed: of weights and inputs.
        json: also write the table's figures to this file.
    """

    config: str = "dit_s_2"
    batch_size: int = 8
    num_steps: int = 10
    repeats: int = 5
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    compile: bool | None = None
    seed: int = 0
    json: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_steps > 1000:
            raise ValueError(f"num_steps must be at most the process's 1000, got {self.num_steps}.")
        cores = len(os.sched_getaffinity(0))
        if self.threads is not None and not 1 <= self.threads <= cores:
            raise ValueError(f"threads must be between 1 and the {cores} cores of this process, got {self.threads}.")


class Contest(NamedTuple):
    """One thing that both compute.

    Attributes:
        name: of it.
        images: that one run is about.
        flops: of the matrix products of one run, None where they were not counted.
        ours: runs ours to its end.
        theirs: runs PyTorch's to its end.
    """

    name: str
    images: int
    flops: int | None
    ours: Callable[[], object]
    theirs: Callable[[], object]


def run(options: DiTOptions) -> dict[str, Any]:
    """Runs the suite, prints its table and returns its figures.

    Raises:
        ValueError: a config that diffusers has no network for, PyTorch is missing or has no GPU where JAX has one, or
            results that differ.
    """
    model = model_config(options)
    try:
        import torch

        from benchmarks import torch_dit  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}: install the extra, pip install -e '.[parity]'.") from error
    cores = sorted(os.sched_getaffinity(0))
    threads = options.threads or len(cores)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two share a GPU
    # JAX takes as many threads as cores when it starts, which it does at the first look at its devices.
    os.sched_setaffinity(0, cores[:threads])
    torch.set_num_threads(threads)
    try:
        gpu = jax.default_backend() == "gpu"
        if gpu and not torch.cuda.is_available():
            raise ValueError("JAX sees a GPU and PyTorch none: install a PyTorch with CUDA, or set JAX_PLATFORMS=cpu.")
        compiled = gpu if options.compile is None else options.compile
        # JAX rounds the inputs of float32 products on a GPU, PyTorch does not.
        precision = "highest" if gpu and options.dtype == "float32" else None
        with jax.default_matmul_precision(precision) if precision else jax.default_matmul_precision("default"):
            contests = prepare(model, options, torch.device("cuda" if gpu else "cpu"), compiled)
            seconds = time_in_turns(contests, options.repeats)
    finally:
        os.sched_setaffinity(0, cores)
    return report(contests, seconds, options, threads, compiled)


def model_config(options: DiTOptions) -> DiTConfig:
    """Returns the network that the options name, with learned variance, nothing recomputed.

    Raises:
        ValueError: there is no such config.
    """
    name = options.config
    if name in config_names() or name.endswith(".py"):
        config = load_config(name, ClassConditionalConfig).model
    elif name in DIT_SIZES:
        config = DIT_SIZES[name]
    else:
        raise ValueError(f"no DiT {name!r}: give one of {', '.join(DIT_SIZES)}, a config or the path of a Python file.")
    return dataclasses.replace(config, dtype=options.dtype, remat="none", learned_variance=True)


def prepare(model: DiTConfig, options: DiTOptions, device: torch.device, compiled: bool) -> list[Contest]:
    """Makes both sides of everything, compiles them and checks that they agree."""
    makers = (forward_and_sample, training)
    contests: list[Contest] = []
    with tqdm(makers, desc="compiling and checking", unit="network") as bar:
        for make in bar:
            contests += make(model, options, device, compiled)
    order = ("forward", "train", "sample")
    return sorted(contests, key=lambda contest: order.index(contest.name))


class Inputs(NamedTuple):
    """What both sides are given, in NumPy.

    Attributes:
        x: (B, H, W, C) float32, standard normal.
        noise: of the shape of `x`.
        steps: (B,) int32, of the process.
        labels: (B,) int32, classes.
    """

    x: NumpyArray
    noise: NumpyArray
    steps: NumpyArray
    labels: NumpyArray


def draw_inputs(model: DiTConfig, options: DiTOptions) -> Inputs:
    """Draws the inputs from the seed."""
    rng = np.random.default_rng(options.seed)
    x, noise = rng.standard_normal((2, options.batch_size, *model.image_size, model.in_channels), np.float32)
    steps, labels = (rng.integers(0, n, options.batch_size, np.int32) for n in (1000, model.num_classes))
    return Inputs(x, noise, steps, labels)


def forward_and_sample(
    model: DiTConfig, options: DiTOptions, device: torch.device, compiled: bool
) -> tuple[Contest, Contest]:
    """Makes the forward pass and the guided sample."""
    import torch

    from benchmarks import torch_dit

    theirs, model, params = torch_dit.random_model(model, options.seed)
    dtype = getattr(torch, options.dtype)
    theirs = theirs.to(device, dtype)
    network = torch.compile(theirs) if compiled else theirs
    sampler = ClassConditionalSampler(model, params, devices=jax.local_devices()[:1])
    params = sampler.params
    inputs = draw_inputs(model, options)
    apply = functools.partial(DiT(model, attention_for("auto", packed=False)).apply, method="on_images")
    forward = jax.jit(apply)
    arguments = jax.device_put((inputs.x, inputs.steps.astype(np.float32), inputs.labels), jax.local_devices()[0])
    their_x = torch_dit.to_torch(inputs.x, device, dtype)
    their_steps, their_labels = (torch_dit.to_torch(a, device).long() for a in (inputs.steps, inputs.labels))

    def our_forward() -> jax.Array:
        return jax.block_until_ready(forward({"params": params}, *arguments))

    @torch.inference_mode()
    def their_forward() -> torch.Tensor:
        return synchronized(network(their_x, their_steps, their_labels).sample)

    check_agreement("forward", our_forward(), torch_dit.to_numpy(their_forward()), options)

    def our_sample() -> NumpyArray:
        return sampler(
            inputs.labels,
            options.seed,
            num_steps=options.num_steps,
            guidance_scale=GUIDANCE_SCALE,
            guided_channels=GUIDED_CHANNELS,
        )

    @torch.inference_mode()
    def their_sample(noise: torch_dit.Noise) -> NumpyArray:
        guided = min(GUIDED_CHANNELS, model.in_channels)
        null, steps = model.num_classes, options.num_steps
        chain = torch_dit.guided_chain(network, noise, their_labels, null, GUIDANCE_SCALE, guided, steps, dtype)
        return torch_dit.to_numpy(chain)

    key, indices = jax.random.key(options.seed), jnp.arange(options.batch_size)
    draw = jax.jit(lambda number: sample_noise(key, indices, number, inputs.x.shape[1:]))
    same = their_sample(lambda number: torch_dit.to_torch(np.asarray(draw(jnp.int32(number))), device))
    check_agreement("sample", our_sample(), same, options)

    def own_noise(number: int) -> torch.Tensor:
        del number  # the next of PyTorch's generator
        return torch.randn(their_x.shape, device=device)

    batch = options.batch_size
    # Blockwise attention runs over blocks that tracing does not count.
    dense = functools.partial(DiT(model).apply, method="on_images")
    flops = count_flops(dense, {"params": params}, *arguments)
    sample_flops = 2 * options.num_steps * flops
    return (
        Contest("forward", batch, flops, our_forward, their_forward),
        Contest("sample", batch, sample_flops, our_sample, lambda: their_sample(own_noise)),
    )


def training(model: DiTConfig, options: DiTOptions, device: torch.device, compiled: bool) -> tuple[Contest]:
    """Makes the training step."""
    import torch

    from benchmarks import torch_dit

    theirs, model, params = torch_dit.random_model(dataclasses.replace(model, learned_variance=False), options.seed)
    theirs = theirs.to(device)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.local_devices()[:1])
    task = make_task(training_config(model, options), mesh)
    dtype = getattr(torch, options.dtype)
    network = torch.compile(theirs) if compiled else theirs
    trainer = torch_dit.TorchTraining(theirs, network, OPTIMIZER, dtype, task.config.class_dropout)
    inputs = draw_inputs(model, options)
    patch = task.config.patch
    batch = image_rows(inputs.x, inputs.labels, patch)
    noise = np.stack([patchify(noise[None], patch.size) for noise in inputs.noise])

    their_x, their_noise = (torch_dit.to_torch(a, device) for a in (inputs.x, inputs.noise))
    their_steps, their_labels = (torch_dit.to_torch(a, device).long() for a in (inputs.steps, inputs.labels))
    loss, gradient = our_gradient(task, params, batch, inputs.steps, noise)
    their_loss, named = trainer.gradient(their_x, their_labels, their_steps, their_noise)
    check_agreement("loss", loss, np.float32(their_loss), options)
    expected = flat_names(torch_dit.as_params(named, model))
    ours = flat_names(gradient)
    flat = (np.concatenate([np.ravel(tree[name]) for name in expected]) for tree in (ours, expected))
    check_agreement("gradient", *flat, options)

    tx = make_optimizer(OPTIMIZER, task.config.num_steps)
    shardings = state_shardings(task, tx, mesh)
    state = state_from_params(params, tx, shardings)
    step = make_train_step(task, tx, mesh, shardings)
    batches = jax.tree.map(lambda leaf: jnp.asarray(leaf[None]), batch)
    rows = jnp.arange(options.batch_size, dtype=jnp.int32)[None]

    def our_step() -> None:
        nonlocal state
        state, _ = step(state, batches, rows)
        jax.block_until_ready(state)

    def their_step() -> None:
        synchronized(trainer.step(their_x, their_labels))

    return (Contest("train", options.batch_size, None, our_step, their_step),)


def training_config(model: DiTConfig, options: DiTOptions) -> ClassConditionalConfig:
    """Returns the experiment whose step is timed."""
    size = model.patch_size
    return ClassConditionalConfig(
        data=LatentDataConfig(batch_size=options.batch_size, row_length=model.grid[0] * model.grid[1]),
        patch=PatchConfig(size=(1, size, size), channels=model.in_channels),
        model=model,
        process=GaussianConfig(loss="simple"),
        optimizer=OPTIMIZER,
        sample=ClassSampleConfig(labels=(0,), size=model.image_size),
    )


def our_gradient(
    task: ClassConditionalTask, params: PyTree, batch: PackedBatch, steps: NumpyArray, noise: NumpyArray
) -> tuple[NumpyArray, PyTree]:
    """Returns the loss at given steps and noise, and its gradient."""

    def mean(params: PyTree) -> jax.Array:
        loss = task.loss_at(params, batch, jnp.asarray(steps)[:, None], jnp.asarray(noise))
        return loss.total / loss.weight

    loss, gradient = jax.jit(jax.value_and_grad(mean))(params)
    return np.asarray(loss), jax.tree.map(np.asarray, gradient)


def synchronized(result: Any) -> Any:
    """Returns a result of PyTorch once it is computed."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def check_agreement(name: str, ours: NumpyArray, theirs: NumpyArray, options: DiTOptions) -> None:
    """Raises ValueError where two results differ by more than `TOLERANCES` allow, or are not finite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    error = np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean())
    allowed = TOLERANCES[options.dtype][name]
    if not error <= allowed:
        raise ValueError(f"{name}: ours differs from PyTorch's by {error:.1e} of it, more than {allowed:.0e}.")


def time_in_turns(contests: list[Contest], repeats: int) -> dict[tuple[str, str], list[float]]:
    """Returns the seconds of each run by what is run and whose (`jax`, `torch`); the first runs are not counted."""
    seconds: dict[tuple[str, str], list[float]] = {}
    with tqdm(total=2 * len(contests) * (repeats + 1), desc="timing", unit="run") as bar:
        for contest in contests:
            turns = [("jax", contest.ours), ("torch", contest.theirs)]
            for number in range(repeats + 1):
                for who, function in turns:
                    time.sleep(PAUSE)
                    start = time.perf_counter()
                    function()
                    if number:
                        seconds.setdefault((contest.name, who), []).append(time.perf_counter() - start)
                    bar.update()
                turns.reverse()
    return seconds


def report(
    contests: list[Contest],
    seconds: dict[tuple[str, str], list[float]],
    options: DiTOptions,
    threads: int,
    compiled: bool,
) -> dict[str, Any]:
    """Prints the table; returns what goes into the JSON file."""
    title = (
        f"{options.config}, {options.dtype}, batches of {options.batch_size}, {options.num_steps} steps a sample, on "
        f"{device_name()}, {threads} threads, PyTorch {'compiled' if compiled else 'eager'}"
    )
    names = ("what", "jax s (least, most)", "torch s (least, most)", "jax / torch", "images/s", "GFLOP/s")
    table = Table(title=title)
    for name in names:
        table.add_column(name, justify="left" if name == "what" else "right")
    rows = []
    for contest in contests:
        times = {who: seconds[contest.name, who] for who in ("jax", "torch")}
        medians = {who: statistics.median(values) for who, values in times.items()}
        row: dict[str, Any] = {"what": contest.name, "ratio": medians["jax"] / medians["torch"]}
        for who, values in times.items():
            row[f"{who}_seconds"] = medians[who]
            row[f"{who}_spread"] = [min(values), max(values)]
            row[f"{who}_images_per_second"] = contest.images / medians[who]
            if contest.flops is not None:
                row[f"{who}_flops_per_second"] = contest.flops / medians[who]
        rows.append(row)
        spreads = [f"{medians[who]:.4f} ({min(times[who]):.4f}, {max(times[who]):.4f})" for who in times]
        images = " | ".join(f"{row[f'{who}_images_per_second']:.2f}" for who in times)
        flops = " | ".join(f"{row.get(f'{who}_flops_per_second', 0) / 1e9:.1f}" for who in times)
        table.add_row(contest.name, *spreads, f"{row['ratio']:.3f}", images, flops if contest.flops else "")
    Console().print(table)
    return {
        "rows": rows,
        "config": options.config,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "num_steps": options.num_steps,
        "device": device_name(),
        "threads": threads,
        "torch_compiled": compiled,
    }
