import dataclasses
import errno
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_run
from helpers.models import read_model
from helpers.runs import train
from PIL import Image
from tiny_run import assert_same_runs

from sora_jax.families.load import load
from sora_jax.training import loop
from sora_jax.training.checkpoint import FOLDER
from sora_jax.training.loop import NonFiniteLossError, Outcome
from sora_jax.training.run_directory import ConfigChangedError, DataChangedError
from sora_jax.training.telemetry import Telemetry


class Hooked(tiny_run.RandomBatches):
    """Calls `hook(number, batch)` before it gives a batch."""

    def __init__(self, experiment, hook):
        super().__init__(experiment, seed=len("train"))  # as `tiny_run.opener`
        self.hook = hook

    def __next__(self):
        batch = super().__next__()
        self.hook(self.index, batch)
        return batch


def hooked(config, hook):
    return lambda split, training: Hooked(config, hook)


def lines(workdir, key):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[key] for record in records if key in record}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps without interruption, with two batches accumulated into each update."""
    config = tiny_run.config(optimizer={"accumulation_steps": 2}, save_every=2, keep=3, log_every=1)
    workdir = tmp_path_factory.mktemp("straight") / "run"
    assert train(config, workdir, tiny_run.opener(config)) is Outcome.FINISHED
    return config, workdir


def test_sigterm_saves_and_the_run_continues_bitwise(straight, tmp_path, capsys):
    config, reference = straight
    numbers = []

    def hook(number, batch):
        numbers.append(number)
        if number == 5:  # the first batch of update 3
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    assert train(config, tmp_path / "run", hooked(config, hook)) is Outcome.PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "run" / "DONE").exists()
    said = capsys.readouterr().err
    assert "preempted at step 3 of 6" in said and "data since step 0: 6 batches" in said
    assert numbers == [1, 2, 3, 4, 5, 6]

    numbers.clear()
    assert train(config, tmp_path / "run", hooked(config, lambda n, _: numbers.append(n))) is Outcome.FINISHED
    assert numbers == [7, 8, 9, 10, 11, 12]
    assert_same_runs(tmp_path / "run", reference, config)
    assert lines(tmp_path / "run", "loss") == lines(reference, "loss")


def test_continues_bitwise_from_the_last_whole_checkpoint(straight, tmp_path):
    """What `kill -9` leaves: a checkpoint half written under a temporary name, and lines of steps not saved."""
    config, reference = straight
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    (workdir / "DONE").unlink()
    shutil.move(workdir / FOLDER / "6", workdir / FOLDER / "6.orbax-checkpoint-tmp")
    shutil.rmtree(workdir / FOLDER / "6.orbax-checkpoint-tmp" / "opt_state")
    shutil.rmtree(workdir / FOLDER / "4")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')
    numbers = []
    assert train(config, workdir, hooked(config, lambda n, _: numbers.append(n))) is Outcome.FINISHED
    assert numbers[0] == 5  # after the two batches of two updates
    assert_same_runs(workdir, reference, config)
    assert lines(workdir, "loss") == lines(reference, "loss")
    assert sorted(p.name for p in (workdir / FOLDER).iterdir()) == ["2", "4", "6"]


def test_a_finished_run_says_so_and_may_grow(straight, tmp_path):
    config, reference = straight
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)

    def untouched(split, training):
        raise AssertionError("a finished run reads no data")

    assert train(config, workdir, untouched) is Outcome.ALREADY_FINISHED
    longer = dataclasses.replace(config, num_steps=7)
    assert train(longer, workdir, tiny_run.opener(longer)) is Outcome.FINISHED
    assert json.loads((workdir / "DONE").read_text()) == {"step": 7}
    assert sorted(lines(workdir, "loss")) == [1, 2, 3, 4, 5, 6, 7]


def test_a_finished_run_whose_last_checkpoint_was_removed_goes_on_from_what_is_left(straight, tmp_path):
    config, reference = straight
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / FOLDER / "6")
    assert (workdir / "DONE").exists()
    assert train(config, workdir, tiny_run.opener(config)) is Outcome.FINISHED
    assert_same_runs(workdir, reference, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"width": 32}}, r"model.width = 16, now it is 32"),
        ({"data": {"caption_dropout": 0.5}}, r"data.caption_dropout = 0.1, now it is 0.5"),
        ({"seed": 3}, r"seed = 0, now it is 3"),
        ({"data": {"path": "elsewhere"}}, r"data.path = '', now it is 'elsewhere'"),  # no fingerprint says otherwise
        ({"num_steps": 5}, r"num_steps must be at least that, got 5"),
    ],
)
def test_another_config_in_the_same_directory_is_named(straight, changes, message):
    _, workdir = straight
    changed = tiny_run.config(**{"optimizer": {"accumulation_steps": 2}, **changes})
    with pytest.raises(ConfigChangedError, match=message):
        train(changed, workdir, tiny_run.opener(changed))


def on(path, straight, workdir, fingerprints, **changes):
    """Goes on with the straight run on the data at `path`, whose splits have the `fingerprints`."""
    config = straight[0]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path), **changes)
    return train(config, workdir, tiny_run.opener(config), data_fingerprints=lambda: fingerprints)


def test_a_run_that_recorded_no_data_takes_it_at_its_first_resume(straight, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(straight[1], workdir)
    (workdir / "data.json").unlink()
    shutil.rmtree(workdir / FOLDER / "6")
    assert on("", straight, workdir, {"train": "a1"}) is Outcome.FINISHED
    assert (
        "the run recorded no fingerprint of its data; from now on it is that of : train a1" in capsys.readouterr().err
    )
    assert json.loads((workdir / "data.json").read_text()) == {"fingerprints": {"train": "a1"}}
    with pytest.raises(DataChangedError, match=r"'train' has the fingerprint b2, the run's has a1"):
        on("", straight, workdir, {"train": "b2"})

    # A held-out split that comes later is recorded with the others; nothing is said where nothing has changed.
    shutil.rmtree(workdir / FOLDER / "6")
    assert on("", straight, workdir, {"train": "a1", "unseen": "c3"}) is Outcome.FINISHED
    assert "the data" not in (said := capsys.readouterr().err) and "fingerprint" not in said
    assert json.loads((workdir / "data.json").read_text()) == {"fingerprints": {"train": "a1", "unseen": "c3"}}
    with pytest.raises(DataChangedError, match="split 'unseen' has the fingerprint d4, the run's has c3"):
        on("", straight, workdir, {"train": "a1", "unseen": "d4"})


def test_a_finished_run_tells_where_its_data_is_now(straight, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(straight[1], workdir)
    assert on("first", straight, workdir, {"train": "a1"}) is Outcome.ALREADY_FINISHED
    assert (
        "data.path was , and whether first holds the same is unknown: the run recorded no fingerprint"
        in capsys.readouterr().err
    )
    assert on("second", straight, workdir, {"train": "a1"}, log_every=3) is Outcome.ALREADY_FINISHED
    assert "moved from first to second: the same by its fingerprints (train a1)" in capsys.readouterr().err
    kept = read_model(workdir)[0]
    assert (kept.data.path, kept.log_every) == ("second", 1)
    (workdir / "data.json").write_text('{"fingerprints": ["a1"]}')
    with pytest.raises(ValueError, match=r"data\.json is damaged: restore it, or remove it where"):
        on("second", straight, workdir, {"train": "a1"})


def test_a_new_run_in_a_directory_records_its_own_data(straight, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "data.json").write_text('{"fingerprints": {"train": "z9", "old": "y8"}}')
    assert on("", straight, workdir, {"train": "a1"}) is Outcome.FINISHED
    assert json.loads((workdir / "data.json").read_text()) == {"fingerprints": {"train": "a1"}}


def test_hosts_that_read_other_data_are_named(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "gather_json", lambda value: [value, [value[0], {"train": "b2"}]])
    config = tiny_run.config(num_steps=1)
    with pytest.raises(
        ValueError, match=r"other data on host 1 \({'train': 'b2'}\) than on host 0 \({'train': 'a1'}\)"
    ):
        train(config, tmp_path / "run", tiny_run.opener(config), data_fingerprints=lambda: {"train": "a1"})
    assert not (tmp_path / "run").exists()


def test_what_stands_among_the_checkpoints_is_left_alone(straight, tmp_path, capsys):
    config, reference = straight
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / FOLDER / "6")
    for name in ("99", "99.bak", "99.tmp", "0012"):
        (workdir / FOLDER / name).mkdir()
        (workdir / FOLDER / name / "notes.txt").write_text("mine")
    shutil.copytree(workdir / FOLDER / "4", workdir / FOLDER / "50")  # a copy of a step is not that step
    (workdir / FOLDER / "77").write_text("a file")
    once = dataclasses.replace(config, keep=1)
    assert train(once, workdir, tiny_run.opener(once)) is Outcome.FINISHED
    assert "continuing at step 4" in (said := capsys.readouterr().err)
    assert all(f"{FOLDER}/{name} is no checkpoint of this run" in said for name in ("99", "50", "77"))
    assert_same_runs(workdir, reference, config)
    names = {"99", "99.bak", "99.tmp", "0012", "50", "77", "6"}
    assert {path.name for path in (workdir / FOLDER).iterdir()} == names
    assert (workdir / FOLDER / "99" / "notes.txt").read_text() == "mine"

    longer = dataclasses.replace(config, num_steps=50)  # would save where something else stands
    with pytest.raises(ValueError, match=r"checkpoints/50 is no checkpoint of this run, and step 50 .* move it"):
        train(longer, workdir, tiny_run.opener(longer))


@pytest.mark.parametrize("where", ["metrics", "checkpoint"])
def test_a_full_disk_names_the_run_and_what_is_left(straight, tmp_path, monkeypatch, where):
    config, reference = straight
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / FOLDER / "6")

    def full(*args, **kwargs):
        if where == "metrics":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: Failed to write 9 bytes [os_error_code='122']")

    owner = (Telemetry, "write") if where == "metrics" else (ocp.CheckpointManager, "save")
    monkeypatch.setattr(*owner, full)
    message = {
        "metrics": f"{workdir}: No space left on device; the last whole checkpoint is step 4.",
        "checkpoint": f"a checkpoint cannot be written to {workdir / FOLDER} (Disk quota exceeded); the last whole "
        "checkpoint is step 4.",
    }[where]
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        train(config, workdir, tiny_run.opener(config))


def test_a_run_without_checkpoint_may_start_anew_with_another_config(tmp_path):
    def fail(number, batch):
        if number == 2:
            raise OSError("no data")

    with pytest.raises(OSError, match="no data"):
        train(tiny_run.CONFIG, tmp_path / "run", hooked(tiny_run.CONFIG, fail))
    assert (tmp_path / "run" / "config.json").exists()
    other = tiny_run.config(seed=1, num_steps=1)
    assert train(other, tmp_path / "run", tiny_run.opener(other)) is Outcome.FINISHED
    assert read_model(tmp_path / "run")[0] == other


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_run.config(save_every=2, log_every=2)

    def poison(number, batch):
        if number == 3:
            batch.patches[0, 0, 0] = np.nan

    with pytest.raises(NonFiniteLossError, match="at step 3; the last good checkpoint is step 2"):
        train(config, tmp_path / "run", hooked(config, poison))
    assert sorted(p.name for p in (tmp_path / "run" / FOLDER).iterdir()) == ["2"]
    assert np.isfinite(np.concatenate([x.ravel() for x in jax.tree.leaves(read_model(tmp_path / "run")[1])])).all()
    assert not (tmp_path / "run" / "DONE").exists()


def test_held_out_loss_best_checkpoint_and_sample_sheets(tmp_path, capsys):
    config = tiny_run.config(
        num_steps=5, eval_every=1, save_every=5, sample_every=2, keep=1, optimizer={"learning_rate": 0.3}
    )
    sheet = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    seen = []

    def draw(params):
        seen.append(params)
        if len(seen) == 2:
            raise FloatingPointError("the samples are not finite.")
        return sheet

    assert train(config, tmp_path / "run", tiny_run.opener(config), sample_sheet=draw) is Outcome.FINISHED
    losses = lines(tmp_path / "run", "held_out_loss/unseen")
    assert sorted(losses) == [1, 2, 3, 4, 5]
    assert [p.name for p in sorted((tmp_path / "run" / "samples").iterdir())] == ["00000002.png", "00000005.png"]
    assert "no sample sheet at step 4: the samples are not finite." in capsys.readouterr().err
    np.testing.assert_array_equal(Image.open(tmp_path / "run" / "samples" / "00000002.png"), sheet)
    jax.tree.map(np.testing.assert_array_equal, seen[-1], read_model(tmp_path / "run")[1])
    best = min(losses, key=losses.get)
    assert best != 5  # at such a learning rate the model gets worse
    assert {int(p.name) for p in (tmp_path / "run" / FOLDER).iterdir()} == {best, 5}


def test_held_out_loss_has_the_same_batches_times_and_noise_each_time(tmp_path):
    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    config = tiny_run.config(num_steps=3, eval_every=1, log_every=1, optimizer=still)
    train(config, tmp_path / "run", tiny_run.opener(config))
    held_out, trained = (lines(tmp_path / "run", key) for key in ("held_out_loss/unseen", "loss"))
    np.testing.assert_allclose(list(held_out.values()), held_out[1], rtol=1e-6)
    assert np.ptp(list(trained.values())) > 1e-3


def test_fine_tuning_starts_from_the_averaged_parameters(straight, tmp_path):
    _, reference = straight
    still = tiny_run.config(num_steps=1, optimizer={"learning_rate": 1e-12, "weight_decay": 0.0})
    train(still, tmp_path / "tuned", tiny_run.opener(still), init_from=lambda mesh: load(reference, mesh).params)
    start, tuned = read_model(reference)[1], read_model(tmp_path / "tuned", averaged=False)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), start, tuned)

    wider = tiny_run.config(model={"mlp_dim": 48})
    with pytest.raises(ValueError, match=r"init_from .* is of another model: blocks\.mlp\.mlp\.fc1\.bias"):
        train(wider, tmp_path / "wider", tiny_run.opener(wider), init_from=lambda _: read_model(reference)[1])
    assert not (tmp_path / "wider").exists()


def test_a_split_without_batches_is_named(tmp_path):
    config = tiny_run.config(eval_every=1)
    empty = lambda split, training: tiny_run.RandomBatches(config, length=None if training else 0)  # noqa: E731
    with pytest.raises(ValueError, match=r"split 'unseen' of data\.eval_splits has no batch"):
        train(config, tmp_path / "run", empty)
    nothing = lambda split, training: tiny_run.RandomBatches(config, length=0)  # noqa: E731
    with pytest.raises(ValueError, match="split 'train' gave no more batches"):
        train(config, tmp_path / "run2", nothing)
    assert not (tmp_path / "run2").exists()


def test_an_exported_model_is_not_trained_over(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"holds an exported model, .* choose another --workdir"):
        train(tiny_run.CONFIG, tmp_path, tiny_run.opener(tiny_run.CONFIG))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("text", ["", "3", '{"step": null}'])
def test_a_damaged_done_file_is_named(tmp_path, text):
    (tmp_path / "DONE").write_text(text)
    with pytest.raises(ValueError, match=r"DONE must hold the step .* remove it, and the run goes on"):
        train(tiny_run.CONFIG, tmp_path, tiny_run.opener(tiny_run.CONFIG))
