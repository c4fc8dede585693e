"""Every sampler on every process, with the exact denoiser of a mixture: none is worse than Euler's method.

All processes and numbers of steps are sampled at once: a ladder is a column of levels, and a short one stands still
before it starts, which must change nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import MIXTURE_COVARIANCE, mixture_denoiser, mixture_flow

from sora_jax.diffusion.gaussian import Levels, discrete_levels, flow_levels, from_x0_and_noise
from sora_jax.diffusion.samplers import (
    DDIM,
    SAMPLERS,
    Ancestral,
    Denoised,
    DPMSolver,
    Heun,
    UniPC,
    denoiser,
    sample_chunk,
    start,
)
from sora_jax.diffusion.schedules import (
    cosine_betas,
    flow_times,
    linear_betas,
    respaced_betas,
    respaced_steps,
    zero_terminal_snr,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

BETAS = {
    "linear": linear_betas(),
    "cosine": cosine_betas(),
    "zero terminal": zero_terminal_snr(linear_betas()),
    "cosine, zero terminal": zero_terminal_snr(cosine_betas()),
}
PROCESSES = (*BETAS, "flow")
EVALUATIONS = (10, 16, 20, 30, 50, 100)
DETERMINISTIC = {"euler": DDIM(), "heun": Heun(), "dpm++": DPMSolver(), "unipc": UniPC()}
# Those that `SAMPLERS` offers, and two that add as much noise in other ways.
STOCHASTIC = {
    "ancestral": Ancestral(),
    "ancestral, large": Ancestral("large"),
    "ddim, eta 1": DDIM(1.0),
    "dpm++sde": DPMSolver(sde=True),
}
assert {*SAMPLERS.values()} <= {*DETERMINISTIC.values(), *STOCHASTIC.values()}
NOISE = np.random.default_rng(0).standard_normal((200, 2))


def ladder(process, num_steps, spacing="linspace"):
    if process == "flow":
        return flow_levels(flow_times(num_steps))
    steps = respaced_steps(1000, num_steps, spacing)
    return discrete_levels(respaced_betas(BETAS[process], steps), steps)


def columns(ladders, length=101):
    """(length, len(ladders)) levels; each ladder stands still at its start until its time has come."""
    padded = [Levels(*(np.pad(a, (length - len(a), 0), mode="edge") for a in one)) for one in ladders]
    return Levels(*(np.stack(parts, axis=1) for parts in zip(*padded, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(denoise, sampler, x, levels):
    def noise(index):
        return jax.random.normal(jax.random.fold_in(jax.random.key(3), index), x.shape, x.dtype)

    return sample_chunk(denoise, start(sampler, x, levels), levels, sampler, noise).x


def sampled(sampler, spacing, x, counts=EVALUATIONS):
    """Samples of all processes at all numbers of evaluations, from the same noise: {(process, evaluations): (n, 2)}."""
    pairs = [(process, count) for process in PROCESSES for count in counts]
    ladders = [ladder(process, count // sampler.evaluations, spacing) for process, count in pairs]
    start_x = jnp.broadcast_to(jnp.asarray(x, jnp.float32), (len(pairs), *x.shape))
    return dict(
        zip(pairs, np.asarray(run(mixture_denoiser, sampler, start_x, columns(ladders)), np.float64), strict=True)
    )


@pytest.fixture(scope="module")
def errors():
    """Root mean square distances to the end of the ODE, {spacing: {sampler: {(process, evaluations): error}}}."""
    found = {}
    for spacing in ("linspace", "trailing"):
        ends = {}
        for process in PROCESSES:
            first = ladder(process, 10, spacing)
            ends[process] = mixture_flow(NOISE, float(first.alpha[0]), float(first.sigma[0]))
        found[spacing] = {
            name: {
                pair: np.sqrt(((x - ends[pair[0]]) ** 2).mean())
                for pair, x in sampled(sampler, spacing, NOISE).items()
            }
            for name, sampler in DETERMINISTIC.items()
        }  # fmt: skip
    return found


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_looking_back_is_no_worse_than_euler(errors, name, process, spacing):
    for count in EVALUATIONS:
        euler, got = (errors[spacing][n][process, count] for n in ("euler", name))
        assert got <= 1.01 * euler, (count, got, euler)
    assert errors[spacing][name][process, 100] < 0.6 * errors[spacing]["euler"][process, 100]


@pytest.mark.parametrize("process", PROCESSES)
def test_heun_is_no_worse_than_euler(errors, process):
    """With as many evaluations from 20 on; below, where its steps are twice as long as Euler's, with as many steps."""
    found = errors["linspace"]
    for count in EVALUATIONS:
        got = found["heun"][process, count]
        if count >= 20:
            assert got <= 1.01 * found["euler"][process, count], (count, got)
    assert found["heun"][process, 20] < found["euler"][process, 10]
    assert found["heun"][process, 100] < 0.4 * found["euler"][process, 100]


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("process", PROCESSES)
def test_heun_is_better_than_euler_with_as_many_steps(errors, process, spacing):
    found = errors[spacing]
    for evaluations, steps in ((20, 10), (100, 50)):
        assert found["heun"][process, evaluations] < found["euler"][process, steps]


