"""Stills in memory: where they lie on the canvas, what they show, and what cannot be loaded."""

import numpy as np
import pytest
from PIL import Image

from sora_jax.data.builders import clip_dataset, folder
from sora_jax.data.builders.parts import ClipTask, Encoding
from sora_jax.data.images import load_images
from sora_jax.data.sources import open_source

RNG = np.random.default_rng(0)
PICTURES = {
    "grey.png": RNG.integers(0, 256, (3, 5, 1), np.uint8).repeat(3, axis=-1),
    "colour.png": RNG.integers(0, 256, (4, 2, 3), np.uint8),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two stills and an animation in `train`, the animation alone in `moving`, the larger still alone in `unseen`."""
    root = tmp_path_factory.mktemp("images")
    for name, pixels in PICTURES.items():
        Image.fromarray(pixels).save(root / name)
    frames = [Image.fromarray(np.full((9, 9, 3), level, np.uint8)) for level in (0, 200)]
    frames[0].save(root / "moving.png", save_all=True, append_images=frames[1:], duration=100)
    members = [("grey.png", "train"), ("moving.png", "train"), ("colour.png", "train"), ("moving.png", "moving")]
    members.append(("grey.png", "unseen"))
    tasks = [ClipTask(i, name, str(root / name), f"a {name[:-4]}", split) for i, (name, split) in enumerate(members)]
    encoding = Encoding(9, format="png")
    return clip_dataset.prepare(folder.ClipFolder, tasks, folder.Converter(), encoding, str(root / "data"))["path"]


def test_stills_lie_in_the_middle_of_black(stored):
    images = load_images(stored, "train", 6)
    assert images.pixels.shape == (2, 6, 6, 3) and images.pixels.dtype == np.uint8
    names = [n for n in open_source(stored, "train").metadata.names if n != "moving.png"]
    assert images.captions == [f"a {n[:-4]}" for n in names]
    expected = {name: np.zeros((6, 6, 3), np.uint8) for name in PICTURES}
    expected["grey.png"][1:4, 0:5] = PICTURES["grey.png"]
    expected["colour.png"][1:5, 2:4] = PICTURES["colour.png"]
    np.testing.assert_array_equal(images.pixels, np.stack([expected[name] for name in names]))


def test_one_channel_keeps_greys_and_weighs_colours(stored):
    images = load_images(stored, "train", 5, channels=1)
    assert images.pixels.shape == (2, 5, 5, 1)
    by_caption = dict(zip(images.captions, images.pixels[..., 0], strict=True))
    np.testing.assert_array_equal(by_caption["a grey"][1:4], PICTURES["grey.png"][..., 0])
    luma = PICTURES["colour.png"] @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(by_caption["a colour"][0:4, 1:3], luma, atol=0.51)


def test_what_cannot_be_loaded_is_named(stored, tmp_path):
    with pytest.raises(ValueError, match=r"size must be at least 5, the long side of 'grey.png' in .*, got 4"):
        load_images(stored, "unseen", 4)
    with pytest.raises(ValueError, match=r"split 'moving' of .* has no stills, but 1 clips of several frames"):
        load_images(stored, "moving", 16)
    with pytest.raises(ValueError, match=r"split 'test' cannot be read from .*; its splits are train, moving, unseen"):
        load_images(stored, "test", 16)
    with pytest.raises(ValueError, match="holds no prepared TFDS data set"):
        load_images(str(tmp_path), "train", 16)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        load_images(stored, "train", 16, channels=4)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        load_images(stored, "train", 0)
