"""Class-conditional samples against the official algorithm in float64, and against closed forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from class_models import LATENTS as CONFIG
from class_models import VAE, random_like, write_autoencoder, write_latent_model, write_pixel_model
from flax import linen as nn
from helpers.models import read_model

from sora_jax.convert.dit import convert_dit
from sora_jax.diffusion.schedules import alpha_bar, linear_betas
from sora_jax.generation.dit_pipeline import DiTPipeline
from sora_jax.generation.generator import sample_seeds, token_noise
from sora_jax.models.autoencoder import image_vae
from sora_jax.models.autoencoder.codec import IdentityCodec
from sora_jax.models.autoencoder.image_vae import ImageVAE
from sora_jax.models.dit import DiT, abstract_params, init_params
from sora_jax.patches.patchify import unpatchify


def random_params(config=CONFIG):
    return random_like(abstract_params(DiT(config)))


def official_chain(network, noises, labels, null, scale, channels, num_steps):
    """The official sampler (facebookresearch/DiT: respacing, learned range, guidance), in float64.

    Args:
        network: (x, step, labels) to (N, H, W, 8).
        noises: (num_steps + 1, N, H, W, 4), what it starts from and then that of each step.
        labels: (N,).
        null: the null class.
        scale: of the guidance.
        channels: that are guided.
        num_steps: that are visited of 1000.
    """
    kept = [round(i * 999 / (num_steps - 1)) for i in range(num_steps)]
    alphas_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[kept]
    x, rms = noises[0].astype(np.float64), []
    for n in reversed(range(num_steps)):
        bar, before = alphas_bar[n], alphas_bar[n - 1] if n else 1.0
        beta = 1 - bar / before
        text, empty = (np.asarray(network(x, kept[n], y), np.float64) for y in (labels, np.full_like(labels, null)))
        noise, place = text[..., :4].copy(), text[..., 4:]
        noise[..., :channels] = (empty + scale * (text - empty))[..., :channels]
        x0 = x / np.sqrt(bar) - np.sqrt(1 / bar - 1) * noise
        mean = beta * np.sqrt(before) / (1 - bar) * x0 + (1 - before) * np.sqrt(1 - beta) / (1 - bar) * x
        if n:
            low, high = np.log(beta * (1 - before) / (1 - bar)), np.log(beta)
            share = (place + 1) / 2
            mean = mean + np.exp((share * high + (1 - share) * low) / 2) * noises[num_steps - n]
        x = mean
        rms.append(np.sqrt(np.square(x).mean()))
    return x, np.array(rms)


def noises(seed, indices, num_steps, shape):
    """What a chain starts from, and the noise of each step: drawn in patches of 2 x 2 cells."""
    height, width, channels = shape
    num_patches = height * width // 4
    seeds = sample_seeds(seed, np.array(indices))
    whole = functools.partial(
        unpatchify, num_frames=1, height=height, width=width, patch_size=(1, 2, 2), channels=channels
    )
    drawn = [[np.random.default_rng(s).standard_normal((num_patches, 4 * channels), np.float32) for s in seeds]]
    draw = jax.jit(token_noise, static_argnums=3)
    ids = jnp.ones((len(seeds), num_patches), jnp.int32)
    drawn += [draw(jnp.asarray(seeds)[:, None], jnp.int32(n), ids, 4 * channels) for n in range(num_steps)]
    return np.stack([np.stack([whole(np.asarray(patches))[0] for patches in step]) for step in drawn])


def relative_error(found, expected):
    return np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())


@pytest.fixture(scope="module")
def sampler():
    return DiTPipeline(CONFIG, random_params(), devices=jax.devices()[:1])


@pytest.mark.parametrize("channels", [3, None])
def test_it_is_the_official_chain(sampler, channels):
    labels = np.array([3, 1])
    forward = jax.jit(functools.partial(DiT(CONFIG).apply, method="on_images"))

    def network(x, step, labels):
        return forward({"params": sampler.params}, x.astype(np.float32), np.full(2, step, np.float32), labels)

    found = sampler(labels, seed=7, num_steps=6, guidance_scale=2.5, guided_channels=channels)
    drawn = noises(7, [0, 1], 6, (4, 6, 4))
    expected, _ = official_chain(network, drawn, labels, 5, 2.5, channels or 4, 6)
    assert found.shape == (2, 4, 6, 4) and found.dtype == np.float32
    assert relative_error(found, expected) < 1e-5
    other, _ = official_chain(network, drawn, labels, 5, 2.5, 7 - (channels or 4), 6)
    assert relative_error(found, other) > 1e-2


def test_a_sample_depends_on_its_index_and_not_on_its_batch(sampler):
    options = dict(seed=1, num_steps=6, guidance_scale=2.5)
    together = sampler([3, 1, 4], **options)
    alone = sampler([4, 3], indices=[2, 0], **options)
    np.testing.assert_allclose(alone, together[[2, 0]], rtol=1e-5, atol=1e-4 * np.abs(together).max())
    again = sampler([3, 3, 3], indices=[0, 1, 0], **options)
    np.testing.assert_array_equal(again[0], again[2])
    assert relative_error(again[1], again[0]) > 0.1
    assert relative_error(sampler([3, 1, 4], **options | {"seed": 2}), together) > 0.1


def test_samples_that_are_not_finite_are_refused_by_class_and_step(sampler):
    params = random_params()
    params["label_embedding"][3] = np.nan
    broken = DiTPipeline(CONFIG, params, devices=jax.devices()[:1])
    words = r"finite: sample 8 \(class 3\) is NaN or beyond 1e19 from step 1 of 6 on \(1 of 3 samples are\); the model"
    with pytest.raises(FloatingPointError, match=words):
        # A row each: NaN reaches neighbours.
        broken([1, 3, 4], indices=[7, 8, 9], num_steps=6, guidance_scale=1.0, image_size=(16, 32))
    words = r"sample 0 \(class 1\) is NaN or beyond 1e19 from step 1 of 6 on \(2 of 2 samples are\); a smaller"
    with pytest.raises(FloatingPointError, match=words):
        sampler([1, 3], num_steps=6, guidance_scale=1e30)


def test_what_the_autoencoder_breaks_is_refused():
    class Breaking(IdentityCodec):
        def decode(self, latents):
            images = super().decode(latents).copy()
            images[1] = np.inf
            return images

    sampler = DiTPipeline(CONFIG, random_params(), Breaking(4), devices=jax.devices()[:1])
    with pytest.raises(FloatingPointError, match=r"sample 1 \(class 3\) is finite until it is decoded \(1 of 2\)"):
        sampler([1, 3], num_steps=6, guidance_scale=1.0)


def test_a_model_without_a_null_class_samples_and_refuses_guidance(sampler):
    with_null = sampler
    config = dataclasses.replace(CONFIG, num_label_rows=CONFIG.num_classes)
    params = random_params(config)
    assert params["label_embedding"].shape[0] == 5 and not config.has_null_class
    params |= {**with_null.params, "label_embedding": with_null.params["label_embedding"][:5]}
    sampler = DiTPipeline(config, params, devices=jax.devices()[:1])
    options = dict(num_steps=6, guidance_scale=1.0)
    np.testing.assert_array_equal(sampler([4, 0], **options), with_null([4, 0], **options))
    with pytest.raises(ValueError, match=r"guidance_scale must be 1, got 1\.5: the model has no null class"):
        sampler([4, 0], num_steps=6)
    with pytest.raises(ValueError, match="labels must be a list of whole numbers between 0 and 4"):
        sampler([5], **options)
    with pytest.raises(ValueError, match="num_label_rows must be None, 5 or 6, got 7"):
        dataclasses.replace(CONFIG, num_label_rows=7)


def test_devices_change_nothing_and_each_shape_is_compiled_once():
    split = DiTPipeline(CONFIG, random_params(), devices=jax.devices()[:2])
    single = DiTPipeline(CONFIG, random_params(), devices=jax.devices()[:1])
    options = dict(num_steps=20, guidance_scale=1.5)  # two chunks
    found = [one([3, 1, 4], **options) for one in (split, single)]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-4 * np.abs(found[0]).max())
    for one in (split, single):
        one([0, 0, 5], seed=3, num_steps=10, guidance_scale=4.0)
        assert one.clips.generator.num_compiled == 1


def test_the_null_class_without_guidance_is_a_scale_of_zero(sampler):
    options = dict(num_steps=6, guided_channels=None)
    plain = sampler([5, 5], guidance_scale=1.0, **options)
    for scale in (0.0, 3.0):
        np.testing.assert_allclose(sampler([5, 5], guidance_scale=scale, **options), plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm++", "unipc"])
def test_deterministic_samplers_without_predicted_noise(name):
    """A fresh model predicts no noise: the data is the start over its alpha, whatever the sampler and its steps."""
    config = dataclasses.replace(CONFIG, learned_variance=False, in_channels=1)
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, DiT(config)))(jax.random.key(0)))
    fresh = DiTPipeline(config, params, devices=jax.devices()[:1])
    found = fresh([2], seed=5, sampler=name, num_steps=5, image_size=(2, 8), guided_channels=None)
    start = noises(5, [0], 0, (2, 8, 1))[0]
    np.testing.assert_allclose(found, start / np.sqrt(alpha_bar(linear_betas())[-1]), rtol=1e-4)


def test_bad_arguments_are_named(sampler):
    for options, words in (
        (dict(labels=[6]), r"labels must be a list of whole numbers between 0 and 5, got \[6\]"),
        (dict(labels=[]), r"labels must be .*, got \[\]"),
        (dict(labels=[0.5]), r"labels must be .*, got \[0\.5\]"),
        (dict(indices=[-1]), r"indices must be .*, got \[-1\]"),
        (dict(indices=[0, 1]), "indices must be one for each of 1 labels, got 2"),
        (dict(image_size=(4, 5)), r"image_size must be .* positive multiples of 2 pixels, got \(4, 5\)"),
        (dict(sampler="magic"), "sampler must be one of euler, .*, got 'magic'"),
        (dict(num_steps=1001), "count must be between 1 and the process's 1000 steps, got 1001"),
        (dict(guidance_scale=np.inf), "guidance_scale must be finite, got inf"),
        (dict(guided_channels=0), "guided_channels must be None or at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            sampler(**dict(labels=[0]) | options)


@pytest.mark.slow
def test_latents_of_converted_weights_are_decoded(tmp_path):
    """The samples are the autoencoder's images of the latents over their scaling factor."""
    model, vae = write_latent_model(tmp_path / "dit"), write_autoencoder(tmp_path / "vae")
    options = dict(seed=2, num_steps=3)
    bare = DiTPipeline.from_pretrained(model)
    latents = bare([1, 5], **options)
    assert latents.shape == (2, 4, 6, 4)
    np.testing.assert_array_equal(latents, DiTPipeline(CONFIG, random_params())([1, 5], **options))
    both = DiTPipeline.from_pretrained(model, vae)
    images = both([1, 5], **options)
    params = random_like(image_vae.abstract_params(ImageVAE(VAE)))
    expected = ImageVAE(VAE).apply({"params": params}, latents / VAE.scaling_factor, method="decode")
    np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-4)
    assert both.image_size == (8, 12)
    both.check_size((8, 4))
    with pytest.raises(ValueError, match="latents of 4 channels: name an autoencoder"):
        bare.check_size((4, 4))
    with pytest.raises(ValueError, match=r"positive multiples of 4 pixels, got \(8, 6\)"):
        both.check_size((8, 6))


