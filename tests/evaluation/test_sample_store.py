"""Stores that are stopped and resumed, and what the community's evaluator finds in the file."""

import dataclasses

import numpy as np
import pytest

from sora_jax.evaluation.manifest import SampleManifest, manifest_path, read_manifest
from sora_jax.evaluation.sample_store import SampleStore
from sora_jax.provenance import Environment

MANIFEST = SampleManifest(
    model="DiT-S/8",
    checkpoint="0" * 64,
    ema=True,
    vae=None,
    sampler="ddpm",
    num_steps=250,
    guidance_scale=1.5,
    options="",
    seed=3,
    num_samples=11,
    height=4,
    width=6,
    precision="float32",
    environment=Environment("1 x cpu", "0.10", "0.1", "2"),
)


class Sampler:
    """Pictures that depend on their index alone; may stop before a call, and remembers what it was asked for."""

    def __init__(self, stop_after=None):
        self.stop_after, self.asked = stop_after, []

    def __call__(self, indices):
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(indices.tolist())
        return np.stack([np.random.default_rng(int(i)).integers(0, 256, (4, 6, 3)).astype(np.uint8) for i in indices])


def test_a_store_that_was_stopped_holds_what_another_does(tmp_path):
    whole, stopped = Sampler(), Sampler(stop_after=2)
    store = SampleStore(tmp_path / "whole", MANIFEST, shard_size=4)
    done = []
    store.fill(whole, progress=done.append)
    chosen = np.array([9, 0, 4, 5])
    np.testing.assert_array_equal(store.read(chosen), Sampler()(chosen))
    assert whole.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]] and done == [4, 4, 3]
    with pytest.raises(KeyboardInterrupt):
        SampleStore(tmp_path / "stopped", MANIFEST, shard_size=4).fill(stopped)
    resumed, rest = SampleStore(tmp_path / "stopped", MANIFEST, shard_size=4), Sampler()
    with pytest.raises(ValueError, match="holds 8 of 11 samples"):
        resumed.assemble(tmp_path / "early.npz")
    assert not (tmp_path / "early.npz").exists()
    resumed.fill(rest)
    assert rest.asked == [[8, 9, 10]] and not resumed.missing()
    files = [s.assemble(tmp_path / f"{i}.npz") for i, s in enumerate((store, resumed))]
    assert files[0].read_bytes() == files[1].read_bytes()
    with np.load(files[0]) as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(arrays["arr_0"], Sampler()(np.arange(11)))
    assert read_manifest(SampleManifest, manifest_path(files[0])) == dataclasses.replace(MANIFEST, batch_sizes=(4,))
    assert not list(tmp_path.rglob("*.part"))


def test_a_shard_that_was_cut_off_is_drawn_again(tmp_path, monkeypatch):
    store = SampleStore(tmp_path, MANIFEST, shard_size=6)

    def die(stream, images, **_):
        stream.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", die)
        store.fill(Sampler())
    assert len(store.missing()) == 2 and not list(tmp_path.glob("shard*"))


def test_hosts_share_the_shards(tmp_path):
    hosts = [Sampler() for _ in range(2)]
    for index, host in enumerate(hosts):
        SampleStore(tmp_path, MANIFEST, shard_size=3).fill(host, process_index=index, process_count=2)
    assert [host.asked for host in hosts] == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10]]]
    assert not SampleStore(tmp_path, MANIFEST, shard_size=3).missing()


@pytest.mark.parametrize("numbered", [False, True])
def test_a_store_goes_on_with_other_sizes_for_more_samples_or_fewer(tmp_path, numbered):
    begun = SampleStore(tmp_path, MANIFEST, shard_size=4)
    begun.fill(Sampler())
    if numbered:  # as older stores called them
        for number, shard in enumerate(sorted(tmp_path.glob("shard_*"))):
            shard.rename(tmp_path / f"shard_{number:05d}.npy")
    more, sampler = SampleStore(tmp_path, dataclasses.replace(MANIFEST, num_samples=20), shard_size=6), Sampler()
    assert more.num_present == 11
    more.fill(sampler)
    assert sampler.asked == [[11], [12, 13, 14, 15, 16, 17], [18, 19]]
    path = more.assemble(tmp_path / "samples.npz")
    np.testing.assert_array_equal(np.load(path)["arr_0"], Sampler()(np.arange(20)))
    manifest = read_manifest(SampleManifest, manifest_path(path))
    assert (manifest.num_samples, manifest.batch_sizes) == (20, (4, 6))
    fewer, sampler = SampleStore(tmp_path, dataclasses.replace(MANIFEST, num_samples=5), shard_size=1), Sampler()
    fewer.fill(sampler)
    assert not sampler.asked and (fewer.num_present, fewer.num_beyond) == (5, 15)
    np.testing.assert_array_equal(np.load(fewer.assemble(path))["arr_0"], Sampler()(np.arange(5)))
    assert read_manifest(SampleManifest, manifest_path(path)).batch_sizes == (4, 6)


