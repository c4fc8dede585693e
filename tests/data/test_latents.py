"""Latents computed once: what is stored of stills and clips, restarts, and processes that share the work."""

import collections
import itertools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.trees import random_tree
from PIL import Image

from sora_jax.commands import prepare_data
from sora_jax.config_json import to_json
from sora_jax.data.builders import clip_dataset, folder
from sora_jax.data.builders.latent_options import LatentOptions, center_crop
from sora_jax.data.builders.latents import CaptionEncoder, prepare_latents
from sora_jax.data.builders.parts import ClipTask, Encoding
from sora_jax.data.content import open_content
from sora_jax.data.latents import LatentSource
from sora_jax.data.sources import open_source
from sora_jax.models.autoencoder.image_vae import ImageVAE, ImageVAEConfig, abstract_params
from sora_jax.models.weights import tensor_bytes
from sora_jax.provenance import flat_names

SIZE, SHAPE = 8, (2, 2, 3)
OPTIONS = LatentOptions(SIZE, part_size=3)
STRIDES = (1, 4, 4)
AUTOENCODER = {"scaling_factor": 0.5, "sha256": "of the weights"}


def encode(images):
    """Mean colours of blocks, with a deviation that depends on them."""
    assert images.dtype == np.float32
    _, height, width, _ = images.shape
    mean = images.reshape(-1, height // 4, 4, width // 4, 4, 3).mean((2, 4))
    return 3 * mean, 0.2 + 0.1 * mean


def write_pictures(root, output, count=8, colour_seed=0):
    """A labelled data set: `count` stills of several sizes and an animation to train on, two stills held out."""
    rng, tasks = np.random.default_rng(colour_seed), []
    root.mkdir(exist_ok=True)
    for i in range(count + 3):
        path = root / f"{i}.png"
        frames = [Image.fromarray(rng.integers(0, 256, (8 + i, 12, 3), np.uint8)) for _ in range(2)]
        animation = {"save_all": True, "append_images": frames[1:], "duration": 100} if i == count else {}
        frames[0].save(path, **animation)
        split = "train" if i <= count else "unseen"
        tasks.append(ClipTask(i, path.name, str(path), f"picture {i}", split, ("cat", "dog")[i % 2]))
    encoding = Encoding(32, format="png")
    return clip_dataset.prepare(folder.ClipFolder, tasks, folder.Converter(), encoding, str(output))["path"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return write_pictures(root / "files", root / "data")


def prepare(pictures, output, encode=encode, options=OPTIONS, autoencoder=AUTOENCODER, batch_size=4, **kwargs):
    return prepare_latents(pictures, encode, STRIDES, 3, autoencoder, str(output), options, batch_size, **kwargs)


@pytest.fixture(scope="module")
def stored(pictures, tmp_path_factory):
    return prepare(pictures, tmp_path_factory.mktemp("latents"))


def files_of(report):
    return {p.name: p.read_bytes() for p in sorted(pathlib.Path(report["path"]).iterdir()) if "array_record" in p.name}


def test_crops_are_those_of_dit():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
    np.testing.assert_array_equal(center_crop(pixels, 9), pixels[:, 2:11])
    np.testing.assert_array_equal(center_crop(pixels.swapaxes(0, 1), 9), pixels.swapaxes(0, 1)[2:11])
    # Four times too large: halved twice, by means of two columns and then of two rows, each rounded.
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    quartered = pixels.astype(np.float64)
    for _ in range(2):
        for axis in (1, 0):
            quartered = np.floor(
                (
                    quartered.take(range(0, quartered.shape[axis], 2), axis)
                    + quartered.take(range(1, quartered.shape[axis], 2), axis)
                    + 1
                )
                / 2
            )
    np.testing.assert_array_equal(center_crop(pixels, 4), quartered[:, 1:5])
    # Between, by a bicubic filter, which keeps a slope; too small a picture is made larger.
    slope = np.broadcast_to(np.linspace(0, 250, 26)[:, None, None], (26, 40, 3)).astype(np.uint8)
    centres = (np.arange(20) + 0.5) * 1.3 - 0.5
    np.testing.assert_allclose(center_crop(slope, 20)[2:-2, 0, 0], 10 * centres[2:-2], atol=1.5)
    assert center_crop(pixels[:5], 11).shape == (11, 11, 3)


def frames_of(pictures, source, index):
    """The frames (T, H, W, 3) of a clip, as they were put in."""
    frames = []
    with Image.open(pathlib.Path(pictures).parents[2] / "files" / source.metadata.names[index]) as image:
        for frame in range(image.n_frames):
            image.seek(frame)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def test_every_clip_is_stored_frame_by_frame_with_its_mirror_image(pictures, stored):
    assert stored["name"] == "clip_folder_latents" and stored["latents"] == {"views": 2, "channels": 3}
    assert stored["splits"] == {
        "train": {"num_clips": 9, "num_stills": 8, "num_frames": 10},
        "unseen": {"num_clips": 2, "num_stills": 2, "num_frames": 2},
    }
    assert stored["height"] == {"min": 2, "max": 2}
    for split in ("train", "unseen"):
        clips, source = open_source(pictures, split), LatentSource(stored["path"], split)
        meta, own = clips.metadata, source.metadata
        assert source.label_names == clips.label_names == ("cat", "dog")
        for name in ("num_frames", "fps", "labels", "clip_ids"):
            np.testing.assert_array_equal(getattr(own, name), getattr(meta, name))
        assert (own.captions, own.names) == (meta.captions, meta.names)
        for i in range(len(clips)):
            crops = [center_crop(frame, SIZE) for frame in frames_of(pictures, clips, i)]
            pixels = np.stack(crops).astype(np.float32) / 127.5 - 1
            for view, turned in enumerate((pixels, pixels[:, :, ::-1])):
                mean, std = source.posterior(i, view=view)
                expected = encode(turned)
                np.testing.assert_allclose(mean, expected[0], atol=1e-6)
                np.testing.assert_allclose(std, expected[1], atol=1e-6)


def test_parts_hold_few_frames_or_one_clip(pictures, stored):
    assert len(files_of(stored)) == 5  # of 10 frames, the two of a clip together, and of 2 held out
    assert (pathlib.Path(stored["path"]) / "index-train.json").exists()


def test_the_index_is_what_the_records_say(stored, tmp_path):
    copied = shutil.copytree(stored["path"], tmp_path / "copied")
    written = LatentSource(str(copied)).metadata
    (copied / "index-train.json").unlink()
    found = LatentSource(str(copied)).metadata
    for name in ("clip_ids", "num_frames", "height", "width", "fps", "labels", "captions", "names"):
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name))


