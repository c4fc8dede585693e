"""Values to pixels: clipped where they are finite, refused where they are not."""

import numpy as np
import pytest

from sora_jax.pixels import check_steps, to_pixels


def test_finite_values_are_rounded_and_clipped():
    values = np.array([-1e30, -2.0, -1.0, 0.0, 0.5, 1.0, 3.0, 1e30])
    assert to_pixels(values).tolist() == [0, 0, 0, 128, 191, 255, 255, 255]
    assert to_pixels(values).dtype == np.uint8


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value):
    with pytest.raises(FloatingPointError, match="sheets are not finite: 25% of their values are NaN or infinite"):
        to_pixels(np.array([0.0, value, 0.0, 0.0]), "sheets")


def test_the_first_bad_sample_and_its_step_are_named():
    check_steps(np.array([-1, -1]), ["a", "b"], 4, "advice")
    words = "the samples are not finite: c is NaN or beyond 1e19 from step 1 of 4 on (2 of 4 samples are); do this."
    with pytest.raises(FloatingPointError) as error:
        check_steps(np.array([-1, -1, 0, 3]), ["a", "b", "c", "d"], 4, "do this")
    assert str(error.value) == words
