"""all-MiniLM-L6-v2: a small BERT (arXiv:1810.04805, distilled as in arXiv:2002.10957), its tokenizer and its loader.

The states of all tokens are what a diffusion model cross-attends to, so there is no pooling here. An encoder is a
directory of `model.safetensors` (`quantize.py` says how matrices are stored), `config.json` and `tokenizer.json`,
made by `experiments/convert_checkpoint.py minilm`; one comes with the package.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import linen as nn
from flax import traverse_util
from tokenizers import Tokenizer

from sora_jax.array_types import Array, Bool, Float, Int, NumpyArray, PyTree
from sora_jax.components import TextEncoderComponent
from sora_jax.config import check
from sora_jax.config_json import as_first_written, config_of, parse
from sora_jax.models.attention import xla_attention
from sora_jax.models.layers import dense, layer_norm
from sora_jax.models.quantize import dequantize_tensors
from sora_jax.models.text.emoji_names import spell_out
from sora_jax.models.text.lost_text import describe_cut, describe_unknown

WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE = "model.safetensors", "config.json", "tokenizer.json"
NAME, UNKNOWN = "all-MiniLM-L6-v2", "[UNK]"
NO_CHARACTER = ("Co", "Cn")  # Unicode categories of private use and of what is not assigned
TAGS = range(0xE0000, 0xE0080)  # that tell flags of regions apart

# Token counts and batch sizes are rounded up to these, so that few shapes are ever compiled.
LENGTHS = (16, 32, 64, 128, 256)
BATCH_SIZES = (4, 64)


@dataclasses.dataclass(frozen=True)
class MiniLMConfig:
    """Size of the encoder; the defaults are all-MiniLM-L6-v2's.

    Attributes:
        vocab_size: rows of the word embedding.
        max_positions: rows of the position embedding: the longest caption.
        width: size of a token state.
        depth: number of layers.
        num_heads: attention heads.
        mlp_dim: hidden size of the MLP.
        norm_eps: epsilon of every norm.
    """

    kind: ClassVar[str] = "minilm"

    vocab_size: int = 30522
    max_positions: int = 512
    width: int = 384
    depth: int = 6
    num_heads: int = 12
    mlp_dim: int = 1536
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for field in ("vocab_size", "width", "depth", "num_heads", "mlp_dim"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        check(self.max_positions >= 2, self, "max_positions", "at least 2")
        check(self.width % self.num_heads == 0, self, "num_heads", f"a divisor of width {self.width}")
        check(self.norm_eps > 0, self, "norm_eps", "positive")


class EncoderLayer(nn.Module):
    """BERT's layer: attention and an MLP, each with its norm behind the residual sum (post-norm), exact GELU.

    Attributes:
        config: sizes.
    """

    config: MiniLMConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], segment_ids: Int[Array, "batch length"]
    ) -> tuple[Array, None]:
        """Returns (B, M, D) and None, as `nn.scan` wants it."""
        config = self.config
        into, out = ("width", "heads_width"), ("heads_width", "width")
        heads = (*x.shape[:2], config.num_heads, -1)
        q, k, v = (dense(config.width, into, name=n, dtype="float32")(x) for n in ("query", "key", "value"))
        h = xla_attention(q.reshape(heads), k.reshape(heads), v.reshape(heads), segment_ids, segment_ids)
        h = dense(config.width, out, name="out", dtype="float32")(h.reshape(x.shape))
        x = layer_norm(name="attention_norm", eps=config.norm_eps, affine=True)(x + h)
        h = dense(config.mlp_dim, ("width", "mlp"), name="fc1", dtype="float32")(x)
        h = dense(config.width, ("mlp", "width"), name="fc2", dtype="float32")(jax.nn.gelu(h, approximate=False))
        return layer_norm(name="mlp_norm", eps=config.norm_eps, affine=True)(x + h), None


class MiniLM(nn.Module):
    """The encoder: token ids to token states.

    The embedding of the first token type is part of the position embedding, as a caption is one sentence.

    Attributes:
        config: sizes.
    """

    config: MiniLMConfig

    @nn.compact
    def __call__(
        self, token_ids: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        """Computes the states of the last layer.

        Args:
            token_ids: (B, M) int, `[CLS] ... [SEP]` and anything where padded.
            mask: (B, M) bool, true for real tokens; these come first.

        Returns:
            (B, M, D) float32, zeros where padded.

        Raises:
            ValueError: more tokens than positions.
        """
        config, length = self.config, token_ids.shape[1]
        if length > config.max_positions:
            raise ValueError(f"token_ids must have at most {config.max_positions} columns, got {length}.")
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "width"))
        words = self.param("word_embedding", init, (config.vocab_size, config.width), jnp.float32)
        positions = self.param("position_embedding", init, (config.max_positions, config.width), jnp.float32)
        x = words[token_ids] + positions[:length]  # (B, M, D)
        x = layer_norm(name="embedding_norm", eps=config.norm_eps, affine=True)(x)
        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(config, name="layers")(x, mask.astype(jnp.int32))
        return jnp.where(mask[..., None], x, 0)


class TextEncoder:
    """Captions to token states; emoji are read by their English names.

    Attributes:
        name: of the encoder.
        dim: width of a token state, D.
        max_positions: the longest caption in tokens.
        fingerprint: hexadecimal hash of weights, config and tokenizer, by which states can be cached.
    """

    name = NAME

    def __init__(self, config: MiniLMConfig, params: PyTree, tokenizer: Tokenizer, fingerprint: str) -> None:
        """Takes the parameters of `MiniLM(config)`, unboxed, and a tokenizer that adds [CLS] and [SEP]."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._unknown = tokenizer.token_to_id(UNKNOWN)
        self._known = functools.lru_cache(maxsize=None)(self._is_known)
        self._params = jax.tree.map(jnp.asarray, params)
        self._apply = functools.partial(_apply, MiniLM(config))
        self.dim = config.width
        self.max_positions = config.max_positions
        self.fingerprint = fingerprint

    def spell_out(self, caption: str) -> str:
        """Returns a caption as it is read: emoji by their names, anything else as it stands."""
        return spell_out(caption, self._known)

    def count_tokens(self, caption: str) -> int:
        """Returns the tokens of a caption before any cut, [CLS] and [SEP] included."""
        return len(self._tokenizer.encode(self.spell_out(caption)).ids)

    def unknown_characters(self, caption: str) -> list[str]:
        """Returns the characters of a caption that the vocabulary lacks, each once; their words are not read.

        A word that is unknown although its characters are not (one of more than 100 letters) stands for itself, and
        invisible characters count where there is nothing else in a caption.
        """
        text = self.spell_out(caption)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if not encoding.ids:
            return list(dict.fromkeys(text.strip()))
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        words = [text[start:end] for token, (start, end) in pairs if token == self._unknown]
        lost = [character for character in text if not self._known(character)]
        return list(dict.fromkeys([*lost, *(word for word in words if all(map(self._known, word)))]))

    def encode(self, captions: Sequence[str], max_tokens: int, option: str | None = None) -> list[NumpyArray]:
        """Encodes captions, in batches of similar lengths.

        What is lost of them, by a cut or for characters that the vocabulary lacks, is reported by one warning each.

        Args:
            captions: any number; "" is encoded as [CLS] [SEP].
            max_tokens: a longer caption is cut to so many tokens, its last one still [SEP].
            option: of a command line, sets `max_tokens`; for messages.

        Returns:
            For each caption (m, D) float32, m the number of its tokens, in the order of `captions`. A caption's
            states do not depend on the others, up to float32 rounding.

        Raises:
            TypeError: a single string instead of several captions.
            ValueError: `max_tokens` that is below 2 or above the encoder's positions.
        """
        if isinstance(captions, str):
            raise TypeError(f"captions must be a list of strings, got the string {captions!r}.")
        if not 2 <= max_tokens <= self.max_positions:
            raise ValueError(
                f"{option or 'max_tokens'} must be between 2 and {self.max_positions}, the positions of the text "
                f"encoder {NAME}, got {max_tokens}."
            )
        # One by one: the tokenizer's own batching starts threads, after which worker processes cannot be forked.
        token_ids = [self._tokenizer.encode(self.spell_out(caption)).ids for caption in captions]
        self._tell_losses(captions, token_ids, max_tokens, option)
        token_ids = [ids if len(ids) <= max_tokens else ids[: max_tokens - 1] + ids[-1:] for ids in token_ids]
        order = sorted(range(len(captions)), key=lambda i: len(token_ids[i]))
        states: list[Any] = [None] * len(captions)
        for start in range(0, len(order), BATCH_SIZES[-1]):
            chunk = order[start : start + BATCH_SIZES[-1]]
            for i, state in zip(chunk, self._encode_batch([token_ids[i] for i in chunk]), strict=True):
                states[i] = state
        return states

    def _tell_losses(
        self, captions: Sequence[str], token_ids: Sequence[list[int]], max_tokens: int, option: str | None
    ) -> None:
        """Warns, once each, of captions that are cut and of those with unknown characters."""
        count = sum(bool(caption.strip()) for caption in captions)
        lengths = {c: len(ids) for c, ids in zip(captions, token_ids, strict=True) if len(ids) > max_tokens}
        if lengths:
            warnings.warn(describe_cut(lengths, count, max_tokens, self.max_positions, option), stacklevel=3)
        pairs = zip(captions, token_ids, strict=True)
        suspects = [c for c, ids in pairs if self._unknown in ids or len(ids) == 2 or not c.isascii()]
        unknown = {caption: some for caption in suspects if (some := self.unknown_characters(caption))}
        if unknown:
            warnings.warn(describe_unknown(unknown, count, NAME), stacklevel=3)

    def _is_known(self, character: str) -> bool:
        """Returns whether a character is read, or left out without harm as accents and variation selectors are."""
        ids = self._tokenizer.encode(character, add_special_tokens=False).ids
        if ids:
            return self._unknown not in ids
        return unicodedata.category(character) not in NO_CHARACTER and ord(character) not in TAGS

    def _encode_batch(self, token_ids: list[list[int]]) -> list[NumpyArray]:
        rows = next(n for n in BATCH_SIZES if n >= len(token_ids))
        longest = max(map(len, token_ids))
        length = min(next((n for n in LENGTHS if n >= longest), self.max_positions), self.max_positions)
        padded, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        for row, ids in enumerate(token_ids):
            padded[row, : len(ids)], mask[row, : len(ids)] = ids, True
        states = np.asarray(self._apply(self._params, padded, mask))
        return [states[row, : len(ids)].copy() for row, ids in enumerate(token_ids)]


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: MiniLM, params: PyTree, token_ids: Array, mask: Array) -> Array:
    # TPUs would round the products to bfloat16, and cached states would then depend on the machine.
    with jax.default_matmul_precision("float32"):
        return model.apply({"params": params}, token_ids, mask)


