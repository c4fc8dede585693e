import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from sora_jax.families.sora import SoraTask, forward_flops
from sora_jax.models.sora import SORA_SIZES
from sora_jax.training import state as states
from sora_jax.training.flops import count_flops, step_flops


def test_matrix_product_scan_and_convolution():
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 5))
    assert count_flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    assert count_flops(jax.jit(jnp.matmul), a, b) == 2 * 3 * 4 * 5

    square = jnp.zeros((4, 4))
    scanned = lambda x: jax.lax.scan(lambda c, _: (c @ square, None), x, length=7)[0]  # noqa: E731
    assert count_flops(scanned, a) == 7 * 2 * 3 * 4 * 4

    image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 16))
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert count_flops(convolve, image, kernel) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)


def test_convolutions_in_groups_with_strides_and_their_gradients():
    image, kernel = jnp.zeros((2, 9, 7, 6)), jnp.zeros((3, 2, 2, 12))  # three groups: two channels into four each
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    assert jax.eval_shape(convolve, image, kernel).shape == (2, 4, 2, 12)
    forward = 2 * (2 * 4 * 2 * 12) * (3 * 2 * 2)
    assert count_flops(convolve, image, kernel) == forward
    # XLA's count: nothing here is padded, so it is the same.
    assert jax.jit(convolve).lower(image, kernel).compile().cost_analysis()["flops"] == forward

    # Without strides the kernel's gradient is as many products, as a convolution with batch groups.
    convolve = lambda k: jax.lax.conv_general_dilated(  # noqa: E731
        image, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    back = lambda k, y: jax.vjp(convolve, k)[1](y)  # noqa: E731
    jaxpr = jax.make_jaxpr(back)(kernel, jnp.zeros((2, 7, 6, 12)))
    groups = [eqn.params.get("batch_group_count") for eqn in jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]
    assert sorted(groups) == [1, 3]
    assert count_flops(back, kernel, jnp.zeros((2, 7, 6, 12))) == 2 * 2 * (2 * 7 * 6 * 12) * (3 * 2 * 2)


def test_loop_of_unknown_length_is_refused():
    loop = lambda x: jax.lax.while_loop(lambda y: y.sum() < 1, lambda y: y @ y, x)  # noqa: E731
    with pytest.raises(ValueError, match="while loop"):
        count_flops(loop, jnp.zeros((2, 2)))


def test_useful_flops_equal_the_jaxpr_of_one_clip_alone():
    """A row that one clip fills: nothing is padding, so the closed form must be what the model does."""
    config = tiny_run.config(data={"row_length": 12, "text_length": 5, "max_caption_tokens": 2})
    task = SoraTask(config)
    batch = task.abstract_batch(num_rows=1)
    levels = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    apply = lambda params, *args: task.model.apply({"params": params}, *args)  # noqa: E731
    counted = count_flops(
        apply,
        states.abstract_params(task),
        batch.patches,
        batch.positions,
        batch.segment_ids,
        levels,
        batch.level_ids,
        batch.text,
        batch.text_segment_ids,
    )
    useful = forward_flops(config, real_tokens=12, text_tokens=5, self_pairs=144, cross_pairs=60, clips=1)
    assert counted == useful  # one level needs no one-hot product


def test_step_counts_backward_and_accumulation():
    one = step_flops(SoraTask(tiny_run.CONFIG))
    two = step_flops(SoraTask(tiny_run.config(optimizer={"accumulation_steps": 2})))
    assert two == 2 * one
    rows, length, text = 8, 12, 8
    dense = forward_flops(
        tiny_run.CONFIG,
        real_tokens=rows * length,
        text_tokens=rows * text,
        self_pairs=rows * length**2,
        cross_pairs=rows * length * text,
        clips=rows * 6,  # the conditioning of every column of the table of levels
    )
    assert 2.5 * dense < one < 3.5 * dense


def test_a_14b_step_is_counted_without_allocating_it():
    config = dataclasses.replace(tiny_run.CONFIG, model=SORA_SIZES["wan_14b"])
    shapes = states.abstract_params(SoraTask(config))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) > 14e9
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
