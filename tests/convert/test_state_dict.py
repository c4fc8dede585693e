"""Checkpoints as people have them: the same tensors, however they are wrapped, and words for what does not fit."""

import io
import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from torch_files import Instance, Raw, module, torch_bytes

from sora_jax.convert.state_dict import find_tensors
from sora_jax.convert.torch_reader import read_torch
from sora_jax.convert.weight_files import find_weights, read_npz, read_weights

STATE = {"embed.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "head.bias": np.array([7, 8], np.float32)}
OTHER = {name: value + 100 for name, value in STATE.items()}
MARKS = ("embed.weight",)
PARTS = [dict([item]) for item in STATE.items()]


def behind(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


STRANGERS = {
    "epoch": 3,
    "note": None,
    "path": Instance("pathlib.PosixPath"),
    "args": Instance("argparse.Namespace", {"lr": "1e-4", "path": Instance("pathlib.PosixPath")}),
    "config": Instance("omegaconf.dictconfig.DictConfig", {"_content": {"a": 1}}, {"b": 2}),
    "best": Raw(b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\0\0\0f8K\0K\1tRC\x08\0\0\0\0\0\0\xf0?tR"),
    "enum": Raw(b"cmy.enums\nMode\nK\x02\x85R"),
    "date": Raw(b"cdatetime\ndatetime\nC\x0a\x07\xe6\x01\x01\x00\x00\x00\x00\x00\x00\x85R"),
    "set": Raw(b"\x8f(K\x01K\x02\x90"),
    "device": Raw(b"ctorch\ndevice\nX\x04\0\0\0cuda\x85R"),
    "lambda": Raw(b"cbuiltins\neval\nX\x03\0\0\x001/0\x85R"),
    "rng": np.arange(9, dtype=np.int64),
}
WRAPPED = {
    "plain": STATE,
    "ema": {"model": OTHER, "ema": STATE, "opt": {"state": {"exp_avg": OTHER}}},
    "state_dict": {"state_dict": STATE},
    "model_state_dict": {"optimizer_state_dict": OTHER, "model_state_dict": STATE},
    "params_ema": {"params": OTHER, "params_ema": STATE},
    "timm": {"state_dict": OTHER, "state_dict_ema": STATE},
    "nested": {"checkpoint": {"module": {"net": STATE}}},
    "listed": [{"epoch": 3}, STATE],
    "module.": behind("module."),
    "_orig_mod.": behind("_orig_mod."),
    "module._orig_mod.": behind("module._orig_mod."),
    "a prefix of one's own": behind("my.net."),
    "ema behind module.": {"ema": behind("module.")},
    "two networks": behind("model.", OTHER) | behind("ema_model.module.") | {"loss.weight": np.zeros(3, np.float32)},
    "AveragedModel": behind("module.") | {"n_averaged": np.array(3)},
    "compiled inside": {"embed._orig_mod.weight": STATE["embed.weight"]}
    | {"head._checkpoint_wrapped_module.bias": STATE["head.bias"]},
    "strangers beside": {**STRANGERS, "ema": STATE},
    "strangers among": {name: v for name, v in STRANGERS.items() if name != "rng"} | STATE,
    "a dict of its own kind": Instance("easydict.EasyDict", None, {"state_dict": STATE}),
    "attributes of a class of one's own": Instance("my.TrainState", {"step": 3, "model": OTHER, "ema": STATE}),
    "a compiled module": {"ema": Raw(b"ctorch._dynamo.eval_frame\nOptimizedModule\n", module(modules={
        "embed": module({"weight": STATE["embed.weight"]}), "head": module({"bias": STATE["head.bias"]})}), b"\x85R")},
    "a whole module": {"ema": module(modules={"module": module(modules={
        "embed": module({"weight": STATE["embed.weight"]}), "head": module({"bias": STATE["head.bias"]})})})},
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_whatever_wraps_them_the_tensors_are_the_same(tmp_path, name):
    (tmp_path / "model.pt").write_bytes(torch_bytes(WRAPPED[name]))
    found, path = read_weights(tmp_path / "model.pt", "net", MARKS)
    assert path == tmp_path / "model.pt" and found.keys() == STATE.keys()
    for key, value in STATE.items():
        np.testing.assert_array_equal(found[key], value, strict=True)


def test_what_was_taken_is_said(caplog):
    caplog.set_level("INFO")
    find_tensors(STATE, MARKS)
    assert not caplog.messages
    find_tensors({"model": OTHER, "ema": behind("module.")}, MARKS)
    assert caplog.messages == ["the weights are those of 'ema', behind the prefix 'module.' (not 'model')."]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"a": OTHER, "b": STATE}, "several networks, 'a' and 'b', and nothing tells"),
        ([OTHER, STATE], "several networks, '0' and '1', and nothing"),
        (behind("student.") | behind("teacher.", OTHER), "prefix 'student.' and .* prefix 'teacher.', and nothing"),
        ({"ema_0.99": OTHER, "ema_0.9": STATE}, "several networks, 'ema_0.99' and 'ema_0.9', and nothing"),
        ({"ema": OTHER, "model_ema": STATE}, "several networks, 'ema' and 'model_ema', and nothing"),
        (
            {"a": STATE, "model": OTHER, "state_dict": dict(STATE)},
            "several networks, 'model' and 'state_dict', and nothing",
        ),
    ],
)
def test_networks_of_which_none_is_likelier_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        find_tensors(values, MARKS)


