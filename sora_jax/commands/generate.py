"""Makes clips from text, with the released default model or any trained one; or images of classes, with a DiT.

A prompt of one frame becomes a PNG, a longer one an mp4; `sheet.png` shows all of them, a row each.

    python experiments/generate.py --prompt "frog"
    python experiments/generate.py --prompt "frog" --prompt "rocket" --num-frames 16 1 --height 48 --width 48 64
    python experiments/generate.py --prompts-file prompts.txt --checkpoint runs/emoji --num-steps 50 --sampler heun
    python experiments/generate.py --class-labels 207 360 387 974 --checkpoint models/dit_xl_2 --vae models/sd_vae
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import emoji
import numpy as np
import tyro
from etils import epath

from sora_jax.commands.process import prepare_process
from sora_jax.files import check_writable, write_whole


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """What to make and where to put it.

    Where an option is left out, the model's own sample settings hold. `--num-frames`, `--height`, `--width` and `--fps`
    take one value, or one for each prompt.

    Attributes:
        class_labels: instead of prompts, the classes of a DiT's images, one each: 0 to its number of classes - 1.
        prompt: what a clip shows; may be given several times. An empty one gives an unconditional clip.
        prompts_file: a text file with a prompt on each line, after those of `--prompt`; empty lines are left out.
        num_frames: frames; 1 is a picture.
        height: in pixels, a multiple of the model's patch (of latents, times the autoencoder's stride).
        width: in pixels, likewise.
        fps: frames a second.
        num_steps: steps of the sampler (DiT: 250).
        guidance_scale: of classifier-free guidance; 1 is none (DiT: 4, and 1 where it has no null class).
        guided_channels: of a DiT; guidance is of so many of the first channels, as in the official code; 0 for all.
        seed: prompt i has the seed `seed` + i.
        sampler: `heun` costs twice as much a step; `dpm++` and `unipc` need the fewest steps (default: `euler`; DiT:
            `ancestral`, which is DDPM with the variance that was learned).
        output: directory of the files.
        checkpoint: a run directory or an exported model (default: the released model); of a DiT also converted weights.
        vae: of a model of latents, the autoencoder that `convert_checkpoint.py sd-vae` wrote.
        scale: whole factor that pixels are enlarged by in the files (default: to a long side of at least 256).
        json: also write the settings, files and times to this file.
    """

    class_labels: tuple[int, ...] = ()
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    prompts_file: Path | None = None
    num_frames: tuple[int, ...] = ()
    height: tuple[int, ...] = ()
    width: tuple[int, ...] = ()
    fps: tuple[float, ...] = ()
    num_steps: int | None = None
    guidance_scale: float | None = None
    guided_channels: int = 3
    seed: int = 0
    sampler: Literal["euler", "heun", "dpm++", "dpm++sde", "unipc", "ancestral"] | None = None
    output: str = "outputs/generate"
    checkpoint: str | None = None
    vae: str | None = None
    scale: int | None = None
    json: Path | None = None


def generate_clips(options: GenerateOptions) -> None:
    """Loads the model, samples, writes the files and prints where and how long."""
    start = time.perf_counter()
    prompts = read_prompts(options)
    if options.scale is not None and options.scale < 1:
        raise ValueError(f"--scale must be a whole number of at least 1, got {options.scale}.")

    # Imported late, so that --help and a bad option answer at once.
    from sora_jax.generation.pipeline import SoraPipeline
    from sora_jax.generation.progress import ProgressBar

    check_outputs(options)
    pipeline = SoraPipeline.from_pretrained(options.checkpoint, options.vae)
    sample = pipeline.config.sample
    shapes = {
        name: one_or_each(name, getattr(options, name), getattr(sample, name), len(prompts))
        for name in ("num_frames", "height", "width", "fps")
    }
    for length, height, width, fps in zip(*shapes.values(), strict=True):
        check_file(length, height, width, fps, options.scale)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            print(f"prompt {number} is empty: its clip is unconditional.")
    loaded = time.perf_counter()
    clips = pipeline(
        prompts,
        **shapes,
        num_steps=options.num_steps,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
        sampler=options.sampler or "euler",
        progress=ProgressBar(),
    )
    sampled = time.perf_counter()
    settings = {
        "checkpoint": options.checkpoint or "default",
        "sampler": options.sampler or "euler",
        "num_steps": options.num_steps or sample.num_steps,
        "guidance_scale": sample.guidance_scale if options.guidance_scale is None else options.guidance_scale,
    }
    made = [
        Made(clip, prompt.strip() or "(no prompt)", slug(prompt), fps, {"prompt": prompt, "seed": options.seed + index})
        for index, (prompt, clip, fps) in enumerate(zip(prompts, clips, shapes["fps"], strict=True))
    ]
    write_results(options, made, "clips", settings, (start, loaded, sampled))


def generate_classes(options: GenerateOptions) -> None:
    """Draws an image of a DiT for each class, writes the files and prints where and how long."""
    start = time.perf_counter()
    meant = {"prompt": (), "prompts_file": None, "num_frames": (), "fps": ()}
    for field, default in meant.items():
        if getattr(options, field) != default:
            raise ValueError(f"--{field.replace('_', '-')} is of clips from text, not of the images of --class-labels.")
    if options.checkpoint is None:
        raise ValueError("--class-labels needs --checkpoint, a DiT: a run, or what convert_checkpoint.py dit wrote.")
    if max(len(options.height), len(options.width)) > 1:
        raise ValueError("--class-labels are drawn at one size: give --height and --width once.")
    if options.guided_channels < 0:
        raise ValueError(f"--guided-channels must be 0 (all) or more, got {options.guided_channels}.")

    from sora_jax.generation.dit_pipeline import DiTPipeline
    from sora_jax.generation.progress import ProgressBar
    from sora_jax.pixels import to_pixels

    check_outputs(options)
    pipeline = DiTPipeline.from_pretrained(options.checkpoint, options.vae)
    num_classes = pipeline.config.num_classes
    # The null class, of which no image is meant to be seen, is none of them.
    if bad := [label for label in options.class_labels if not 0 <= label < num_classes]:
        raise ValueError(f"--class-labels must be between 0 and {num_classes - 1}, the model's classes, got {bad[0]}.")
    size = tuple(
        given[0] if given else side
        for given, side in zip((options.height, options.width), pipeline.image_size, strict=True)
    )
    pipeline.check_size(size)
    num_steps = min(250, pipeline.process.most_steps) if options.num_steps is None else options.num_steps
    settings = {
        "sampler": options.sampler or "ancestral",
        "num_steps": num_steps,
        "guidance_scale": options.guidance_scale,
        "guided_channels": options.guided_channels or None,
    }
    if options.guidance_scale is None:
        settings["guidance_scale"] = 4.0 if pipeline.config.has_null_class else 1.0
    loaded = time.perf_counter()
    images = pipeline(options.class_labels, options.seed, image_size=size, progress=ProgressBar(), **settings)
    sampled = time.perf_counter()
    frames = to_pixels(np.broadcast_to(images, (*images.shape[:-1], 3)))
    made = [
        Made(frame[None], f"class {label}", f"class-{label}", 1.0, {"label": label})
        for label, frame in zip(options.class_labels, frames, strict=True)
    ]
    settings = {"checkpoint": options.checkpoint, **settings, "seed": options.seed}
    write_results(options, made, "images", settings, (start, loaded, sampled))


def check_outputs(options: GenerateOptions) -> None:
    """Raises ValueError or OSError where the files could not be written, before anything is sampled."""
    check_writable("--output", options.output, directory=True)
    if options.json is not None:
        check_writable("--json", options.json)


@dataclasses.dataclass(frozen=True)
class Made:
    """A clip that was sampled.

    Attributes:
        frames: (T, H, W, 3) uint8; one frame is a picture.
        caption: beside it in the sheet.
        name: of its file, after its number.
        fps: frames a second.
        facts: what the report says of it besides its file and its size.
    """

    frames: np.ndarray
    caption: str
    name: str
    fps: float
    facts: dict[str, Any]


def write_results(
    options: GenerateOptions,
    made: Sequence[Made],
    kind: str,
    settings: dict[str, Any],
    times: tuple[float, float, float],
) -> None:
    """Writes a file of each clip, the contact sheet and the report, and prints where they are and how long it took.

    Args:
        options: say where to.
        made: the clips.
        kind: key of their list in the report.
        settings: what the report says of all of them.
        times: when the command began, when the model was loaded and when the clips were sampled, in seconds.
    """
    from sora_jax.generation import video_io

    output = epath.Path(options.output)
    report = []
    for index, clip in enumerate(made):
        name, (length, height, width) = f"{index:03d}-{clip.name}", clip.frames.shape[:3]
        if length == 1:
            path = video_io.write_image(output / f"{name}.png", clip.frames[0], options.scale)
        else:
            path = video_io.write_video(output / f"{name}.mp4", clip.frames, clip.fps, options.scale)
        factor = video_io.viewing_scale(height, width, options.scale)
        rate = f" at {clip.fps:g} fps" if length > 1 else ""
        print(f"{path}  {length} x {height} x {width}{rate}, shown {factor} times as large: {clip.caption!r}")
        size = {"num_frames": length, "height": height, "width": width, "fps": clip.fps, "scale": factor}
        report.append(clip.facts | {"file": str(path)} | size)
    sheet = video_io.contact_sheet([clip.frames for clip in made], [clip.caption for clip in made])
    sheet_path = video_io.write_image(output / "sheet.png", sheet)
    print(f"{sheet_path}  the contact sheet")
    start, loaded, sampled = times
    seconds = {"load": loaded - start, "sample": sampled - loaded, "write": time.perf_counter() - sampled}
    seconds["total"] = time.perf_counter() - start
    print(", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    if options.json is not None:
        result = {**settings, kind: report, "sheet": str(sheet_path), "seconds": seconds}
        write_whole(options.json, json.dumps(result, indent=2) + "\n")


def read_prompts(options: GenerateOptions) -> list[str]:
    """Returns the prompts of the command line, then those of the file; ValueError if there are none."""
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        try:
            lines = options.prompts_file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts-file {options.prompts_file} cannot be read: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT (once or more) or a --prompts-file with a prompt on a line.")
    return prompts


def one_or_each(name: str, values: tuple, default: float, count: int) -> list:
    """Returns `count` values: the given ones, the one given value, or the default, repeated."""
    if len(values) not in (0, 1, count):
        option = name.replace("_", "-")
        raise ValueError(f"--{option} has {len(values)} values for {count} prompts; give one, or one for each prompt.")
    return list(values) if len(values) == count and count > 1 else [values[0] if values else default] * count


def check_file(length: int, height: int, width: int, fps: float, scale: int | None) -> None:
    """Raises ValueError, naming the option, where a clip could be sampled but not be written to a file."""
    from sora_jax.generation import video_io

    try:
        if scale is not None:
            video_io.viewing_scale(height, width, scale)
        if length > 1 and fps > 0:
            video_io.frame_rate(fps)
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def slug(prompt: str) -> str:
    """Returns a prompt as the part of a file name, emoji by their names."""
    words = emoji.demojize(prompt, delimiters=(" ", " ")).lower()
    return re.sub(r"[\W_]+", "-", words).strip("-")[:40].strip("-") or "unconditional"


def run(options: GenerateOptions) -> None:
    """Makes what is asked for: images of classes, or clips of prompts."""
    (generate_classes if options.class_labels else generate_clips)(options)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        options = tyro.cli(GenerateOptions, args=argv, description=__doc__)
        run(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def script() -> NoReturn:
    """Runs the command line of this process and ends it."""
    prepare_process()
    sys.exit(main())
