import numpy as np
import pytest

from sora_jax.config import FlowConfig, PatchConfig
from sora_jax.diffusion.process import FlowProcess
from sora_jax.generation.canvas import (
    ClipRequest,
    Condition,
    canvas_segment,
    make_requests,
    pack_canvas,
    unpack_clips,
)
from sora_jax.models.autoencoder.codec import IdentityCodec

PATCH = PatchConfig(size=(2, 4, 4))
NULL = np.full((2, 3), -1, np.float32)


def segment(request, clip_id=0, num_tokens=3, num_steps=4):
    condition, process = Condition(np.full((num_tokens, 3), clip_id, np.float32)), FlowProcess(FlowConfig())
    return canvas_segment(request, clip_id, condition, Condition(NULL), IdentityCodec(), PATCH, process, num_steps)


def test_requests_take_one_value_or_one_a_prompt():
    requests = make_requests(["a", "b"], 5, num_frames=[1, 8], height=8, width=np.array([4, 12]), fps=6.0)
    assert requests == [ClipRequest("a", 1, 8, 4, 6.0, 5), ClipRequest("b", 8, 8, 12, 6.0, 6)]
    seeds = [r.seed for r in make_requests(["a", "b"], [9, 2], num_frames=1, height=4, width=4, fps=1.0)]
    assert seeds == [9, 2]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompts=[]), "prompts is empty"),
        (dict(prompts="frog"), "prompts must be a list"),
        (dict(prompts=["a", 3]), "prompt must be a string"),
        (dict(num_frames=[1, 2, 3]), "num_frames has 3 values for 2 prompts"),
        (dict(num_frames=0), "num_frames must be a whole number of at least 1, got 0"),
        (dict(num_frames=1.5), "num_frames must be a whole number"),
        (dict(num_frames=float("nan")), "num_frames must be a whole number of at least 1, got nan"),
        (dict(height=-8), "height must be a whole number"),
        (dict(height="x"), "height must be a whole number of at least 1, got 'x'"),
        (dict(width=8.0), "width must be a whole number of at least 1, got 8.0"),
        (dict(width=[8, None]), "width must be a whole number of at least 1, got None"),
        (dict(prompts=["a\udcff b", "b"]), r"prompt must be text in UTF-8, got 'a\\udcff b'"),
        (dict(fps="x"), "fps must be positive, got 'x'"),
        (dict(seed="x"), "seed must be a whole number of at least 0 and below .*, got 'x'"),
        (dict(seed=2**32), "seed must be a whole number of at least 0 and below .*, got 4294967296"),
        (dict(fps=0), "fps must be positive, got 0"),
        (dict(fps=float("nan")), "fps must be positive"),
        (dict(guidance_scale=float("inf")), "guidance_scale must be finite, got inf"),
        (dict(strength=0), "strength must be above 0 and at most 1, got 0"),
        (dict(strength=[1, 1.5]), "strength must be above 0 and at most 1, got 1.5"),
        (dict(strength=0.5), r"content must be given for strength 0\.5"),
        (dict(known_frames=1), "known_frames must be between 0 and 0, got 1"),
        (dict(num_frames=3, known_frames=2), "content must be given for 2 known_frames"),
        (
            dict(num_frames=3, known_frames=2, content=[np.zeros((1, 4, 4, 3), np.float32)] * 2),
            r"\(2 or more, 4, 4, channels\), got \(1,",
        ),
        (dict(stagger=-1), "stagger must be a whole number of at least 0, got -1"),
        (dict(seed=-1), "seed must be a whole number of at least 0 and below .*, got -1"),
    ],
)
def test_bad_requests_are_named(changes, message):
    values = dict(prompts=["a", "b"], seed=0, num_frames=1, height=4, width=4, fps=8.0) | changes
    with pytest.raises(ValueError, match=message):
        make_requests(values.pop("prompts"), values.pop("seed"), **values)


def test_noise_is_drawn_from_the_clips_own_seed_for_every_value():
    clip = segment(ClipRequest("a", 3, 8, 8, 8.0, 7)).segment
    assert clip.patches.shape == (8, 96) and clip.patches.dtype == np.float32
    again, other = (segment(ClipRequest(*a)).segment for a in (("b", 3, 8, 8, 8.0, 7), ("a", 3, 8, 8, 8.0, 8)))
    np.testing.assert_array_equal(clip.patches, again.patches)
    assert abs(np.corrcoef(clip.patches.ravel(), other.patches.ravel())[0, 1]) < 0.2
    # The frame that only fills the last patch has noise of its own, as in training.
    assert len(np.unique(clip.patches)) == clip.patches.size
    assert abs(clip.patches.mean()) < 0.2 and abs(clip.patches.std() - 1) < 0.1


def test_a_size_that_does_not_fit_the_patches_names_what_works():
    with pytest.raises(ValueError, match="height must be a multiple of the patch's 4, got 10; 8 or 12 would work"):
        segment(ClipRequest("a", 1, 10, 8, 8.0, 0))


