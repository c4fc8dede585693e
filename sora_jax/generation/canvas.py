"""What is asked of the sampler: clips as segments, the levels they go through, and the rows they are sampled in.

A clip's patches hold noise where they are asked for, the clip's own values where they are known, and both, mixed as
the first level says, where a given clip is to be made anew in part (SDEdit, arXiv:2108.01073). Each column of a clip's
level table has a way of its own down the clip's ladder of levels:

    asked   down the ladder, which starts at the clip's `strength`
    known   always at its clean end
    free    down the ladder, frame after frame `stagger` steps later (a pyramid; arXiv:2407.01392, section 3.3)

The noise of a clip is drawn in the clip's own shape from the clip's own seed and packed afterwards, so a clip comes out
the same alone, beside others of other strengths and tables, and on any number of devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sora_jax.array_types import Float, Int, PackedBatch
from sora_jax.config import PatchConfig
from sora_jax.diffusion.gaussian import Levels
from sora_jax.diffusion.process import Process
from sora_jax.models.autoencoder.codec import Codec
from sora_jax.patches.levels import FREE, KNOWN, SegmentLevels, first_frames_known, free_frames, one_level
from sora_jax.patches.patchify import grid_shape, patchify, unpatchify
from sora_jax.patches.positions import grid_positions
from sora_jax.patches.rows import Segment, fill_row, first_fit, stack_rows

# Rows are made no finer than this many tokens and caption tokens, so that few shapes are ever compiled.
ROW_MULTIPLE = 128
TEXT_MULTIPLE = 32
CLEAN = Levels(0.0, 1.0, 0.0, 1.0)  # the level of data


@dataclasses.dataclass(frozen=True)
class ClipRequest:
    """One clip to be made.

    Attributes:
        prompt: what it shows; empty for an unconditional sample.
        num_frames: its frames.
        height, width: in pixels, multiples of the patch's.
        fps: frames a second.
        seed: of its noise.
        guidance_scale: of classifier-free guidance; 1 is none.
        strength: share of the way to noise that `content` is taken before it is made anew, in (0, 1]; 1 leaves nothing
            of it but what is known.
        known_frames: so many first frames are known, and are those of `content`.
        stagger: steps by which each latent frame begins later than the one before it; 0 for all at once.
        content: (T, height, width, channels) float32, a given clip with values in [-1, 1]; of all frames where
            `strength` is below 1, of the known ones otherwise.
        label: its class, for models of classes.
    """

    prompt: str
    num_frames: int
    height: int
    width: int
    fps: float
    seed: int
    guidance_scale: float = 1.0
    strength: float = 1.0
    known_frames: int = 0
    stagger: int = 0
    content: Float[np.ndarray, "frames height width channels"] | None = dataclasses.field(default=None, compare=False)
    label: int = -1

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be a string, got {self.prompt!r}.")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise ValueError(f"prompt must be text in UTF-8, got {self.prompt!r}.")
        for name in ("num_frames", "height", "width"):
            value = getattr(self, name)
            if not is_number(value, np.integer) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if not is_number(self.fps) or not (self.fps > 0 and math.isfinite(self.fps)):
            raise ValueError(f"fps must be positive, got {self.fps!r}.")
        if not is_number(self.seed, np.integer) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be a whole number of at least 0 and below 2**32, got {self.seed!r}.")
        if not is_number(self.guidance_scale) or not np.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {self.guidance_scale!r}.")
        if not is_number(self.strength) or not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength!r}.")
        most = self.num_frames - 1
        if not is_number(self.known_frames, np.integer) or not 0 <= self.known_frames <= most:
            raise ValueError(f"known_frames must be between 0 and {most}, got {self.known_frames!r}.")
        if not is_number(self.stagger, np.integer) or self.stagger < 0:
            raise ValueError(f"stagger must be a whole number of at least 0, got {self.stagger!r}.")
        self._check_content()

    def _check_content(self) -> None:
        """Raises ValueError where `content` is not what strength and known frames need."""
        needed = self.num_frames if self.strength < 1 else self.known_frames
        shape = None if self.content is None else tuple(np.shape(self.content))
        if needed and shape is None:
            why = f"strength {self.strength:g}" if self.strength < 1 else f"{self.known_frames} known_frames"
            raise ValueError(f"content must be given for {why}.")
        if shape is not None and (len(shape) != 4 or shape[0] < needed or shape[1:3] != (self.height, self.width)):
            works = f"({max(needed, 1)} or more, {self.height}, {self.width}, channels)"
            raise ValueError(f"content must have the shape {works}, got {shape}.")


def is_number(value: Any, kind: type = np.number) -> bool:
    """Returns whether `value` is a single number, of a `kind` of NumPy's."""
    return np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, kind)


