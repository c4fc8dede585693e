import dataclasses
import functools
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from class_models import VAE, random_like
from helpers.compilation import on_devices
from tiny_model import WordEncoder, make_config, random_params

import sora_jax.generation
from sora_jax.array_types import PackedBatch
from sora_jax.config import FlowConfig, PatchConfig
from sora_jax.diffusion.samplers import SAMPLERS
from sora_jax.generation.canvas import ClipRequest, canvas_segment, fill_canvas, make_requests, unpack_clips
from sora_jax.generation.generator import Draw, canvas_draw, token_noise
from sora_jax.generation.pipeline import SoraPipeline
from sora_jax.models.autoencoder import image_vae
from sora_jax.models.autoencoder.codec import IdentityCodec, ImageCodec
from sora_jax.models.autoencoder.image_vae import ImageVAE
from sora_jax.pixels import from_pixels, to_pixels

PROMPTS = ["frog", "red heart", "", "a rocket in the sky"]
SIZES = dict(num_frames=[3, 1, 4, 2], height=[8, 16, 12, 40], width=[8, 8, 16, 40], fps=[8.0, 8.0, 4.0, 12.0])


def floats(pipeline, prompts, seed, sampler="euler", scale=3.0, num_steps=2, **sizes):
    """The clips before they are rounded to pixels."""
    requests = make_requests(prompts, seed, guidance_scale=scale, **sizes)
    return pipeline.clips(requests, prompts, num_steps, sampler)


