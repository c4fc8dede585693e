"""Clips made on the spot, with the interface of a prepared split; picklable for worker processes."""

import io

import numpy as np
from PIL import Image

from sora_jax.data.captions import CaptionTable
from sora_jax.data.records import ClipMetadata

NUM_CLIPS = 40


class FakeSource:
    """Clip i is of one colour that says which clip it is; its frames darken with time."""

    def __init__(self, num_clips: int = NUM_CLIPS):
        rng = np.random.default_rng(0)
        self.path, self.label_names, self.null_states = "fake", (), None
        self.metadata = ClipMetadata(
            clip_ids=np.arange(num_clips),
            num_frames=np.where(np.arange(num_clips) % 4 == 0, 1, rng.integers(20, 72, num_clips)).astype(np.int32),
            height=rng.integers(60, 100, num_clips).astype(np.int32),
            width=rng.integers(60, 100, num_clips).astype(np.int32),
            fps=np.full(num_clips, 24, np.float32),
            labels=np.full(num_clips, -1, np.int32),
            captions=[f"clip {i}" for i in range(num_clips)],
            names=[f"clip-{i}.webp" for i in range(num_clips)],
        )

    def __len__(self):
        return len(self.metadata)

    def read_frames(self, index, frame_indices):
        size = (int(self.metadata.width[index]), int(self.metadata.height[index]))
        encoded = []
        for frame in frame_indices:
            file = io.BytesIO()
            Image.new("RGB", size, (5 * index, 200 - 2 * frame, 255)).save(file, "PNG")
            encoded.append(file.getvalue())
        return encoded


def caption_table(source, dim=3):
    """Caption i has 2 + i % 3 token states, all equal to i; the null caption has two, equal to -1."""

    def encode(captions):
        numbers = [int(c.split()[1]) if c else -1 for c in captions]
        return [np.full((2 + (n % 3 if n >= 0 else 0), dim), n, np.float32) for n in numbers]

    return CaptionTable.build(source.metadata.captions, encode)
