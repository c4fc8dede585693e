"""What every experiment configures, as frozen dataclasses.

A value that cannot work fails at construction with an error that names the field, the value and what is
allowed. An experiment is an `ExperimentConfig` of some kind (`sora_jax.families` has them), whose JSON stands beside
every checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np

T = TypeVar("T")


def check(condition: bool, owner: Any, field: str, allowed: str) -> None:
    """Raises ValueError naming `owner`'s class, `field`, its value and what is `allowed`, unless `condition`."""
    if not condition:
        raise ValueError(f"{type(owner).__name__}.{field} must be {allowed}, got {getattr(owner, field)!r}.")


def check_range(owner: Any, field: str, low: float) -> None:
    """Checks that `field` is an increasing pair (lowest, highest) whose lowest is at least `low`."""
    lowest, highest = getattr(owner, field)
    check(low <= lowest <= highest, owner, field, f"(lowest, highest) with {low} <= lowest <= highest")


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    """How a clip is cut into patches.

    Attributes:
        size: (t, h, w) extent of a patch in frames and pixels (or latent frames and cells).
        channels: values a pixel (3 for RGB) or a latent cell holds.
        reference_rate: temporal positions are seconds times this rate (arXiv:2503.20314 counts latent frames).
    """

    size: tuple[int, int, int] = (2, 8, 8)
    channels: int = 3
    reference_rate: float = 4.0

    def __post_init__(self) -> None:
        check(len(self.size) == 3 and all(n >= 1 for n in self.size), self, "size", "positive (t, h, w)")
        check(self.channels >= 1, self, "channels", "at least 1")
        check(self.reference_rate > 0, self, "reference_rate", "positive")

    @property
    def dim(self) -> int:
        """Values in a patch, P."""
        return math.prod(self.size) * self.channels


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """What all data has.

    Attributes:
        split: the split that is trained on.
        eval_splits: held-out splits whose loss is reported.
        batch_size: rows (or examples) of the global batch.
    """

    split: str = "train"
    eval_splits: tuple[str, ...] = ()
    batch_size: int = 128

    def __post_init__(self) -> None:
        check(self.batch_size >= 1, self, "batch_size", "at least 1")

    @property
    def packs_several(self) -> bool:
        """Whether a row of a batch may hold more than one example."""
        return False


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """One data set of a mixture.

    Attributes:
        path: directory of a prepared TFDS data set.
        weight: of the samples that are trained on, its share is this over the sum of all weights.
        split: that is trained on (None: the config's).
        max_clips: train on this many of its clips (None: all).
        still_share: of its samples that are single frames (None: the config's).
    """

    path: str
    weight: float = 1.0
    split: str | None = None
    max_clips: int | None = None
    still_share: float | None = None

    def __post_init__(self) -> None:
        check(0 < self.weight < math.inf, self, "weight", "positive and finite")
        check(self.max_clips is None or self.max_clips >= 1, self, "max_clips", "None or at least 1")
        share = self.still_share
        check(share is None or 0 <= share <= 1, self, "still_share", "None or between 0 and 1")


