"""Where a run keeps the token states of its captions, and by what it knows them again."""

import errno
import os
import pathlib
import types
import warnings

import numpy as np
import pytest
import rich.console

from sora_jax.commands import process
from sora_jax.data.captioned import DataConfig
from sora_jax.data.captions import CaptionTable
from sora_jax.runs import packed


class Encoder:
    """Letters as tokens; `words` are read instead of what they stand for."""

    dim, fingerprint = 3, "of the encoder"

    def __init__(self, words=None):
        self.words, self.asked = words or {}, []

    def spell_out(self, caption):
        return self.words.get(caption, caption)

    def encode(self, captions, max_tokens, option):
        self.asked.append((captions, max_tokens, option))
        return [np.full((len(self.spell_out(c)) + 2, 3), 1.0, np.float32) for c in captions]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns what makes the table of a data set with some captions, and the folders of the data and of the run."""
    data, workdir = tmp_path / "data", tmp_path / "run"
    data.mkdir()

    def table(captions, encoder):
        content = types.SimpleNamespace(metadata=types.SimpleNamespace(captions=captions), captions=None)
        monkeypatch.setattr(packed, "find_dataset", lambda path: data)
        monkeypatch.setattr(packed, "open_data", lambda data, split: content)
        monkeypatch.setattr(packed, "load_text_encoder", lambda: encoder)
        console = rich.console.Console(stderr=True)
        return packed.caption_table(DataConfig(path=str(data)), 3, ("train",), workdir, console)

    return table, data, workdir


def names(folder):
    return sorted(path.name for path in pathlib.Path(folder).iterdir()) if folder.exists() else []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.ENOSPC, errno.ENOTSUP])
def test_data_that_takes_no_table_leaves_it_to_the_run(run, monkeypatch, capsys, number):
    table, data, workdir = run
    real = CaptionTable.save

    def save(self, path):
        if pathlib.Path(path).parent == data:
            raise OSError(number, os.strerror(number), str(path))
        return real(self, path)

    monkeypatch.setattr(CaptionTable, "save", save)
    encoder = Encoder()
    assert table(["frog", "toad"], encoder).lengths(["frog"]).tolist() == [6]
    said = [line for line in capsys.readouterr().err.splitlines() if "takes no table" in line]
    assert said == [f"{data} takes no table of captions ({os.strerror(number)}): it is kept in {workdir}"]
    assert names(data) == [] and len(names(workdir)) == 1
    table(["frog", "toad"], encoder)  # found again
    assert len(encoder.asked) == 1 and capsys.readouterr().err == ""


def test_a_table_is_made_anew_for_other_captions_and_another_reading(run):
    table, data, _ = run
    plain, emoji = ["frog"], ["\N{FROG FACE}"]
    table(plain, Encoder())
    table(plain, Encoder({"\N{FROG FACE}": "frog"}))  # of captions without emoji nothing has changed
    assert len(names(data)) == 1
    assert table(emoji, Encoder()).lengths(emoji).tolist() == [3]
    assert table(emoji, Encoder({"\N{FROG FACE}": "frog"})).lengths(emoji).tolist() == [6]
    assert len(names(data)) == 3


def test_the_encoder_is_told_what_cuts_captions(run):
    table, _, _ = run
    encoder = Encoder()
    table(["frog"], encoder)
    assert encoder.asked == [(["", "frog"], DataConfig().max_caption_tokens, "--data.max-caption-tokens")]


def test_scripts_warn_in_one_line(monkeypatch):
    monkeypatch.setattr(process, "skip_missing_tpu", lambda: None)
    monkeypatch.setattr(warnings, "formatwarning", None)
    process.prepare_process()
    assert warnings.formatwarning("a cut", UserWarning, "file.py", 3, "its code") == "warning: a cut\n"
