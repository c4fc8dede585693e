"""A data set that an earlier version prepared still opens, and gives the pictures that were put in."""

import pathlib

import numpy as np
import pytest

from sora_jax.data.decode import decode_frames
from sora_jax.data.sources import open_source, split_names

OLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "clip_folder"
"""Written through TFDS's own builder from red.png, moves.gif and blue.png, which the test below describes."""

RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 200, 30), (30, 30, 200), (230, 230, 230)


def test_it_has_its_splits():
    assert sorted(split_names(str(OLDER))) == ["train", "unseen"]


@pytest.mark.parametrize(
    ("split", "name", "caption", "label", "fps", "size", "colours"),
    [
        ("train", "red.png", "a red field", "still", 1.0, (8, 12), [RED]),
        ("train", "moves.gif", "colours that change", "clip", 10.0, (12, 8), [GREEN, BLUE, GREY]),
        ("unseen", "blue.png", "a blue field", "still", 1.0, (10, 10), [BLUE]),
    ],
)
def test_its_clips_are_what_was_put_in(split, name, caption, label, fps, size, colours):
    source = open_source(str(OLDER), split)
    meta, place = source.metadata, source.metadata.names.index(name)
    assert meta.captions[place] == caption
    assert source.label_names[meta.labels[place]] == label
    assert (meta.fps[place], meta.height[place], meta.width[place]) == (fps, *size)
    frames = decode_frames(source.read_frames(place, range(len(colours))), *size)
    assert len(frames) == meta.num_frames[place]
    np.testing.assert_allclose(frames.mean((1, 2)), colours, atol=2)  # JPEG rounds
