import io

import numpy as np
import pytest
from PIL import Image

from sora_jax.evaluation import plots


def decoded(png):
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_a_grid_has_each_image_at_its_place():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(2, 3, 4, 5, 1)).astype(np.uint8)
    grid = plots.image_grid(list(images / 127.5 - 1), scale=2, gap=1)
    assert grid.shape == (2 * (8 + 1) + 1, 3 * (10 + 1) + 1, 3)
    for row in range(2):
        for column in range(3):
            top, left = 9 * row + 1, 11 * column + 1
            cell = grid[top : top + 8, left : left + 10]
            np.testing.assert_array_equal(cell[::2, ::2, 1], images[row, column, :, :, 0])
            np.testing.assert_array_equal(cell[1::2, 1::2, 2], images[row, column, :, :, 0])
    assert (grid[0] == 255).all() and (grid[:, 11] == 255).all()
    np.testing.assert_array_equal(decoded(plots.png_bytes(grid)), grid)


def test_values_out_of_range_are_cut_and_colours_stay():
    image = np.zeros((1, 1, 1, 3)) + np.array([-2.0, 0.0, 2.0])
    np.testing.assert_array_equal(plots.image_grid([image], scale=1, gap=0), [[[0, 128, 255]]])


def test_a_grid_of_what_is_not_finite_is_refused():
    with pytest.raises(FloatingPointError, match="not finite"):
        plots.image_grid([np.full((1, 1, 1, 3), np.nan)])


@pytest.mark.parametrize("rows", [[np.zeros((2, 4, 4, 2))], [np.zeros((2, 4, 4, 1)), np.zeros((3, 4, 4, 1))], []])
def test_rows_that_make_no_grid(rows):
    with pytest.raises(ValueError, match="rows must all be"):
        plots.image_grid(rows)


def test_png_bytes_want_8_bit():
    with pytest.raises(ValueError, match=r"image must be .* uint8, got \(2, 2\) float64"):
        plots.png_bytes(np.zeros((2, 2)))


def points(seed):
    return {name: np.random.default_rng(seed).uniform(-2, 2, (40, 2)) for name in ("t = 0", "t = 4")}


PICTURES = {
    "points": lambda seed: plots.point_trajectories(points(0), points(seed), {k: (v, v) for k, v in points(1).items()}),
    "bits": lambda seed: plots.bit_trajectories(
        {"t = 0": np.eye(5)}, {"t = 0": np.float32(np.random.default_rng(seed).random((5, 5)) < 0.5)}
    ),
    "terms": lambda seed: plots.bound_terms(np.random.default_rng(seed).random(30), "value"),
    "rate": lambda seed: plots.rate_distortion(np.linspace(0, 2, 30), np.random.default_rng(seed).random(30)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_its_data(name):
    one, same, other = (decoded(PICTURES[name](seed)) for seed in (2, 2, 3))
    np.testing.assert_array_equal(one, same)
    assert one.shape == other.shape
    assert 0.001 < (one != other).any(axis=-1).mean() < 0.5


def test_rate_and_distortion_must_be_as_long():
    with pytest.raises(ValueError, match=r"must be as long, got \(3,\) and \(4,\)"):
        plots.rate_distortion(np.zeros(3), np.zeros(4))
