"""Recognition from the command line: pictures to a data set, runs with a grid of learning rates, figures, pictures."""

import io
import json

import numpy as np
import pytest
from helpers.models import read_model
from PIL import Image

from sora_jax.commands import prepare_data, train
from sora_jax.commands.evaluations.classification import ClassifyOptions, classify
from sora_jax.data.sources import open_source
from sora_jax.families.recognition import ContrastiveTask
from sora_jax.runs.recognition import check_source, read_recognition_model

pytestmark = pytest.mark.slow

NAVIT = """
from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.labelled import NativeSize, LabelledDataConfig
from sora_jax.models.navit import NaViTConfig
from sora_jax.patches.token_drop import ConstantDrop
from sora_jax.families.recognition import ClassificationConfig

def config():
    return ClassificationConfig(
        data=LabelledDataConfig(
            sampling=NativeSize((8.0, 16.0), token_drop=ConstantDrop(0.25)), row_length=32, max_segments=6, num_bins=4,
            batch_size=2, num_shards=1, num_workers=0,
        ),
        patch=PatchConfig(size=(1, 4, 4)),
        model=NaViTConfig(
            width=8, depth=1, num_heads=2, mlp_dim=8, num_classes=2, max_grid=(1, 12, 12), num_fractions=4,
            attention="xla",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        num_steps=4, log_every=2, eval_every=2, eval_batches=4, save_every=4, num_seeds=2,
        learning_rates=(1e-3, 1e-2), test_sides=(8, 16), beside=({beside}),
    )
"""
VIT = """
from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.labelled import FixedSize, LabelledDataConfig
from sora_jax.models.vit import ViTConfig
from sora_jax.families.recognition import ClassificationConfig

def config():
    return ClassificationConfig(
        data=LabelledDataConfig(
            sampling=FixedSize((16, 16)), row_length=16, max_segments=1, num_bins=1, batch_size=4, num_shards=1,
            num_workers=0,
        ),
        patch=PatchConfig(size=(1, 4, 4)),
        model=ViTConfig(
            image_size=(16, 16), patch_size=4, width=8, depth=1, num_heads=2, mlp_dim=8, num_classes={classes}
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        num_steps=4, log_every=2, eval_every=2, eval_batches=4, save_every=4, test_sides=(8, 16),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide bright and tall dark pictures, with their classes, as a prepared data set."""
    folder = tmp_path_factory.mktemp("recognition")
    source, lines = folder / "pictures", []
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        size = (20 + i % 5, 12) if i % 2 else (12, 20 + i % 7)
        pixels = rng.integers(0, 60, (*size[::-1], 3)) + 180 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(source / f"{i}.png")
        split = "train" if i < 12 else "validation" if i < 16 else "unseen"
        label = ("dark", "bright")[i % 2]
        lines.append(json.dumps({"file": f"{i}.png", "caption": f"picture {i}", "split": split, "label": label}))
    (source / "captions.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["folder", "--source", str(source), "--output", str(folder / "data"), "--num-workers", "0"]
    assert prepare_data.main(arguments) == 0
    (folder / "vit.py").write_text(VIT.replace("{classes}", "2"))
    (folder / "three.py").write_text(VIT.replace("{classes}", "3"))
    (folder / "navit.py").write_text(NAVIT.replace("{beside}", f"{str(folder / 'vit.py')!r},"))
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """The study, run once: two rates and two seeds of each of two models."""
    command = [str(folder / "navit.py"), "--data.path", str(folder / "data"), "--workdir", str(folder / "run")]
    command += ["--json", str(folder / "figures.json")]
    assert train.main(command) == 0
    return command


def test_the_figures_of_both_models(finished, folder):
    figures = json.loads((folder / "figures.json").read_text())
    other = figures["beside"][str(folder / "vit.py")]
    for found in (figures, other):
        assert found["num_scored"] == 8 and found["num_left_out"] == 0
        assert found["num_seeds"] == len(found["accuracy_by_seed"]) == 2
        assert found["accuracy"] == np.mean(found["accuracy_by_seed"])
        assert found["most_frequent"] == 0.5
        assert found["test_sides"] == [8, 16] and len(found["score_at_sides"]) == 2
        assert found["training_flops"] == 4 * found["flops_per_step"]
        assert found["evaluated_flops"] == [2 * found["flops_per_step"], found["training_flops"]]
        assert found["learning_rate"] in (1e-3, 1e-2) and 0 < found["update_seconds"] < found["step_seconds"] * 100
    # At the size that it was trained at, a ViT is scored as it stands.
    assert other["score_at_sides"][1] == other["accuracy"]
    share = figures["compute_share/vit"]
    assert share == figures["training_flops"] / other["training_flops"]
    assert other["examples_per_step"] == 4 and figures["examples_per_step"] > 4
    for name in ("compute.png", "resolutions.png"):
        with Image.open(folder / "run" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 0


def test_one_rate_was_chosen_on_the_validation_split(finished, folder):
    runs = sorted(path.name for path in (folder / "run").iterdir() if path.is_dir())
    assert sum(name.startswith("navit_rate_0.001_") for name in runs) + sum("navit_rate_0.01_" in n for n in runs) == 3
    assert sum(name.endswith("seed_1") for name in runs) == 2


def test_again_nothing_is_trained_and_the_figures_are_the_same(finished, folder, capsys):
    def lasting():
        figures = json.loads((folder / "figures.json").read_text())
        beside = figures.pop("beside").values()
        # What an update takes is measured each time.
        return [{name: value for name, value in f.items() if name != "update_seconds"} for f in (figures, *beside)]

    before = lasting()
    assert train.main(finished) == 0
    out = capsys.readouterr().out
    assert "already finished" in out and "\nfinished" not in out
    assert lasting() == before


def test_a_longer_grid_trains_the_new_rates_alone(finished, folder, capsys):
    before = {path.name for path in (folder / "run").iterdir() if path.is_dir()}
    command = [*finished, "--learning-rates", "1e-3", "1e-2", "1e-9", "--test-sides", "8"]
    assert train.main(command) == 0
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("finished at step 4") == 2
    new = {path.name for path in (folder / "run").iterdir() if path.is_dir()} - before
    assert new == {"navit_rate_1e-09_seed_0", "vit_rate_1e-09_seed_0"}
    assert json.loads((folder / "figures.json").read_text())["test_sides"] == [8]


def test_a_checkpoint_is_scored_as_its_run_was(finished, folder):
    run = next(path for path in (folder / "run").iterdir() if path.name.startswith("vit_") and "seed_0" in path.name)
    assert json.loads((run / "config.json").read_text())["num_seeds"] == 2
    classify(ClassifyOptions(str(run), sides=(8, 16), json=folder / "classify.json"))
    results = json.loads((folder / "classify.json").read_text())["results"]
    config, params = read_model(run)
    logits = logits_of(config, params, open_source(str(folder / "data"), "unseen"))
    labels = open_source(str(folder / "data"), "unseen").metadata.labels
    np.testing.assert_allclose(results["side 16"]["accuracy"], np.mean(logits.argmax(axis=1) == labels))
    assert set(results) == {"side 8", "side 16"}


def logits_of(config, params, source):
    """An independent way to the logits: Pillow's resize and the network itself."""
    from sora_jax.models.vit import ViT

    images = []
    for i in range(len(source)):
        with Image.open(io.BytesIO(source.read_frames(i, [0])[0])) as picture:
            picture = picture.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
            images.append(np.asarray(picture, np.float32) / 127.5 - 1)
    return np.asarray(ViT(config.model).apply({"params": params}, np.stack(images)))


def test_a_run_begins_with_another_ones_parameters(finished, folder):
    run = next(path for path in (folder / "run").iterdir() if path.name.startswith("vit_"))
    config, params = read_recognition_model(str(run))
    assert config.image_size == (16, 16)
    command = [str(folder / "vit.py"), "--data.path", str(folder / "data"), "--workdir", str(folder / "tuned")]
    command += ["--init-from", str(run), "--num-steps", "1", "--optimizer.learning-rate", "1e-12", "--test-sides"]
    assert train.main(command) == 0
    _, tuned = read_model(folder / "tuned" / "vit_seed_0")
    np.testing.assert_allclose(
        tuned["encoder"]["position_embedding"], params["encoder"]["position_embedding"], atol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["three.py"], "num_classes must be the 2 classes of"),
        (["navit.py", "--model.max-grid", "1", "4", "4"], "is larger than NaViTConfig.max_grid 1 x 4 x 4"),
        (["vit.py", "--init-from", "nowhere"], "no run, checkpoint or exported model at nowhere"),
        (["vit.py", "--data.split", "none"], "split 'none' cannot be read"),
    ],
)
def test_what_cannot_work_is_said_before_training(folder, capsys, arguments, message, tmp_path):
    name, *rest = arguments
    command = [str(folder / name), "--data.path", str(folder / "data"), "--workdir", str(tmp_path / "run"), *rest]
    assert train.main(command) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_classify_says_what_it_lacks(finished, folder):
    run = str(next(path for path in (folder / "run").iterdir() if path.name.startswith("vit_")))
    with pytest.raises(ValueError, match=r"views are of ViViT's clips, got \(2, 3\) for a ViTConfig"):
        classify(ClassifyOptions(run, views=(2, 3)))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ClassifyOptions(run, batch_size=0)
    with pytest.raises(ValueError, match="sides and views do not go together"):
        ClassifyOptions(run, sides=(8,), views=(2, 3))
    with pytest.raises(ValueError, match="fps is for converted weights: a run has its own, got 5"):
        classify(ClassifyOptions(run, fps=5.0))
    with pytest.raises(ValueError, match="holds several runs or models, name one of them: navit_rate_0"):
        classify(ClassifyOptions(str(folder / "run")))
    navit = next(path for path in (folder / "run").iterdir() if path.name.startswith("navit_"))
    classify(ClassifyOptions(str(navit), sides=(400,)))  # where nothing is enlarged, nothing is too large
    with pytest.raises(FileNotFoundError, match="no run, checkpoint or exported model at nowhere"):
        classify(ClassifyOptions("nowhere", data=str(folder / "data")))


