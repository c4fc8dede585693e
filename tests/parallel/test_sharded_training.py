import functools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from helpers.compilation import on_devices

SCRIPT = pathlib.Path(__file__).parent / "sharded_losses.py"


@functools.cache
def losses(kinds):
    """The losses of some kinds of runs; a process for each tuple of them."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *kinds], env=on_devices(8), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SOME, OTHERS = ("clips", "images"), ("packed images", "pairs")


@pytest.mark.parametrize(
    ("kinds", "kind"),
    [(SOME, kind) for kind in SOME] + [pytest.param(OTHERS, kind, marks=pytest.mark.slow) for kind in OTHERS],
    ids=[*SOME, *OTHERS],
)
def test_eight_devices_give_the_losses_of_one(kinds, kind):
    """The batch is split over both axes of the mesh, the parameters over one of them."""
    found = losses(kinds)
    assert found["devices"] == 8
    one, eight = found[kind]["one"], found[kind]["eight"]
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=2e-5)
    np.testing.assert_allclose(eight["held_out"], one["held_out"], rtol=2e-5)
    assert (one["share"], eight["share"]) == (1, 0.25)