@pytest.mark.parametrize("kept", [0, 5, 9, 100, 128, 300])
def test_a_shard_that_is_cut_short_is_named_and_drawn_again(tmp_path, kept):
    SampleStore(tmp_path, MANIFEST, shard_size=4).fill(Sampler())
    cut = tmp_path / "shard_00000004_00000008.npy"
    cut.write_bytes(cut.read_bytes()[:kept])
    (tmp_path / f"{cut.name}.0123.part").write_bytes(b"of a process that was killed")
    store, sampler = SampleStore(tmp_path, MANIFEST, shard_size=3), Sampler()
    assert store.damaged == (cut.name,)
    store.fill(sampler)
    assert sampler.asked == [[4, 5], [6, 7]] and not list(tmp_path.glob("*.part"))
    np.testing.assert_array_equal(np.load(store.assemble(tmp_path / "all.npz"))["arr_0"], Sampler()(np.arange(11)))
    assert SampleStore(tmp_path, MANIFEST).damaged == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(guidance_scale=4.0), r"with guidance_scale 1\.5, not 4\.0"),
        (dict(ema=False), "with ema true, not false"),
        (dict(checkpoint="1" * 64), "with checkpoint"),
        (dict(environment=Environment("8 x tpu", "0.10", "0.1", "2")), r'environment\.device "1 x cpu", not "8 x tpu"'),
    ],
)
def test_samples_of_another_manifest_are_refused(tmp_path, changes, message):
    SampleStore(tmp_path, MANIFEST).fill(Sampler())
    with pytest.raises(ValueError, match=message):
        SampleStore(tmp_path, dataclasses.replace(MANIFEST, **changes))


def test_bad_values_are_named(tmp_path):
    store = SampleStore(tmp_path / "a", MANIFEST, shard_size=4)
    with pytest.raises(ValueError, match=r"must be \(4, 4, 6, 3\) uint8, got \(4, 6, 4, 3\) float32"):
        store.fill(lambda indices: np.zeros((4, 6, 4, 3), np.float32))
    assert not (tmp_path / "a").exists()
    store.fill(Sampler())
    for name, array, words in (
        (
            "shard_00000012_00000013",
            np.zeros((1, 6, 4, 3), np.uint8),
            r"holds \(1, 6, 4, 3\) uint8, not \('n', 4, 6, 3\)",
        ),
        ("shard_00000012_00000014", np.zeros((1, 4, 6, 3), np.uint8), "holds 1 samples, not 2"),
        (
            "shard_00000010_00000011",
            np.zeros((1, 4, 6, 3), np.uint8),
            "holds samples that are in shard_00000008_00000011",
        ),
        ("shard_00000012_00000013", np.zeros((1, 4, 6, 3), np.int8), "is not a shard: it holds int8"),
        ("shard_of_mine", np.zeros((1, 4, 6, 3), np.uint8), "is not called as a shard is"),
        ("shard_00001", np.zeros((4, 4, 6, 3), np.uint8), r"shard_00000\.npy is not whole"),
    ):
        np.save(tmp_path / "a" / f"{name}.npy", array)
        with pytest.raises(ValueError, match=words):
            SampleStore(tmp_path / "a", MANIFEST, shard_size=4)
        (tmp_path / "a" / f"{name}.npy").unlink()
    file = tmp_path / "a" / "shard_00000004_00000008.npy"
    whole = file.read_bytes()
    for data, words in (
        (b"text, and nothing else", "is not a shard"),
        (whole + b"more", "is not a shard: it has 420 bytes where 416"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"shard_00000004_00000008\.npy {words}"):
            SampleStore(tmp_path / "a", MANIFEST, shard_size=4)
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"shards without a manifest\.json"):
        SampleStore(tmp_path / "a", MANIFEST, shard_size=4)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        SampleStore(tmp_path / "b", dataclasses.replace(MANIFEST, num_samples=0))
    with pytest.raises(ValueError, match="shard_size must be at least 1, got 0"):
        SampleStore(tmp_path / "b", MANIFEST, shard_size=0)
