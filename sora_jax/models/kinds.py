"""What a `config.json` is of, told by its keys, and which command takes a model of that kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """One kind of config.

    Attributes:
        config: name of its dataclass.
        key: that no config of a kind further down the table has.
        run: whether it is a run's (or an exported model's), which have `optimizer` too, or that of converted weights.
        what: it is, in words.
        use: what takes it, in words.
    """

    config: str
    key: str
    run: bool
    what: str
    use: str


_CLASSIFIER = "evaluate.py classify and train.py --init-from take it"
_DIT = "generate.py --class-labels and evaluate.py sample take it"
KINDS = (
    Kind("SoraConfig", "flow", True, "a Sora", "generate.py --prompt, evaluate.py nearest and sample take it"),
    Kind("ClassConditionalConfig", "class_dropout", True, "a DiT that was trained here", _DIT),
    Kind("ContrastiveConfig", "embedding_dim", True, "a contrastive NaViT", "train.py --init-from takes it"),
    Kind("ClassificationConfig", "objective", True, "a classifier (ViT, ViViT or NaViT)", _CLASSIFIER),
    Kind(
        "DiffusionConfig",
        "num_held_out",
        True,
        "a study of discrete diffusion",
        "train.py reports on it and evaluate.py sample takes it",
    ),
    Kind("ViViTConfig", "tubelet_size", False, "a converted ViViT", _CLASSIFIER),
    Kind("ViTConfig", "representation_dim", False, "a converted ViT", _CLASSIFIER),
    Kind("DiTConfig", "conditioning", False, "a converted DiT", _DIT),
    Kind("UNetConfig", "multipliers", False, "a converted U-Net", "evaluate.py sample takes it"),
    Kind("ImageVAEConfig", "scaling_factor", False, "an image autoencoder", "--vae takes it"),
    Kind("MiniLMConfig", "max_positions", False, "a text encoder", "load_text_encoder reads it"),
)


def kind_of(keys: Mapping[str, Any]) -> Kind | None:
    """Returns what a config with these keys is of; None where it is of no kind that is known."""
    return next((kind for kind in KINDS if kind.key in keys and kind.run == ("optimizer" in keys)), None)


def check_kind(keys: Mapping[str, Any], config: str, where: str) -> None:
    """Raises ValueError where keys say that they are another kind's.

    Args:
        keys: of a `config.json`.
        config: name of the dataclass that is wanted.
        where: the config stands.
    """
    found, wanted = kind_of(keys), next((kind.what for kind in KINDS if kind.config == config), config)
    if found is not None and found.config != config:
        raise ValueError(f"{where} is {found.what}, not {wanted}: {found.use}.")
