"""Precision and recall against loops over the definition in float64, and examples that a reader can check."""

import numpy as np
import pytest

from sora_jax.evaluation.precision_recall import precision_recall


def by_definition(reference, samples, k):
    """Equations 1 and 2, a pair at a time."""

    def radius(features, i):
        return sorted(np.linalg.norm(features[i] - features[j]) for j in range(len(features)) if j != i)[k - 1]

    def share(points, features):
        radii = [radius(features, i) for i in range(len(features))]
        return np.mean([any(np.linalg.norm(x - s) <= r for s, r in zip(features, radii, strict=True)) for x in points])

    return share(samples, reference), share(reference, samples)


def line(*places):
    return np.array(places, np.float32)[:, None]


def test_on_a_line():
    """With k = 1 the balls of 0, 1 and 5 have the radii 1, 1 and 4; those of 2.5, 3 and 9.5 have 0.5, 0.5 and 6.5."""
    found = precision_recall(line(0, 1, 5), line(2.5, 3, 9.5), num_neighbours=1)
    assert found.precision == pytest.approx(2 / 3)  # 2.5 and 3 are in 5's ball, 9.5 is in none
    assert found.recall == pytest.approx(1 / 3)  # 5 is in 9.5's ball, 0 and 1 are in none


@pytest.mark.parametrize("shift", [0.0, 1000.0], ids=["centred", "far from zero"])
def test_against_the_definition(shift):
    rng = np.random.default_rng(0)
    reference = (rng.normal(size=(41, 5)) + shift).astype(np.float32)
    samples = (0.8 * rng.normal(size=(30, 5)) + 0.7 + shift).astype(np.float32)
    expected = by_definition(reference.astype(np.float64), samples.astype(np.float64), 3)
    assert 0.1 < min(expected) and max(expected) < 0.95
    for block_size in (7, 4096):
        assert precision_recall(reference, samples, block_size=block_size) == pytest.approx(expected)
    swapped = precision_recall(samples, reference)
    assert (swapped.recall, swapped.precision) == pytest.approx(expected)


def test_the_extremes():
    features = np.random.default_rng(1).normal(size=(20, 4)).astype(np.float32)
    assert precision_recall(features, features[::-1]) == (1, 1)
    assert precision_recall(features, features + 100) == (0, 0)
    few = np.repeat(features[:2], 5, axis=0)  # a model that makes two of the images: precise, without recall
    found = precision_recall(features, few)
    assert found.precision == 1 and found.recall == pytest.approx(2 / 20)


def test_bad_values_are_named():
    good = np.zeros((5, 3), np.float32)
    with pytest.raises(ValueError, match="samples must have more than num_neighbours 3 rows, got 3"):
        precision_recall(good, good[:3])
    with pytest.raises(ValueError, match=r"got \(5, 3\) and \(5, 2\)"):
        precision_recall(good, good[:, :2])
    with pytest.raises(ValueError, match="reference must be finite"):
        precision_recall(good + np.inf, good)
    with pytest.raises(ValueError, match="at least 1, got 0 and 4096"):
        precision_recall(good, good, num_neighbours=0)