def test_each_clip_keeps_its_own_size_and_a_rate_that_is_asked_for(pictures, tmp_path):
    options = LatentOptions(16, fit="keep", multiple=4, fps=5.0, views="image", part_size=100)
    report = prepare(pictures, tmp_path, options=options)
    clips, source = open_source(pictures), LatentSource(report["path"])
    own = source.metadata
    assert len(set(own.height)) > 2 and (report["height"]["max"], report["width"]["max"]) == (4, 3)
    moving = int(np.flatnonzero(clips.metadata.num_frames > 1)[0])
    assert (clips.metadata.fps[moving], own.fps[moving], own.num_frames[moving]) == (10, 5, 1)
    for i in range(len(source)):
        height, width = clips.metadata.height[i], clips.metadata.width[i]
        assert (own.height[i], own.width[i]) == tuple(
            max(round(side * min(16 / max(height, width), 1) / 4), 1) for side in (height, width)
        )
        mean, _ = source.posterior(i)
        assert mean.shape == (own.num_frames[i], own.height[i], own.width[i], 3)
        if (own.height[i] * 4, own.width[i] * 4) == (height, width):  # not resized
            expected, _ = encode(frames_of(pictures, clips, i)[:1].astype(np.float32) / 127.5 - 1)
            np.testing.assert_allclose(mean[:1], expected, atol=1e-6)


