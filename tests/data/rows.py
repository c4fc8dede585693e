"""Rows of a pipeline, taken and compared."""

import numpy as np


def take(rows, count):
    with rows:
        return [next(rows) for _ in range(count)]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name, x, y in zip(a._fields, a, b, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)