def test_a_clip_is_the_same_alone_packed_and_in_another_order(pipeline):
    packed = floats(pipeline, PROMPTS, [3, 4, 5, 6], **SIZES)
    assert [clip.shape for clip in packed] == [(3, 8, 8, 3), (1, 16, 8, 3), (4, 12, 16, 3), (2, 40, 40, 3)]
    for i, prompt in enumerate(PROMPTS):
        alone = floats(pipeline, [prompt], 3 + i, **{name: values[i] for name, values in SIZES.items()})
        np.testing.assert_allclose(alone[0], packed[i], atol=1e-4)
    turned = floats(pipeline, PROMPTS[::-1], [6, 5, 4, 3], **{name: values[::-1] for name, values in SIZES.items()})
    for first, second in zip(packed, turned[::-1], strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("sampler", ("dpm++sde", "unipc"))
def test_a_clips_own_noise_and_memory_go_with_it(pipeline, sampler):
    packed = floats(pipeline, PROMPTS, [3, 4, 5, 6], sampler, num_steps=4, **SIZES)
    sizes = {name: values[2] for name, values in SIZES.items()}
    alone = floats(pipeline, PROMPTS[2:3], 5, sampler, num_steps=4, **sizes)
    np.testing.assert_allclose(alone[0], packed[2], atol=1e-4)
    assert np.abs(floats(pipeline, PROMPTS[2:3], 6, sampler, num_steps=4, **sizes)[0] - alone[0]).max() > 1e-2


def test_noise_of_a_patch_depends_on_its_clips_seed_the_step_and_its_number_alone():
    ids = jnp.array([[1, 1, 1, 2, 2, 0], [2, 2, 1, 1, 1, 0]])
    noise = token_noise(jnp.array([[7, 8], [7, 8]], jnp.uint32), 0, ids, 1000)
    np.testing.assert_array_equal(noise[0, :3], noise[1, 2:5])
    np.testing.assert_array_equal(noise[0, 3:5], noise[1, :2])
    drawn = np.asarray(noise[0, :5])
    np.testing.assert_allclose(drawn @ drawn.T / 1000, np.eye(5), atol=0.2)  # standard normal, and all of its own
    later = token_noise(jnp.array([[7, 8], [7, 8]], jnp.uint32), 1, ids, 1000)
    assert (later[:, :5] != noise[:, :5]).all(axis=-1).all()


def test_a_clip_is_the_same_in_several_batches(tiny_config, pipeline):
    one_by_one = SoraPipeline(
        tiny_config, pipeline.params, WordEncoder(), devices=jax.devices()[:1], tokens_per_batch=1
    )
    together = floats(pipeline, PROMPTS, 3, **SIZES)
    for first, second in zip(together, floats(one_by_one, PROMPTS, 3, **SIZES), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)


ON_DEVICES = """
import jax, numpy as np
from class_models import VAE, random_like
from tiny_model import WordEncoder, make_config, random_params
from test_generation_pipeline import PROMPTS, SIZES, floats
from sora_jax.generation.pipeline import SoraPipeline
from sora_jax.models.autoencoder.codec import ImageCodec
from sora_jax.models.autoencoder.image_vae import ImageVAE, abstract_params
config = make_config()
assert len(jax.devices()) == 3
one, three = (SoraPipeline(config, random_params(config), WordEncoder(), devices=jax.devices()[:n]) for n in (1, 3))
for first, second in zip(floats(one, PROMPTS, 3, **SIZES), floats(three, PROMPTS, 3, **SIZES), strict=True):
    np.testing.assert_allclose(first, second, atol=1e-4)
params, frames = random_like(abstract_params(ImageVAE(VAE))), np.linspace(-1, 1, 5 * 8 * 8 * 3).reshape(5, 8, 8, 3)
first, second = (ImageCodec(VAE, params, jax.devices()[:n]).encode(frames) for n in (1, 3))
np.testing.assert_allclose(first, second, atol=1e-5)
print("equal")
"""


def test_a_clip_is_the_same_on_several_devices():
    here = str(pathlib.Path(__file__).parent)
    command = [sys.executable, "-c", ON_DEVICES]
    process = subprocess.run(command, capture_output=True, text=True, cwd=here, env=on_devices(3))
    assert process.stdout.strip() == "equal", process.stderr


def test_what_a_clip_depends_on(pipeline):
    def make(prompt="frog", fps=8.0, seed=0, scale=3.0, sampler="euler"):
        sizes = dict(num_frames=4, height=8, width=8, fps=fps)
        return floats(pipeline, [prompt], seed, scale=scale, sampler=sampler, **sizes)[0]

    frog = make()
    np.testing.assert_array_equal(frog, make())
    for other in (make("rocket"), make(fps=12.0), make(seed=1), make(scale=1.0), make(sampler="heun")):
        assert np.abs(frog - other).max() > 1e-3
    # Without a caption there is nothing to guide towards.
    np.testing.assert_allclose(make("", scale=3.0), make("", scale=1.0), atol=1e-5)
    np.testing.assert_array_equal(make(" "), make(""))


def test_guidance_moves_from_the_null_to_the_captions_velocity(pipeline):
    """With one Euler step the result is linear in the guidance scale: noise - v_null - scale (v_text - v_null)."""
    sizes = dict(num_frames=2, height=8, width=8, fps=8.0, num_steps=1)
    one, two, four = (floats(pipeline, ["frog"], 0, scale=scale, **sizes)[0] for scale in (1.0, 2.0, 4.0))
    null = floats(pipeline, [""], 0, scale=1.0, **sizes)[0]
    np.testing.assert_allclose(two, null + 2 * (one - null), atol=1e-4)
    np.testing.assert_allclose(four, null + 4 * (one - null), atol=1e-4)
    assert np.abs(one - null).max() > 1e-3


def constant(params, rows, x, levels):
    """A network that puts out one value."""
    return jnp.full_like(x, 0.5)


def mean_level(params, rows, x, levels):
    """A network that puts out the mean noise level of a row's tokens."""
    real = rows.segment_ids > 0
    level = jnp.where(real, jnp.take_along_axis(levels, rows.level_ids, axis=1), 0)
    return jnp.zeros_like(x) + (level.sum(axis=1) / real.sum(axis=1))[:, None, None]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_denoiser_is_followed_to_its_clip(with_config, sampler):
    """x0 prediction of a constant: the last step from t to 0 lands on it whatever the noise was."""
    pipeline = with_config(flow=FlowConfig(prediction="x0", min_time=0.5))
    pipeline.clips.generator.network = constant
    clip = pipeline(["frog"], num_frames=3, height=8, width=8, num_steps=7, guidance_scale=2.0, sampler=sampler)[0]
    assert clip.shape == (3, 8, 8, 3) and clip.dtype == np.uint8
    assert np.unique(clip).tolist() == [191]  # (0.5 + 1) * 127.5, rounded


CONTENT = np.full((2, 4, 16, 3), 0.25, np.float32)


@pytest.mark.parametrize(
    ("sampler", "prediction"), [("euler", "velocity"), ("heun", "x0"), ("dpm++sde", "x0"), ("unipc", "x0")]
)
def test_known_frames_stay_as_they_are(with_config, sampler, prediction):
    pipeline = with_config(flow=FlowConfig(prediction=prediction))
    sizes = dict(num_frames=4, height=4, width=16, fps=8.0, known_frames=2, content=[CONTENT])
    clip = floats(pipeline, ["frog"], 0, sampler, num_steps=3, **sizes)[0]
    assert np.isfinite(clip).all()  # rows are padded, and what is padded is told as nothing
    np.testing.assert_array_equal(clip[:2], CONTENT)
    assert (clip[2:] != 0.25).all()


def test_known_frames_have_level_zero(with_config):
    pipeline = with_config()
    pipeline.clips.generator.network = mean_level
    sizes = dict(num_frames=4, height=4, width=8, fps=8.0, num_steps=1, known_frames=2, content=[CONTENT[:, :, :8]])
    noise = np.random.default_rng(7).standard_normal((4, 96), np.float32)
    for scale in (1.0, 2.0):
        clip = floats(pipeline, ["frog"], 7, scale=scale, **sizes)[0]
        # Of four patches two are at t = 1: the velocity is 1/2, and x = noise - 1/2.
        np.testing.assert_allclose(clip[2, 0, 0], noise[2, :3] - 0.5, atol=1e-6)


def three_tables():
    """Text to video, a known first frame made anew in part, and every frame a level of its own."""
    given = np.random.default_rng(1).uniform(-1, 1, (6, 4, 8, 3)).astype(np.float32)
    common = dict(num_frames=6, height=4, width=8, fps=8.0)
    return [
        ClipRequest("frog", **common, seed=3, guidance_scale=3.0),
        ClipRequest("red heart", **common, seed=4, guidance_scale=1.5, strength=0.6, known_frames=2, content=given),
        ClipRequest("a rocket", **common, seed=5, guidance_scale=0.5, stagger=2),
    ]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clips_of_other_strengths_guidance_and_tables_are_packed_as_they_are_alone(pipeline, sampler):
    """In one row, and each in a row of its own; rows of one batch, so that all is compiled once."""
    requests, make = three_tables(), pipeline.clips
    conditions, null = make.conditioner(requests), make.conditioner.null
    segments = [
        canvas_segment(r, i, conditions[i], null, make.codec, make.patch, make.generator.process, 5)
        for i, r in enumerate(requests)
    ]
    canvas = fill_canvas(segments, [[0, 1, 2], [2], [0], [1]])
    assert len(canvas.levels.time) == 5 + 1 + 2 * 2  # what begins last
    seeds, scales = zip(*((r.seed, r.guidance_scale) for r in requests), strict=True)
    draw = canvas_draw(canvas, seeds, scales)
    made = make.generator(draw, make.generator.process.sampler(sampler), "abc")

    def clips(row):
        rows = PackedBatch(*(a[row : row + 1] for a in canvas.rows))
        return unpack_clips(made[row : row + 1], rows, [(6, 4, 8)] * 3, make.patch)

    packed, alone = clips(0), [clips(2)[0], clips(3)[1], clips(1)[2]]
    for first, second in zip(packed, alone, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5 * max(1, np.abs(second).max()))
    np.testing.assert_array_equal(packed[1][:2], requests[1].content[:2])


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm++sde"])
def test_a_clip_that_ends_early_is_what_it_is_without_the_longer_ones(pipeline, sampler):
    requests = three_tables()
    together = pipeline.clips(requests, "abc", 4, sampler)
    for request, clip in zip(requests[:2], together, strict=False):
        np.testing.assert_allclose(pipeline.clips([request], "a", 4, sampler)[0], clip, atol=1e-5 * np.abs(clip).max())


def test_guidance_lasts_for_its_interval_alone(pipeline):
    sizes = dict(num_frames=2, height=8, width=8, fps=8.0)
    requests = [make_requests(["frog"], 0, guidance_scale=scale, **sizes) for scale in (1.0, 4.0)]
    plain, guided = (pipeline.clips(some, "a", 4, "euler")[0] for some in requests)
    always, never, late = (
        pipeline.clips(requests[1], "a", 4, "euler", interval=interval)[0]
        for interval in ((0.0, 1.0), (-2.0, -1.0), (0.0, 0.3))
    )
    np.testing.assert_allclose(always, guided, atol=1e-5)
    np.testing.assert_allclose(never, plain, atol=1e-5)
    assert min(np.abs(late - plain).max(), np.abs(late - guided).max()) > 1e-3
    with pytest.raises(ValueError, match=r"interval of guidance must be \(lowest, highest\), .*, got \(1.0, 0.0\)"):
        pipeline.clips(requests[1], "a", 4, "euler", interval=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"interval of guidance must be .*, got \(0.9,\)"):
        pipeline("frog", guidance_interval=(0.9,))


def test_times_of_larger_clips_are_shifted(with_config):
    """A clip of four times the tokens spends its steps at higher times: t' = 2 t / (1 + t)."""
    process = with_config(flow=FlowConfig(base_tokens=4)).clips.generator.process
    np.testing.assert_allclose(process.ladder(4, num_tokens=4).time, [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(process.ladder(4, num_tokens=16).time, [1, 6 / 7, 2 / 3, 0.4, 0], rtol=1e-6)


def test_equal_shapes_are_traced_once_whatever_else_changes(tiny_config):
    pipeline = SoraPipeline(tiny_config, random_params(tiny_config), WordEncoder())
    sizes = dict(num_frames=2, height=8, width=8)
    first = pipeline(["frog", "rocket"], **sizes, num_steps=6)
    for call in (
        dict(prompts=["tiger face", "sun"], seed=5),
        dict(prompts=["frog", ""], guidance_scale=4.5, fps=6.0),
        dict(prompts=["frog", "rocket"], num_steps=9),  # both are chunks of three
    ):
        pipeline(**{"num_steps": 6, **sizes, **call})
    assert pipeline.clips.generator.num_compiled == 1
    pipeline.params = random_params(tiny_config, seed=1)
    second = pipeline(["frog", "rocket"], **sizes, num_steps=6)
    assert pipeline.clips.generator.num_compiled == 1
    assert (first[0] != second[0]).any()


def test_progress_counts_every_step_of_every_batch(tiny_config):
    pipeline = SoraPipeline(
        tiny_config, random_params(tiny_config), WordEncoder(), devices=jax.devices()[:1], tokens_per_batch=1
    )
    calls = []
    sizes = dict(num_frames=2, height=48, width=48)  # one clip a row, and one row a batch
    pipeline(["frog"] * 2, **sizes, num_steps=10, progress=lambda *call: calls.append(call))
    assert calls == [(0, 20), (5, 20), (10, 20), (10, 20), (15, 20), (20, 20)]


def test_left_out_arguments_are_the_models_own(pipeline, tiny_config):
    sample = tiny_config.sample
    (clip,) = pipeline(["frog"])
    assert clip.shape == (sample.num_frames, sample.height, sample.width, 3)
    given = dict(fps=sample.fps, num_steps=sample.num_steps, guidance_scale=sample.guidance_scale, seed=0)
    np.testing.assert_array_equal(clip, pipeline(["frog"], **given)[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_steps=0), "num_steps must be at least 1, got 0"),
        (dict(num_steps=2.5), "num_steps must be a whole number of at least 1, got 2.5"),
        (dict(guidance_scale="x"), "guidance_scale must be finite, got 'x'"),
        (dict(sampler="plms"), r"sampler must be one of euler, heun, dpm\+\+, .*, got 'plms'"),
        (dict(guidance_scale=float("inf")), "guidance_scale must be finite"),
        (dict(width=10), "width must be a multiple of the patch's 4, got 10; 8 or 12 would work"),
        (dict(num_frames=0), "num_frames"),
        (dict(fps=-1.0), "fps must be positive"),
        (dict(seed=[1, 2]), "seed has 2 values for 1 prompts"),
    ],
)
def test_bad_arguments_are_named(pipeline, changes, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"prompts": ["frog"], **changes})