@dataclasses.dataclass(frozen=True)
class PackedDataConfig(BatchConfig):
    """Where clips come from, and the rows they are packed into; how they are sampled is for a subclass to say.

    A data set holds pixels or latents, as it says itself; of latents, all sizes are in latent cells.

    Attributes:
        path: directory of a prepared TFDS data set (`experiments/prepare_data.py` prints it).
        mixture: several data sets instead of `path`, each with a weight. Held-out splits are those of all of them.
        max_clips: train on this many clips, chosen by `clip_seed` (None: all).
        clip_seed: chooses the `max_clips` clips.
        row_length: tokens of a packed row, L.
        text_length: caption tokens of a row, M; 0 leaves the captions out.
        max_segments: most clips of a row, K.
        max_levels: most noise levels of a row, J (None: K, which suffices where each clip has one).
        max_caption_tokens: longer captions are cut to this many tokens.
        num_bins: rows that the packer fills at once.
        batch_size: a multiple of `num_shards`.
        num_shards: logical shards; fixes the order of the data whatever the number of hosts and workers.
        num_workers: processes that decode, per host (0: in the main process).
        prefetch: batches kept ready.
        caption_dropout: probability of training on the null caption.
        oversize: a sample larger than a row is made smaller (`resize`), which of latents means fewer frames, or left
            out (`skip`).
        flip: probability of training on the mirror image; of latents, these must have been stored.
        crop: what is taken of a picture, the same of all frames of a clip: all of it (`none`), the largest part of the
            sample's aspect in its middle (`center`), or a part drawn by `crop_area` and `crop_aspect` (`random`). Of
            latents, which cannot be resized, it is a window of the sample's size.
        crop_area: (least, most) share of the picture's area that a `random` crop takes.
        crop_aspect: (least, most) aspect of a `random` crop over that of the sample, or of the picture where samples
            keep its aspect.
        seed: of order, sampling and packing.
    """

    path: str = ""
    mixture: tuple[MixturePart, ...] = ()
    max_clips: int | None = None
    clip_seed: int = 0
    row_length: int = 1024
    text_length: int = 256
    max_segments: int = 32
    max_levels: int | None = None
    max_caption_tokens: int = 32
    num_bins: int = 64
    batch_size: int = 4
    num_shards: int = 2
    num_workers: int = 1
    prefetch: int = 4
    caption_dropout: float = 0.1
    oversize: Literal["resize", "skip"] = "resize"
    flip: float = 0.0
    crop: Literal["none", "center", "random"] = "none"
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(not (self.path and self.mixture), self, "mixture", "() where path names one")
        check(all(part.path for part in self.mixture), self, "mixture", "data sets with a path each")
        check(self.max_clips is None or not self.mixture, self, "max_clips", "None in a mixture, each part has its own")
        check(0 <= self.flip <= 1, self, "flip", "between 0 and 1")
        check_range(self, "crop_area", 1e-3)
        check(self.crop_area[1] <= 1, self, "crop_area", "at most 1")
        check_range(self, "crop_aspect", 1e-2)
        check(self.crop_aspect[1] < math.inf, self, "crop_aspect", "finite")
        for field in ("max_clips", "max_levels"):
            value = getattr(self, field)
            check(value is None or value >= 1, self, field, "None or at least 1")
        check(0 <= self.caption_dropout <= 1, self, "caption_dropout", "between 0 and 1")
        for field in ("row_length", "max_segments", "num_bins", "num_shards", "prefetch"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        check(self.num_workers >= 0, self, "num_workers", "at least 0")
        check(self.max_caption_tokens >= 2, self, "max_caption_tokens", "at least 2")
        check(
            self.text_length == 0 or self.text_length >= self.max_caption_tokens,
            self,
            "text_length",
            f"0 or at least max_caption_tokens ({self.max_caption_tokens})",
        )
        shards = self.num_shards
        check(self.batch_size % shards == 0, self, "batch_size", f"a multiple of num_shards ({shards})")

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """The data sets that are read: those of the mixture, or the one at `path`."""
        return self.mixture or (MixturePart(self.path, max_clips=self.max_clips),)

    @property
    def packs_several(self) -> bool:
        """Whether a row may hold more than one clip."""
        return self.max_segments > 1

    @property
    def how_to_fit(self) -> str:
        """What to change where no clip fits a row."""
        return f"raise data.row_length ({self.row_length}) or set data.oversize to 'resize'."

    @property
    def num_levels(self) -> int:
        """Columns of a row's level table, J."""
        return self.max_segments if self.max_levels is None else self.max_levels

    def for_evaluation(self: T) -> T:
        """Returns how held-out data is sampled and read: as it is, with every caption, in the main process."""
        crop = "none" if self.crop == "none" else "center"
        return dataclasses.replace(self, caption_dropout=0.0, flip=0.0, crop=crop, num_workers=0)

    def draw(self, rng: np.random.Generator, clip: Any, patch: PatchConfig, resizable: bool) -> Any:
        """Draws what is taken of a clip; a subclass says how.

        Args:
            rng: of this draw.
            clip: its index, and what it is stored with (`sora_jax.data.transforms.StoredClip`).
            patch: gives sizes their multiples.
            resizable: whether it may have another size than it is stored with, as pixels and unlike latents.

        Returns:
            The `sora_jax.data.transforms.Sample`, or why there is none, in words.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its clips are sampled.")


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Rectified flow: what the network predicts and which times it is trained on.

    Attributes:
        prediction: what the network puts out, `velocity` (eps - x_0) or the clean patch `x0`; the loss is the
            squared error of the velocity either way.
        time_mean: mean of the logit-normal time (arXiv:2403.03206, section 3.1); positive is noisier.
        time_std: its standard deviation.
        min_time: with `x0`, the velocity that the loss compares is (x_t - x_0) / max(t, min_time).
        base_tokens: times of a clip of n tokens are shifted, in training and in sampling, such that it is as uncertain
            at them as one of `base_tokens` is without (arXiv:2403.03206, section 5.3.2); None shifts nothing.
        loss_weighting: the loss is a mean over tokens or, each clip counting the same, over clips.
        free_times: of latent frames that have a time each: `independent`, or `rising` with the frames.
        known_noise: known patches have a time drawn uniformly from [0, known_noise], so that what a user gives need not
            be as clean as the data (arXiv:2106.15282 blurs and noises what it conditions on likewise).
    """

    prediction: Literal["velocity", "x0"] = "velocity"
    time_mean: float = 0.0
    time_std: float = 1.0
    min_time: float = 0.05
    loss_weighting: Literal["token", "clip"] = "token"
    free_times: Literal["independent", "rising"] = "independent"
    known_noise: float = 0.0
    base_tokens: int | None = None

    def __post_init__(self) -> None:
        check(self.time_std > 0, self, "time_std", "positive")
        check(0 < self.min_time < 1, self, "min_time", "between 0 and 1")
        check(self.base_tokens is None or self.base_tokens >= 1, self, "base_tokens", "None or at least 1")
        check(0 <= self.known_noise < 1, self, "known_noise", "at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay, clipping, accumulation and an EMA of the parameters.

    Attributes:
        learning_rate: after warm-up.
        final_share: the cosine ends at this share of `learning_rate`.
        warmup_steps: of the learning rate.
        b1, b2, eps, weight_decay: of AdamW; biases, norms and modulation tables are not decayed.
        clip_norm: largest global norm of the gradient.
        accumulation_steps: batches averaged into one update.
        ema_decay: limit of the EMA's decay; at step n it is min(ema_decay, (1 + n) / (10 + n)).
    """

    learning_rate: float = 3e-4
    final_share: float = 0.1
    warmup_steps: int = 200
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulation_steps: int = 1
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        check(0 < self.learning_rate < math.inf, self, "learning_rate", "positive and finite")
        check(0 <= self.final_share <= 1, self, "final_share", "between 0 and 1")
        check(self.warmup_steps >= 0, self, "warmup_steps", "at least 0")
        for field in ("b1", "b2", "ema_decay"):
            check(0 <= getattr(self, field) < 1, self, field, "at least 0 and below 1")
        check(self.eps > 0, self, "eps", "positive")
        check(0 <= self.weight_decay < math.inf, self, "weight_decay", "at least 0 and finite")
        check(self.clip_norm > 0, self, "clip_norm", "positive")
        check(self.accumulation_steps >= 1, self, "accumulation_steps", "at least 1")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the named mesh axes; -1 takes the devices that are left.

    Attributes:
        data: the batch is split over it, parameters are copied.
        fsdp: the batch and the parameters are split over it.
    """

    data: int = -1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for field in ("data", "fsdp"):
            check(getattr(self, field) == -1 or getattr(self, field) >= 1, self, field, "-1 or at least 1")
        check(not (self.data == -1 and self.fsdp == -1), self, "fsdp", "given where data is -1")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """One training run, whatever is trained; each family has a subclass (`sora_jax.families.registry`).

    Attributes:
        kind: of the family, as `config.json` says it.
        is_study: whether it ends with a report.
        num_steps: optimizer updates.
        seed: of the initialisation and of every draw of noise and time.
        log_every: steps between lines of metrics.
        eval_every: steps between held-out losses (0: never).
        eval_batches: batches of each held-out split.
        save_every: steps between checkpoints.
        keep: checkpoints kept beside the best one.
        sample_every: steps between sample sheets (0: never).
    """

    kind: ClassVar[str] = ""
    is_study: ClassVar[bool] = False

    data: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    num_steps: int = 10_000
    seed: int = 0
    log_every: int = 10
    eval_every: int = 1000
    eval_batches: int = 4
    save_every: int = 1000
    keep: int = 2
    sample_every: int = 1000

    def __post_init__(self) -> None:
        for field in ("num_steps", "log_every", "eval_batches", "save_every", "keep"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        for field in ("seed", "eval_every", "sample_every"):
            check(getattr(self, field) >= 0, self, field, "at least 0")

    if TYPE_CHECKING:  # every family has a field of this name, with a default of its own

        @property
        def model(self) -> Any:
            """Config of the network."""

    @property
    def process_kind(self) -> str | None:
        """What makes data noisy: `flow`, `gaussian` or `binomial`; None where nothing does."""
        return None


@dataclasses.dataclass(frozen=True)
class StudyConfig(ExperimentConfig):
    """An experiment that ends with a report: means over a few seeds, beside those of other experiments.

    Attributes:
        num_seeds: runs, of the seeds `seed`, `seed` + 1 ...; figures are means over them.
        beside: names of other such experiments that are run and reported with this one.
    """

    is_study: ClassVar[bool] = True

    num_seeds: int = 1
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_seeds >= 1, self, "num_seeds", "at least 1")