def make_requests(prompts: Sequence[str], seed: int | Sequence[int], **values: Any) -> list[ClipRequest]:
    """Returns one request a prompt.

    Args:
        prompts: one clip each.
        seed: one for each prompt, or a single one s: prompt i then has the seed s + i.
        **values: other fields of `ClipRequest`, each a single value or one for each prompt; `content` is a list.

    Raises:
        ValueError: no prompt, a list of another length than the prompts, or a value that cannot be.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of strings, got the string {prompts!r}.")
    if not prompts:
        raise ValueError("prompts is empty: give at least one prompt.")
    columns = {}
    values["seed"] = [seed + i for i in range(len(prompts))] if is_number(seed, np.integer) else seed
    for name, value in values.items():
        several = isinstance(value, list | tuple) or np.ndim(value) > 0
        columns[name] = list(value) if several else [value] * len(prompts)
    for name, column in columns.items():
        if len(column) != len(prompts):
            raise ValueError(f"{name} has {len(column)} values for {len(prompts)} prompts; give one, or one a prompt.")
    return [
        ClipRequest(prompt, **{name: column[i] for name, column in columns.items()}) for i, prompt in enumerate(prompts)
    ]


class Condition(NamedTuple):
    """What a clip is conditioned on.

    Attributes:
        text: (m, D) float, token states of its caption; (0, 0) of a model of classes.
        label: its class, -1 of a model of captions.
    """

    text: Float[np.ndarray, "tokens text_dim"]
    label: int = -1


class CanvasSegment(NamedTuple):
    """A clip, ready to be sampled.

    Attributes:
        segment: its patches at their first levels, and the rest that its rows hold.
        null: the condition that it is guided away from.
        ladder: (n + 1,) each, the levels down which its columns go.
        places: (s + 1, j) int32, where on the ladder each of its columns is after each of its steps.
    """

    segment: Segment
    null: Condition
    ladder: Levels
    places: Int[np.ndarray, "steps columns"]


def canvas_segment(
    request: ClipRequest,
    clip_id: int,
    condition: Condition,
    null: Condition,
    codec: Codec,
    patch: PatchConfig,
    process: Process,
    num_steps: int,
) -> CanvasSegment:
    """Returns a clip with its noise, its level table and its way through the levels.

    Args:
        request: the clip.
        clip_id: its place among the requests.
        condition: what it is conditioned on.
        null: what it is guided away from.
        codec: whose latents the model makes.
        patch: how these are cut.
        process: of the model.
        num_steps: of the whole way from noise.

    Raises:
        ValueError: a size that codec or patches do not divide, known frames that do not fill whole patches, or a number
            of steps that the process has not.
    """
    size = codec.latent_size(request.num_frames, request.height, request.width)
    grid = grid_shape(*size, patch.size)
    ladder = process.ladder(num_steps, request.strength, math.prod(grid))
    num_known, unit = 0, patch.size[0] * codec.strides[0]
    if request.known_frames:
        frames = codec.latent_size(request.known_frames, request.height, request.width)[0]
        if frames % patch.size[0]:
            raise ValueError(
                f"known_frames must be a multiple of the {unit} frames of a patch, got {request.known_frames}."
            )
        num_known = frames // patch.size[0]
    levels = _levels_of(request, grid, num_known)
    places = _places(levels.roles, len(ladder.sigma) - 1, request.stagger)

    patches = np.random.default_rng(request.seed).standard_normal((math.prod(grid), patch.dim), np.float32)
    if request.strength < 1 or num_known:
        frames = request.content[: request.num_frames if request.strength < 1 else request.known_frames]
        encoded = codec.encode(np.asarray(frames, np.float32))
        content = np.zeros((*size, patch.channels), np.float32)
        content[: len(encoded)] = encoded
        known = (levels.roles == KNOWN)[levels.ids, None]
        alpha, sigma = (np.asarray(a) for a in (ladder.alpha, ladder.sigma))
        # From a strength of 1 a sampler starts from noise alone, though the noisiest level may hold a little data.
        first = (alpha[0], sigma[0]) if request.strength < 1 else (0.0, 1.0)
        data = patchify(content, patch.size)
        patches = np.where(known, data, first[0] * data + first[1] * patches).astype(np.float32)
    positions = grid_positions(grid, request.fps / codec.strides[0], patch)
    segment = Segment(patches, positions, condition.text, levels, clip_id, condition.label)
    return CanvasSegment(segment, null, ladder, places)


def _levels_of(request: ClipRequest, grid: tuple[int, int, int], num_known: int) -> SegmentLevels:
    """Returns the level table of a clip of which the first `num_known` latent frames are known."""
    frames = np.repeat(np.arange(grid[0]), grid[1] * grid[2])
    if request.stagger:
        ids, roles = free_frames(frames, grid[0])
        return SegmentLevels(ids, np.where(np.arange(grid[0]) < num_known, KNOWN, roles))
    return first_frames_known(frames, num_known) if num_known else one_level(len(frames))


def _places(roles: Int[np.ndarray, " columns"], num_steps: int, stagger: int) -> Int[np.ndarray, "steps columns"]:
    """Returns where on a ladder of `num_steps` steps each column is before the first step and after each."""
    delays = np.maximum(np.cumsum(roles == FREE) - 1, 0) * stagger * (roles == FREE)
    steps = np.arange(num_steps + delays.max() + 1)
    return np.where(roles == KNOWN, num_steps, np.clip(steps[:, None] - delays, 0, num_steps)).astype(np.int32)


class Canvas(NamedTuple):
    """Rows of clips to be sampled.

    Attributes:
        rows: the clips at their first levels.
        null_rows: the same with the conditions that they are guided away from.
        levels: (S + 1, B, J) each, the level table of each row before the first step and after each; a clip that needs
            fewer steps than others ends early. Clean where no segment has a column.
    """

    rows: PackedBatch
    null_rows: PackedBatch
    levels: Levels


def pack_canvas(segments: Sequence[CanvasSegment], num_rows: int = 1) -> Canvas:
    """Packs clips into rows as long as the longest, filled up to `ROW_MULTIPLE`.

    Longer rows would cost a dense attention more and a skipping one the same.

    Args:
        segments: at least one.
        num_rows: the number of rows is made a multiple of this by empty ones.
    """
    lengths = [len(s.segment.patches) for s in segments]
    texts = [max(len(s.segment.text), len(s.null.text)) for s in segments]
    budget = _round_up(max(lengths), ROW_MULTIPLE)
    shares = first_fit(lengths, texts, row_length=budget, text_length=sum(texts), max_segments=len(segments))
    return fill_canvas(segments, shares + [[]] * (-len(shares) % num_rows))


def fill_canvas(segments: Sequence[CanvasSegment], shares: Sequence[Sequence[int]]) -> Canvas:
    """Fills rows with clips; see `pack_canvas`.

    Args:
        segments: at least one.
        shares: which of them each row holds.
    """
    texts = [max(len(s.segment.text), len(s.null.text)) for s in segments]
    budget = _round_up(max(sum(len(segments[i].segment.patches) for i in share) for share in shares), ROW_MULTIPLE)
    columns = [s.places.shape[1] for s in segments]
    sizes = {
        "row_length": budget,
        "text_length": _round_up(max(sum(texts[i] for i in share) for share in shares), TEXT_MULTIPLE),
        "max_segments": _power_of_two(max(map(len, shares))),
        "max_levels": _power_of_two(max(sum(columns[i] for i in share) for share in shares)),
        "patch_dim": segments[0].segment.patches.shape[1],
        "text_dim": segments[0].null.text.shape[1],
    }
    rows = [[segments[i].segment for i in share] for share in shares]
    null_rows = [[segments[i].segment._replace(**segments[i].null._asdict()) for i in share] for share in shares]
    batches = [stack_rows([fill_row(row, **sizes) for row in some]) for some in (rows, null_rows)]

    num_steps = max(len(s.places) for s in segments)
    levels = [np.full((num_steps, len(shares), sizes["max_levels"]), v, np.float32) for v in CLEAN]
    for row, share in enumerate(shares):
        last = 0
        for s in (segments[i] for i in share):
            places = np.pad(s.places, ((0, num_steps - len(s.places)), (0, 0)), mode="edge")
            first, last = last, last + places.shape[1]
            for table, values in zip(levels, s.ladder, strict=True):
                table[:, row, first:last] = np.asarray(values)[places]
    return Canvas(*batches, Levels(*levels))


def unpack_clips(
    patches: Float[np.ndarray, "rows length values"],
    batch: PackedBatch,
    sizes: Sequence[tuple[int, int, int]],
    patch: PatchConfig,
) -> list[Float[np.ndarray, "frames height width channels"]]:
    """Returns the clips that stand in packed rows, in the order of the requests.

    Args:
        patches: (B, L, P), the rows after sampling.
        batch: the rows they were made in; `clip_ids` are places among the requests.
        sizes: (t, h, w) of each clip, in what patches are cut of.
        patch: how clips are cut.
    """
    clips: list = [None] * len(sizes)
    for row, ids in enumerate(batch.clip_ids):
        for segment, clip_id in enumerate(ids):
            if clip_id >= 0:
                values = patches[row][batch.segment_ids[row] == segment + 1]
                clips[clip_id] = unpatchify(values, *sizes[clip_id], patch.size, patch.channels)
    return clips


def _power_of_two(value: int) -> int:
    """Returns the smallest power of two that is at least `value`, itself at least 1."""
    return 1 << (value - 1).bit_length()


def _round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
