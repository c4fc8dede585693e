"""The released text encoder: its states, its tokenizer and its errors."""

import shutil
import warnings
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models.text.minilm import MiniLM, MiniLMConfig, load_text_encoder

ASSETS = Path(str(resources.files("sora_jax"))) / "assets" / "minilm"
# States of transformers' BertModel with the original float32 weights, stored in float16.
REFERENCE = np.load(Path(__file__).parents[1] / "fixtures" / "minilm_states.npz")
CAPTIONS = [str(caption) for caption in REFERENCE["captions"]]


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder()


def cosine(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def sentence(states):
    return states.mean(axis=0)  # all-MiniLM-L6-v2 pools its sentence embedding by the mean


def test_states_are_those_of_the_float_weights(encoder):
    states = encoder.encode(CAPTIONS, max_tokens=32)
    cosines = []
    for i, state in enumerate(states):
        assert state.shape == REFERENCE[f"states_{i}"].shape and state.dtype == np.float32
        cosines.append(cosine(state, REFERENCE[f"states_{i}"]))
        relative = np.linalg.norm(state, axis=-1) / np.linalg.norm(REFERENCE[f"states_{i}"].astype(np.float32), axis=-1)
        np.testing.assert_allclose(relative, 1, atol=0.04)
    cosines = np.concatenate(cosines)
    assert cosines.mean() >= 0.999 and cosines.min() >= 0.999


def test_tokens_are_those_of_the_original(encoder):
    for i, caption in enumerate(CAPTIONS):
        assert encoder.count_tokens(caption) == len(REFERENCE[f"ids_{i}"])
        assert encoder._tokenizer.encode(encoder.spell_out(caption)).ids == REFERENCE[f"ids_{i}"].tolist()


def test_a_caption_does_not_depend_on_its_batch(encoder):
    alone = encoder.encode(["two red hearts"], max_tokens=64)[0]
    others = ["a long caption of many words " * 6, "", "frog", "toad", "rocket"]  # padded to 64 tokens, 64 rows
    batched = encoder.encode([*others, "two red hearts"], max_tokens=64)
    np.testing.assert_allclose(batched[-1], alone, atol=1e-5)
    assert len(batched[0]) > 32 and len(batched[1]) == 2


def test_many_captions_keep_their_order(encoder):
    captions = [f"number {i} " * (1 + i % 3) for i in range(70)]  # two batches, sorted by length inside
    states = encoder.encode(captions, max_tokens=32)
    for i in (0, 1, 35, 69):
        np.testing.assert_allclose(states[i], encoder.encode([captions[i]], 32)[0], atol=1e-5)
    assert encoder.encode([], 32) == []


def test_meaning(encoder):
    frog, toad, airplane = map(sentence, encoder.encode(["frog", "toad", "airplane"], max_tokens=8))
    assert cosine(frog, toad) > cosine(frog, airplane) + 0.05


def test_empty_caption_is_cls_and_sep(encoder):
    assert encoder.count_tokens("") == 2
    assert encoder.encode([""], max_tokens=2)[0].shape == (2, 384)


def test_long_caption_is_cut_with_a_warning(encoder):
    message = r"the caption is cut to 4 tokens \(the longest has 6\): 'red frog jumps high'; the model reads no more"
    with pytest.warns(UserWarning, match=message):
        cut = encoder.encode(["red frog jumps high"], max_tokens=4)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = encoder.encode(["red frog"], max_tokens=4)[0]  # [CLS] red frog [SEP]: [SEP] is kept by the cut
    np.testing.assert_allclose(cut, short, atol=1e-5)


def told(encoder, captions, max_tokens=32, **options):
    """Returns the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder.encode(captions, max_tokens, **options)
    return [str(warning.message) for warning in caught]


def test_the_cuts_of_many_captions_are_one_line_with_the_option_that_keeps_more(encoder):
    captions = ["", "short", *(f"scene {i} of a walk on a beach" for i in range(60))]
    (line,) = told(encoder, captions, 6, option="--data.max-caption-tokens")
    assert "\n" not in line and len(line) < 400
    assert "60 of 61 captions are cut to 6 tokens (the longest has 10)" in line
    assert "'scene 0 of a walk on a beach'" in line and line.count("scene") == 5
    assert "--data.max-caption-tokens keeps more, up to the encoder's 512" in line
    assert told(encoder, captions, 10, option="--data.max-caption-tokens") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\N{FROG FACE}", "frog"),
        ("two \N{FROG FACE}s", "two frog s"),
        ("\N{THUMBS UP SIGN}\U0001f3fd", "thumbs up medium skin tone"),
        ("\N{WOMAN}\u200d\N{ROCKET}", "woman astronaut"),
        ("\N{FROG FACE}\u200d\N{ROCKET}", "frog rocket"),  # no emoji together
        ("\N{HEAVY BLACK HEART}\ufe0f", "red heart"),
        ("\N{HEAVY BLACK HEART}", "red heart"),
        ("\U0001f1eb\U0001f1f7", "France"),
        ("1\ufe0f\u20e3", "keycap 1"),
        ("\N{BLACK HEART SUIT}", "\N{BLACK HEART SUIT}"),  # a word of the vocabulary
        ("\N{BLACK HEART SUIT}\ufe0f", "heart suit"),
        ("\N{COPYRIGHT SIGN} 2024,  caf\N{LATIN SMALL LETTER E WITH ACUTE}", None),
        ("plain  text: 1 * # (c) -> \N{EM DASH}", None),
    ],
)
def test_emoji_are_read_by_their_names(encoder, text, words):
    assert encoder.spell_out(text) == (text if words is None else words)
    if words is not None:
        np.testing.assert_array_equal(*encoder.encode([text, words], 32))
        assert told(encoder, [text]) == []


@pytest.mark.parametrize(
    ("caption", "characters"),
    [
        ("\u0e41\u0e21\u0e27", ["\u0e41"]),  # Thai
        ("\u4e00\u53ea\u9752\u86d9", ["\u53ea", "\u86d9"]),  # Chinese: two of four characters are in the vocabulary
        ("frog \U0001fb10", ["\U0001fb10"]),
        ("frog \ue000", ["\ue000"]),  # private use: the tokenizer drops it
        ("\u200b", ["\u200b"]),  # nothing to be seen, and nothing is left
        ("a" * 101, ["a" * 101]),
        ("a" * 100, []),
        ("frog, caf\u00e9 cafe\u0301 \u65e5\u672c", []),
        ("", []),
        (" ", []),
    ],
)
def test_unknown_characters_are_named(encoder, caption, characters):
    assert encoder.unknown_characters(caption) == characters
    lines = told(encoder, ["frog", caption], 64)
    assert len(lines) == bool(characters)
    for line in lines:
        assert "all-MiniLM-L6-v2 does not know" in line and all(
            repr(c) in line or f"'{c[:37]}...'" in line for c in characters
        )
        assert len(line) < 250


def test_unknown_characters_of_many_captions_are_one_line(encoder):
    captions = [f"\u0e41 {chr(0x4E00 + i)} {i}" for i in range(0, 120, 2)]
    (line,) = told(encoder, captions)
    assert line.startswith("60 of 60 captions are read with words left out")
    assert len(line) < 400 and "\n" not in line


def test_bad_arguments(encoder):
    with pytest.raises(TypeError, match="list of strings, got the string 'frog'"):
        encoder.encode("frog", max_tokens=8)
    with pytest.raises(ValueError, match=r"max_tokens must be between 2 and 512, .*MiniLM-L6-v2, got 1\."):
        encoder.encode(["frog"], max_tokens=1)
    with pytest.raises(ValueError, match=r"--data.max-caption-tokens must be between 2 and 512, .* got 600"):
        encoder.encode(["frog"], 600, "--data.max-caption-tokens")


def test_fingerprint_follows_the_files(encoder, tmp_path):
    shutil.copytree(ASSETS, tmp_path / "same")
    assert load_text_encoder(tmp_path / "same").fingerprint == encoder.fingerprint
    weights = bytearray((tmp_path / "same" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "same" / "model.safetensors").write_bytes(weights)
    assert load_text_encoder(tmp_path / "same").fingerprint != encoder.fingerprint


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_text_encoder(tmp_path)
    shutil.copytree(ASSETS, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="broken"):
        load_text_encoder(tmp_path / "broken")


def test_weights_of_another_size(tmp_path):
    shutil.copytree(ASSETS, tmp_path / "other")
    config = (tmp_path / "other" / "config.json").read_text()
    (tmp_path / "other" / "config.json").write_text(config.replace('"depth": 6', '"depth": 5'))
    with pytest.raises(ValueError, match=r"must be \(5,"):
        load_text_encoder(tmp_path / "other")


def test_assets_fit_their_budget_and_carry_the_licence():
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) <= 20_000_000
    assert "Apache License" in (ASSETS / "LICENSE").read_text()
    assert "all-MiniLM-L6-v2" in (ASSETS / "NOTICE").read_text()


def test_padding_is_zero_and_unseen():
    config = MiniLMConfig(vocab_size=11, max_positions=8, width=16, depth=2, num_heads=2, mlp_dim=24)
    model, ids = MiniLM(config), jnp.array([[1, 5, 2, 0, 0], [0, 0, 0, 0, 0]])
    mask = jnp.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    variables = jax.jit(model.init)(jax.random.key(0), ids, mask)
    apply = jax.jit(model.apply)
    states = apply(variables, ids, mask)
    poisoned = apply(variables, ids.at[0, 3:].set(7), mask)
    np.testing.assert_array_equal(states, poisoned)
    assert not states[0, 3:].any() and not states[1].any() and jnp.isfinite(states).all()
    with pytest.raises(ValueError, match="at most 8 columns, got 9"):
        apply(variables, jnp.zeros((1, 9), jnp.int32), jnp.ones((1, 9), bool))
