import dataclasses
import json
import pathlib
import subprocess
import sys

import av
import numpy as np
import pytest
from class_models import write_autoencoder, write_latent_model, write_pixel_model
from PIL import Image
from tiny_model import random_params

from sora_jax.commands import generate
from sora_jax.config import PatchConfig
from sora_jax.families.load import export_model

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "generate.py"


@pytest.fixture(scope="module")
def checkpoint(tiny_config, tmp_path_factory):
    """A model of random parameters for MiniLM's captions, as `convert_checkpoint.py export` writes it."""
    model = dataclasses.replace(tiny_config.model, text_dim=384)
    config = dataclasses.replace(tiny_config, model=model)
    path = tmp_path_factory.mktemp("model")
    export_model(path, config, random_params(config))
    return str(path)


def test_clips_of_several_sizes_are_written_and_reported(checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    generate.run(
        generate.GenerateOptions(
            prompt=("Frog, jumping!", ""),
            num_frames=(3, 1),
            height=(8, 12),
            width=(16,),
            seed=4,
            output=str(output),
            checkpoint=checkpoint,
            scale=2,
            json=tmp_path / "report.json",
        )
    )
    printed = capsys.readouterr().out
    assert "prompt 2 is empty: its clip is unconditional." in printed
    names = ["000-frog-jumping.mp4", "001-unconditional.png", "sheet.png"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert all(str(output / name) in printed for name in names)
    with av.open(str(output / names[0])) as container:
        assert [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)] == [(16, 32, 3)] * 3
    assert np.asarray(Image.open(output / names[1])).shape == (24, 32, 3)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(c["num_frames"], c["height"], c["width"], c["fps"], c["seed"]) for c in report["clips"]] == [
        (3, 8, 16, 8.0, 4),
        (1, 12, 16, 8.0, 5),
    ]
    assert report["num_steps"] == 2 and report["seconds"]["total"] > 0


def test_clips_of_latents_are_decoded_by_their_autoencoder(tiny_config, checkpoint, tmp_path, capsys):
    model, patch = dataclasses.replace(tiny_config.model, text_dim=384), PatchConfig((1, 2, 2), channels=4)
    config = dataclasses.replace(tiny_config, model=model, patch=patch)
    export_model(tmp_path / "model", config, random_params(config))
    vae = ["--vae", str(write_autoencoder(tmp_path / "vae"))]
    common = ["--prompt", "frog", "--output", str(tmp_path / "out"), "--scale", "1"]
    command = [*common, "--checkpoint", str(tmp_path / "model"), "--num-frames", "2", "--height", "8", "--width", "16"]
    assert generate.main([*command, *vae]) == 0
    with av.open(str(tmp_path / "out" / "000-frog.mp4")) as container:
        assert [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)] == [(8, 16, 3)] * 2
    capsys.readouterr()
    assert generate.main(command) == 2
    assert "got 4: latents need their autoencoder, vae." in capsys.readouterr().err
    assert generate.main([*common, "--checkpoint", checkpoint, *vae]) == 2
    assert "makes pixels, which no autoencoder decodes: leave vae out" in capsys.readouterr().err


def test_images_of_classes_are_written_and_reported(tmp_path, capsys):
    output = tmp_path / "out"
    generate.run(
        generate.GenerateOptions(
            class_labels=(4, 0, 4),
            checkpoint=str(write_latent_model(tmp_path / "dit")),
            vae=str(write_autoencoder(tmp_path / "vae")),
            height=(16,),
            num_steps=3,
            sampler="euler",
            guided_channels=0,
            scale=1,
            output=str(output),
            json=tmp_path / "report.json",
        )
    )
    names = ["000-class-4.png", "001-class-0.png", "002-class-4.png", "sheet.png"]
    assert sorted(path.name for path in output.iterdir()) == names
    images = [np.asarray(Image.open(output / name)) for name in names[:3]]
    assert all(image.shape == (16, 12, 3) for image in images) and (images[0] != images[2]).any()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [image["label"] for image in report["images"]] == [4, 0, 4]
    assert report["guidance_scale"] == 4 and report["guided_channels"] is None and report["sampler"] == "euler"
    printed = capsys.readouterr().out
    assert all(str(output / name) in printed for name in names)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompt=("frog",)), "--prompt is of clips from text"),
        (dict(num_frames=(3,)), "--num-frames is of clips from text"),
        (dict(checkpoint=None), "--class-labels needs --checkpoint, a DiT"),
        (dict(height=(4, 8)), "--class-labels are drawn at one size"),
        (dict(guided_channels=-1), r"--guided-channels must be 0 \(all\) or more, got -1"),
        (dict(height=(5,)), r"positive multiples of 2 pixels, got \(5, 4\)"),
        (dict(class_labels=(0, 3)), "--class-labels must be between 0 and 2, the model's classes, got 3"),  # null
        (dict(class_labels=(-1,)), "--class-labels must be between 0 and 2, the model's classes, got -1"),
        (dict(num_steps=21), "count must be between 1 and the process's 20 steps, got 21"),
    ],
)
def test_bad_options_for_classes_are_named(tmp_path, changes, message):
    model = str(write_pixel_model(tmp_path / "model"))
    options = dict(class_labels=(0,), checkpoint=model, output=str(tmp_path / "out")) | changes
    with pytest.raises(ValueError, match=message):
        generate.run(generate.GenerateOptions(**options))
    assert not (tmp_path / "out").exists()


