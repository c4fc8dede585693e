"""Compiles the training step for TPUs that are not there, and reports whether it fits.

TPU's compiler runs on any machine that has `libtpu` and can be given the name of a topology. What it makes of the
real training step, kernels and collectives included, says how much memory a chip needs before one is rented.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from sora_jax.config import ExperimentConfig
from sora_jax.families.registry import make_task
from sora_jax.parallel.mesh import check_batch_size, make_mesh
from sora_jax.training.chips import hbm_bytes
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.state import abstract_batches, abstract_state, state_shardings
from sora_jax.training.step import make_train_step

EXAMPLES = ("v4:2x2x1", "v5e:2x4", "v5e:4x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# libtpu would ask a cloud machine's metadata server for some of these, and wait for an answer that never comes. It
# also lets one process at a time use the chips, of which compiling needs none.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class MissingCompilerError(ImportError):
    """The TPU compiler is not installed."""


class OutOfMemoryError(RuntimeError):
    """The step needs more memory than a chip has."""


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What the compiler made of one training step; all bytes are those of one device.

    Attributes:
        topology: name of the topology.
        device_kind: as `jax.Device.device_kind` names the chip.
        num_devices: of the topology; two a chip of v4 and tpu7x.
        mesh: size of each mesh axis.
        argument_bytes: state, batch and row numbers.
        output_bytes: the next state and the metrics.
        aliased_bytes: outputs that take the place of arguments.
        temporary_bytes: activations and buffers of collectives, at their peak.
        code_bytes: of the program.
        total_bytes: arguments, outputs, temporaries and code, the aliased counted once.
        hbm_bytes: what a device has.
        collectives: how often each kind stands in the program (in the body of a loop: once).
        num_pallas_calls: Pallas kernels in the program (in the body of a loop: once).
        compile_seconds: tracing included.
    """

    topology: str
    device_kind: str
    num_devices: int
    mesh: dict[str, int]
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    code_bytes: int
    total_bytes: int
    hbm_bytes: int
    collectives: dict[str, int]
    num_pallas_calls: int
    compile_seconds: float


def plan_step(config: ExperimentConfig, topology: str) -> StepPlan:
    """Compiles an experiment's training step for a topology and reports memory and collectives.

    Args:
        config: of the experiment; attention `auto` means what it means on a TPU.
        topology: chip and layout, like `v5e:2x4`.

    Raises:
        MissingCompilerError: `libtpu` is not installed.
        OutOfMemoryError: the compiler found no program that fits; says how much was wanted.
        ValueError: an unknown topology, or a mesh or batch that does not fit its devices.
    """
    start = time.monotonic()
    devices = topology_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    check_batch_size(config.data.batch_size, dict(mesh.shape))
    try:
        compiled = lower_step(config, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", str(error))
        reason = f"it needs {sizes[1]} of {sizes[2]}" if sizes else str(error).splitlines()[0]
        raise OutOfMemoryError(
            f"a step does not fit {devices[0].device_kind}: {reason}. A smaller data.batch_size (or "
            "data.row_length), a larger mesh.fsdp or model.remat full needs less."
        ) from error
    memory, program = compiled.memory_analysis(), compiled.as_text()
    if memory is None or program is None:
        raise RuntimeError(f"the compiler for {topology} does not say what it made.")
    parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    code, aliased = memory.generated_code_size_in_bytes, memory.alias_size_in_bytes
    return StepPlan(
        topology=topology,
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        mesh=dict(mesh.shape),
        argument_bytes=parts[0],
        output_bytes=parts[1],
        aliased_bytes=aliased,
        temporary_bytes=parts[2],
        code_bytes=code,
        total_bytes=sum(parts) + code - aliased,
        hbm_bytes=_known_hbm_bytes(topology, devices),
        collectives=count_collectives(program),
        num_pallas_calls=program.count('custom_call_target="tpu_custom_call"'),
        compile_seconds=time.monotonic() - start,
    )


def topology_devices(name: str) -> list[jax.Device]:
    """Returns the devices of a topology that need not exist; programs can be compiled for them, not run.

    Args:
        name: chip and layout, like `v5e:2x4`.

    Raises:
        MissingCompilerError: `libtpu` is not installed.
        ValueError: an unknown topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise MissingCompilerError("compiling for a TPU needs libtpu: pip install -e '.[tpu]'")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        devices: list[jax.Device] = list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(f"unknown topology {name!r} ({reason}); give one like {', '.join(EXAMPLES)}.") from error
    _known_hbm_bytes(name, devices)
    return devices


def _known_hbm_bytes(name: str, devices: list[jax.Device]) -> int:
    """Returns the memory of a topology's device; ValueError where it is not known."""
    found = hbm_bytes(devices)
    if found is None:
        kind, examples = devices[0].device_kind, ", ".join(EXAMPLES)
        raise ValueError(f"topology {name!r} has devices of kind {kind}, whose memory is not known; try {examples}.")
    return found


def lower_step(config: ExperimentConfig, mesh: Mesh) -> jax.stages.Lowered:
    """Returns the training step for TPUs, traced for a mesh with shapes alone, ready to be compiled."""
    task = make_task(config, mesh, platform="tpu")
    tx = make_optimizer(config.optimizer, config.num_steps)
    shardings = state_shardings(task, tx, mesh)
    return make_train_step(task, tx, mesh, shardings).lower(
        abstract_state(task, tx, shardings), *abstract_batches(task)
    )


def count_collectives(program: str) -> dict[str, int]:
    """Returns how many collectives of each kind there are in a compiled program's text.

    One that is cut into halves, or spread over several fusions to run beside computations, is one: it has one channel.
    """
    channels: dict[str, set[str]] = {kind: set() for kind in COLLECTIVES}
    for instruction in program.splitlines():
        if found := re.search(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", instruction):
            channel = re.search(r"channel_id=\d+", instruction)
            channels[found[1]].add(channel[0] if channel else instruction)
    return {kind: len(names) for kind, names in channels.items()}