def test_known_frames_that_do_not_fill_patches_are_refused():
    request = ClipRequest("a", 4, 4, 4, 8.0, 0, known_frames=1, content=np.zeros((1, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="known_frames must be a multiple of the 2 frames of a patch, got 1"):
        segment(request)


def test_rows_hold_every_clip_once_and_the_null_rows_differ_in_text_alone():
    sizes = [(1, 48, 48), (1, 4, 4), (8, 16, 16), (2, 40, 40), (1, 4, 8)]
    segments = [segment(ClipRequest("x", *size, 8.0, i), i) for i, size in enumerate(sizes)]
    rows, null_rows, _ = pack_canvas(segments)
    # 144, 1, 64, 100 and 2 patches: rows as long as the longest, filled up to 256.
    np.testing.assert_array_equal(rows.clip_ids, [[0, 1, 2, 4], [3, -1, -1, -1]])
    assert rows.patches.shape == (2, 256, 96) and rows.text.shape == (2, 32, 3)
    assert rows.loss_mask.sum() == 311 and (rows.segment_ids > 0).sum() == 311
    for name in rows._fields:
        if not name.startswith("text"):
            np.testing.assert_array_equal(getattr(rows, name), getattr(null_rows, name), err_msg=name)
    for row, ids in enumerate(rows.clip_ids):
        for place, clip_id in enumerate(ids[ids >= 0], 1):
            assert (rows.text[row][rows.text_segment_ids[row] == place] == clip_id).all()
            assert (null_rows.text[row][null_rows.text_segment_ids[row] == place] == -1).all()
    assert (null_rows.text_segment_ids > 0).sum() == 2 * len(sizes)


def test_a_null_caption_longer_than_the_captions_still_fits():
    segments = [segment(ClipRequest("x", 1, 4, 4, 8.0, i), i, num_tokens=1) for i in range(20)]
    rows, null_rows, _ = pack_canvas(segments)
    assert rows.text.shape == null_rows.text.shape == (1, 64, 3)


def test_empty_rows_fill_up_the_devices():
    rows = pack_canvas([segment(ClipRequest("x", 1, 4, 4, 8.0, 0))], num_rows=3).rows
    assert rows.patches.shape == (3, 128, 96) and rows.clip_ids.tolist() == [[0], [-1], [-1]]


def test_known_frames_are_clean_and_not_asked_for():
    content = np.full((2, 4, 4, 3), 0.25, np.float32)
    known = ClipRequest("x", 4, 4, 4, 8.0, 0, known_frames=2, content=content)
    rows, _, levels = pack_canvas([segment(ClipRequest("x", 1, 8, 4, 8.0, 0)), segment(known, 1)])
    assert rows.level_ids[0, :4].tolist() == [0, 0, 2, 1] and rows.loss_mask[0, :5].tolist() == [1, 1, 0, 1, 0]
    assert rows.level_segments.tolist() == [[1, 2, 2, 0]]
    np.testing.assert_array_equal(levels.time[:, 0].T, [[1, 0.75, 0.5, 0.25, 0]] * 2 + [[0] * 5] * 2)
    np.testing.assert_array_equal(rows.patches[0, 2], np.full(96, 0.25))
    noise = np.random.default_rng(0).standard_normal((2, 96), np.float32)
    np.testing.assert_array_equal(rows.patches[0, 3], noise[1])


def test_each_clip_has_a_way_of_its_own_through_the_levels():
    """By eye: of four steps one clip takes the last two, and frames of another begin one step after the other."""
    content = np.full((6, 4, 4, 3), 0.5, np.float32)
    half = ClipRequest("x", 2, 4, 4, 8.0, 3, strength=0.4, content=content)
    rising = ClipRequest("x", 6, 4, 4, 8.0, 0, stagger=1)
    both = ClipRequest("x", 6, 4, 4, 8.0, 0, stagger=2, known_frames=2, content=content)
    made = [segment(request, i) for i, request in enumerate((half, rising, both))]
    np.testing.assert_array_equal(
        made[1].places.T, [[0, 1, 2, 3, 4, 4, 4], [0, 0, 1, 2, 3, 4, 4], [0, 0, 0, 1, 2, 3, 4]]
    )
    np.testing.assert_array_equal(made[2].places.T, [[4] * 7, [0, 1, 2, 3, 4, 4, 4], [0, 0, 0, 1, 2, 3, 4]])
    rows, _, levels = pack_canvas(made)
    assert rows.level_ids[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    np.testing.assert_allclose(levels.time[:, 0, 0], [0.4, 0.25, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(levels.time[:, 0, 3], [1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert not levels.time[:, 0, [4, 7]].any()  # what is known, and a column that no segment has
    noise = np.random.default_rng(3).standard_normal((1, 96), np.float32)
    np.testing.assert_allclose(rows.patches[0, 0], 0.6 * 0.5 + 0.4 * noise[0], rtol=1e-6)


def test_unpacking_gives_each_request_its_clip():
    requests = make_requests(["a"] * 3, 0, num_frames=[3, 1, 2], height=[8, 4, 12], width=8, fps=8.0)
    segments = [segment(request, i) for i, request in enumerate(requests)]
    rows = pack_canvas(segments).rows
    marked = np.where(rows.segment_ids[..., None] > 0, 10.0 * rows.segment_ids[..., None], np.nan) + 0 * rows.patches
    clips = unpack_clips(marked, rows, [(r.num_frames, r.height, r.width) for r in requests], PATCH)
    assert [clip.shape for clip in clips] == [(3, 8, 8, 3), (1, 4, 8, 3), (2, 12, 8, 3)]
    assert [np.unique(clip).tolist() for clip in clips] == [[10], [20], [30]]
