"""Samplers step by step against the schedulers of diffusers, with the same network and the same noise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion.gaussian import Levels, discrete_levels
from sora_jax.diffusion.samplers import DDIM, Ancestral, DPMSolver, Heun, UniPC, denoiser, start
from sora_jax.diffusion.schedules import linear_betas, respaced_betas

pytestmark = pytest.mark.parity

SHAPE = (2, 8, 8, 3)
NUM_STEPS = 12
NOISE = np.random.default_rng(0).standard_normal((NUM_STEPS + 1, *SHAPE)).astype(np.float32)
BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


@pytest.fixture(autouse=True, scope="module")
def peers():
    """Imports the peers for this module's tests alone: the others do not need them."""
    global diffusers, torch
    torch = pytest.importorskip("torch", reason="needs .[parity]")
    diffusers = pytest.importorskip("diffusers", reason="needs .[parity]")


def network(x, time, xp):
    """A smooth function of x and the step, the same in both libraries."""
    return 0.6 * xp.tanh(1.3 * x + xp.sin(xp.zeros_like(x) + time * 0.01)) + 0.1 * x


def ours(sampler, levels, prediction="noise", learned=False):
    """Returns the states after each step."""

    def told(x, time):
        output = network(x, time, jnp)
        return jnp.concatenate([output, jnp.tanh(x)], axis=-1) if learned else output

    denoise = denoiser(told, prediction, learned_range=learned)
    state, states = start(sampler, jnp.asarray(NOISE[0]), levels), []
    x, memory = state.x, state.memory
    step = jax.jit(lambda x, memory, now, to, i, noise: sampler.step(denoise, x, memory, now, to, i, noise))
    for i in range(len(levels.sigma) - 1):
        now, to = (Levels(*(jnp.asarray(a[j]) for a in levels)) for j in (i, i + 1))
        x, memory = step(x, memory, now, to, jnp.int32(i), jnp.asarray(NOISE[i + 1]))
        states.append(np.asarray(x))
    return states


def levels_of(timesteps):
    """Our levels at a scheduler's timesteps, which fall."""
    steps = np.asarray(timesteps)[::-1].astype(int)
    return discrete_levels(respaced_betas(linear_betas(), steps), steps)


def theirs(scheduler, monkeypatch, learned=False, **options):
    """Returns the scheduler's states after each step."""
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    noise = iter(NOISE[1:])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(to_nchw(next(noise))))
    x, states = torch.from_numpy(to_nchw(NOISE[0])), []
    for t in scheduler.timesteps:
        output = network(x, float(t), torch)
        if learned:
            output = torch.cat([output, torch.tanh(x)], dim=1)
        x = scheduler.step(output, t, x, **options).prev_sample
        states.append(x.numpy().transpose(0, 2, 3, 1))
    return states


def to_nchw(x):
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def compare(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert np.sqrt(((a - b) ** 2).mean() / (b**2).mean()) < 1e-4
    # The network moves the state: a step left out would be seen.
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(expected))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ancestral_is_ddpm(variance, monkeypatch):
    scheduler = diffusers.DDPMScheduler(**BETAS, variance_type=variance, clip_sample=False)
    scheduler.set_timesteps(NUM_STEPS)
    name = variance.removeprefix("fixed_").removesuffix("_range")
    got = ours(Ancestral(name), levels_of(scheduler.timesteps), learned=name == "learned")
    compare(got, theirs(scheduler, monkeypatch, learned=name == "learned"))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(eta, monkeypatch):
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(NUM_STEPS)
    compare(ours(DDIM(eta), levels_of(scheduler.timesteps)), theirs(scheduler, monkeypatch, eta=eta))


@pytest.mark.parametrize("sde", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_dpm_solver(sde, prediction, monkeypatch):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++", solver_order=2, prediction_type=prediction
    )
    scheduler.set_timesteps(NUM_STEPS)
    ours_name = {"epsilon": "noise", "v_prediction": "v"}[prediction]
    got = ours(DPMSolver(sde), levels_of(scheduler.timesteps), ours_name)
    compare(got, theirs(scheduler, monkeypatch))


def test_unipc(monkeypatch):
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS, solver_order=2, solver_type="bh2", final_sigmas_type="zero")
    scheduler.set_timesteps(NUM_STEPS)
    compare(ours(UniPC(), levels_of(scheduler.timesteps)), theirs(scheduler, monkeypatch))


def test_heun():
    """EDM's form: their state is x / alpha, and a step of theirs is half of ours."""
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS, timestep_spacing="leading")
    scheduler.set_timesteps(NUM_STEPS)
    steps = scheduler.timesteps[::2].numpy()
    levels = levels_of(steps)
    levels = levels._replace(unit=levels.alpha)
    x, states = torch.from_numpy(to_nchw(NOISE[0] / levels.alpha[0])), []
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), float(t), torch)
        x = scheduler.step(output, t, x).prev_sample
        states.append(x.numpy().transpose(0, 2, 3, 1))
    whole = [*states[1:-1:2], states[-1]]  # after the second half; the last step has one half
    compare(ours(Heun(), levels), [a * b for a, b in zip(whole, levels.alpha[1:], strict=True)])


@pytest.mark.parametrize("heun", [False, True])
def test_flow(heun, monkeypatch):
    kind = diffusers.FlowMatchHeunDiscreteScheduler if heun else diffusers.FlowMatchEulerDiscreteScheduler
    scheduler = kind(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(NUM_STEPS)
    timesteps = scheduler.timesteps.numpy()
    times = np.append(timesteps[::2] if heun else timesteps, 0).astype(np.float32) / 1000
    levels = Levels(times * 1000, 1 - times, times, np.ones_like(times))
    expected = theirs(scheduler, monkeypatch)
    expected = [*expected[1:-1:2], expected[-1]] if heun else expected
    compare(ours(Heun() if heun else DDIM(), levels, "velocity"), expected)