def test_token_states_of_captions_are_stored_where_they_are_asked_for(pictures, tmp_path):
    def letters(captions):
        return [np.array([[1 / 3, ord(letter)] for letter in f"^{caption}$"], np.float32) for caption in captions]

    report = prepare(pictures, tmp_path, captions=CaptionEncoder(letters, 2, {"encoder": "letters"}))
    content = open_content(report["path"], "unseen")
    states = content.captions
    for i, caption in enumerate(content.metadata.captions):
        np.testing.assert_array_equal(states.lookup(caption), letters([caption])[0].astype(np.float16))
        assert content.metadata.caption_tokens[i] == len(caption) + 2
    np.testing.assert_array_equal(states.lookup(""), letters([""])[0].astype(np.float16))
    assert report["request"]["captions"] == {"encoder": "letters"}
    with pytest.raises(ValueError, match="holds other latents already"):
        prepare(pictures, tmp_path)


def test_tfds_reads_it_too(stored):
    example = tfds.builder_from_directory(stored["path"]).as_data_source("train")[3]
    source = LatentSource(stored["path"])
    np.testing.assert_array_equal(example["latents"], [source.posterior(3, view=view) for view in (0, 1)])
    assert example["label"] == source.metadata.labels[3]
    assert example["caption"].decode() == source.metadata.captions[3]


@pytest.mark.parametrize("views", ["image", "flip"])
def test_one_view_in_half_precision(pictures, stored, tmp_path, views):
    options = LatentOptions(SIZE, views=views, dtype="float16")
    report = prepare(pictures, tmp_path, options=options, batch_size=5)
    source, both = LatentSource(report["path"]), LatentSource(stored["path"])
    assert source.layout.views == (views,)
    for i in range(len(both)):
        expected = both.posterior(i, view=0 if views == "image" else 1)
        np.testing.assert_array_equal(source.posterior(i), expected.astype(np.float16))


def test_an_interrupted_run_goes_on(pictures, stored, tmp_path):
    calls = itertools.count(1)

    def interrupted(images):
        if next(calls) == 4:  # two calls of four views make a part of three stills
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        prepare(pictures, tmp_path, interrupted)
    target = tmp_path / "clip_folder_latents" / "1.0.0"
    assert not (target / "dataset_info.json").exists()
    with pytest.raises(ValueError, match="holds no prepared TFDS data set"):
        LatentSource(str(target))
    calls = []

    def counted(images):
        calls.append(len(images))
        return encode(images)

    report = prepare(pictures, tmp_path, counted)
    assert calls == [4] * 6  # of eight: one part of five is done already
    assert files_of(report) == files_of(stored) and not list(target.glob("*.incomplete"))
    assert prepare(pictures, tmp_path, None) == report  # finished: nothing is encoded
    with pytest.raises(ValueError, match="holds other latents already"):
        prepare(pictures, tmp_path, autoencoder=AUTOENCODER | {"sha256": "of others"})


