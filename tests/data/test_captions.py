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
        assert reopened.lookup("frog").dtype == np.float32


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