def test_networks_that_are_equal_or_called_so_are_taken():
    copied = {name: value.copy() for name, value in STATE.items()}
    for values in ({"a": STATE, "b": copied}, {"a": OTHER, "model": STATE}, {"a": OTHER, "ema": STATE, "b": OTHER}):
        for key, value in find_tensors(values, MARKS).items():
            np.testing.assert_array_equal(value, STATE[key])


DEEP = {f"blocks.{n}.weight": np.full(2, n, np.float32) for n in range(3)} | STATE
SHALLOW = {name: value for name, value in DEEP.items() if name[:8] not in ("blocks.1", "blocks.2")}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": DEEP, "ema": SHALLOW}, "average, 'ema', lacks blocks.1.weight (and 1 more), which 'model' has"),
        ({"ema": behind("module.", SHALLOW), "net": DEEP}, "prefix 'module.', lacks blocks.1.weight (and 1 more)"),
        (DEEP | behind("ema.", SHALLOW), "'ema.', lacks blocks.1.weight (and 1 more), which the file itself"),
        ({"model": DEEP, "ema": {k: DEEP[k] for k in DEEP if k not in MARKS}}, "lacks embed.weight, which 'model' has"),
    ],
)  # fmt: skip
def test_an_average_of_a_part_is_refused(values, words):
    with pytest.raises(ValueError) as error:
        find_tensors(values, MARKS)
    assert words in str(error.value)


def test_what_an_average_need_not_have():
    count = {"norm.num_batches_tracked": np.array(3)}
    larger = DEEP | {"blocks.3.weight": np.zeros(2, np.float32)}
    for values in (
        {"model": DEEP | count, "ema": DEEP},
        {"model": DEEP, "ema": dict(DEEP), "teacher": larger},
        {"model": DEEP, "ema": {"decay": np.ones(1, np.float32)}},
        {"model": DEEP, "ema_of_another": {"head.bias": np.ones(2, np.float32)}},
        DEEP | behind("ema.", DEEP),
    ):
        assert DEEP.keys() <= find_tensors(values, MARKS).keys() <= DEEP.keys() | {f"ema.{name}" for name in DEEP}


META = Raw(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "got dict: it holds no tensors"),
        ({"state_dict": {}}, "got dict with 'state_dict': it holds no tensors"),
        ({"shadow_params": list(STATE.values())}, r"its tensors have no names \(those at 'shadow_params'\)"),
        ({"embed.weight": META}, r"embed\.weight has no values: its tensors hold no data \(device meta\)"),
        ({"model": {"a": META}}, r"model/a has no values: its tensors hold no data \(device meta\)"),
        (STATE | {"a": META}, r"a has no values: its tensors hold no data \(device meta\)"),
        ({"optimizer": STATE}, "holds no tensors but those of an optimizer, 'optimizer'"),
        ({"head.bias": np.arange(2)} | PARTS[0], "head.bias has dtype int64; weights must be of a floating-point one"),
    ],
)
def test_what_holds_no_weights_is_said(values, words):
    with pytest.raises(ValueError, match=words):
        find_tensors(read_torch_of(values), MARKS)


