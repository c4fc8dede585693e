import itertools

import numpy as np
import pytest

from sora_jax.data.examples import ExampleBatches
from sora_jax.data.toy import HeartbeatConfig, SwissRollConfig


def count_up(rng, count):
    return np.arange(count, dtype=np.float32) + rng.integers(1000)


def test_a_batch_depends_on_its_number_and_the_seed_alone():
    first, second, other = (list(itertools.islice(ExampleBatches(count_up, seed, 8), 5)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert len({batch[0] for batch in first}) == 5
    assert not {batch[0] for batch in first} & {batch[0] for batch in other}


def test_going_on_from_a_place():
    batches = ExampleBatches(count_up, 3, 8)
    expected = list(itertools.islice(batches, 5))[3:]
    again = ExampleBatches(count_up, 3, 8)
    list(itertools.islice(again, 3))
    place = again.get_state()
    resumed = ExampleBatches(count_up, 3, 8)
    resumed.set_state(place)
    np.testing.assert_array_equal(list(itertools.islice(resumed, 2)), expected)
    assert resumed.summary() == "5 batches of 8 examples"


def test_hosts_share_the_batch_of_one():
    whole = next(ExampleBatches(count_up, 3, 8))
    parts = [next(ExampleBatches(count_up, 3, 8, process_index=i, process_count=4)) for i in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    with pytest.raises(ValueError, match=r"data.batch_size must be a multiple of the 3 hosts, got 8"):
        ExampleBatches(count_up, 3, 8, process_count=3)


def test_a_held_out_split_ends():
    assert len(list(ExampleBatches(count_up, 3, 8, length=4))) == 4


@pytest.mark.parametrize("config", [SwissRollConfig(), HeartbeatConfig()])
def test_examples_have_the_shape_that_their_config_says(config):
    batch = config.source("train")(np.random.default_rng(0), 7)
    assert batch.shape == (7, *config.shape)
    assert batch.dtype == np.float32