def test_a_model_of_pixels_has_its_own_process_and_is_clipped(tmp_path):
    sampler = DiTPipeline.from_pretrained(write_pixel_model(tmp_path / "pixels"))
    assert sampler.process.most_steps == 20 and sampler.image_size == (4, 4)
    sampler.check_size((4, 8))
    images = sampler([0, 2], num_steps=20)
    assert images.shape == (2, 4, 4, 3) and np.abs(images).max() <= 1
    with pytest.raises(ValueError, match="makes pixels, which no autoencoder decodes"):
        DiTPipeline.from_pretrained(tmp_path / "pixels", vae="anything")


def test_models_that_are_not_there_or_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run, checkpoint or exported model at .*absent"):
        DiTPipeline.from_pretrained(tmp_path / "absent")
    model, vae = write_latent_model(tmp_path / "dit"), write_autoencoder(tmp_path / "vae")
    (vae / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"vae.config\.json"):
        DiTPipeline.from_pretrained(model, vae)
    (model / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"dit.config\.json"):
        DiTPipeline.from_pretrained(model)


def restless(torch, model):
    """Weights with which a chain stays finite and keeps moving: most of the noise is told, the rest is a random map.

    The patch embedding is an isometry, times 8, and the head holds its transpose: LayerNorm makes of that the direction
    of a patch, of a length of 1.5 times the expected one, which draws back what grows. The rest is kept smaller.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            gain = 0.4 if "norm1.linear" in name or "proj_out_1" in name else 0.8
            std = 0.02 if name.endswith("bias") else gain * value[0].numel() ** -0.5
            value.normal_(0.0, std, generator=generator)
        first = model.transformer_blocks[0].norm1.emb
        first.class_embedder.embedding_table.weight.normal_(0.0, 1.0, generator=generator)
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first.state_dict())
        width = model.inner_dim
        basis = torch.linalg.qr(torch.randn(width, 16, generator=generator))[0]  # (D, p q c)
        model.pos_embed.proj.weight.copy_(8 * basis.reshape(width, 2, 2, 4).permute(0, 3, 1, 2))
        noise = model.proj_out_2.weight.reshape(2, 2, 8, width)[:, :, :4]  # a view
        noise *= 0.3
        noise += 1.5 * (16 / width) ** 0.5 * basis.T.reshape(2, 2, 4, width)
    return model.eval()


@pytest.mark.parity
def test_250_guided_steps_stay_with_the_reference_to_the_end(tmp_path):
    torch = pytest.importorskip("torch", reason="needs .[parity]")
    diffusers = pytest.importorskip("diffusers", reason="needs .[parity]")
    sizes = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, num_embeds_ada_norm=5, out_channels=8)
    model = restless(torch, diffusers.DiTTransformer2DModel(sample_size=8, **sizes))
    model.save_pretrained(tmp_path / "theirs")
    for name, data in convert_dit(tmp_path / "theirs").items():
        (tmp_path / name).write_bytes(data)
    ours = DiTPipeline(*read_model(tmp_path), devices=jax.devices()[:1])

    def network(x, step, labels):
        nchw = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32))
        with torch.no_grad():
            out = model(nchw, torch.full((len(x),), step), torch.from_numpy(labels)).sample
        return out.numpy().transpose(0, 2, 3, 1)

    labels = np.array([3, 0])
    drawn = noises(12, [0, 1], 250, (8, 8, 4))
    expected, rms = official_chain(network, drawn, labels, 5, 1.5, 3, 250)
    found = ours(labels, seed=12)
    error = relative_error(found, expected)
    print(f"after 250 steps: RMS {rms[-1]:.2f} (between {rms.min():.2f} and {rms.max():.2f}), error {error:.1e} of it")
    assert 0.1 < rms.min() and rms.max() < 5 and error < 1e-3
    # It moves: what another class, and guidance of all channels, end with is far away.
    for other, channels in ((labels[::-1].copy(), 3), (labels, 4)):
        assert relative_error(official_chain(network, drawn, other, 5, 1.5, channels, 250)[0], expected) > 0.5
