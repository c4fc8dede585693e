"""Training of `SoraTransformer` on packed rows of clips, by rectified flow.

For a patch with time t, noise eps and clean values x_0 (t = 0 is data, t = 1 is noise):

(1)  x_t = (1 - t) x_0 + t eps,  t that of the patch's column of the level table (`draw_levels`)
(2)  loss = mean of (v_theta(x_t, t) - (eps - x_0))^2 over tokens that are not known, or over clips
     (`FlowConfig.loss_weighting`)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from sora_jax.array_types import Array, Float, Int, PackedBatch, PyTree
from sora_jax.config import ExperimentConfig, FlowConfig, PatchConfig, check
from sora_jax.data.captioned import DataConfig
from sora_jax.diffusion import flow
from sora_jax.diffusion.losses import flow_loss
from sora_jax.diffusion.process import FlowProcess
from sora_jax.models import sora
from sora_jax.models.attention import AttentionFn, xla_attention
from sora_jax.models.sora import GRID_FREQUENCIES, ModelConfig, SoraTransformer
from sora_jax.patches.levels import FREE, KNOWN
from sora_jax.patches.segments import segment_one_hot
from sora_jax.training import streams
from sora_jax.training.task import Loss, Metrics, packed_batch


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The sample sheet that training draws.

    Attributes:
        prompts: one clip each.
        num_frames, height, width, fps: of the clips; the patch divides height and width.
        num_steps: Euler steps.
        guidance_scale: of classifier-free guidance; 1 is none.
        vae: directory of the autoencoder that latents are decoded by; without it a model of latents draws no sheet.
    """

    prompts: tuple[str, ...] = ("frog", "red heart", "rocket", "tiger face")
    num_frames: int = 8
    height: int = 48
    width: int = 48
    fps: float = 8.0
    num_steps: int = 20
    guidance_scale: float = 2.0
    vae: str = ""

    def __post_init__(self) -> None:
        for field in ("num_frames", "height", "width", "num_steps"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        check(self.fps > 0, self, "fps", "positive")


@dataclasses.dataclass(frozen=True)
class SoraConfig(ExperimentConfig):
    """Training of a `SoraTransformer` on packed rows of clips."""

    kind: ClassVar[str] = "sora"

    data: DataConfig = DataConfig()  # noqa: RUF009
    model: ModelConfig = ModelConfig()  # noqa: RUF009
    patch: PatchConfig = PatchConfig()  # noqa: RUF009
    flow: FlowConfig = FlowConfig()  # noqa: RUF009
    sample: SampleConfig = SampleConfig()

    @property
    def text_dim(self) -> int:
        """Size of a caption token state."""
        return self.model.text_dim

    @property
    def process_kind(self) -> str:
        """What makes data noisy."""
        return "flow"

    def __post_init__(self) -> None:
        super().__post_init__()
        frames = math.ceil(self.data.num_frames[1] / self.patch.size[0])
        needed = max(2 * (self.data.known_first_share > 0), frames * (self.data.free_frames_share > 0))
        allowed = f"at least {needed} for clips of {frames} latent frames"
        check(self.data.num_levels >= needed, self.data, "max_levels", allowed)
        for field, patch in zip(("height", "width"), self.patch.size[1:], strict=True):
            value = getattr(self.sample, field)
            if value % patch:
                above = (value // patch + 1) * patch
                works = f"{above - patch} or {above}" if value > patch else f"{above}"
                raise ValueError(
                    f"sample.{field} must be a multiple of the {patch} pixels of patch.size {self.patch.size}, "
                    f"got {value}; {works} would work."
                )


class SoraTask:
    """A `SoraTransformer` and its loss; a `sora_jax.training.task.Task`.

    Args:
        config: of the experiment.
        attention_fn: the kernel; the reference suffices for shapes and counts.
    """

    def __init__(self, config: SoraConfig, attention_fn: AttentionFn = xla_attention) -> None:
        self.config = config
        self.model = SoraTransformer(config.model, config.patch.dim, attention_fn)

    def init_params(self, key: jax.Array) -> PyTree:
        """Returns freshly drawn parameters, boxed with their logical axes; the kernel does not change them."""
        return sora.init_params(self.model, key)

    def abstract_batch(self, num_rows: int | None = None) -> PackedBatch:
        """Returns the shapes and dtypes of a batch (of `num_rows` rows instead of the configured ones)."""
        config = self.config
        return packed_batch(config.data, config.patch.dim, config.model.text_dim, num_rows)

    def loss(
        self, params: PyTree, batch: PackedBatch, rows: Int[Array, " rows"], key: jax.Array, training: bool
    ) -> Loss:
        """Returns equation 2 at drawn times and noise; there is no dropout."""
        del training
        times_key, noise_key = jax.random.split(key)
        levels = draw_levels(times_key, rows, batch, self.config)
        noise = draw_noise(noise_key, rows, batch.patches.shape[1:])
        total, weight = weighted_loss(params, self.model, batch, levels, noise, self.config)
        return Loss(total, weight, count_tokens(batch, self.config.data.max_segments))

    def rates(self, totals: Mapping[str, float], seconds: float, num_batches: int) -> dict[str, float]:
        """Returns tokens, clips and useful operations a second, and the share of slots that held a patch."""
        slots = num_batches * self.config.data.batch_size * self.config.data.row_length
        return {
            "real_tokens_per_second": totals["real_tokens"] / seconds,
            "real_token_share": totals["real_tokens"] / slots,
            "clips_per_second": totals["clips"] / seconds,
            "model_flops_per_second": model_flops(self.config, **totals) / seconds,
        }

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Returns nothing: the loss says it all."""
        return {}

    def figures(self) -> dict[str, int]:
        """Returns nothing more: clips have sizes of their own."""
        return {}


def draw_levels(
    key: jax.Array, rows: Int[Array, " rows"], batch: PackedBatch, config: SoraConfig
) -> Float[Array, "batch levels"]:
    """Draws the level table of each row by the roles of its columns (`sora_jax.patches.levels`), (B, J) float32.

    A segment has a logit-normal time, shifted for its size by `flow.base_tokens`, and so has each of its free columns,
    in rising order where `flow.free_times` says so. What is known has a time uniform in [0, `flow.known_noise`].

    Args:
        key: of the draw.
        rows: their numbers among all of an update.
        batch: rows of clips.
        config: of the experiment.
    """
    process, flow = FlowProcess(config.flow), config.flow
    num_segments, num_levels = batch.clip_ids.shape[1], batch.level_roles.shape[1]

    def of_row(key: jax.Array, segments: Array, roles: Array, segment_ids: Array) -> Array:
        own = process.draw(key, (num_segments,))
        free_key, known_key = (jax.random.fold_in(key, number) for number in (1, 2))
        free = process.draw(free_key, (num_levels,))
        if flow.free_times == "rising":
            free = sorted_within(free, jnp.where(roles == FREE, segments, 0))
        known = flow.known_noise * jax.random.uniform(known_key, (num_levels,))
        asked = own[jnp.maximum(segments - 1, 0)]
        num_tokens = (segments[:, None] == segment_ids).sum(axis=1)
        drawn = process.shift(jnp.where(roles == FREE, free, asked), num_tokens)
        return jnp.where(roles == KNOWN, known, drawn)

    keys = streams.row_keys(key, rows)
    return jax.vmap(of_row)(keys, batch.level_segments, batch.level_roles, batch.segment_ids)


def sorted_within(values: Float[Array, " n"], groups: Int[Array, " n"]) -> Float[Array, " n"]:
    """Returns the values of each group in rising order, at the places that the group has."""
    by_value, by_place = jnp.lexsort((values, groups)), jnp.argsort(groups, stable=True)
    return jnp.zeros_like(values).at[by_place].set(values[by_value])


def draw_noise(key: jax.Array, rows: Int[Array, " rows"], shape: tuple[int, ...]) -> Array:
    """Returns standard normal noise for each row, (B, *shape) float32; `rows` are their global numbers."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(streams.row_keys(key, rows))


def network(
    model: SoraTransformer,
    params: PyTree,
    rows: PackedBatch,
    x: Float[Array, "batch length values"],
    levels: Float[Array, "batch levels"],
) -> Float[Array, "batch length values"]:
    """Returns what a model says of rows, in training and in sampling.

    Args:
        model: the network.
        params: of the model.
        rows: where patches are, whose they are, and their captions; their own values are not looked at.
        x: (B, L, P), the patches at their levels.
        levels: (B, J), t of each column of the level table.
    """
    return model.apply(
        {"params": params},
        x,
        rows.positions,
        rows.segment_ids,
        levels,
        rows.level_ids,
        rows.text,
        rows.text_segment_ids,
    )


def weighted_loss(
    params: PyTree,
    model: SoraTransformer,
    batch: PackedBatch,
    levels: Float[Array, "batch levels"],
    noise: Float[Array, "batch length values"],
    config: SoraConfig,
) -> tuple[Array, Array]:
    """Returns equation 2 times what its mean is over, and that number.

    Args:
        params: of the model.
        model: the network.
        batch: rows of clips.
        levels: t of each column of the level table.
        noise: for every patch.
        config: of the experiment.

    Returns:
        (loss * weight, weight), both float32 scalars; the weight counts tokens or clips.
    """
    num_segments = batch.clip_ids.shape[1]
    t = jnp.take_along_axis(levels, batch.level_ids, axis=1)  # (B, L)
    xt = flow.interpolate(batch.patches, noise, t)
    output = network(model, params, batch, xt, levels)
    loss = flow_loss(output, xt, t, batch.patches, noise, batch.loss_mask, batch.segment_ids, num_segments, config.flow)
    if config.flow.loss_weighting == "token":
        weight = batch.loss_mask.sum()
    else:
        members = segment_one_hot(batch.segment_ids, num_segments) * batch.loss_mask[..., None]
        weight = (members.sum(axis=1) > 0).sum()
    weight = weight.astype(jnp.float32)
    return loss * weight, weight


def count_tokens(batch: PackedBatch, num_segments: int) -> Metrics:
    """Returns what the work of a batch depends on, float32 scalars.

    `real_tokens` and `text_tokens` are not padding; `self_pairs` sums the squares of the segments' lengths and
    `cross_pairs` their lengths times their captions'.
    """
    lengths = segment_one_hot(batch.segment_ids, num_segments).sum(axis=1)  # (B, K)
    captions = segment_one_hot(batch.text_segment_ids, num_segments).sum(axis=1)
    return {
        "real_tokens": lengths.sum(),
        "text_tokens": captions.sum(),
        "clips": (lengths > 0).sum().astype(jnp.float32),
        "levels": (batch.level_segments > 0).sum().astype(jnp.float32),
        "self_pairs": jnp.square(lengths).sum(),
        "cross_pairs": (lengths * captions).sum(),
    }


def forward_flops(
    config: SoraConfig,
    *,
    real_tokens: float,
    text_tokens: float,
    self_pairs: float,
    cross_pairs: float,
    levels: float,
    **rest: float,
) -> float:
    """Returns the useful operations of a forward pass: those that each clip would need alone, without padding.

    So attention counts the sum of the squares of the segments' lengths, and a packed row does not flatter itself.

    Args:
        config: of the experiment.
        real_tokens: patches that are not padding.
        text_tokens: caption tokens that are not padding.
        self_pairs: sum over segments of their length squared.
        cross_pairs: sum over segments of their length times that of their caption.
        levels: noise levels, for each of which the conditioning is computed once.
        **rest: counts that do not matter to it.
    """
    m, patch_dim = config.model, config.patch.dim
    w = m.width
    a_token = 2 * 2 * patch_dim * w + m.depth * (2 * 4 * w * w + 2 * 2 * w * w + 2 * 2 * w * m.mlp_dim)
    if m.grid_embedding:
        a_token += 2 * 5 * GRID_FREQUENCIES * w
    a_text_token = 2 * (m.text_dim * w + w * w) + m.depth * 2 * 2 * w * w
    a_level = 2 * (m.frequency_dim * w + w * w + 6 * w * w)
    a_pair = m.depth * 2 * 2 * w
    return real_tokens * a_token + text_tokens * a_text_token + levels * a_level + (self_pairs + cross_pairs) * a_pair


def model_flops(config: SoraConfig, **counts: float) -> float:
    """Returns the useful operations of training on a batch: three forward passes; see `forward_flops`."""
    return 3 * forward_flops(config, **counts)