def test_a_crash_before_the_metadata_costs_no_encoding(pictures, stored, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("sora_jax.data.builders.latents._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(pictures, tmp_path)
    assert files_of(prepare(pictures, tmp_path, None)) == files_of(stored)


def test_processes_share_the_parts(pictures, stored, tmp_path):
    calls = collections.Counter()
    for process in (2, 1, 0):

        def counted(images, process=process):
            calls[process] += 1
            return encode(images)

        report = prepare(pictures, tmp_path, counted, process_index=process, process_count=3)
        assert (report is None) == (process > 0)
    assert set(calls) == {0, 1, 2}
    assert files_of(report) == files_of(stored)


def test_what_cannot_be_encoded_is_named(pictures, tmp_path):
    outputs = (tmp_path / str(i) for i in range(9))

    def fails(words, output=None, **arguments):
        with pytest.raises(ValueError) as caught:
            prepare(arguments.pop("source", pictures), output or next(outputs), **arguments)
        assert words in str(caught.value), caught.value

    fails("holds no prepared TFDS data set", source=str(tmp_path))
    fails("batch_size must be at least 1, got 0", batch_size=0)
    fails("image_size must be a multiple of the autoencoder's strides (4, 4), got 6", options=LatentOptions(6))
    fails("multiple must be a multiple of the autoencoder's strides (4, 4), got 6", options=LatentOptions(8, "keep", 6))
    fails("process_index must be in 0 ... 1, got 2", process_index=2, process_count=2)
    fails(
        "latents must be (2, 2, 3), the autoencoder gives (1, 2, 3)",
        encode=lambda x: [part[:, :1] for part in encode(x)],
    )
    fails(
        "not finite in float16",
        encode=lambda x: (x[:, :2, :2] * 1e6,) * 2,
        options=LatentOptions(SIZE, dtype="float16"),
    )
    other = tmp_path / "other" / "clip_folder_latents" / "1.0.0"
    other.mkdir(parents=True)
    (other / "file").touch()
    fails("holds another data set already", output=tmp_path / "other")
    for options, words in (
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"part_size": 0}, "part_size must be at least 1, got 0"),
        ({"views": "none"}, "views must be image, flip or both, got 'none'"),
        ({"fit": "fill"}, "fit must be crop or keep, got 'fill'"),
        ({"fps": 0.0}, "fps must be None or positive and finite, got 0.0"),
        ({"dtype": "bfloat16"}, "dtype must be float16 or float32, got 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=words):
            LatentOptions(**options)
    with pytest.raises(ValueError, match=r"holds no latents; run experiments/prepare_data\.py latents"):
        LatentSource(pictures)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """(directory, config, params) of a small autoencoder with random weights."""
    config = ImageVAEConfig(latent_channels=2, widths=(4, 4), num_blocks=1, num_groups=2)
    params = random_tree(abstract_params(ImageVAE(config)))
    directory = tmp_path_factory.mktemp("vae")
    (directory / "model.safetensors").write_bytes(tensor_bytes(flat_names(params)))
    (directory / "config.json").write_text(to_json(config))
    return directory, config, params


@pytest.fixture(scope="module")
def script():
    return prepare_data.main


def test_the_command_encodes_with_an_autoencoder(script, pictures, vae, tmp_path, capsys):
    directory, config, params = vae
    arguments = ["latents", "--source", pictures, "--vae", str(directory), "--output", str(tmp_path / "out")]
    arguments += ["--image-size", "8", "--batch-size", "4", "--json", str(tmp_path / "report.json")]
    assert script(arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert printed.rstrip().splitlines()[-1] == f"data.path = {report['path']}"
    source, clips = LatentSource(report["path"], "unseen"), open_source(pictures, "unseen")
    layout = source.layout
    assert layout.scaling_factor == config.scaling_factor and len(layout.request["autoencoder"]["sha256"]) == 64
    path = pathlib.Path(pictures).parents[2] / "files" / clips.metadata.names[0]
    crop = center_crop(np.asarray(Image.open(path).convert("RGB")), 8) / np.float32(127.5) - 1
    apply = jax.jit(lambda x: ImageVAE(config).apply({"params": params}, x, method="encode"))
    posterior = apply(np.stack([crop, crop[:, ::-1]] * 2))
    for view in (0, 1):
        mean, std = source.posterior(0, view=view)
        np.testing.assert_allclose(mean[0], posterior.mean[view], atol=1e-5)
        np.testing.assert_allclose(std[0], posterior.std[view], rtol=1e-4)

    def fails(words, *more):
        assert script([*arguments, *more]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error

    fails("is neither a run, an exported model nor converted weights", "--vae", str(tmp_path))
    fails("image_size must be a multiple of the autoencoder's strides (2, 2), got 7", "--image-size", "7")
    fails("batch_size must be at least 1, got 0", "--batch-size", "0")
    fails("holds other latents already", "--dtype", "float16")
    fails("holds no prepared TFDS data set", "--source", str(tmp_path / "nowhere"))
