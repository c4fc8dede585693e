"""Mixtures of data sets: by weight, exact on any number of hosts and after any stop, known by all their parts."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from latent_sets import write_latents
from rows import assert_equal, take

from sora_jax.config import MixturePart, PatchConfig
from sora_jax.config_json import from_json, to_json
from sora_jax.data.captioned import DataConfig
from sora_jax.data.captions import CaptionTable
from sora_jax.data.content import open_content, open_data
from sora_jax.data.identity import data_fingerprints
from sora_jax.data.labelled import LabelledDataConfig
from sora_jax.data.packing import Shard
from sora_jax.data.pipeline import make_pipeline

PATCH = PatchConfig(size=(1, 2, 2), channels=2)
STILLS = ((1, 4, 4), (1, 4, 6))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Stills, 12 of them; clips, 16, with 4 held out."""
    root = tmp_path_factory.mktemp("mixture")
    stills = write_latents(root / "stills", (("train", 12), ("validation", 2)), sizes=STILLS)
    return stills, write_latents(root / "clips", (("train", 16), ("unseen", 4), ("validation", 3)))


@pytest.fixture(scope="module")
def captions(paths):
    content = open_content(paths[1])
    names = {*content.metadata.captions, *(f"clip {i}" for i in range(30))}
    return CaptionTable.build(names, lambda texts: [np.full((1 + len(t), 3), len(t), np.float32) for t in texts])


def config(paths, weights=(3.0, 1.0), parts=({}, {}), **changes):
    mixture = tuple(MixturePart(path, weight, **part) for path, weight, part in zip(paths, weights, parts, strict=True))
    fields = dict(
        mixture=mixture, num_frames=(1, 6), fps=(4, 8), still_share=0.0, row_length=64, text_length=64, max_segments=8,
        max_caption_tokens=4, num_bins=4, batch_size=4, num_shards=4, num_workers=0, flip=0.5, eval_splits=(),
    )  # fmt: skip
    return DataConfig(**fields | changes)


def pipeline(data, captions, index=0, count=1, split=None, training=True):
    return make_pipeline(data, PATCH, captions, split, training=training, process_index=index, process_count=count)


def planned(data, count=200, index=0):
    shard = Shard(open_data(data), None, data, PATCH, index, True)
    samples = []
    while len(samples) < count:
        samples += shard.next_plan()
    return samples


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.2, 0.8)])
def test_samples_come_as_often_as_the_weights_say(paths, weights):
    samples = planned(config(paths, weights))
    share = np.mean([sample.clip < 12 for sample in samples])
    assert abs(share - weights[0] / sum(weights)) < 0.02
    counts = collections.Counter(sample.clip for sample in samples if sample.clip < 12)
    assert len(counts) == 3 and max(counts.values()) - min(counts.values()) <= 4  # every fourth, each as often


def test_flips_and_draws_are_of_each_sample(paths):
    samples = planned(config(paths))
    assert 0.4 < np.mean([sample.flip for sample in samples]) < 0.6
    assert len({sample.draw_seed for sample in samples}) == len(samples)


def test_parts_have_clips_and_stills_of_their_own(paths):
    data = config(paths, parts=({"max_clips": 4}, {"still_share": 1.0}))
    samples = [sample for index in range(4) for sample in planned(data, 60, index)]
    assert len({sample.clip for sample in samples if sample.clip < 12}) == 4
    assert {sample.num_frames for sample in samples} == {1}
    free = planned(config(paths), 100, 1)
    assert max(sample.num_frames for sample in free) > 1


def test_a_resumed_mixture_with_flips_gives_the_same_rows(paths, captions):
    data = config(paths)
    with pipeline(data, captions) as rows:
        expected = [next(rows) for _ in range(8)]
    first, second = pipeline(data, captions), pipeline(dataclasses.replace(data, num_workers=2), captions)
    for _ in range(3):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert_equal(take(second, 5), expected[3:])
    assert any((a != b).any() for a, b in zip(expected[0], expected[3], strict=True))
    ids = np.concatenate([batch.clip_ids.ravel() for batch in expected])
    assert (ids >= 12).any() and ((ids >= 0) & (ids < 12)).any()


