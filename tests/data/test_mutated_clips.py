"""Damaged files: whatever bytes a folder holds, each file is in the data set or named, and bounds hold."""

import collections
import dataclasses
import io
import json
import time

import av
import numpy as np
import pytest
from PIL import Image

from sora_jax.data.builders import clip_dataset, folder
from sora_jax.data.builders.parts import Encoding
from sora_jax.data.sources import ClipSource

WIDTH, HEIGHT, NUM_FRAMES = 32, 24, 6
MOST_FRAMES = 4096  # of a small file, whatever its times are
MOST_SECONDS = 20.0  # of a processor, a file
MOST_BYTES_A_FRAME = 64 << 10  # as JPEG of at most 64 pixels a side, without chroma subsampling

VIDEOS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "mov": "mpeg4", "avi": "mjpeg"}
PICTURES = {"gif": "GIF", "webp": "WEBP", "png": "PNG", "jpg": "JPEG", "tif": "TIFF", "avif": "AVIF"}
STILLS = ("jpg", "tif")
EXTREMES = (0, 1, 2, 255, 1000, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def moving_pictures():
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for i in range(NUM_FRAMES):
        yield np.stack([8 * columns, 10 * rows, 40 * i + 0 * rows], -1).astype(np.uint8)


def encoded_video(container, codec):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format={"mkv": "matroska"}.get(container, container)) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for pixels in moving_pictures():
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def encoded_pictures(kind):
    frames, buffer = [Image.fromarray(pixels) for pixels in moving_pictures()], io.BytesIO()
    animation = {} if kind in ("JPEG", "TIFF") else {"save_all": True, "append_images": frames[1:], "duration": 100}
    frames[0].save(buffer, kind, **animation)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def clean():
    """A small file of each format."""
    videos = {suffix: encoded_video(suffix, codec) for suffix, codec in VIDEOS.items()}
    return videos | {suffix: encoded_pictures(kind) for suffix, kind in PICTURES.items()}


def mutate(rng, data, other):
    """Returns `data` damaged in one or two ways; `other` is a file of another format."""
    for _ in range(rng.integers(1, 3)):
        size = max(len(data), 1)
        start, length = int(rng.integers(size)), int(min(size, 2 ** rng.uniform(0, 8)))
        place = start if rng.random() < 0.3 else int(rng.integers(min(size, 600)))  # headers stand at the beginning
        match int(rng.integers(7)):
            case 0:
                data = data[:start]
            case 1:
                damaged = bytearray(data)
                for i in rng.integers(size, size=rng.integers(1, 5)) if data else ():
                    damaged[i] ^= 1 << int(rng.integers(8))
                data = bytes(damaged)
            case 2:
                data = data[:start] + bytes(len(data[start : start + length])) + data[start + length :]
            case 3:
                data = data[: start + length] + data[start:]
            case 4:
                data = data[:place] + rng.bytes(length) + data[place:]
            case 5:  # a number of a header: a size, a time, a count
                width = int(rng.choice([1, 2, 4, 8]))
                number = int(rng.choice(np.array(EXTREMES, object))) % 2 ** (8 * width)
                order = "big" if rng.random() < 0.5 else "little"
                data = data[:place] + number.to_bytes(width, order) + data[place + width :]
            case 6:
                data = data[:start] + other[int(rng.integers(len(other))) :]
    return data


@dataclasses.dataclass(frozen=True)
class Timed:
    """The converter of a folder, which may not take long."""

    convert: folder.Converter

    def __call__(self, task, encoding):
        start = time.process_time()
        yield from self.convert(task, encoding)
        assert time.process_time() - start < MOST_SECONDS, task.name


def check(root, clean, count, num_workers, seed=0):
    """Prepares a folder of `count` damaged files with a clean one of each format beside them."""
    source, rng = root / "clips", np.random.default_rng(seed)
    source.mkdir()
    files = {f"clean.{suffix}": data for suffix, data in clean.items()}
    suffixes = list(clean)
    for i in range(count):
        suffix, other = suffixes[i % len(suffixes)], suffixes[int(rng.integers(len(suffixes)))]
        files[f"{i}.{suffix}"] = mutate(rng, clean[suffix], clean[other])
    for name, data in files.items():
        (source / name).write_bytes(data)
    lines = [json.dumps({"file": name, "caption": name}) for name in files]
    (source / "captions.jsonl").write_text("\n".join(lines))
    tasks, skipped = folder.make_tasks(str(source), unseen_share=0)
    assert len(tasks) == len(files) and not skipped
    report = clip_dataset.prepare(
        folder.ClipFolder, tasks, Timed(folder.Converter()), Encoding(64), str(root / "data"), num_workers, skipped
    )
    meta = ClipSource(report["path"]).metadata
    frames = collections.Counter()
    for name, num_frames in zip(meta.names, meta.num_frames.tolist(), strict=True):
        frames[name.split("#")[0]] += num_frames
    left_out = {entry["file"]: entry["reason"] for entry in report["skipped"]}
    assert set(frames) | set(left_out) == set(files) and not set(frames) & set(left_out)
    assert all(reason.strip() and "\n" not in reason for reason in left_out.values())
    for suffix in clean:
        assert frames[f"clean.{suffix}"] == (1 if suffix in STILLS else NUM_FRAMES)
    assert max(frames.values()) <= MOST_FRAMES
    assert max(meta.width.max(), meta.height.max()) <= 64
    assert report["num_bytes"]["train"] < MOST_BYTES_A_FRAME * sum(frames.values())
    return frames, left_out


def test_a_hundred_damaged_files(tmp_path, clean):
    frames, left_out = check(tmp_path, clean, 100, 0)
    assert len(left_out) > 50 and len(frames) > 11 + 10


@pytest.mark.slow
def test_a_thousand_damaged_files(tmp_path, clean):
    frames, left_out = check(tmp_path, clean, 1000, 2)
    assert len(left_out) > 500 and len(frames) > 11 + 100
