"""ViViT: clips as runs of tubelets through the one transformer block, in the four models of arXiv:2103.15691.

    Model 1  every token attends to every token of the clip
    Model 2  a transformer over each tubelet frame; another over the frames' class tokens
    Model 3  each block attends over space (among the tokens of a frame), then over time (among those of a place)
    Model 4  half of the heads of each block attend over space, half over time

Models 3 and 4 have no class token (section 3.3) and classify the mean of all tokens. Attention over an axis is the
block's own self-attention with a kernel that rearranges queries, keys and values, so that its projections cost what
Model 1's do and its products what the paper counts. As in the authors' code (Scenic), Model 2's positions are those
of a frame, shared by all frames, and its transformer over time has four blocks. Dropout and stochastic depth are
left out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from sora_jax.array_types import Array, Float, PyTree
from sora_jax.config import check
from sora_jax.models.attention import AttentionFn, RowAttention, xla_attention
from sora_jax.models.layers import dense
from sora_jax.models.recognition import SegmentOutput, one_segment, whole_clips
from sora_jax.models.vit import Encoder, ViTConfig, encoder_sublayers
from sora_jax.patches.patchify import patchify
from sora_jax.patches.positions import interpolate_positions


@dataclasses.dataclass(frozen=True)
class ViViTConfig:
    """Size and computation of a `ViViT`; the defaults are ViViT-B/16x2's for Kinetics-400.

    Attributes:
        model: 1 joint attention, 2 factorised encoder, 3 factorised self-attention, 4 factorised dot products.
        num_frames: of a clip.
        image_size: (height, width) of a frame in pixels.
        tubelet_size: (t, h, w) extent of a tubelet in frames and pixels. With t = 1 frames are sampled uniformly
            and cut as images are (section 3.2).
        channels: values of a pixel.
        width: size of a token inside the model.
        depth: number of blocks; of Model 2, those over space.
        temporal_depth: number of blocks over time of Model 2.
        num_heads: attention heads; even in Model 4.
        mlp_dim: hidden size of the MLP.
        num_classes: values that the head puts out; 0 for no head.
        norm_eps: epsilon of every norm.
        exact_gelu: GELU by the error function; the authors' code and weights have its tanh approximation.
        dtype: of the computation; parameters, norms, softmax and head stay float32.
        remat: what a block keeps for its backward pass: `none` keeps all, `dots` the matrix products, `full` nothing.
        attention: name of a kernel (see `sora_jax.parallel.attention`).
    """

    kind: ClassVar[str] = "vivit"

    model: int = 1
    num_frames: int = 32
    image_size: tuple[int, int] = (224, 224)
    tubelet_size: tuple[int, int, int] = (2, 16, 16)
    channels: int = 3
    width: int = 768
    depth: int = 12
    temporal_depth: int = 4
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 400
    norm_eps: float = 1e-6
    exact_gelu: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "xla", "blockwise", "splash"] = "xla"

    def __post_init__(self) -> None:
        check(self.model in (1, 2, 3, 4), self, "model", "1, 2, 3 or 4")
        for field in ("channels", "width", "depth", "temporal_depth", "num_heads", "mlp_dim"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        check(self.num_classes >= 0, self, "num_classes", "at least 0")
        size = self.tubelet_size
        check(len(size) == 3 and min(size) >= 1, self, "tubelet_size", "positive (t, h, w)")
        whole = self.num_frames >= 1 and self.num_frames % size[0] == 0
        check(whole, self, "num_frames", f"a positive multiple of the tubelet's {size[0]}")
        whole = all(side >= 1 and side % part == 0 for side, part in zip(self.image_size, size[1:], strict=True))
        check(whole, self, "image_size", f"(height, width), positive multiples of the tubelet's {size[1:]}")
        check(self.width % self.num_heads == 0, self, "num_heads", f"a divisor of width {self.width}")
        check(self.model != 4 or self.num_heads % 2 == 0, self, "num_heads", "even in Model 4")
        check(self.norm_eps > 0, self, "norm_eps", "positive")

    takes_any_size: ClassVar[Literal[False]] = False

    @property
    def patch(self) -> tuple[int, int, int]:
        """(t, h, w) of a patch: the tubelet."""
        return self.tubelet_size

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Of a clip, (frames, height, width, channels)."""
        return self.num_frames, *self.image_size, self.channels

    def network(self, patch_dim: int, num_segments: int, attention_fn: AttentionFn = xla_attention) -> ViViT:
        """Returns the network; the size of tubelets is its own, and a row holds one clip."""
        del patch_dim, num_segments
        return ViViT(self, attention_fn)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tubelets along time, height and width."""
        t, h, w = self.tubelet_size
        return self.num_frames // t, self.image_size[0] // h, self.image_size[1] // w


class ViViT(nn.Module):
    """Classifies clips.

    Attributes:
        config: size and computation.
        attention_fn: the kernel of self-attention; `sora_jax.parallel.attention` chooses it for devices.
    """

    config: ViViTConfig
    attention_fn: AttentionFn = xla_attention

    @nn.compact
    def __call__(self, clips: Float[Array, "batch frames height width channels"]) -> Float[Array, "batch out"]:
        """Computes logits, or features where the model has no head.

        Args:
            clips: (B, T, H, W, channels), in [-1, 1] for the published weights.

        Returns:
            (B, num_classes) float32; (B, width) where `num_classes` is 0.

        Raises:
            ValueError: clips of another size or number of channels than the config's.
        """
        c = self.config
        expected = (c.num_frames, *c.image_size, c.channels)
        if tuple(clips.shape[1:]) != expected:
            raise ValueError(f"clips must be (B, {', '.join(map(str, expected))}), got {tuple(clips.shape)}.")
        patches = jax.vmap(functools.partial(patchify, patch_size=c.tubelet_size))(clips)  # (B, L, P)
        x = dense(c.width, ("patch", "width"), name="patch_embedding", dtype=c.dtype)(patches.astype(c.dtype))

        attention, num_frames = self.attention_fn, c.grid[0]
        kernels = {
            1: {"self_attention": attention},
            2: {"self_attention": attention},
            3: {
                "spatial_attention": over_space(attention, num_frames),
                "temporal_attention": over_time(attention, num_frames),
            },
            4: {"self_attention": over_space_and_time(attention, num_frames)},
        }[c.model]
        sublayers = encoder_sublayers(
            kernels,
            num_heads=c.num_heads, mlp_dim=c.mlp_dim, eps=c.norm_eps, exact_gelu=c.exact_gelu, dtype=c.dtype,
        )  # fmt: skip
        encoder = functools.partial(Encoder, sublayers, eps=c.norm_eps, dtype=c.dtype, remat=c.remat)
        if c.model == 2:
            x = rearrange(x, "b (t n) d -> (b t) n d", t=num_frames)
            x = encoder(depth=c.depth, class_token=True, name="encoder")(x)
            x = rearrange(x, "(b t) d -> b t d", t=num_frames).astype(c.dtype)
            x = encoder(depth=c.temporal_depth, class_token=True, name="temporal_encoder")(x)
        else:
            x = encoder(depth=c.depth, class_token=c.model == 1, name="encoder")(x)
        if c.num_classes:
            x = dense(c.num_classes, ("width", "classes"), name="head", dtype="float32", zero=True)(x)
        return x

    def on_rows(self, patches: Array, positions: Array, segment_ids: Array, extents: Array) -> SegmentOutput:
        """Returns the logits of rows of one clip each, whose patches stand in order (positions tell nothing more)."""
        del positions, extents
        c = self.config
        clips = whole_clips(patches, (c.num_frames, *c.image_size), c.patch, c.channels)
        return one_segment(self(clips), segment_ids)

    def fresh_params(self, key: jax.Array) -> dict:
        """Returns what `init_params` does."""
        return init_params(self, key)


def over_space(attention: RowAttention, num_frames: int) -> RowAttention:
    """Returns `attention` among the tokens of a frame; tokens (B, T * N, ...) are in the order t, then place."""
    return _rearranged(attention, "b (t n) ... -> (b t) n ...", "(b t) n ... -> b (t n) ...", num_frames)


def over_time(attention: RowAttention, num_frames: int) -> RowAttention:
    """Returns `attention` among the tokens of a place; tokens (B, T * N, ...) are in the order t, then place."""
    return _rearranged(attention, "b (t n) ... -> (b n) t ...", "(b n) t ... -> b (t n) ...", num_frames)


def over_space_and_time(attention: RowAttention, num_frames: int) -> RowAttention:
    """Returns `over_space` for the first half of the heads beside `over_time` for the second (section 3.3, Model 4).

    That is the order of the paper's equation; the authors' code has the halves the other way round.
    """
    space, time = over_space(attention, num_frames), over_time(attention, num_frames)

    def attend(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array) -> Array:
        (q_s, q_t), (k_s, k_t), (v_s, v_t) = (jnp.split(x, 2, axis=2) for x in (q, k, v))
        out = space(q_s, k_s, v_s, query_ids, key_ids), time(q_t, k_t, v_t, query_ids, key_ids)
        return jnp.concatenate(out, axis=2)

    return attend


def _rearranged(attention: RowAttention, there: str, back: str, num_frames: int) -> RowAttention:
    """Returns `attention` on rearranged queries, keys, values and segment ids."""

    def attend(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array) -> Array:
        out = attention(*(rearrange(x, there, t=num_frames) for x in (q, k, v, query_ids, key_ids)))
        return rearrange(out, back, b=len(q), t=num_frames)

    return attend


def init_from_vit(
    config: ViViTConfig,
    key: jax.Array,
    vit_config: ViTConfig,
    vit_params: PyTree,
    embedding: Literal["central_frame", "inflation"] = "central_frame",
) -> PyTree:
    """Returns parameters of a `ViViT` that begin where an image model ended (section 3.4).

    Blocks, class token and norm are the image model's (of Model 2: those over space). Its positions are interpolated
    to the frame's grid and repeated in time. Model 3's attention over time is all zeros, so that at first each frame
    is what the image model sees. Model 2's transformer over time and every head are drawn as `key` says.

    Args:
        config: of the ViViT.
        key: of what the image model does not have.
        vit_config: of the image model.
        vit_params: its parameters, unboxed.
        embedding: of a tubelet of t frames: `inflation` is the image's kernel over t, for each frame; `central_frame`
            is the image's kernel for frame t // 2 and zero for the others.

    Returns:
        The parameters of `ViViT(config)`, unboxed.

    Raises:
        ValueError: an unknown `embedding`, or an image model with a stem, of another width, depth, number of heads,
            size of MLP or of patch, number of channels, or without the class token that Models 1 and 2 have.
    """
    if embedding not in ("central_frame", "inflation"):
        raise ValueError(f"embedding must be 'central_frame' or 'inflation', got {embedding!r}.")
    patch = (vit_config.patch_size, vit_config.patch_size)
    pairs = {
        n: (getattr(vit_config, n), getattr(config, n)) for n in ("width", "depth", "num_heads", "mlp_dim", "channels")
    }
    for name, (image, video) in {**pairs, "patch_size": (patch, config.tubelet_size[1:])}.items():
        if image != video:
            raise ValueError(f"the image model's {name} must be the ViViT's {video}, got {image}.")
    if vit_config.stem is not None:
        raise ValueError("the image model must cut pixels into patches, not a stem's features.")
    class_token = config.model in (1, 2)
    if class_token and vit_config.pooling != "token":
        raise ValueError(f"Model {config.model} needs an image model with pooling 'token', got {vit_config.pooling!r}.")

    params = nn.meta.unbox(jax.jit(functools.partial(init_params, ViViT(config)))(key))
    image, encoder = vit_params["encoder"], params["encoder"]

    kernel = np.asarray(vit_params["patch_embedding"]["kernel"])
    frames = config.tubelet_size[0]
    shares = np.full(frames, 1 / frames) if embedding == "inflation" else np.arange(frames) == frames // 2
    kernel = (shares[:, None, None] * kernel).reshape(-1, config.width).astype(np.float32)
    params["patch_embedding"] = {"kernel": kernel, "bias": vit_params["patch_embedding"]["bias"]}

    table = interpolate_positions(image["position_embedding"], vit_config.grid, config.grid[1:])
    special, places = np.split(table, [len(table) - math.prod(config.grid[1:])])
    if config.model != 2:
        places = np.tile(places, (config.grid[0], 1))
    encoder["position_embedding"] = np.concatenate([special, places]) if class_token else places

    blocks = dict(image["blocks"])
    if config.model == 3:
        for part in ("", "_norm"):
            blocks[f"spatial_attention{part}"] = blocks.pop(f"self_attention{part}")
            blocks[f"temporal_attention{part}"] = encoder["blocks"][f"temporal_attention{part}"]
        blocks["temporal_attention"] = jax.tree.map(jnp.zeros_like, blocks["temporal_attention"])
    encoder |= {"blocks": blocks, "norm": image["norm"]}
    if class_token:
        encoder["class_token"] = image["class_token"]
    return params


def init_params(model: ViViT, key: jax.Array) -> dict:
    """Returns freshly drawn parameters, boxed with their logical axes."""
    # They do not depend on the kernel, and one that is built for a mesh takes no single row.
    c, model = model.config, model.clone(attention_fn=xla_attention)
    return model.init(key, jnp.zeros((1, c.num_frames, *c.image_size, c.channels)))["params"]


def abstract_params(model: ViViT) -> dict:
    """Returns the shapes and logical axes of the parameters, without allocating them."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