def test_a_name_that_only_ends_like_one_is_no_prefix():
    state = behind("", STATE) | {"aux_embed.weight": np.zeros(1)}
    assert find_tensors(state, MARKS).keys() == state.keys()


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_dtypes_stay(tmp_path, dtype):
    (tmp_path / "a.pt").write_bytes(torch_bytes({"ema": {name: v.astype(dtype) for name, v in STATE.items()}}))
    found = read_weights(tmp_path / "a.pt", "net", MARKS).tensors
    assert {v.dtype for v in found.values()} == {np.dtype(dtype)} and found["embed.weight"][1, 2] == 5


def test_a_tensor_that_is_needed_and_not_known_is_named():
    with pytest.raises(
        ValueError, match=r"w is an object of torch\._utils\._rebuild_sparse, a kind of tensor that is not"
    ):
        find_tensors(read_torch_of({"w": Raw(b"ctorch._utils\n_rebuild_sparse\n)R"), **STATE}), MARKS)
    for values, words in (({"epoch": 3}, "got dict with 'epoch'"), ([1], "got list"), ("text", "got str")):
        with pytest.raises(ValueError, match=rf"expected a state dict \(names to tensors\), {words}"):
            find_tensors(read_torch_of(values), MARKS)


def test_objects_too_deep_inside_of_each_other_are_refused():
    deep = STATE["embed.weight"]
    pickle = Raw(b"cmy\nClass\n" * 5000, deep, b"\x85R" * 5000)
    with pytest.raises(ValueError, match="too deep inside of each other"):
        find_tensors(read_torch_of({"a": pickle, **STATE}), MARKS)


def read_torch_of(values):
    return read_torch(io.BytesIO(torch_bytes(values)))


def write(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = safetensors.numpy.save(state) if path.suffix == ".safetensors" else torch_bytes(state)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("files", "index"),
    [
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "model.safetensors.index.json"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], "pytorch_model.bin.index.json"),
        (
            [f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)],
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
        ([f"model-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)], "model.safetensors.index.fp16.json"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
    ],
)
def test_weights_in_parts(tmp_path, files, index):
    for name, part in zip(files, PARTS, strict=True):
        write(tmp_path / name, part)
    sources = [tmp_path, tmp_path / files[0]]
    if index:
        names = {key: name for name, part in zip(files, PARTS, strict=True) for key in part}
        (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": names}))
        sources.append(tmp_path / index)
        assert find_weights(tmp_path, "net") == tmp_path / index
    for source in sources:
        assert read_weights(source, "net", MARKS).tensors.keys() == STATE.keys()
    (tmp_path / files[1]).unlink()
    for source in sources:
        with pytest.raises(FileNotFoundError, match=rf"is of 2 files, of which {files[1]} is missing"):
            read_weights(source, "net", MARKS)


@pytest.mark.parametrize("files", [["a.safetensors", "b.safetensors"], ["a.safetensors", "a.safetensors"]])
def test_what_an_index_says_and_its_file_lacks_is_named(tmp_path, files):
    for name in set(files):
        part = {key: STATE[key] for key, file in zip(STATE, files, strict=True) if file == name}
        write(tmp_path / name, part)
    index = tmp_path / "model.safetensors.index.json"
    places = dict(zip(STATE, files, strict=True))
    index.write_text(json.dumps({"weight_map": places}))
    assert read_weights(index, "net", MARKS).tensors.keys() == STATE.keys()
    index.write_text(json.dumps({"weight_map": places | {"block.weight": files[0]}}))
    with pytest.raises(
        ValueError, match=r"index\.json cannot be converted: a\.safetensors lacks block\.weight, which it"
    ):
        read_weights(index, "net", MARKS)


def test_what_a_directory_is_taken_for(tmp_path):
    order = [
        "model.safetensors",
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "mine.safetensors",
    ]  # the first that is there is taken
    for name in order:
        write(tmp_path / name, STATE)
    (tmp_path / "config.json").write_text("{}")
    for name in order:
        assert find_weights(tmp_path, "net").name == name
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"no net at .*: it holds no weights, such as model\.safetensors"):
        find_weights(tmp_path, "net")
    for names in (("a.pt", "b.pt"), ("model.bf16.safetensors", "model.fp16.safetensors")):
        for name in names:
            write(tmp_path / name, STATE)
        with pytest.raises(ValueError, match=f"several files of weights, name one of them: {', '.join(names)}"):
            find_weights(tmp_path, "net")
    write(tmp_path / "pipe" / "unet" / "model.safetensors", STATE)
    assert find_weights(tmp_path / "pipe", "net", "unet").parent.name == "unet"


