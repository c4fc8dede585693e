"""What is asked of the sampler: clips as segments of noise, and the packed rows they are sampled in.

A canvas is a list of `Segment`s, one a clip, whose patches hold noise where they are asked for (`known` false) and
the clip's own values where they are given. The noise of a clip is drawn in the clip's own shape from the clip's own
seed and packed afterwards, so a clip comes out the same alone, beside others, and on any number of devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sora_jax.array_types import Float, PackedBatch
from sora_jax.config import PatchConfig
from sora_jax.patches.patchify import grid_shape, unpatchify
from sora_jax.patches.positions import grid_positions
from sora_jax.patches.rows import Segment, fill_row, first_fit, stack_rows

# Rows are made no finer than this many tokens and caption tokens, so that few shapes are ever compiled.
ROW_MULTIPLE = 128
TEXT_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class ClipRequest:
    """One clip to be made.

    Attributes:
        prompt: what it shows; empty for an unconditional sample.
        num_frames: its frames.
        height, width: in pixels, multiples of the patch's.
        fps: frames a second.
        seed: of its noise.
    """

    prompt: str
    num_frames: int
    height: int
    width: int
    fps: float
    seed: int

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


def is_number(value: Any, kind: type = np.number) -> bool:
    """Returns whether `value` is a single number, of a `kind` of NumPy's."""
    return np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, kind)


def make_requests(prompts: Sequence[str], seed: int | Sequence[int], **values: Any) -> list[ClipRequest]:
    """Returns one request a prompt.

    Args:
        prompts: one clip each.
        seed: one for each prompt, or a single one s: prompt i then has the seed s + i.
        **values: `num_frames`, `height`, `width` and `fps`, each a single value or one for each prompt.

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
        columns[name] = [value] * len(prompts) if np.ndim(value) == 0 else list(value)
    for name, column in columns.items():
        if len(column) != len(prompts):
            raise ValueError(f"{name} has {len(column)} values for {len(prompts)} prompts; give one, or one a prompt.")
    return [
        ClipRequest(prompt, **{name: column[i] for name, column in columns.items()}) for i, prompt in enumerate(prompts)
    ]


def blank_segment(
    request: ClipRequest, clip_id: int, text: Float[np.ndarray, "tokens text_dim"], patch: PatchConfig
) -> Segment:
    """Returns a clip of noise, with nothing known.

    Args:
        request: the clip.
        clip_id: its place among the requests.
        text: (m, D) float16, its caption's token states.
        patch: how clips are cut.

    Raises:
        ValueError: a size that the patches do not divide.
    """
    grid = grid_shape(request.num_frames, request.height, request.width, patch.size)
    shape = (math.prod(grid), patch.dim)
    return Segment(
        patches=np.random.default_rng(request.seed).standard_normal(shape, np.float32),
        positions=grid_positions(grid, request.fps, patch),
        text=text,
        known=np.zeros(shape[0], bool),
        clip_id=clip_id,
    )


def pack_canvas(segments: Sequence[Segment], null_text: Float[np.ndarray, "tokens text_dim"], num_rows: int = 1):
    """Packs a canvas into rows as long as its longest clip, filled up to `ROW_MULTIPLE`.

    Longer rows would cost a dense attention more and a skipping one the same.

    Args:
        segments: at least one.
        null_text: (m, D), token states of the empty caption.
        num_rows: the number of rows is made a multiple of this by empty ones.

    Returns:
        The rows as a `PackedBatch`, and the same rows with the null caption in each segment.
    """
    lengths = [len(s.patches) for s in segments]
    texts = [max(len(s.text), len(null_text)) for s in segments]
    budget = _round_up(max(lengths), ROW_MULTIPLE)
    shares = first_fit(lengths, texts, row_length=budget, text_length=sum(texts), max_segments=len(segments))
    shares += [[]] * (-len(shares) % num_rows)
    sizes = {
        "row_length": budget,
        "text_length": _round_up(max(sum(texts[i] for i in share) for share in shares), TEXT_MULTIPLE),
        "max_segments": 1 << (max(map(len, shares)) - 1).bit_length(),
        "patch_dim": segments[0].patches.shape[1],
        "text_dim": null_text.shape[1],
    }
    rows = [[segments[i] for i in share] for share in shares]
    null_rows = [[segment._replace(text=null_text) for segment in row] for row in rows]
    return tuple(stack_rows([fill_row(row, **sizes) for row in some]) for some in (rows, null_rows))


def unpack_clips(
    patches: Float[np.ndarray, "rows length values"],
    batch: PackedBatch,
    requests: Sequence[ClipRequest],
    patch: PatchConfig,
) -> list[Float[np.ndarray, "frames height width channels"]]:
    """Returns the clips that stand in packed rows, in the order of the requests.

    Args:
        patches: (B, L, P), the rows after sampling.
        batch: the rows they were made in; `clip_ids` are places among the requests.
        requests: the clips.
        patch: how clips are cut.
    """
    clips: list = [None] * len(requests)
    for row, ids in enumerate(batch.clip_ids):
        for segment, clip_id in enumerate(ids):
            if clip_id >= 0:
                request = requests[clip_id]
                values = patches[row][batch.segment_ids[row] == segment + 1]
                shape = (request.num_frames, request.height, request.width)
                clips[clip_id] = unpatchify(values, *shape, patch.size, patch.channels)
    return clips


def _round_up(value: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
