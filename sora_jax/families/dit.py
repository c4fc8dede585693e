"""Training of DiT: discrete diffusion of images of a class, packed into rows (arXiv:2212.09748).

Every segment of a row has a step t and a class of its own; the class is dropped for the null class now and then, for
classifier-free guidance. The loss is a mean over tokens,

(1)  `simple`  the squared error of the prediction                                        arXiv:2006.11239, Eq. 14
(2)  `hybrid`  (1) plus the bound's term in bits, for the variance alone                  arXiv:2102.09672, Eq. 16

The share of the bound is that of the official code (facebookresearch/DiT): 1, of a term in bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.array_types import Array, Float, Int, PackedBatch, PyTree
from sora_jax.config import ExperimentConfig, PatchConfig, check
from sora_jax.data.labelled import FixedSize, LabelledDataConfig
from sora_jax.diffusion.process import DiscreteProcess, GaussianConfig
from sora_jax.families.recognition import count_examples
from sora_jax.models import dit
from sora_jax.models.attention import AttentionFn, xla_attention
from sora_jax.models.dit import DiT, DiTConfig, split_output
from sora_jax.patches.segments import without_padding
from sora_jax.training import streams
from sora_jax.training.flops import count_flops
from sora_jax.training.task import Loss, packed_batch


@dataclasses.dataclass(frozen=True)
class ClassSampleConfig:
    """The sample sheet that training draws.

    Attributes:
        labels: classes, a row of the sheet each.
        columns: samples of each class.
        size: (height, width) in pixels or latent cells.
        num_steps: of the respaced ancestral sampler.
        guidance_scale: of classifier-free guidance; 1 is none.
        vae: directory of the autoencoder that latents are decoded by; without it the sheet shows their first channels.
    """

    labels: tuple[int, ...] = (0, 1, 2, 3)
    columns: int = 8
    size: tuple[int, int] = (32, 32)
    num_steps: int = 50
    guidance_scale: float = 2.0
    vae: str = ""

    def __post_init__(self) -> None:
        check(bool(self.labels) and min(self.labels) >= 0, self, "labels", "classes, at least one")
        check(min(self.size) >= 1, self, "size", "positive (height, width)")
        for field in ("columns", "num_steps"):
            check(getattr(self, field) >= 1, self, field, "at least 1")


@dataclasses.dataclass(frozen=True)
class ClassConditionalConfig(ExperimentConfig):
    """Training of a DiT on labelled images, of one size or each of its own.

    Attributes:
        data: pixels or latents that it is trained on; their labels are the classes.
        patch: of the rows: the model's.
        model: the network.
        process: of the noise; its variance is learned where the model's is.
        class_dropout: probability of training on the null class.
        sample: the sample sheet.
    """

    kind: ClassVar[str] = "dit"

    data: LabelledDataConfig = LabelledDataConfig(  # noqa: RUF009
        eval_splits=(), sampling=FixedSize((32, 32)), row_length=256, max_segments=1, num_bins=1, flip=0.5
    )
    patch: PatchConfig = PatchConfig(size=(1, 2, 2), channels=4)  # noqa: RUF009
    model: DiTConfig = DiTConfig()  # noqa: RUF009
    process: GaussianConfig = GaussianConfig(variance="learned", loss="hybrid", discrete=True)  # noqa: RUF009
    class_dropout: float = 0.1
    sample: ClassSampleConfig = ClassSampleConfig()

    @property
    def process_kind(self) -> str:
        """What makes data noisy."""
        return self.process.kind

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.class_dropout <= 1, self, "class_dropout", "between 0 and 1")
        if not self.model.has_null_class:
            check(self.class_dropout == 0, self, "class_dropout", "0 for a model without a null class")
            check(self.sample.guidance_scale == 1, self.sample, "guidance_scale", "1 for a model without a null class")
        size = self.model.patch_size
        check(self.patch.size == (1, size, size), self.patch, "size", f"the model's (1, {size}, {size})")
        channels = self.model.in_channels
        check(self.patch.channels == channels, self.patch, "channels", f"the model's {channels}")
        steps = self.process.num_levels
        check(self.sample.num_steps <= steps, self.sample, "num_steps", f"at most the {steps} of process.num_levels")
        self._check_data()
        learned = self.model.learned_variance
        allowed = "hybrid where the model learns its variance" if learned else "simple where the variance is fixed"
        check(self.process.loss == ("hybrid" if learned else "simple"), self.process, "loss", allowed)
        check(not self.process.learn_betas, self.process, "learn_betas", "false for DiT")
        check(max(self.sample.labels) < self.model.num_classes, self.sample, "labels", "classes of the model")
        whole = all(side % size == 0 for side in self.sample.size)
        check(whole, self.sample, "size", f"multiples of the patch's {size}")

    @property
    def makes_pixels(self) -> bool:
        """Whether the model makes pixels, grey or RGB, rather than latents that an autoencoder decodes."""
        return self.model.in_channels in (1, 3) and not self.sample.vae

    def sampled_process(self, clipped: bool = True) -> DiscreteProcess:
        """Returns the process, with the bounds that pixels are clipped to when they are sampled, where they may be."""
        return DiscreteProcess(self.process, (-1.0, 1.0) if self.makes_pixels and clipped else None)

    def _check_data(self) -> None:
        """Raises ValueError where the rows are not such that the model takes."""
        data, patch = self.data, self.model.patch_size
        check(data.label == "class", data, "label", "'class': the class is what the model is conditioned on")
        check(data.num_frames == 1, data, "num_frames", "1: DiT makes images")
        check(data.text_length == 0, data, "text_length", "0: DiT is conditioned on classes, not on captions")
        if data.sampling.one_size:
            whole = all(side % patch == 0 for side in data.sampling.size)
            check(whole, data.sampling, "size", f"multiples of the patch's {patch}")
            tokens = math.prod(side // patch for side in data.sampling.size)
            check(data.row_length >= tokens, data, "row_length", f"at least the {tokens} patches of an image")


class ClassConditionalTask:
    """A DiT and its loss; a `sora_jax.training.task.Task`.

    Args:
        config: of the experiment.
        attention_fn: the kernel; the reference suffices for shapes and counts.
    """

    def __init__(self, config: ClassConditionalConfig, attention_fn: AttentionFn = xla_attention) -> None:
        self.config = config
        self.model = DiT(config.model, attention_fn)
        self.process = config.sampled_process()

    def init_params(self, key: jax.Array) -> PyTree:
        """Returns freshly drawn parameters, boxed with their logical axes."""
        return dit.init_params(self.model, key)

    def abstract_batch(self, num_rows: int | None = None) -> PackedBatch:
        """Returns the shapes and dtypes of a batch (of `num_rows` rows instead of the configured ones)."""
        return packed_batch(self.config.data, self.config.patch.dim, 0, num_rows)

    def loss(
        self, params: PyTree, batch: PackedBatch, rows: Int[Array, " rows"], key: jax.Array, training: bool
    ) -> Loss:
        """Returns equation 1 or 2 at drawn steps and noise, with classes dropped in training."""
        keys = streams.row_keys(key, rows)
        num_segments = batch.labels.shape[1]

        def draw(key: jax.Array) -> tuple[Array, Array, Array]:
            step_key, noise_key, drop_key = jax.random.split(key, 3)
            steps = self.process.draw(step_key, (num_segments,))
            noise = jax.random.normal(noise_key, batch.patches.shape[1:])
            return steps, noise, jax.random.uniform(drop_key, (num_segments,)) < self.config.class_dropout

        steps, noise, dropped = jax.vmap(draw)(keys)
        labels = jnp.where(dropped & training, self.config.model.num_classes, batch.labels)
        return self.loss_at(params, batch._replace(labels=labels), steps, noise)

    def loss_at(self, params: PyTree, batch: PackedBatch, steps: Int[Array, "batch segments"], noise: Array) -> Loss:
        """Returns equation 1 or 2.

        Args:
            params: of the model.
            batch: rows of images; where a label is no class, the null class is meant.
            steps: (B, K), of each segment.
            noise: for every patch.
        """
        real = batch.segment_ids > 0
        batch = batch._replace(patches=without_padding(batch.patches, batch.segment_ids))
        of_token = jnp.take_along_axis(steps, jnp.maximum(batch.segment_ids - 1, 0), axis=1)  # (B, L)
        # A token is an example of its own, of the level of its image.
        shape = batch.patches.shape
        x0, noise = (a.reshape(-1, shape[-1]) for a in (batch.patches, noise))

        def of_examples(x: Array, time: Array) -> Array:
            del time  # of each token; the model takes that of each segment
            out = network(self.model, params, batch, x.reshape(shape), steps.astype(jnp.float32))
            return out.reshape(-1, out.shape[-1])

        error = self.process.error(of_examples, x0, noise, of_token.reshape(-1), 1 / math.log(2))
        error = jnp.where(real, error.reshape(real.shape), 0)
        return Loss(error.sum(), real.sum().astype(jnp.float32), count_examples(batch))

    def rates(self, totals: Mapping[str, float], seconds: float, num_batches: int) -> dict[str, float]:
        """Returns tokens, images and (of one size) useful operations a second, and the share of slots with a patch."""
        one = self.forward_flops_of_one()
        slots = num_batches * self.config.data.batch_size * self.config.data.row_length
        return {
            "real_tokens_per_second": totals["real_tokens"] / seconds,
            "real_token_share": totals["real_tokens"] / slots,
            "examples_per_second": totals["examples"] / seconds,
            **({} if one is None else {"model_flops_per_second": 3 * totals["examples"] * one / seconds}),
        }

    def forward_flops_of_one(self) -> int | None:
        """Returns the operations of a forward pass of one image; None where images have sizes of their own."""
        data = self.config.data
        return _flops_of_one(self.config.model, data.sampling.size) if data.sampling.one_size else None

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Returns nothing: the loss says it all."""
        return {}

    def figures(self) -> dict[str, int]:
        """Returns the fixed table of positions and, of images of one size, the multiply-accumulates of one."""
        one = self.forward_flops_of_one()
        return {"num_table_params": dit.num_table_params(self.config.model)} | (
            {"forward_macs": one // 2} if one else {}
        )


def network(
    model: DiT,
    params: PyTree,
    rows: PackedBatch,
    x: Float[Array, "batch length values"],
    levels: Float[Array, "batch segments"],
) -> Float[Array, "batch length out"]:
    """Returns what a model says of rows, in training and in sampling.

    Args:
        model: the network.
        params: of the model.
        rows: where patches are, whose they are, and the classes; their own values are not looked at.
        x: (B, L, P), the patches at their levels.
        levels: (B, K), the step of each image: a level table with one column a segment.

    Returns:
        (B, L, P), or (B, L, 2 P) where the variance is learned: the prediction, then the variance's place.

    Raises:
        ValueError: a level table that has not one column for each segment.
    """
    if levels.shape != rows.labels.shape:
        raise ValueError(f"a DiT has one level an image, {rows.labels.shape}; got a level table of {levels.shape}.")
    out = model.apply({"params": params}, x, rows.positions, rows.segment_ids, levels, rows.labels)
    return jnp.concatenate(split_output(out, model.config), axis=-1) if model.config.learned_variance else out


@functools.cache
def _flops_of_one(config: DiTConfig, size: tuple[int, int]) -> int:
    """Returns the operations of a forward pass of one image of (height, width) cells; nothing is allocated."""
    plain = DiT(config)
    image = jax.ShapeDtypeStruct((1, *size, config.in_channels), jnp.float32)
    time, label = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (jnp.float32, jnp.int32))
    params = nn.meta.unbox(dit.abstract_params(plain))
    apply = functools.partial(plain.apply, method="on_images")
    return count_flops(lambda params, *args: apply({"params": params}, *args), params, image, time, label)
