"""How much of the packed rows of a recognition experiment is padding, planned by the pipeline's own shards.

Nothing is decoded. Token dropping and sizes are drawn as in training.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sora_jax.commands.train import load_config
from sora_jax.data.packing import Shard
from sora_jax.data.sources import open_source
from sora_jax.families.recognition import ClassificationConfig


@dataclasses.dataclass(frozen=True)
class WasteOptions:
    """Measures the padding of packed rows of images, or clips, at their native aspect.

    Attributes:
        path: directory of a prepared data set.
        config: name of a file in sora_jax/configs/ or path of a Python file; gives patches, sizes and dropping.
        row_lengths: tokens of a row; most segments of a row grow with them.
        rows: that are planned for each.
        json: also write the table's figures to this file.
    """

    path: str
    config: str = "navit_stills"
    row_lengths: tuple[int, ...] = (256, 1024, 2048)
    rows: int = 2000
    json: Path | None = None

    def __post_init__(self) -> None:
        if not self.row_lengths or min(self.row_lengths) < 1:
            raise ValueError(f"row_lengths must be one or more positive numbers, got {self.row_lengths}.")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}.")


def run(options: WasteOptions) -> dict[str, Any]:
    """Runs the suite, prints its table and returns its figures."""
    config = load_config(options.config, ClassificationConfig)
    source = open_source(options.path, config.data.split)
    results = []
    for length in options.row_lengths:
        # Rows that are full of the smallest images must not end for want of segments.
        data = dataclasses.replace(config.data, row_length=length, max_segments=max(length // 2, 1))
        shard = Shard(source, None, data, config.patch, 0, True, data.max_clips)
        rows = [shard.next_plan() for _ in tqdm(range(options.rows), desc=f"rows of {length}", unit="row", delay=2.0)]
        tokens = sum(sample.num_tokens(config.patch) for row in rows for sample in row)
        images = sum(map(len, rows))
        waste = 1 - tokens / (length * len(rows))
        results.append(
            {
                "row_length": length,
                "rows": len(rows),
                "images": images,
                "tokens_an_image": tokens / images,
                "padding_share": waste,
                "left_out": sum(shard.skipped.values()),
            }
        )
    table = Table(
        "row length", "rows", "images", "tokens an image", "padding", "left out", title="padding of packed rows"
    )
    for r in results:
        sizes = (f"{r['row_length']}", f"{r['rows']:,}", f"{r['images']:,}", f"{r['tokens_an_image']:.1f}")
        table.add_row(*sizes, f"{r['padding_share']:.2%}", str(r["left_out"]))
    Console().print(table)
    return {"config": options.config, "results": results}
