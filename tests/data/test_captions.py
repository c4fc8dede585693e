import errno
import os
import pickle

import numpy as np
import pytest

from sora_jax.data.captions import CaptionTable


def encode(captions):
    return [np.full((len(c) + 2, 3), len(c), np.float32) for c in captions]


def test_a_table_holds_each_caption_once_and_the_null_caption(tmp_path):
    calls = []

    def counting(captions):
        calls.extend(captions)
        return encode(captions)

    table = CaptionTable.build(["frog", "red heart", "frog"], counting).save(tmp_path / "table")
    assert calls == ["", "frog", "red heart"]
    for reopened in (table, CaptionTable.load(tmp_path / "table"), pickle.loads(pickle.dumps(table))):
        np.testing.assert_array_equal(reopened.lookup("frog"), np.full((6, 3), 4.0))
        np.testing.assert_array_equal(reopened.lengths(["red heart", ""]), [11, 2])
        assert reopened.dim == 3
        assert reopened.lookup("frog").dtype == np.float16


def test_a_failing_encoder_leaves_no_table(tmp_path):
    def failing(captions):
        raise RuntimeError("no encoder")

    with pytest.raises(RuntimeError):
        CaptionTable.build(["frog"], failing).save(tmp_path / "table")
    with pytest.raises(ValueError, match="no caption table at"):
        CaptionTable.load(tmp_path / "table")


def test_an_unknown_caption_is_named():
    table = CaptionTable.build(["frog"], encode)
    with pytest.raises(ValueError, match="no caption 'toad'"):
        table.lookup("toad")


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    table = CaptionTable.build(["frog"], encode)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space left on device"):
            table.save(tmp_path / "table")
    assert not list(tmp_path.iterdir())
    first, second = table.save(tmp_path / "table"), table.save(tmp_path / "table")  # as two runs that start together
    np.testing.assert_array_equal(first.lookup("frog"), second.lookup("frog"))
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


@pytest.mark.parametrize("file", ["states.npy", "spans.json"])
def test_a_damaged_table_is_named(tmp_path, file):
    CaptionTable.build(["frog"], encode).save(tmp_path / "table")
    content = (tmp_path / "table" / file).read_bytes()
    (tmp_path / "table" / file).write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"the caption table .*table is damaged .* remove it, and it is made again"):
        CaptionTable.load(tmp_path / "table")
