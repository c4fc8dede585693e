"""ViT: images as runs of patches through the one transformer block (arXiv:2010.11929).

    (1)  z_0 = [class token; patches E] + E_pos
    (2)  z_l = blocks of self-attention and MLP, each behind a norm (pre-norm)
    (3)  y   = norm(z_L), the class token's or the mean of all patches', then the head

With `stem`, x is cut from the features of a ResNet instead of the pixels (the hybrids of section 3.1).
What is published and not here: dropout.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sora_jax.array_types import Array, Float, PyTree
from sora_jax.config import check
from sora_jax.models.attention import AttentionFn, RowAttention, xla_attention
from sora_jax.models.layers import dense, layer_norm
from sora_jax.models.recognition import SegmentOutput, one_segment, whole_clips
from sora_jax.models.resnet_stem import ResNetStem, ResNetStemConfig
from sora_jax.models.transformer import Context, FeedForward, SelfAttention, Sublayer, scanned_blocks
from sora_jax.patches.patchify import patchify
from sora_jax.patches.positions import interpolate_positions


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Size and computation of a `ViT`; `VIT_SIZES` names the published ones. The defaults are ViT-B/16's.

    Attributes:
        image_size: (height, width) in pixels.
        patch_size: side of a patch in pixels; with a stem, a multiple of its stride (its features' patches have this
            side over that stride).
        channels: values of a pixel.
        width: size of a token inside the model.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_dim: hidden size of the MLP.
        pooling: what is classified: the class `token`, or the `mean` of all patches (then there is no class token).
        representation_dim: size of the hidden layer (with tanh) that the head has in pre-training; 0 for none.
        num_classes: values that the head puts out; 0 for no head.
        norm_eps: epsilon of every norm.
        exact_gelu: GELU by the error function, instead of its tanh approximation.
        dtype: of the computation; parameters, norms, softmax and head stay float32.
        remat: what a block keeps for its backward pass: `none` keeps all, `dots` the matrix products, `full` nothing.
        attention: name of a kernel (see `sora_jax.parallel.attention`).
        stem: the ResNet of a hybrid, or None.
    """

    kind: ClassVar[str] = "vit"

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    channels: int = 3
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    pooling: Literal["token", "mean"] = "token"
    representation_dim: int = 0
    num_classes: int = 1000
    norm_eps: float = 1e-6
    exact_gelu: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "xla", "blockwise", "splash"] = "xla"
    stem: ResNetStemConfig | None = None

    def __post_init__(self) -> None:
        for field in ("patch_size", "channels", "width", "depth", "num_heads", "mlp_dim"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        for field in ("representation_dim", "num_classes"):
            check(getattr(self, field) >= 0, self, field, "at least 0")
        whole = all(side >= 1 and side % self.patch_size == 0 for side in self.image_size)
        check(whole, self, "image_size", f"(height, width), positive multiples of patch_size {self.patch_size}")
        check(self.width % self.num_heads == 0, self, "num_heads", f"a divisor of width {self.width}")
        check(self.norm_eps > 0, self, "norm_eps", "positive")
        if self.stem is not None:
            whole = self.patch_size % self.stem.stride == 0
            check(whole, self, "patch_size", f"a multiple of the stem's stride {self.stem.stride}")

    num_frames: ClassVar[int] = 1
    takes_any_size: ClassVar[Literal[True]] = True  # `resize_images`

    @property
    def patch(self) -> tuple[int, int, int]:
        """(t, h, w) of a patch."""
        return 1, self.patch_size, self.patch_size

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Of an image, (height, width, channels)."""
        return *self.image_size, self.channels

    def network(self, patch_dim: int, num_segments: int, attention_fn: AttentionFn = xla_attention) -> ViT:
        """Returns the network; the size of patches is its own, and a row holds one image."""
        del patch_dim, num_segments
        return ViT(self, attention_fn)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


_WIDTHS = {
    "ti": dict(width=192, depth=12, num_heads=3, mlp_dim=768),
    "s": dict(width=384, depth=12, num_heads=6, mlp_dim=1536),
    "b": dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
    "l": dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
    "h": dict(width=1280, depth=32, num_heads=16, mlp_dim=5120),
}
_PATCHES = {"ti": (16,), "s": (32, 16), "b": (32, 16), "l": (32, 16), "h": (14,)}
# arXiv:2010.11929, table 1, with the smaller ones of arXiv:2106.10270, table 2.
VIT_SIZES: dict[str, ViTConfig] = {
    f"vit_{size}_{patch}": ViTConfig(patch_size=patch, **_WIDTHS[size]) for size in _WIDTHS for patch in _PATCHES[size]
}
# The hybrids of the official code. Its "R+ViT-Ti/16" has 8x8 patches of features of stride 4, which are 32 pixels.
VIT_SIZES |= {
    "vit_r_ti_32": ViTConfig(patch_size=32, **_WIDTHS["ti"], stem=ResNetStemConfig(())),
    "vit_r26_s_32": ViTConfig(patch_size=32, **_WIDTHS["s"], stem=ResNetStemConfig((2, 2, 2, 2))),
    "vit_r26_b_32": ViTConfig(patch_size=32, **_WIDTHS["b"], stem=ResNetStemConfig((2, 2, 2, 2))),
    "vit_r50_b_16": ViTConfig(patch_size=16, **_WIDTHS["b"], stem=ResNetStemConfig((3, 4, 9))),
    "vit_r50_l_32": ViTConfig(patch_size=32, **_WIDTHS["l"], stem=ResNetStemConfig((3, 4, 6, 3))),
}


class Encoder(nn.Module):
    """Tokens with learned positions through the blocks: equations 1 and 2 and the norm of 3.

    Attributes:
        sublayers: of each block.
        depth: number of blocks.
        class_token: whether a learned token is put before the others.
        eps: of the norms.
        dtype: of the computation.
        remat: see `ViTConfig`.
    """

    sublayers: tuple[Sublayer, ...]
    depth: int
    class_token: bool
    eps: float
    dtype: str
    remat: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch width"]:
        """Returns (B, D) float32: the normed class token, or the mean of all normed tokens where there is none."""
        batch, _, width = x.shape
        if self.class_token:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("width",))
            token = self.param("class_token", init, (width,), jnp.float32).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, width)), x], axis=1)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "width"))
        x = x + self.param("position_embedding", init, x.shape[1:], jnp.float32).astype(self.dtype)
        blocks = scanned_blocks(
            self.sublayers, depth=self.depth, eps=self.eps, dtype=self.dtype, remat=self.remat, name="blocks"
        )
        x, _ = blocks(x, Context(segment_ids=jnp.ones(x.shape[:2], jnp.int32)))
        norm = layer_norm(name="norm", eps=self.eps, affine=True)
        return norm(x[:, 0]) if self.class_token else norm(x).mean(axis=1)


class ViT(nn.Module):
    """Classifies images.

    Attributes:
        config: size and computation.
        attention_fn: the kernel of self-attention; `sora_jax.parallel.attention` chooses it for devices.
    """

    config: ViTConfig
    attention_fn: AttentionFn = xla_attention

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch out"]:
        """Computes logits, or features where the model has no head.

        Args:
            images: (B, H, W, channels), in [-1, 1] for the published weights.

        Returns:
            (B, num_classes) float32; (B, width) or (B, representation_dim) where `num_classes` is 0.

        Raises:
            ValueError: images of another size or number of channels than the config's.
        """
        c = self.config
        expected = (*c.image_size, c.channels)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}; "
                "sora_jax.models.vit.resize_images makes a model for another size."
            )
        features, side = images, c.patch_size
        if c.stem is not None:
            features, side = ResNetStem(c.stem, c.dtype, name="stem")(images), c.patch_size // c.stem.stride
        # An image is a clip of one frame.
        patches = jax.vmap(functools.partial(patchify, patch_size=(1, side, side)))(features[:, None])  # (B, L, P)
        x = dense(c.width, ("patch", "width"), name="patch_embedding", dtype=c.dtype)(patches.astype(c.dtype))
        sublayers = encoder_sublayers(
            {"self_attention": self.attention_fn},
            num_heads=c.num_heads, mlp_dim=c.mlp_dim, eps=c.norm_eps, exact_gelu=c.exact_gelu, dtype=c.dtype,
        )  # fmt: skip
        class_token = c.pooling == "token"
        x = Encoder(sublayers, c.depth, class_token, c.norm_eps, c.dtype, c.remat, name="encoder")(x)
        if c.representation_dim:
            axes = ("width", "representation")
            x = jnp.tanh(dense(c.representation_dim, axes, name="representation", dtype="float32")(x))
        if c.num_classes:
            x = dense(c.num_classes, ("width", "classes"), name="head", dtype="float32", zero=True)(x)
        return x

    def on_rows(self, patches: Array, positions: Array, segment_ids: Array, extents: Array) -> SegmentOutput:
        """Returns the logits of rows of one image each, whose patches stand in order (positions tell nothing more)."""
        del positions, extents
        c = self.config
        images = whole_clips(patches, (1, *c.image_size), c.patch, c.channels)[:, 0]
        return one_segment(self(images), segment_ids)

    def fresh_params(self, key: jax.Array) -> dict:
        """Returns what `init_params` does."""
        return init_params(self, key)


def encoder_sublayers(
    kernels: Mapping[str, RowAttention], *, num_heads: int, mlp_dim: int, eps: float, exact_gelu: bool, dtype: str
) -> tuple[Sublayer, ...]:
    """Returns a block of ViT: self-attention with biases, without norms of queries and keys or angles, then an MLP.

    Args:
        kernels: of each self-attention by the name of its parameters, in order.
        num_heads: attention heads.
        mlp_dim: hidden size of the MLP.
        eps: of the norms.
        exact_gelu: see `ViTConfig`.
        dtype: of the computation.
    """
    attention = functools.partial(SelfAttention, num_heads, eps, dtype, qk_norm="none")
    mixers = {name: functools.partial(attention, attention=kernel) for name, kernel in kernels.items()}
    mixers["mlp"] = functools.partial(FeedForward, mlp_dim, dtype, exact_gelu)
    return tuple(Sublayer(name, mixer, affine=True, modulated=False) for name, mixer in mixers.items())


def resize_images(config: ViTConfig, params: PyTree, image_size: tuple[int, int]) -> tuple[ViTConfig, PyTree]:
    """Returns config and parameters for images of another size, positions interpolated (section 3.2).

    Args:
        config: of the model.
        params: its parameters, unboxed.
        image_size: (height, width) in pixels.

    Raises:
        ValueError: sides that are not positive multiples of the patch's.
    """
    new = dataclasses.replace(config, image_size=image_size)
    encoder = params["encoder"]
    table = interpolate_positions(encoder["position_embedding"], config.grid, new.grid)
    return new, {**params, "encoder": {**encoder, "position_embedding": table}}


def reset_head(config: ViTConfig, params: PyTree, num_classes: int) -> tuple[ViTConfig, PyTree]:
    """Returns config and parameters for fine-tuning: the whole head replaced by a zero layer (section 3.2).

    Args:
        config: of the model.
        params: its parameters, unboxed.
        num_classes: of the new head; 0 for none.
    """
    new = dataclasses.replace(config, num_classes=num_classes, representation_dim=0)
    params = {name: value for name, value in params.items() if name not in ("representation", "head")}
    if num_classes:
        kernel = np.zeros((config.width, num_classes), np.float32)
        params["head"] = {"kernel": kernel, "bias": np.zeros(num_classes, np.float32)}
    return new, params


def init_params(model: ViT, key: jax.Array) -> dict:
    """Returns freshly drawn parameters, boxed with their logical axes."""
    # They do not depend on the kernel, and one that is built for a mesh takes no single row.
    c, model = model.config, model.clone(attention_fn=xla_attention)
    return model.init(key, jnp.zeros((1, *c.image_size, c.channels)))["params"]


def abstract_params(model: ViT) -> dict:
    """Returns the shapes and logical axes of the parameters, without allocating them."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