def test_models_of_other_classes_do_not_stand_beside_each_other(folder, capsys, tmp_path):
    navit = (folder / "navit.py").read_text().replace("vit.py", "three.py")
    (tmp_path / "other.py").write_text(navit)
    command = [str(tmp_path / "other.py"), "--data.path", str(folder / "data"), "--workdir", str(tmp_path / "run")]
    assert train.main(command) == 1
    assert "beside must name experiments with as many classes, 2, got" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_are_asked_for(folder, monkeypatch):
    config = train.load_config(str(folder / "vit.py"))
    source = open_source(str(folder / "data"), "train")
    check_source(config, source)
    monkeypatch.setattr(source, "label_names", ())
    with pytest.raises(ValueError, match="has no class labels"):
        check_source(config, source)


def test_recall_counts_what_is_nearer_than_the_own_caption():
    image = np.eye(6, 4, dtype=np.float32)
    text = np.eye(6, 4, dtype=np.float32)
    text[0] = (0.5, 0.9, 0, 0)  # nearer to the second image
    text[1] = (0.6, 0.8, 0, 0)
    found = ContrastiveTask.figures_of(image, text, labels=np.zeros(len(image), int))
    # Image 0 finds caption 1 first (0.6 > 0.5); image 1 caption 0 (0.9 > 0.8); the last two see all alike.
    assert found["recall_at_1"] == pytest.approx(4 / 6) and found["recall_at_5"] == 1
    assert found["chance"] == pytest.approx(1 / 6)