def test_a_file_is_read_by_what_it_is(tmp_path):
    (tmp_path / "torch.safetensors").write_bytes(torch_bytes(STATE))
    (tmp_path / "safetensors.pt").write_bytes(safetensors.numpy.save(STATE))
    for name in ("torch.safetensors", "safetensors.pt"):
        assert read_weights(tmp_path / name, "net", MARKS).tensors.keys() == STATE.keys()


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weights": {}}, "it has no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "must name files beside it"),
        ({"weight_map": {"a": 3}}, "must name files beside it"),
        ([], "expected a JSON object, got list"),
    ],
)
def test_an_index_that_is_none(tmp_path, index, words):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"index.json cannot be converted: .*{words}"):
        read_weights(tmp_path, "net", MARKS)


TORCH = torch_bytes(STATE)
FOREIGN = {
    "is empty": b"",
    "is a Git LFS pointer, not the file: run git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "is a web page": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "is XML, not weights: '<Error><Code>AccessDenied": b"<Error><Code>AccessDenied</Code></Error>",
    """is JSON, not weights: '{"error": "not found"}'""": b'{"error": "not found"}',
    "is text, not weights: 'Invalid username": b"Invalid username or password.",
    "is truncated or damaged: it begins as a zip archive": TORCH[:-30],
    "is gzip-compressed: unpack it": b"\x1f\x8b\x08\0",
    "is a tar archive": b"model.pt".ljust(257, b"\0") + b"ustar\x0000",
    "is an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "begins with zeros alone": bytes(2000),
}


@pytest.mark.parametrize("words", FOREIGN)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.npz"])
def test_files_of_another_kind_are_called_by_their_names(tmp_path, words, name):
    (tmp_path / name).write_bytes(FOREIGN[words])
    with pytest.raises(ValueError) as error:
        read_npz(tmp_path / name) if name.endswith("npz") else read_weights(tmp_path / name, "net", MARKS)
    assert words in str(error.value) and "\n" not in str(error.value)
    if name != "model.npz":  # whose caller names it
        assert str(error.value).startswith(str(tmp_path / name))


def test_archives_of_another_kind_are_called_by_their_names(tmp_path):
    for words, data in (
        ("TorchScript archive: save the module's state_dict", torch_bytes(STATE, {"constants.pkl": b""})),
        ("big-endian", torch_bytes(STATE, {"byteorder": b"big"})),
        (r"compressed \(method 12\)", torch_bytes(STATE, compression=zipfile.ZIP_BZIP2)),
        ("a pickle, but not of torch.save", b"\x80\x04}."),
    ):
        (tmp_path / "a.pt").write_bytes(data)
        with pytest.raises(ValueError, match=words):
            read_weights(tmp_path / "a.pt", "net", MARKS)
    np.savez(tmp_path / "b.npz", **STATE)
    with pytest.raises(ValueError, match=r"archive of NumPy arrays \(\.npz\), not a PyTorch file"):
        read_weights(tmp_path / "b.npz", "net", MARKS)
    data = bytearray(TORCH)
    for at in (i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"):
        data[at + 10] = 99  # a compression that zipfile does not know
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match="compressed"):
        read_weights(tmp_path / "a.pt", "net", MARKS)


def test_a_storage_that_says_it_is_larger_than_its_file_is_refused_before_it_is_read(tmp_path):
    data = bytearray(TORCH)
    at = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)  # of the first storage, in the archive's directory
    data[at + 20 : at + 28] = (2**31).to_bytes(4, "little") * 2  # packed and whole size
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match="has not the 2147483648 bytes"):
        read_weights(tmp_path / "a.pt", "net", MARKS)


def test_nothing_is_allocated_that_the_file_has_not(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    for data, words in (
        (header.getvalue() + bytes(100), r"does not hold the \(1000000000000,\) float32"),
        (bytes(10**7), "larger than a file of its size can hold"),
    ):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA if len(data) > 10**6 else 0) as archive:
            archive.writestr("w.npy", data)
        with pytest.raises(ValueError, match=words):
            read_npz(tmp_path / "a.npz")
