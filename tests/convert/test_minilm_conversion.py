"""BERT weights into MiniLM: against NumPy in float64 and against transformers, and the command that does it."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from tokenizers import Tokenizer

from sora_jax.commands import convert_checkpoint
from sora_jax.convert.minilm import convert_config, convert_minilm, convert_tensors
from sora_jax.models.text.minilm import MiniLM, load_text_encoder

ROOT = Path(__file__).parents[2]
BERT = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 30522,
    "max_position_embeddings": 16,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-12,
}


def random_state(values, seed=0):
    """A BERT state dict in which nothing is zero, one or symmetric."""
    rng = np.random.default_rng(seed)
    width, hidden = values["hidden_size"], values["intermediate_size"]

    def draw(*shape, scale=0.2):
        return rng.normal(scale=scale, size=shape).astype(np.float32)

    state = {}

    def dense(name, inputs, outputs):
        state[f"{name}.weight"], state[f"{name}.bias"] = draw(outputs, inputs), draw(outputs)

    def norm(name):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(width), draw(width)

    for name, rows in (
        ("word", values["vocab_size"]),
        ("position", values["max_position_embeddings"]),
        ("token_type", 2),
    ):
        state[f"embeddings.{name}_embeddings.weight"] = draw(rows, width, scale=1.0)
    norm("embeddings.LayerNorm")
    for i in range(values["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            dense(f"{layer}.attention.self.{name}", width, width)
        dense(f"{layer}.attention.output.dense", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", width, hidden)
        dense(f"{layer}.output.dense", hidden, width)
        norm(f"{layer}.output.LayerNorm")
    dense("pooler.dense", width, width)
    return state


def numpy_bert(state, values, ids):
    """BERT's token states of one sentence without padding, in float64, written from arXiv:1810.04805."""
    w = {name: value.astype(np.float64) for name, value in state.items()}
    erf = np.vectorize(math.erf)

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + values["layer_norm_eps"])
        return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0])
    size = values["hidden_size"] // values["num_attention_heads"]
    for i in range(values["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (dense(f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value"))
        heads = []
        for head in range(values["num_attention_heads"]):
            part = slice(head * size, (head + 1) * size)
            weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        h = dense(f"{layer}.attention.output.dense", np.concatenate(heads, -1))
        x = norm(f"{layer}.attention.output.LayerNorm", x + h)
        h = dense(f"{layer}.intermediate.dense", x)
        h = dense(f"{layer}.output.dense", h * (1 + erf(h / math.sqrt(2))) / 2)
        x = norm(f"{layer}.output.LayerNorm", x + h)
    return x


def flax_states(state, values, ids, mask):
    config = convert_config(values)
    params = traverse_util.unflatten_dict(convert_tensors(state, config), sep=".")
    return jax.jit(MiniLM(config).apply)({"params": params}, np.asarray(ids), np.asarray(mask, bool))


@pytest.fixture
def source(tmp_path):
    """A directory with a small random BERT and the real tokenizer."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BERT))
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(random_state(BERT)))
    shutil.copy(ROOT / "sora_jax/assets/minilm/tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def command():
    return convert_checkpoint.main


def test_states_equal_numpy_in_float64():
    state = random_state(BERT)
    ids = [[101, 7, 30000, 102, 0], [101, 9, 8, 5, 102]]
    states = flax_states(state, BERT, ids, [[1, 1, 1, 1, 0], [1] * 5])
    np.testing.assert_allclose(states[0, :4], numpy_bert(state, BERT, ids[0][:4]), atol=2e-5)
    np.testing.assert_allclose(states[1], numpy_bert(state, BERT, ids[1]), atol=2e-5)


@pytest.mark.parity
def test_states_equal_transformers():
    torch = pytest.importorskip("torch", reason="needs .[parity]")
    transformers = pytest.importorskip("transformers", reason="needs .[parity]")
    state = random_state(BERT, seed=1)
    settings = {key: value for key, value in BERT.items() if key != "model_type"}
    model = transformers.BertModel(transformers.BertConfig(**settings)).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)
    ids = np.array([[101, 7, 30000, 102, 0], [101, 9, 8, 5, 102]])
    mask = np.array([[1, 1, 1, 1, 0], [1] * 5])
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()
    ours = np.asarray(flax_states(state, BERT, ids, mask))
    np.testing.assert_allclose(ours[mask == 1], theirs[mask == 1], atol=2e-5)


def test_command_writes_an_encoder(source, tmp_path, command, capsys):
    output = tmp_path / "output"
    assert (
        command(["minilm", "--source", str(source), "--output", str(output), "--json", str(tmp_path / "t.json")]) == 0
    )
    sizes = json.loads((tmp_path / "t.json").read_text())["files"]
    assert sizes == {path.name: path.stat().st_size for path in output.iterdir()}
    assert {"LICENSE", "NOTICE", "model.safetensors"} <= sizes.keys() and "model.safetensors" in capsys.readouterr().out
    encoder = load_text_encoder(output)
    states = encoder.encode(["frog"], 8)[0]
    token_ids = Tokenizer.from_file(str(output / "tokenizer.json")).encode("frog").ids
    expected = numpy_bert(random_state(BERT), BERT, token_ids)
    cosines = (states * expected).sum(-1) / np.linalg.norm(states, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosines.min() > 0.99


def test_command_errors(source, tmp_path, command, capsys):
    def fails(path, words):
        assert command(["minilm", "--source", str(path), "--output", str(tmp_path / "output")]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and not (tmp_path / "output").exists()

    fails(tmp_path / "nowhere", "no BERT encoder at")
    (tmp_path / "text.whl").write_text("no zip")
    fails(tmp_path / "text.whl", "neither a directory nor a wheel")
    (source / "config.json").write_text(json.dumps(BERT | {"model_type": "roberta"}))
    fails(source, "model_type must be 'bert', got 'roberta'")
    (source / "config.json").unlink()
    fails(source, "no config of a BERT encoder at")
    with pytest.raises(SystemExit) as exit_info:
        command(["minilm", "--sauce", "x"])
    assert exit_info.value.code == 2


def test_tensor_errors(source):
    state = random_state(BERT)
    bias = state.pop("encoder.layer.1.output.dense.bias")
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.bias is missing"):
        convert_tensors(state, convert_config(BERT))
    state |= {"encoder.layer.1.output.dense.bias": bias, "cls.bias": bias}
    with pytest.raises(ValueError, match=r"cls\.bias is unknown"):
        convert_tensors(state, convert_config(BERT))
    with pytest.raises(ValueError, match=r"fc1\.bias must be \(2, 256\), got \(2, 128\)"):
        convert_tensors(random_state(BERT), convert_config(BERT | {"intermediate_size": 256}))
    with pytest.raises(ValueError, match="'hidden_size' is missing"):
        convert_config({key: value for key, value in BERT.items() if key != "hidden_size"})
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="source"):
        convert_minilm(source)