def test_an_encoder_of_another_width_is_an_error(tiny_config):
    with pytest.raises(ValueError, match="width 16; the model's text_dim is 8"):
        SoraPipeline(tiny_config, {}, types.SimpleNamespace(dim=16))


def test_the_kernel_that_trained_the_model_need_not_exist_here(tiny_config, pipeline):
    splash = dataclasses.replace(tiny_config, model=dataclasses.replace(tiny_config.model, attention="splash"))
    sizes = dict(num_frames=1, height=8, width=8, fps=8.0)
    other = SoraPipeline(splash, pipeline.params, WordEncoder(), devices=jax.devices()[:1])
    clip = floats(other, ["frog"], 0, **sizes)[0]
    np.testing.assert_array_equal(clip, floats(pipeline, ["frog"], 0, **sizes)[0])


class PoisonedEncoder(WordEncoder):
    """Gives the word `poison` tokens of NaN."""

    def encode(self, captions, max_tokens):
        tokens = super().encode(captions, max_tokens)
        return [t * (np.nan if caption == "poison" else 1) for t, caption in zip(tokens, captions, strict=True)]


def test_clips_that_are_not_finite_are_refused_by_prompt_and_step(tiny_config, pipeline):
    poisoned = SoraPipeline(
        tiny_config, pipeline.params, PoisonedEncoder(), devices=jax.devices()[:1], tokens_per_batch=1
    )
    sizes, done = dict(num_frames=2, height=40, width=40), []  # each in a row and a batch of its own
    words = (
        r"^the samples are not finite: prompt 2 \('poison'\) is NaN or beyond 1e19 from step 1 of 2 on \(1 of 3 samples"
    )
    with pytest.raises(FloatingPointError, match=words):
        poisoned(["frog", "poison", "rocket"], **sizes, progress=lambda step, total: done.append(step))
    assert done[-1] == 4  # the batch of the third prompt is not begun
    with pytest.raises(FloatingPointError, match=r"step 1 of 2 on \(2 of 2 samples are\); a smaller guidance_scale"):
        pipeline(["frog", "rocket"], guidance_scale=1e30)


