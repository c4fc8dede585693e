"""Pictures that each have a time of their own, at one rate."""

import numpy as np
import pytest

from sora_jax.data.decode import LEAST_FRAMES, MOST_COPIES, STILL_FPS, UnreadableClipError, constant_rate

THIRTY = np.diff(np.round(np.arange(31) * 1000 / 30)).tolist()  # 33, 34, 33 ...: 30 a second in milliseconds


@pytest.mark.parametrize(
    ("durations", "indices", "fps"),
    [
        ([100], [0], STILL_FPS),
        ([40, 40, 40], [0, 1, 2], 25),
        ([42, 42, 42, 252, 42], [0, 1, 2, 3, 3, 3, 3, 3, 3, 4], 1000 / 42),
        ([100, 100, 50, 50], [0, 0, 1, 1, 2, 3], 20),
        ([100, 200, 300, 400], [0, 1, 1, 2, 2, 2, 3, 3, 3, 3], 10),
        ([1000, 1000, 8000], [0, 1, *[2] * 8], 1),
        ([*[40] * 5, 4800, 33], [0, 1, 2, 3, 4, *[5] * 120, 6], 25),  # a burst before a pause
        ([4800, *[40] * 5], [*[0] * 120, 1, 2, 3, 4, 5], 25),
        ([30, 30, 40] * 30, list(range(90)), 30),  # GIF's hundredths of a second
        ([20, 30] * 20, list(range(40)), 40),
        (THIRTY * 100, list(range(3000)), 30),
        ([4, 4, 4, 4, 4, 5] * 50, list(range(300)), 240),
        ([1, 32] * 50, list(range(100)), 1000 / 16.5),  # pairs of pictures, as some recorders write
    ],
)
def test_each_picture_stands_at_its_time(durations, indices, fps):
    found, rate = constant_rate(durations)
    assert found == indices
    assert rate == pytest.approx(fps)


@pytest.mark.parametrize("pauses", [{29: 4000}, {29: 4017}, {9: 777, 19: 1290}, {0: 5000}])
def test_a_pause_costs_no_picture_and_no_time(pauses):
    durations = [pauses.get(i, d) for i, d in enumerate(THIRTY)]
    found, rate = constant_rate(durations)
    assert sorted(set(found)) == list(range(30))
    assert rate == pytest.approx(30, rel=0.01)
    assert len(found) / rate == pytest.approx(sum(durations) / 1000, abs=1 / rate)
    assert {i: found.count(i) for i in range(30) if found.count(i) > 1} == pytest.approx(
        {i: pause * 30 / 1000 for i, pause in pauses.items()}, abs=1
    )


def test_whatever_the_durations_the_clip_begins_and_lasts_as_they_say():
    rng = np.random.default_rng(0)
    for _ in range(300):
        kinds = [rng.uniform(0, 50), 40.0, rng.uniform(0, 1000), 0.0, rng.exponential(100)]
        durations = [kinds[k] for k in rng.integers(0, len(kinds), rng.integers(2, 60))]
        durations[0] += 1
        found, rate = constant_rate(durations)
        assert found[0] == 0 and min(np.diff([0, *found])) >= 0
        assert abs(len(found) * 1000 / rate - sum(durations)) <= 1000 / rate * 1.001
        assert {i for i, d in enumerate(durations) if d * rate > 1000.001} <= set(found)


def test_a_broken_duration_neither_makes_the_rate_nor_thousands_of_copies():
    found, rate = constant_rate([*THIRTY, 1, *THIRTY, 0, *THIRTY])
    assert 29 < rate < 32 and len(set(found)) >= 90 and len(found) <= 93
    with pytest.raises(UnreadableClipError, match="31 pictures in 4"):
        constant_rate([*THIRTY, 2**32 - 1])
    for durations in ([40, np.nan], [40, np.inf], [40, -1], [0, 0]):
        with pytest.raises(UnreadableClipError):
            constant_rate(durations)


@pytest.mark.parametrize("count", [10, 200])
def test_the_copies_of_a_picture_are_bounded(count):
    most = max(LEAST_FRAMES, MOST_COPIES * count)
    longest = [40] * (count - 1) + [40 * (most - count + 1)]
    assert len(constant_rate(longest)[0]) == most
    with pytest.raises(UnreadableClipError, match=f"at most {most}"):
        constant_rate([*longest[:-1], longest[-1] + 40])
