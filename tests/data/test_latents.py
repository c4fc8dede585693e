"""Latents computed once: what is stored, restarts, processes that share the work, and batches drawn from it."""

import collections
import contextlib
import itertools
import json
import pathlib
import threading

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import linen as nn
from PIL import Image

from sora_jax.commands import prepare_data
from sora_jax.config_json import to_json
from sora_jax.data.builders import clip_dataset, folder
from sora_jax.data.builders.latents import LatentOptions, center_crop, prepare_latents
from sora_jax.data.builders.parts import ClipTask, Encoding
from sora_jax.data.latents import LatentBatches, LatentSource
from sora_jax.data.sources import open_source
from sora_jax.models.autoencoder.image_vae import ImageVAE, ImageVAEConfig, abstract_params
from sora_jax.models.weights import tensor_bytes
from sora_jax.provenance import flat_names

SIZE, SHAPE = 8, (2, 2, 3)
OPTIONS = LatentOptions(SIZE, part_size=3)
AUTOENCODER = {"scaling_factor": 0.5, "sha256": "of the weights"}


def encode(images):
    """Mean colours of blocks, with a deviation that depends on them."""
    assert images.shape[1:] == (SIZE, SIZE, 3) and images.dtype == np.float32
    mean = images.reshape(-1, 2, 4, 2, 4, 3).mean((2, 4))
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
    return prepare_latents(pictures, encode, SHAPE, autoencoder, str(output), options, batch_size, **kwargs)


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


def test_every_still_is_stored_with_its_mirror_image(pictures, stored):
    assert stored["name"] == "clip_folder_latents" and stored["shape"] == [2, 2, *SHAPE]
    assert stored["splits"] == {"train": {"num_examples": 8}, "unseen": {"num_examples": 2}}
    assert stored["num_left_out"] == {"clips of several frames": 1}
    assert len(files_of(stored)) == 4  # parts of 3, 3, 2 and 2
    for split in ("train", "unseen"):
        clips, source = open_source(pictures, split), LatentSource(stored["path"], split)
        meta = clips.metadata
        stills = np.flatnonzero(meta.num_frames == 1)
        assert len(source) == len(stills) and source.label_names == ("cat", "dog")
        for i, still in enumerate(stills):
            with Image.open(pathlib.Path(pictures).parents[2] / "files" / meta.names[still]) as image:
                crop = center_crop(np.asarray(image.convert("RGB")), SIZE) / np.float32(127.5) - 1
            mean, std = encode(np.stack([crop, crop[:, ::-1]]))
            example = source[i]
            np.testing.assert_allclose(example.mean, mean, atol=1e-6)
            np.testing.assert_allclose(example.std, std, atol=1e-6)
            assert (example.label, example.caption, example.name) == (
                meta.labels[still], meta.captions[still], meta.names[still],
            )  # fmt: skip


def test_tfds_reads_it_too(stored):
    example = tfds.builder_from_directory(stored["path"]).as_data_source("unseen")[1]
    ours = LatentSource(stored["path"], "unseen")[1]
    np.testing.assert_array_equal(example["latents"], np.stack([ours.mean, ours.std], axis=1))
    assert example["label"] == ours.label and example["caption"].decode() == ours.caption


@pytest.mark.parametrize("views", ["image", "flip"])
def test_one_view_in_half_precision(pictures, stored, tmp_path, views):
    report = prepare(pictures, tmp_path, options=LatentOptions(SIZE, views, "float16"), batch_size=5)
    source, both = LatentSource(report["path"]), LatentSource(stored["path"])
    for i in range(len(both)):
        expected = both[i].mean[0 if views == "image" else 1]
        np.testing.assert_array_equal(source[i].mean[0], expected.astype(np.float16))
        assert source[i].mean.shape == (1, *SHAPE)


def test_an_interrupted_run_goes_on(pictures, stored, tmp_path):
    calls = itertools.count(1)

    def interrupted(images):
        if next(calls) == 4:  # two calls of two stills make a part of three
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
    assert calls == [4] * 4  # one part of four is done already
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
    assert calls == {0: 3, 1: 2, 2: 1}  # parts of 3 and 2 stills, of 3, and of 2; two stills a call
    assert files_of(report) == files_of(stored)


def test_what_cannot_be_encoded_is_named(pictures, tmp_path):
    outputs = (tmp_path / str(i) for i in range(9))

    def fails(words, output=None, **arguments):
        with pytest.raises(ValueError) as caught:
            prepare(arguments.pop("source", pictures), output or next(outputs), **arguments)
        assert words in str(caught.value), caught.value

    fails("holds no prepared TFDS data set", source=str(tmp_path))
    fails("batch_size must be at least 1, got 0", batch_size=0)
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
        ({"dtype": "bfloat16"}, "dtype must be float16 or float32, got 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=words):
            LatentOptions(**options)
    with pytest.raises(ValueError, match=r"holds no latents; run experiments/prepare_data\.py latents"):
        LatentSource(pictures)


def test_an_epoch_has_every_image_once(stored):
    source = LatentSource(stored["path"])
    exact = {
        tuple(np.round(example.mean[view].ravel(), 3)): i
        for i in range(8)
        for example in [source[i]]
        for view in (0, 1)
    }
    noiseless = LatentSource(stored["path"])
    noiseless.sample = lambda index, rng: (source[index].mean[rng.integers(2)], source[index].label)
    seen = []
    for batch in LatentBatches(noiseless, 0, 4, length=4):
        images = [exact[tuple(np.round(latents.ravel(), 3))] for latents in batch.latents]
        assert batch.labels.tolist() == [source[i].label for i in images] and batch.labels.dtype == np.int32
        seen += images
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8)) and seen[:8] != seen[8:]


