"""The files in tests/fixtures/torch were written by torch.save 2.13.0 from tensors of the values asserted here."""

import argparse
import collections
import io
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from sora_jax.convert import torch_reader
from sora_jax.convert.pickle_reader import Stranger
from sora_jax.convert.state_dict import find_tensors
from sora_jax.convert.torch_reader import read_torch

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "torch"
FORMATS = ("zip.pt", "legacy.pt")


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_of_torch_save(name):
    state = read_torch(FIXTURES / name)
    expected = {
        "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "tail": np.array([5, 6, 7, 8], np.float32),
        "half": np.array([0.5, -2], np.float16),
        "brain": np.array([1.5, -3], "bfloat16"),
        "count": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "flag": np.array([True, False]),
        "parameter": np.array([[1, 2]], np.float32),
    }
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert state[key].dtype == value.dtype, key
        np.testing.assert_array_equal(state[key], value, err_msg=key)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kept", (0.2, 0.6, 0.97))
def test_a_truncated_file_is_an_error(name, kept):
    data = (FIXTURES / name).read_bytes()
    with pytest.raises(ValueError):
        read_torch(io.BytesIO(data[: int(len(data) * kept)]))


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def as_zip(payload):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    return io.BytesIO(buffer.getvalue())


def as_legacy(payload):
    head = (torch_reader.LEGACY_MAGIC, torch_reader.LEGACY_PROTOCOL, {"little_endian": True})
    return io.BytesIO(b"".join(pickle.dumps(value, 2) for value in head) + payload + pickle.dumps([], 2))


@pytest.mark.parametrize("wrap", (as_zip, as_legacy))
@pytest.mark.parametrize("protocol", (2, 4))
@pytest.mark.parametrize("function", (os.mkdir, eval, getattr, pickle.loads))
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, wrap, protocol, function):
    target = tmp_path / "made"
    argument = str(target) if function is os.mkdir else f"__import__('os').mkdir({str(target)!r})"
    payload = pickle.dumps({"weight": Evil(function, argument)}, protocol)
    (stranger,) = read_torch(wrap(payload)).values()
    assert isinstance(stranger, Stranger) and stranger.name.endswith(function.__name__)
    assert not target.exists()


def test_a_pickle_that_calls_what_it_must_not():
    # An OrderedDict is known, but a state with attributes is only ever skipped, and an instance is never made.
    value = collections.OrderedDict(a=1)
    value.secret = "attribute"
    read = read_torch(as_zip(pickle.dumps(value, 2)))
    assert read == {"a": 1} and type(read) is dict
    # Opcodes that call: INST, OBJ, and REDUCE of what another call made.
    for payload in (b"(K\x01ios\nsystem\n.", b"(cos\nsystem\nK\x01o.", b"cos\nsystem\n)R)R."):
        assert read_torch(as_zip(b"\x80\x02" + payload)).name == "os.system"
    with pytest.raises(ValueError):  # a number where a function should be
        read_torch(as_zip(b"\x80\x02K\x01)R."))
    with pytest.raises(ValueError):  # nothing on the stack
        read_torch(as_zip(b"\x80\x02R."))


def tensor_pickle(offset, shape, stride, num_values=4, kind="FloatStorage", function="_rebuild_tensor_v2"):
    """The opcodes of one tensor over the storage "0", as torch.save would write them."""
    integer = lambda n: b"J" + n.to_bytes(4, "little", signed=True)  # noqa: E731
    text = lambda s: b"X" + len(s).to_bytes(4, "little") + s.encode()  # noqa: E731
    row = lambda values: b"(" + b"".join(map(integer, values)) + b"t"  # noqa: E731
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu") + integer(num_values)
    arguments = b"(" + storage + b"tQ" + integer(offset) + row(shape) + row(stride) + b"\x89)t"
    return b"\x80\x02" + f"ctorch._utils\n{function}\n".encode() + arguments + b"R."


def tensor_file(data=b"\0" * 16, compression=zipfile.ZIP_STORED, **tensor):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("m/data.pkl", tensor_pickle(**tensor), zipfile.ZIP_STORED)
        archive.writestr("m/data/0", data)
    return buffer


def test_a_tensor_beyond_its_storage_is_an_error():
    fits = read_torch(tensor_file(offset=1, shape=(3,), stride=(1,)))
    assert fits.shape == (3,)
    for offset, shape, stride in ((2, (3,), (1,)), (0, (2, 2), (3, 1)), (-1, (2,), (1,)), (0, (2,), (-1,))):
        with pytest.raises(ValueError, match=r"storage|offset"):
            read_torch(tensor_file(offset=offset, shape=shape, stride=stride))


def test_a_storage_of_another_length_or_type_is_an_error():
    with pytest.raises(ValueError, match="bytes"):
        read_torch(tensor_file(data=b"\0" * 12, offset=0, shape=(4,), stride=(1,)))
    with pytest.raises(ValueError, match="bytes"):  # a zip bomb
        read_torch(tensor_file(compression=zipfile.ZIP_DEFLATED, offset=0, shape=(4,), stride=(1,)))
    for changes in ({"kind": "QInt8Storage"}, {"function": "_rebuild_device_tensor"}):
        tensor = read_torch(tensor_file(**changes, offset=0, shape=(4,), stride=(1,)))
        (name,) = changes.values()
        assert isinstance(tensor, Stranger) and tensor.name.endswith(name)
        with pytest.raises(ValueError, match=rf"w is an object of .*{name}, a kind of tensor that is not read"):
            find_tensors({"w": tensor, "v": np.zeros(1)}, ("v",))


def test_files_of_another_kind_are_errors(tmp_path):
    for data in (b"", b"hello", pickle.dumps({"a": 1}), b"\x93NUMPY"):
        with pytest.raises(ValueError):
            read_torch(io.BytesIO(data))
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(ValueError, match=r"data\.pkl"):
        read_torch(empty)
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "missing.pt")


@pytest.mark.parametrize("protocol", (2, 4))
def test_the_arguments_of_a_training_script_are_passed_over(protocol):
    values = {"args": argparse.Namespace(model="DiT-XL/2", lr=1e-4), "step": 3}
    read = read_torch(as_zip(pickle.dumps(values, protocol)))
    assert read["step"] == 3 and read["args"].name == "argparse.Namespace"
    assert read["args"].state == {"model": "DiT-XL/2", "lr": 1e-4}