def test_steps_of_packed_clips_are_their_own(pipeline):
    draw = Draw(*[None] * 9)._replace(
        names=np.array([[2, 0], [1, -1]]), segment_ids=np.array([[1, 1, 2, 2], [1, 1, 1, 0]]), scales=np.ones((2, 2))
    )
    check = functools.partial(pipeline.clips.generator._check, draw=draw, names=["a", "b", "c"], num_steps=9)
    check(np.array([[-1, -1, -1, -1], [-1, -1, -1, 0]]))  # padding does not count
    with pytest.raises(FloatingPointError, match="a is NaN or beyond 1e19 from step 6 of 9 on \\(1 of 3"):
        check(np.array([[-1, -1, 7, 5], [-1, -1, -1, -1]]))
    with pytest.raises(FloatingPointError, match="c is NaN or beyond 1e19 from step 1 of 9 on"):
        check(np.array([[3, 0, -1, -1], [-1, -1, -1, -1]]))


def test_a_single_string_is_a_prompt(pipeline):
    (one,), (same,) = pipeline("frog", seed=2), pipeline(["frog"], seed=2)
    np.testing.assert_array_equal(one, same)


def test_one_function_in_generation_is_compiled():
    """There is one generator: whatever is sampled goes through it."""
    folder = pathlib.Path(sora_jax.generation.__file__).parent
    found = [path.name for path in folder.glob("*.py") for line in path.read_text().splitlines() if "jax.jit" in line]
    assert found == ["generator.py"]


