"""Training of ViT, ViViT and NaViT: to name the class of an image or clip, or to match it with its caption.

Their batches are the generator's packed rows. A row of ViT or ViViT holds one image or clip of the model's size, so
that its patches are put together again; a row of NaViT holds as many as fit, of any size.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Generic, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sora_jax.array_types import Array, Int, PackedBatch, PyTree
from sora_jax.config import PatchConfig, StudyConfig, check
from sora_jax.data.labelled import LabelledDataConfig, NativeSize
from sora_jax.models.attention import AttentionFn, xla_attention
from sora_jax.models.navit import ContrastiveHead, NaViTConfig
from sora_jax.models.recognition import SegmentOutput
from sora_jax.models.vit import ViTConfig
from sora_jax.models.vivit import ViViTConfig
from sora_jax.patches.patchify import num_tokens
from sora_jax.patches.segments import segment_one_hot, without_padding
from sora_jax.training.contrastive import classification_loss, contrastive_loss
from sora_jax.training.flops import count_flops
from sora_jax.training.task import Loss, Metrics, packed_batch


@dataclasses.dataclass(frozen=True)
class RecognitionConfig(StudyConfig):
    """What classification and contrastive training have in common.

    Attributes:
        data: what it is trained on.
        patch: of the rows; of ViT and ViViT that of the model.
        learning_rates: tried with the first seed; the others go on with the best (none: `optimizer.learning_rate`).
        selection_split: of the held-out splits, the one that `learning_rates` are compared on; it is not scored.
        test_sides: sizes that the report scores held-out images at, the square root of the area in pixels, beside
            the one that training evaluates at. A ViT's positions are interpolated to them.
        model: the network.
    """

    data: LabelledDataConfig = LabelledDataConfig()  # noqa: RUF009
    patch: PatchConfig = PatchConfig(size=(1, 16, 16))  # noqa: RUF009
    learning_rates: tuple[float, ...] = ()
    selection_split: str = "validation"
    test_sides: tuple[int, ...] = ()
    sample_every: int = 0
    model: ViTConfig | ViViTConfig | NaViTConfig = ViTConfig()  # noqa: RUF009

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.sample_every == 0, self, "sample_every", "0: there is nothing to draw")
        rates = self.learning_rates
        check(all(0 < rate < math.inf for rate in rates), self, "learning_rates", "positive and finite")
        check(len(set(rates)) == len(rates), self, "learning_rates", "distinct")
        check(all(side >= 1 for side in self.test_sides), self, "test_sides", "at least 1 each")
        others = (self.data.split, *self.data.eval_splits)
        allowed = "another split than those that are trained on and scored"
        used = bool(self.learning_rates)
        check(not used or self.selection_split not in others, self, "selection_split", allowed)


@dataclasses.dataclass(frozen=True)
class ClassificationConfig(RecognitionConfig):
    """Training of a classifier.

    Attributes:
        model: the network; of its classes there are as many as the data set, or `data.speeds`, has.
        objective: `softmax`, or `sigmoid`: a binary cross-entropy for each class.
        label_smoothing: share of the target that is spread over all classes.
    """

    kind: ClassVar[str] = "classification"

    objective: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.label_smoothing < 1, self, "label_smoothing", "at least 0 and below 1")
        check(self.model.num_classes >= 1, self.model, "num_classes", "at least 1")
        check(self.data.label != "none", self.data, "label", "'class' or 'speed' for a classifier")
        check(self.data.text_length == 0, self.data, "text_length", "0: a classifier reads no captions")
        if not self.model.takes_any_size:
            check(not self.test_sides, self, "test_sides", "() for a ViViT, which takes clips of one size")
        elif self.model.patch is not None:
            whole = all(side % self.model.patch[1] == 0 for side in self.test_sides)
            check(whole, self, "test_sides", f"multiples of the patch's {self.model.patch[1]}")
        if self.data.label == "speed":
            speeds = len(self.data.speeds)
            check(self.model.num_classes == speeds, self.model, "num_classes", f"the {speeds} of data.speeds")
        check_rows(self.model, self.data, self.patch)

    def image_network(self, params: PyTree) -> tuple[ViTConfig | ViViTConfig | NaViTConfig, PyTree]:
        """Returns config and parameters of the network of images in a task's parameters."""
        return self.model, params


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig(RecognitionConfig):
    """Training of a NaViT and a projection of captions into one space.

    Attributes:
        model: the network; its head is not used and has one class.
        embedding_dim: of the space.
        text_dim: size of a caption token state (384 for MiniLM).
        chunk: pairs whose row of the matrix of all pairs is held at a time (None: all).
    """

    kind: ClassVar[str] = "contrastive"

    data: LabelledDataConfig = LabelledDataConfig(sampling=NativeSize(), text_length=256, label="none")  # noqa: RUF009
    model: NaViTConfig = NaViTConfig(num_classes=1)  # noqa: RUF009
    embedding_dim: int = 512
    text_dim: int = 384
    chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("embedding_dim", "text_dim"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        check(self.chunk is None or self.chunk >= 1, self, "chunk", "None or at least 1")
        check(self.data.text_length > 0, self.data, "text_length", "above 0: the captions are what is learned from")
        check(self.model.num_classes == 1, self.model, "num_classes", "1: the head is not used")
        check(self.data.label == "none", self.data, "label", "'none': the captions are what is learned from")
        check(self.data.caption_dropout == 0, self.data, "caption_dropout", "0: an image belongs to its own caption")
        check_rows(self.model, self.data, self.patch)

    def image_network(self, params: PyTree) -> tuple[NaViTConfig, PyTree]:
        """Returns config and parameters of the network of images in a task's parameters."""
        return self.model, params["image"]


def check_rows(model: ViTConfig | ViViTConfig | NaViTConfig, data: LabelledDataConfig, patch: PatchConfig) -> None:
    """Raises ValueError where the rows of the data are not what a model takes, naming both sizes."""
    if model.patch is None:
        check(not data.sampling.one_size, data, "sampling", "a NativeSize for NaViT")
        frames = -(-data.num_frames // patch.size[0])
        tokens = round(frames * data.sampling.largest_side**2 / (patch.size[1] * patch.size[2]))
        works = f"at least the {tokens} patches of the largest sample where oversize is 'skip'"
        check(data.oversize == "resize" or data.row_length >= tokens, data, "row_length", works)
        return
    size, frames = model.patch, model.num_frames
    check(patch.size == size, patch, "size", f"the model's {size}")
    check(patch.channels == model.channels, patch, "channels", f"the model's {model.channels}")
    check(data.sampling.one_size, data, "sampling", "a FixedSize for ViT and ViViT")
    check(data.sampling.size == model.image_size, data.sampling, "size", f"the model's image_size {model.image_size}")
    check(data.num_frames == frames, data, "num_frames", f"the model's {frames}")
    check(data.max_segments == 1, data, "max_segments", "1 for ViT and ViViT: a row holds one image or clip")
    tokens = num_tokens(frames, *model.image_size, size)
    check(data.row_length == tokens, data, "row_length", f"the {tokens} patches of the model's image or clip")


C = TypeVar("C", bound=RecognitionConfig)


class RecognitionTask(abc.ABC, Generic[C]):
    """What the two tasks share; a `sora_jax.training.task.Task`.

    A subclass says what a report is about.

    Args:
        config: of the experiment.
        attention_fn: the kernel; the reference suffices for shapes and counts.

    Attributes:
        headline: key and name of the figure that a report is about.
        held_out_score: the one of `scores` that a report follows through training.
        figures_of: returns the figures of columns: those of `scored`, (N, ...) each, then the labels, (N,).
    """

    text_dim = 0
    headline: ClassVar[tuple[str, str]]
    held_out_score: ClassVar[str]
    figures_of: ClassVar[Callable[..., dict[str, float]]]

    def __init__(self, config: C, attention_fn: AttentionFn = xla_attention) -> None:
        self.config = config
        self.model: nn.Module = config.model.network(config.patch.dim, config.data.max_segments, attention_fn)

    @abc.abstractmethod
    def scored(self, params: PyTree, batch: PackedBatch) -> tuple[Array, ...]:
        """Returns what each segment is scored by, (B, K, ...) each."""

    @abc.abstractmethod
    def loss(
        self, params: PyTree, batch: PackedBatch, rows: Int[Array, " rows"], key: jax.Array, training: bool
    ) -> Loss:
        """Returns the loss of a batch; see `sora_jax.training.task.Task`."""

    @abc.abstractmethod
    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Returns what the sums of `Loss.counts` say of the model, by name."""

    def init_params(self, key: jax.Array) -> PyTree:
        """Returns freshly drawn parameters, boxed with their logical axes."""
        return self.model.fresh_params(key)

    def abstract_batch(self, num_rows: int | None = None) -> PackedBatch:
        """Returns the shapes and dtypes of a batch (of `num_rows` rows instead of the configured ones)."""
        return packed_batch(self.config.data, self.config.patch.dim, self.text_dim, num_rows)

    def outputs(self, params: PyTree, batch: PackedBatch) -> SegmentOutput:
        """Returns what the network says of each segment; of ViT and ViViT, features are logits."""
        patches = without_padding(batch.patches, batch.segment_ids)
        rows = (patches, batch.positions, batch.segment_ids, batch.extents)
        # Flax cannot know what a method returns, nor that no variable is mutable.
        return cast(SegmentOutput, self.model.apply({"params": params}, *rows, method="on_rows"))

    def rates(self, totals: Mapping[str, float], seconds: float, num_batches: int) -> dict[str, float]:
        """Returns tokens, images (or clips) and useful operations a second, and the share of slots with a patch."""
        slots = num_batches * self.config.data.batch_size * self.config.data.row_length
        return {
            "real_tokens_per_second": totals["real_tokens"] / seconds,
            "real_token_share": totals["real_tokens"] / slots,
            "examples_per_second": totals["examples"] / seconds,
            "model_flops_per_second": 3 * self.forward_flops(totals) / seconds,
        }

    def forward_flops(self, totals: Mapping[str, float]) -> float:
        """Returns the useful operations of forward passes over images or clips, each alone and without padding.

        Args:
            totals: sums of `Loss.counts`.
        """
        model = self.config.model
        if model.example_shape is None:
            counts = {name: totals[name] for name in ("real_tokens", "examples", "self_pairs")}
            return model.forward_flops(self.config.patch.dim, **counts)
        return totals["examples"] * _flops_of_one(self.model)

    def forward_flops_of_one(self) -> int | None:
        """Returns the operations of a forward pass of one image or clip; None for NaViT, whose sizes differ."""
        return None if self.config.model.example_shape is None else _flops_of_one(self.model)

    def figures(self) -> dict[str, int]:
        """Returns the multiply-accumulates of one image or clip, where all have one size."""
        one = self.forward_flops_of_one()
        return {"forward_macs": one // 2} if one else {}


class ClassificationTask(RecognitionTask[ClassificationConfig]):
    """Classes of images or clips."""

    headline: ClassVar[tuple[str, str]] = ("accuracy", "accuracy")
    held_out_score: ClassVar[str] = "accuracy"

    def scored(self, params: PyTree, batch: PackedBatch) -> tuple[Array, ...]:
        """Returns the logits of each segment, (B, K, classes)."""
        return (self.outputs(params, batch).logits,)

    @staticmethod
    def figures_of(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns the accuracy, its binomial standard error, and that of always naming the most frequent class.

        Args:
            logits: (N, classes).
            labels: (N,).
        """
        accuracy = float((logits.argmax(axis=-1) == labels).mean())
        return {
            "accuracy": accuracy,
            "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / len(labels)),
            "most_frequent": float(np.bincount(labels).max() / len(labels)),
        }

    def loss(
        self, params: PyTree, batch: PackedBatch, rows: Int[Array, " rows"], key: jax.Array, training: bool
    ) -> Loss:
        """Returns the mean cross-entropy of the segments; nothing is drawn."""
        del rows, key
        c = self.config
        out = self.outputs(params, batch)
        known = out.present & (batch.labels >= 0)
        smoothing = c.label_smoothing if training else 0.0
        loss = classification_loss(out.logits, batch.labels, known, kind=c.objective, label_smoothing=smoothing)
        weight = known.sum().astype(jnp.float32)
        correct = (known & (out.logits.argmax(axis=-1) == batch.labels)).sum().astype(jnp.float32)
        return Loss(loss * weight, weight, count_examples(batch) | {"correct": correct, "labelled": weight})

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Returns the share of the examples with a class whose most likely class is theirs."""
        return {"accuracy": totals["correct"] / max(totals["labelled"], 1)}


class ContrastiveTask(RecognitionTask[ContrastiveConfig]):
    """Images or clips and their captions."""

    headline: ClassVar[tuple[str, str]] = ("recall_at_1", "recall")
    held_out_score: ClassVar[str] = "retrieval"

    def scored(self, params: PyTree, batch: PackedBatch) -> tuple[Array, ...]:
        """Returns the embeddings of each segment's image and caption, (B, K, E) each."""
        return self.embeddings(params, batch)[:2]

    @staticmethod
    def figures_of(image: np.ndarray, text: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns the share of images whose own caption is the nearest of all, and among the five nearest.

        A caption that is as near as the own one (the same words) counts as it.

        Args:
            image: (N, E).
            text: (N, E).
            labels: (N,), of no use.
        """
        del labels
        similarity = image @ text.T
        nearer = (similarity > np.diag(similarity)[:, None] + 1e-6).sum(axis=1)
        return {f"recall_at_{k}": float((nearer < k).mean()) for k in (1, 5)} | {"chance": 1 / len(image)}

    def __init__(self, config: ContrastiveConfig, attention_fn: AttentionFn = xla_attention) -> None:
        super().__init__(config, attention_fn)
        self.text_dim = config.text_dim
        self.head = ContrastiveHead(config.embedding_dim)

    def init_params(self, key: jax.Array) -> PyTree:
        """Returns {"image": those of the network, "head": those of the projections}."""
        c = self.config
        features = jnp.zeros((1, 1, c.model.width))
        text, ids = jnp.zeros((1, 1, c.text_dim)), jnp.ones((1, 1), jnp.int32)
        image_key, head_key = jax.random.split(key)
        head = self.head.init(head_key, features, text, ids)["params"]
        return {"image": super().init_params(image_key), "head": head}

    def embeddings(self, params: PyTree, batch: PackedBatch) -> tuple[Array, Array, Array, Array]:
        """Returns embeddings of images and captions, (B, K, E) each, the scale, and which are there, (B, K) bool."""
        out = self.outputs(params["image"], batch)
        variables = {"params": params["head"]}
        return *self.head.apply(variables, out.features, batch.text, batch.text_segment_ids), out.present

    def loss(
        self, params: PyTree, batch: PackedBatch, rows: Int[Array, " rows"], key: jax.Array, training: bool
    ) -> Loss:
        """Returns the contrastive loss over the pairs of the batch (of each one that is accumulated)."""
        del rows, key, training
        image, text, scale, present = self.embeddings(params, batch)
        loss = contrastive_loss(image, text, present, scale, chunk=self.config.chunk)
        weight = present.sum().astype(jnp.float32)
        mask = present.reshape(-1)
        u, v = (x.reshape(-1, x.shape[-1]) for x in (image, text))
        similarity = jnp.where(mask, jnp.einsum("ne,me->nm", u, v), -jnp.inf)
        own = jnp.einsum("ne,ne->n", u, v)
        # The same caption may stand for several images: one that is as near as the own is no mistake.
        correct = (mask & (own >= similarity.max(axis=-1) - 1e-6)).sum().astype(jnp.float32)
        return Loss(loss * weight, weight, count_examples(batch) | {"correct": correct})

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Returns the share of images whose caption is the nearest of those in their batch."""
        return {"retrieval": totals["correct"] / max(totals["examples"], 1)}


def count_examples(batch: PackedBatch) -> Metrics:
    """Returns what the work of a batch depends on, float32 scalars: see `sora_jax.families.sora.count_tokens`."""
    lengths = segment_one_hot(batch.segment_ids, batch.clip_ids.shape[1]).sum(axis=1)  # (B, K)
    return {
        "real_tokens": lengths.sum(),
        "examples": (lengths > 0).sum().astype(jnp.float32),
        "self_pairs": jnp.square(lengths).sum(),
    }


@functools.cache
def _flops_of_one(model: nn.Module) -> int:
    """Returns the operations of a forward pass of one image or clip; nothing is allocated."""
    plain = model.clone(attention_fn=xla_attention)
    shape = jax.ShapeDtypeStruct((1, *model.config.example_shape), jnp.float32)
    params = nn.meta.unbox(jax.eval_shape(plain.fresh_params, jax.random.key(0)))
    return count_flops(lambda params, x: plain.apply({"params": params}, x), params, shape)