def test_clips_that_are_not_finite_leave_nothing(checkpoint, tmp_path):
    options = generate.GenerateOptions(
        prompt=("frog",),
        guidance_scale=1e30,
        output=str(tmp_path / "out"),
        checkpoint=checkpoint,
        json=tmp_path / "r.json",
    )
    with pytest.raises(FloatingPointError, match=r"prompt 1 \('frog'\) is NaN or beyond 1e19 from step 1 of 2 on"):
        generate.run(options)
    assert not list(tmp_path.iterdir())


def test_prompts_of_a_file_follow_those_of_the_command_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red heart\n\n  rocket \r\ntwo\u2028halves\n", encoding="utf-8-sig")
    options = generate.GenerateOptions(prompt=("frog",), prompts_file=path)
    assert generate.read_prompts(options) == ["frog", "red heart", "rocket", "two\u2028halves"]


def test_a_prompt_beyond_the_text_budget_is_cut_with_a_warning(checkpoint, tmp_path):
    options = generate.GenerateOptions(prompt=("frog " * 20,), output=str(tmp_path), checkpoint=checkpoint)
    with pytest.warns(UserWarning, match="the caption is cut to 8 tokens .the longest has 22.: 'frog frog"):
        generate.run(options)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(height=(10,)), "height must be a multiple of the patch's 4, got 10; 8 or 12 would work"),
        (dict(num_frames=(1, 2)), "--num-frames has 2 values for 1 prompts"),
        (dict(num_steps=0), "num_steps must be at least 1, got 0"),
        (dict(scale=0), "--scale must be a whole number of at least 1, got 0"),
        (dict(scale=2049), "--scale must be at most 2048 for 8 x 8 pixels, got 2049"),
        (dict(fps=(0.0,)), "fps must be positive, got 0"),
        (dict(fps=(0.0004,)), "--fps must be between 0.01 and 1000 in a video, got 0.0004"),
    ],
)
def test_bad_options_are_named_and_write_nothing(checkpoint, tmp_path, changes, message):
    output = tmp_path / "out"
    options = generate.GenerateOptions(prompt=("frog",), output=str(output), checkpoint=checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        generate.run(options)
    assert not output.exists()


@pytest.mark.parametrize("changes", [dict(output="file"), dict(json=pathlib.Path("file/x.json"))])
def test_where_nothing_can_be_written_is_named_before_the_model_is_loaded(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    options = generate.GenerateOptions(prompt=("frog",), checkpoint="absent", **changes)
    with pytest.raises(ValueError, match=f"--{next(iter(changes))} .* 'file' is a file, not a directory"):
        generate.run(options)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "no prompt: give --prompt TEXT"),
        (["--prompts-file", "missing.txt"], 2, "--prompts-file missing.txt cannot be read"),
        (["--prompt", "frog", "--smapler", "heun"], 2, "smapler"),
        (["--prompt", "frog", "--checkpoint", "missing"], 1, "no run, checkpoint or exported model at missing"),
    ],
)
def test_exit_codes(tmp_path, arguments, code, message):
    process = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == code and message in process.stderr and "Traceback" not in process.stderr
    assert not list(tmp_path.iterdir())
