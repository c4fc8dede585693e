"""Damaged files load or raise ValueError or OSError with a message, in bounded time and memory."""

import pathlib
import re
import time
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from torch_files import Instance, torch_bytes

from sora_jax.convert.state_dict import find_tensors
from sora_jax.convert.torch_reader import read_torch
from sora_jax.convert.weight_files import read_npz, read_weights

LEGACY = pathlib.Path(__file__).parent.parent / "fixtures" / "torch" / "legacy.pt"
RNG = np.random.default_rng(0)
STATE = {
    f"blocks.{i}.{name}": RNG.normal(size=(8, 12)).astype(np.float32) for i in range(3) for name in ("q", "k", "v")
}
MARKS = ("blocks.0.q",)


def files(folder):
    """Whole files, by suffix, with what reads each."""
    checkpoint = {"ema": STATE, "args": Instance("argparse.Namespace", {"lr": "1e-4"}), "epoch": 3}
    np.savez(folder / "plain.npz", **STATE)
    np.savez_compressed(folder / "packed.npz", **STATE)
    read = lambda path: read_weights(path, "net", MARKS)  # noqa: E731
    return {
        "pt": ([torch_bytes(checkpoint), LEGACY.read_bytes()], lambda path: find_tensors(read_torch(path), MARKS)),
        "safetensors": ([safetensors.numpy.save(STATE, {"format": "pt"})], read),
        "npz": ([(folder / name).read_bytes() for name in ("plain.npz", "packed.npz")], read_npz),
    }


def mutate(data, rng):
    """Flips, zeroes, cuts, repeats or removes bytes, or makes a number in a header large."""
    data = bytearray(data)
    # Headers are at the beginning or, of zip archives, at the end; every other time the damage is there.
    ends = [*range(min(600, len(data))), *range(max(len(data) - 600, 0), len(data))]
    place = lambda: int(rng.choice(ends) if rng.random() < 0.5 else rng.integers(len(data)))  # noqa: E731
    match rng.integers(6):
        case 0:
            for _ in range(rng.integers(1, 9)):
                data[place()] ^= 1 << rng.integers(8)
        case 1:
            del data[place() :]
        case 2:
            first = place()
            data[first : first + int(rng.integers(1, 200))] = bytes(len(data[first : first + 200]))
        case 3:
            first = place()
            del data[first : first + int(rng.integers(1, 40))]
        case 4:
            first = place()
            data[first:first] = data[first : first + int(rng.integers(1, 40))]
        case 5:
            numbers = list(re.finditer(rb"\d+", bytes(data[:3000])))
            number = numbers[rng.integers(len(numbers))]
            data[number.start() : number.end()] = b"9" * int(rng.integers(1, 20))
    return bytes(data)


def check(suffix, count, tmp_path):
    """Returns how many of so many damaged files were refused."""
    originals, read = files(tmp_path)[suffix]
    refused = 0
    for seed in range(count):
        data = mutate(originals[seed % len(originals)], np.random.default_rng((seed, len(suffix))))
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(data)
        tracemalloc.start()
        begun = time.process_time()
        try:
            read(path)
        except (ValueError, OSError) as error:
            refused += 1
            assert str(error) and "\n" not in str(error), (seed, error)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 40 * len(data) + 4_000_000 and time.process_time() - begun < 5, (seed, peak)
    return refused


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npz"])
def test_a_few_damaged_files(suffix, tmp_path):
    assert 5 <= check(suffix, 20, tmp_path) <= 20


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npz"])
def test_many_damaged_files(suffix, tmp_path):
    assert 100 <= check(suffix, 200, tmp_path) <= 200