@pytest.mark.parametrize(
    "name", ["heun", "unipc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("euler", "dpm++"))]
)
def test_what_is_predicted_makes_no_difference(name):
    """Networks that tell the same in other words, 20 steps of each process.

    Noise says nothing of data where alpha is 0, at the start of a flow or of a terminal SNR of zero, and little where
    it is 5e-5, at the start of a cosine schedule.
    """
    predictions = ("v", "velocity", "x0", "noise")
    asked = {p: ("linear", "cosine") if p == "noise" else PROCESSES for p in predictions}
    levels = columns([ladder(process, 20) for processes in asked.values() for process in processes], length=21)
    told = levels._replace(time=np.arange(levels.alpha.size).reshape(levels.alpha.shape))  # the network looks it up
    firsts = np.cumsum([0, *map(len, asked.values())])

    def denoise(x, level):
        said = []
        for prediction, first, end in zip(predictions, firsts, firsts[1:], strict=False):

            def network(x, time, prediction=prediction):
                alpha, sigma = (jnp.ravel(a)[time] for a in (levels.alpha, levels.sigma))
                exact = mixture_denoiser(x, Levels(time, alpha, sigma, jnp.ones_like(alpha)))
                return from_x0_and_noise(exact.x0, exact.noise, alpha, sigma, prediction)

            said.append(denoiser(network, prediction)(x[first:end], Levels(*(a[first:end] for a in level))))
        return Denoised(*(jnp.concatenate([one[n] for one in said]) for n in range(2)))

    x = jnp.broadcast_to(jnp.asarray(NOISE[:50], jnp.float32), (firsts[-1], 50, 2))
    got = np.asarray(run(denoise, DETERMINISTIC[name], x, told))
    direct = np.asarray(run(mixture_denoiser, DETERMINISTIC[name], x, levels))
    assert np.isfinite(got).all()
    assert np.sqrt(((got - direct) ** 2).mean(axis=(1, 2))).max() < 1e-4


@pytest.fixture(scope="module")
def law():
    """Returns how far the covariance of 10,000 samples is from the mixture's: {(process, evaluations): distance}."""
    x = np.random.default_rng(1).standard_normal((10_000, 2))

    @functools.cache
    def distances(sampler):
        samples = sampled(sampler, "linspace", x, counts=(10, 30, 100))
        return {pair: np.abs(np.cov(y.T) - MIXTURE_COVARIANCE).max() for pair, y in samples.items()}

    return distances


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCHASTIC)
def test_what_adds_noise_is_as_near_to_the_covariance_as_euler(name, law):
    """Each path differs, so the law is compared; 0.03 is five standard errors of it.

    With few steps what is of order 1 may be half as far off again as Euler's method.
    """
    euler = law(DDIM())
    for pair, distance in law(STOCHASTIC[name]).items():
        assert distance <= 1.5 * euler[pair] + 0.03, (pair, distance, euler[pair])
        assert pair[1] < 100 or distance < 0.05, (pair, distance)
