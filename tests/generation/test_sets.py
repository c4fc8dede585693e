"""Sets of images of families other than DiT's: what they are of, and that a sample is its own whatever the batch."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from class_models import _write, random_like
from helpers.models import read_model
from tiny_model import WordEncoder, make_config, random_params

from sora_jax.commands.evaluations import sampling
from sora_jax.config_json import to_json
from sora_jax.data.images import StillsConfig
from sora_jax.diffusion.process import GaussianConfig
from sora_jax.evaluation.manifest import SampleManifest, manifest_path, read_manifest
from sora_jax.families.diffusion import DiffusionConfig, diffusion_task
from sora_jax.families.load import export_model
from sora_jax.generation.sets import Chosen, SetOptions, open_set
from sora_jax.models import unet
from sora_jax.models.text import minilm
from sora_jax.models.unet import UNet, UNetConfig
from sora_jax.training.state import abstract_params

NETWORK = UNetConfig(width=4, multipliers=(1, 1), num_blocks=1, attention_levels=(), num_groups=2, dropout=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    _write(root / "ddpm", NETWORK, random_like(unet.abstract_params(UNet(NETWORK))))
    config = DiffusionConfig(
        data=StillsConfig(size=4),
        model=dataclasses.replace(NETWORK, in_channels=1, out_channels=2),
        process=GaussianConfig(num_levels=20, schedule="cosine", variance="learned", loss="hybrid", discrete=True),
    )
    export_model(root / "run", config, random_like(abstract_params(diffusion_task(config))))
    export_model(root / "sora", make_config(), random_params(make_config()))
    return root


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddpm", dict(size=(4, 6))), ("run", {}), ("sora", dict(prompts=("frog", "sun"), size=(8, 8)))],
)
def test_a_sample_is_its_own_in_any_batch(models, monkeypatch, name, options):
    monkeypatch.setattr(minilm, "load_text_encoder", lambda: WordEncoder())
    found = open_set(models / name, SetOptions(seed=3, **options))
    labels, chosen = np.zeros(4, int), found.chosen(3, None)
    images = found.draw(np.array([5, 0, 7, 2]), labels, chosen)
    assert images.shape == (4, *found.size, 3) and images.dtype == np.uint8 and images.std() > 1
    alone = found.draw(np.array([7, 5]), labels[:2], chosen)
    assert np.abs(alone.astype(int) - images[[2, 0]]).max() <= 1
    other = open_set(models / name, SetOptions(seed=4, **options)).draw(np.array([7, 5]), labels[:2], chosen)
    assert np.abs(other.astype(int) - alone).max() > 5


def test_ddpm_weights_are_sampled_by_the_chain_of_the_paper(models):
    """Algorithm 2 of arXiv:2006.11239 in float64, with sigma_t^2 = beta_t and x_0 clipped, on the same noise."""
    found = open_set(models / "ddpm", SetOptions(size=(4, 6)))
    assert found.chosen(None, None) == Chosen(1000, 1.0) and found.sampler == "ancestral"
    config, params = read_model(models / "ddpm")
    network = jax.jit(functools.partial(UNet(config).apply, {"params": params}, deterministic=True))
    steps = np.array([999, 666, 333, 0])
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[steps]
    (seed,) = sampling_seeds(0, [11])
    x = np.random.default_rng(seed).standard_normal((4, 6, 3), np.float32).astype(np.float64)[None]
    for n, step in enumerate(steps):
        before = bar[n + 1] if n < 3 else 1.0
        beta = 1 - bar[n] / before
        eps = np.asarray(network(x.astype(np.float32), np.full(1, step, np.float32)), np.float64)
        x0 = np.clip((x - np.sqrt(1 - bar[n]) * eps) / np.sqrt(bar[n]), -1, 1)
        mean = np.sqrt(before) * beta / (1 - bar[n]) * x0 + np.sqrt(1 - beta) * (1 - before) / (1 - bar[n]) * x
        key = jax.random.fold_in(jax.random.key(seed), n)
        x = mean + (np.sqrt(beta) * np.asarray(jax.random.normal(key, (4, 6, 3))) if n < 3 else 0)
    image = found.draw(np.array([11]), np.zeros(1, int), found.chosen(4, None))
    assert np.abs(image - (np.clip(x, -1, 1) + 1) * 127.5).max() <= 1


def sampling_seeds(seed, indices):
    first = np.random.SeedSequence(seed).generate_state(1, np.uint32)[0]
    return [np.uint32((int(first) + index) % 2**32) for index in indices]


def test_a_set_of_another_family_is_resumable_and_says_what_it_is(models, tmp_path):
    def options(**changes):
        chosen = dict(num_samples=6, batch_size=4, num_steps=3) | changes
        return sampling.SampleOptions(checkpoint=str(models / "run"), output=str(tmp_path / "set"), **chosen)

    sampling.sample(options(num_samples=4))
    sampling.sample(options())
    with np.load(tmp_path / "set" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (6, 4, 4, 3)
    manifest = read_manifest(SampleManifest, manifest_path(tmp_path / "set" / "samples.npz"))
    assert manifest.options == "num_levels: 20" and manifest.guidance_scale == 1 and "discrete" in manifest.model
    with pytest.raises(ValueError, match="guidance_scale must be 1 for a model without a condition, got 2"):
        sampling.sample(options(guidance_scale=2.0))


def test_what_makes_no_images_is_told(models, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run, checkpoint or exported model at"):
        open_set(tmp_path / "absent", SetOptions())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(to_json(NETWORK).replace("multipliers", "something"))
    with pytest.raises(ValueError, match="unknown key 'something'"):
        open_set(tmp_path / "other", SetOptions())
    with pytest.raises(ValueError, match="size must be given for DDPM weights"):
        open_set(models / "ddpm", SetOptions())
    with pytest.raises(ValueError, match=r"positive multiples of 2 pixels, got \(4, 5\)"):
        open_set(models / "ddpm", SetOptions(size=(4, 5)))
    with pytest.raises(ValueError, match="vae must be left out for a model of pixels, got 'x'"):
        open_set(models / "run", SetOptions(vae="x"))