def test_every_place_has_noise_of_its_own(stored):
    source = LatentSource(stored["path"])
    source.sample = lambda index, rng: (rng.standard_normal(1), index)
    noise = [value for batch in LatentBatches(source, 0, 4, length=6) for value in batch.latents[:, 0]]
    assert len(set(noise)) == 24


def test_threads_make_batches_ahead_and_change_nothing(stored):
    one = list(LatentBatches(LatentSource(stored["path"]), 3, 6, length=7))
    source = LatentSource(stored["path"])
    draw, together, inside = source.sample, threading.Barrier(3), set()

    def sample(index, rng):
        if len(inside) < 3 and threading.get_ident() not in inside:
            inside.add(threading.get_ident())
            together.wait(timeout=30)  # three threads are here at once, or this raises
        return draw(index, rng)

    source.sample = sample
    with contextlib.closing(LatentBatches(source, 3, 6, length=7, num_workers=3)) as batches:
        several = list(batches)
    jax.tree.map(np.testing.assert_array_equal, several, one)
    source.sample = lambda index, rng: draw(99, rng)
    with pytest.raises(IndexError, match="got 99"):
        next(LatentBatches(source, 3, 6, num_workers=3))


def test_latents_are_drawn_from_the_scaled_posterior(stored):
    source = LatentSource(stored["path"])
    example = source[3]
    drawn = np.stack([source.sample(3, np.random.default_rng(i))[0] for i in range(4000)])
    assert drawn.dtype == np.float32
    mean = 0.5 * example.mean.mean(0)
    variance = 0.25 * (example.std**2).mean(0) + 0.25 * example.mean.var(0)  # of two views, each as likely
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(drawn.var(0), variance, rtol=0.15)


def test_going_on_from_a_place_and_sharing_among_hosts(stored):
    source = LatentSource(stored["path"])
    expected = list(itertools.islice(LatentBatches(source, 3, 6), 5))
    batches = LatentBatches(source, 3, 6)
    next(batches), next(batches)
    resumed = LatentBatches(LatentSource(stored["path"]), 3, 6)
    resumed.set_state(json.loads(json.dumps(batches.get_state())))
    for found, batch in zip(itertools.islice(resumed, 3), expected[2:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, batch)
    assert resumed.summary() == "5 batches of 6 latents"
    for count in (2, 3):
        hosts = [LatentBatches(source, 3, 6, process_index=i, process_count=count) for i in range(count)]
        for batch in expected:
            parts = [next(host) for host in hosts]
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda *rows: np.concatenate(rows), *parts), batch)
    assert not np.array_equal(next(LatentBatches(source, 4, 6)).latents, expected[0].latents)
    with pytest.raises(ValueError, match=r"data.batch_size must be a multiple of the 4 hosts, got 6"):
        LatentBatches(source, 3, 6, process_count=4)
    with pytest.raises(ValueError, match=r"split 'train\[:0\]' of .* is empty"):
        LatentBatches(LatentSource(stored["path"], "train[:0]"), 3, 6)
    with pytest.raises(IndexError, match=r"index must be in 0 \.\.\. 7, got 8"):
        source[8]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """(directory, config, params) of a small autoencoder with random weights."""
    config, rng = ImageVAEConfig(latent_channels=2, widths=(4, 4), num_blocks=1, num_groups=2), np.random.default_rng(0)
    shapes = nn.meta.unbox(abstract_params(ImageVAE(config)))
    params = jax.tree.map(lambda leaf: rng.normal(0.1, 0.3, leaf.shape).astype(np.float32), shapes)
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
    assert source.scaling_factor == config.scaling_factor and len(source.request["autoencoder"]["sha256"]) == 64
    path = pathlib.Path(pictures).parents[2] / "files" / clips.metadata.names[0]
    crop = center_crop(np.asarray(Image.open(path).convert("RGB")), 8) / np.float32(127.5) - 1
    apply = jax.jit(lambda x: ImageVAE(config).apply({"params": params}, x, method="encode"))
    posterior = apply(np.stack([crop, crop[:, ::-1]] * 2))
    np.testing.assert_allclose(source[0].mean, posterior.mean[:2], atol=1e-5)
    np.testing.assert_allclose(source[0].std, posterior.std[:2], rtol=1e-4)

    def fails(words, *more):
        assert script([*arguments, *more]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error

    fails("no image VAE at", "--vae", str(tmp_path))
    fails("H and W multiples of 2, got shape (1, 7, 7, 3)", "--image-size", "7")
    fails("batch_size must be a multiple of 1 devices times 2 views, got 3", "--batch-size", "3")
    fails("holds other latents already", "--dtype", "float16")
    fails("holds no prepared TFDS data set", "--source", str(tmp_path / "nowhere"))