def init_params(model: MiniLM, key: jax.Array) -> dict:
    """Returns freshly drawn parameters, boxed with their logical axes."""
    return model.init(key, jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.bool_))["params"]


def abstract_params(model: MiniLM) -> dict:
    """Returns the shapes and logical axes of the parameters, without allocating them."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def load_text_encoder(path: epath.PathLike | None = None) -> TextEncoder:
    """Loads an encoder.

    Args:
        path: directory that `experiments/convert_checkpoint.py minilm` wrote, local or `gs://` (None: the one that
            comes with the package).

    Raises:
        FileNotFoundError: a file that is missing; the message names it.
        ValueError: a file that cannot be read, or weights that do not fit the config.
    """
    directory, contents = _read_files(path)
    try:
        config = config_of(MiniLMConfig, parse(contents[CONFIG_FILE].decode()))
        tensors = dequantize_tensors(safetensors.numpy.load(contents[WEIGHTS_FILE]))
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{directory} holds no text encoder that can be read: {error}") from error
    check_tensors(config, tensors)
    params = traverse_util.unflatten_dict(tensors, sep=".")
    tokenizer = Tokenizer.from_str(contents[TOKENIZER_FILE].decode())
    return TextEncoder(config, params, tokenizer, _fingerprint(contents))


def text_encoder_component(max_tokens: int, path: epath.PathLike | None = None) -> TextEncoderComponent:
    """Returns what a config says of the encoder that `load_text_encoder` loads, without loading it.

    Args:
        max_tokens: that captions are cut to.
        path: of the encoder.

    Raises:
        FileNotFoundError: a file that is missing; the message names it.
        ValueError: a config that cannot be read.
    """
    return TextEncoderComponent(NAME, _fingerprint(_read_files(path)[1]), max_tokens)


def _read_files(path: epath.PathLike | None) -> tuple[epath.Path, dict[str, bytes]]:
    """Returns the directory of an encoder and the contents of its files."""
    directory = epath.resource_path("sora_jax") / "assets" / "minilm" if path is None else epath.Path(path)
    contents = {}
    for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"no text encoder at {directory}: {name} is missing (experiments/convert_checkpoint.py writes it)."
            )
        contents[name] = (directory / name).read_bytes()
    return directory, contents


def _fingerprint(contents: dict[str, bytes]) -> str:
    """Returns the SHA-256 of an encoder's files; the version of its config does not change it."""
    config = as_first_written(parse(contents[CONFIG_FILE].decode())).encode()
    return hashlib.sha256(contents[WEIGHTS_FILE] + config + contents[TOKENIZER_FILE]).hexdigest()


def check_tensors(config: MiniLMConfig, tensors: dict[str, NumpyArray]) -> None:
    """Raises ValueError, naming the tensor, unless names and shapes are those of `MiniLM(config)`'s parameters."""
    wanted = traverse_util.flatten_dict(nn.meta.unbox(abstract_params(MiniLM(config))), sep=".")
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in wanted or name not in tensors:
            raise ValueError(f"text encoder: tensor {name} is {'unknown' if name in tensors else 'missing'}.")
        if wanted[name].shape != tensors[name].shape:
            raise ValueError(f"text encoder: {name} must be {wanted[name].shape}, got {tensors[name].shape}.")