def test_latents_of_clips_are_sampled_and_decoded_by_their_codec():
    """A clip is the codec's of the latents that the same model makes without one."""
    config = dataclasses.replace(make_config(), patch=PatchConfig(size=(1, 2, 2), channels=4))
    codec = ImageCodec(VAE, random_like(image_vae.abstract_params(ImageVAE(VAE))), devices=jax.devices()[:1])
    pipeline = SoraPipeline(config, random_params(config), WordEncoder(), codec, devices=jax.devices()[:1])
    given = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), np.uint8)
    options = dict(height=8, width=8, num_frames=3, num_steps=2, seed=1)
    clips = pipeline(["frog", "rocket"], known_frames=[0, 1], content=[None, given], **options)
    assert [clip.shape for clip in clips] == [(3, 8, 8, 3)] * 2 and clips[0].std() > 1
    # The known frame is what the autoencoder makes of it.
    latents = codec.encode(from_pixels(given[:1]))
    np.testing.assert_allclose(clips[1][:1], to_pixels(codec.decode(latents)).astype(int), atol=1)
    pipeline.clips.codec = IdentityCodec(4)
    requests = make_requests(["frog"], 1, num_frames=3, height=4, width=4, fps=8.0, guidance_scale=2.0)
    (bare,) = pipeline.clips(requests, "a", 2, "euler")
    np.testing.assert_allclose(clips[0], to_pixels(codec.decode(bare)).astype(int), atol=1)


def test_a_model_of_latents_is_refused_at_once(with_config):
    with pytest.raises(ValueError, match=r"patch\.channels must be 3 to make RGB pixels, got 16"):
        with_config(patch=PatchConfig(size=(2, 4, 4), channels=16))


def test_captions_are_rounded_as_they_are_for_training(tiny_config, pipeline):
    class Rounded(WordEncoder):
        def encode(self, captions, max_tokens):
            return [states.astype(np.float16).astype(np.float32) for states in super().encode(captions, max_tokens)]

    states = WordEncoder().encode(["frog"], 8)[0]
    assert (states != states.astype(np.float16)).any()
    rounded = SoraPipeline(tiny_config, random_params(tiny_config), Rounded(), devices=jax.devices()[:1])
    sizes = dict(num_frames=1, height=8, width=8, fps=8.0)
    for one, other in zip(*(floats(p, ["frog"], 3, **sizes) for p in (pipeline, rounded)), strict=True):
        np.testing.assert_array_equal(one, other)