def test_hosts_share_a_mixture(paths, captions):
    data = config(paths)
    expected = take(pipeline(data, captions), 4)
    for count in (2, 4):
        hosts = [take(pipeline(data, captions, i, count), 4) for i in range(count)]
        joined = [type(parts[0])(*map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*hosts, strict=True)]
        assert_equal(joined, expected)


def test_held_out_splits_are_those_of_all_parts_that_have_them(paths, captions):
    def names(split):
        content = open_data(config(paths), split)
        with pipeline(config(paths), captions, split=split, training=False) as rows:
            ids = [i for batch in rows for i in batch.clip_ids.ravel() if i >= 0]
        return sorted(content.metadata.names[i] for i in ids)

    assert names("unseen") == [f"clip-{i}" for i in range(16, 20)]
    assert names("validation") == sorted(["clip-12", "clip-13", "clip-20", "clip-21", "clip-22"])
    with pytest.raises(ValueError, match="no data set of the mixture has the split 'absent'"):
        open_data(config(paths), "absent")


def test_a_part_may_be_trained_on_another_split(paths):
    content = open_data(config(paths, parts=({"split": "validation"}, {})))
    assert content.metadata.names[:3] == ["clip-12", "clip-13", "clip-0"] and content.starts == (0, 2, 18)


def test_one_part_is_that_data_set_alone(paths, captions):
    alone = dataclasses.replace(config(paths), mixture=(), path=paths[1])
    mixed = config(paths[1:], (5.0,), ({},))
    assert_equal(take(pipeline(mixed, captions), 3), take(pipeline(alone, captions), 3))


def test_fingerprints_are_of_every_part(paths):
    found = data_fingerprints(config(paths), ("train", "unseen"))
    assert set(found) == {"0/train", "1/train", "1/unseen"}
    alone = [data_fingerprints(DataConfig(path=path), ("train",))["train"] for path in paths]
    assert [found["0/train"], found["1/train"]] == alone


def test_a_mixture_is_kept_in_json(paths):
    data = config(paths, parts=({"max_clips": 4}, {"still_share": 0.5}))
    assert from_json(DataConfig, to_json(data)) == data


def test_labels_are_kept_where_all_parts_have_the_same(paths, tmp_path):
    assert open_data(config(paths)).label_names == ("cat", "dog")
    other = write_latents(tmp_path, (("train", 4),))
    with open(f"{other}/label.labels.txt", "w") as file:
        file.write("cat\nwolf\n")
    mixed = open_data(config((paths[0], other)))
    assert mixed.label_names == () and set(mixed.metadata.labels) == {-1}


def test_what_cannot_be_mixed_is_named(paths, captions, tmp_path):
    scaled = write_latents(tmp_path, (("train", 4),), factor=0.25)
    for data, words in (
        (config((paths[0], "tests/fixtures/clip_folder")), "must have the same kind: .* has latents, .* RGB pixels"),
        (config((paths[0], scaled)), "must have the same autoencoder"),
    ):
        with pytest.raises(ValueError, match=words):
            open_data(data)
    with pytest.raises(ValueError, match=r"num_shards must be at most the number of clips of .*stills.* \(3\), got 4"):
        pipeline(config(paths, parts=({"max_clips": 3}, {})), captions)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixturePart("a", 0.0), "weight must be positive and finite, got 0.0"),
        (lambda: MixturePart("a", still_share=2.0), "still_share must be None or between 0 and 1, got 2.0"),
        (lambda: MixturePart("a", max_clips=0), "max_clips must be None or at least 1, got 0"),
        (
            lambda: DataConfig(path="a", mixture=(MixturePart("b"),)),
            r"mixture must be \(\) where path names one",
        ),
        (lambda: DataConfig(mixture=(MixturePart(""),)), "mixture must be data sets with a path each"),
        (lambda: DataConfig(mixture=(MixturePart("b"),), max_clips=3), "max_clips must be None in a mixture"),
        (
            lambda: LabelledDataConfig(mixture=(MixturePart("b", still_share=0.5),)),
            "mixture must be parts without still_share",
        ),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
