"""The Inception Score: closed forms, and loops over the definition."""

import math

import numpy as np
import pytest

from sora_jax.evaluation.inception_score import inception_score


def by_definition(probabilities):
    marginal = [sum(column) / len(column) for column in zip(*probabilities, strict=True)]
    kl = [sum(p * math.log(p / q) for p, q in zip(row, marginal, strict=True)) for row in probabilities]
    return math.exp(sum(kl) / len(kl))


def test_closed_forms():
    assert inception_score(np.zeros((10, 7))) == pytest.approx(1)  # no idea
    assert inception_score(np.tile([0.0, 5, -3], (9, 1))) == pytest.approx(1)  # always the same
    sure = np.tile(1e4 * np.eye(8), (5, 1)).astype(np.float32)  # sure, each class as often: their number
    assert inception_score(sure) == pytest.approx(8)
    assert inception_score(np.pad(sure, ((0, 0), (0, 3)), constant_values=-1e4)) == pytest.approx(8)  # a class unseen


def test_against_the_definition():
    logits = np.random.default_rng(0).normal(size=(53, 11)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert inception_score(logits + 700) == pytest.approx(by_definition(probabilities), rel=1e-10)
    parts = [by_definition(probabilities[i : i + 20]) for i in (0, 20, 40)]  # the last of 13
    assert inception_score(logits, split_size=20) == pytest.approx(np.mean(parts), rel=1e-10)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"got shape \(0, 4\)"):
        inception_score(np.zeros((0, 4)))
    with pytest.raises(ValueError, match="split_size must be at least 1, got 0"):
        inception_score(np.zeros((2, 4)), split_size=0)
    with pytest.raises(ValueError, match="finite"):
        inception_score(np.full((2, 4), np.nan))
