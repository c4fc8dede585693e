"""What a model was trained beside: they stand in its `config.json`; loading with others is reported.

What a file does not say is None: it is older than the component, or the model has none.
"""

from __future__ import annotations

import dataclasses
import warnings


@dataclasses.dataclass(frozen=True)
class TextEncoderComponent:
    """What made token states of captions.

    Attributes:
        name: of the encoder.
        fingerprint: of its weights, its config and its tokenizer.
        max_tokens: that captions were cut to.
    """

    name: str
    fingerprint: str
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class CodecComponent:
    """What made the values that the model sees of pixels.

    Attributes:
        kind: `identity` where these are the pixels themselves; `image` for an image autoencoder.
        fingerprint: of its weights and its config; None where it has none.
        scale: that its latents were multiplied by.
    """

    kind: str
    fingerprint: str | None = None
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class ProcessComponent:
    """What made data noisy; its numbers are the config's.

    Attributes:
        kind: `flow`, `gaussian` or `binomial`.
    """

    kind: str


@dataclasses.dataclass(frozen=True)
class Components:
    """All of them.

    Attributes:
        text_encoder: of captions.
        codec: of pixels.
        process: of noise.
    """

    text_encoder: TextEncoderComponent | None = None
    codec: CodecComponent | None = None
    process: ProcessComponent | None = None


UNKNOWN = Components()


class ComponentWarning(UserWarning):
    """A model is used with another component than it was trained with."""


def difference(trained: Components, now: Components) -> str | None:
    """Returns in words what a model was trained with and what it would be used with; None where nothing differs.

    What either does not say is not compared. Nor is `max_tokens`, which a user may choose.

    Args:
        trained: with the model.
        now: at hand.
    """
    a, b = trained.text_encoder, now.text_encoder
    if a and b and (a.name, a.fingerprint) != (b.name, b.fingerprint):
        return (
            f"trained with the text encoder {a.name} of fingerprint {a.fingerprint[:12]}, and the one here is {b.name} "
            f"of {b.fingerprint[:12]}, in whose states captions mean something else: the sora_jax that trained the "
            "model has its encoder"
        )
    a, b = trained.codec, now.codec
    if a and b and a.kind != b.kind:
        return f"trained on what the codec {a.kind!r} makes of pixels, and the one here is {b.kind!r}"
    if a and b and a.scale != b.scale:
        return (
            f"trained on latents times {a.scale:g}, and the autoencoder here says {b.scale:g}: name the one whose "
            "latents it was trained on"
        )
    if a and b and None not in (a.fingerprint, b.fingerprint) and a.fingerprint != b.fingerprint:
        return (
            f"trained on latents of the autoencoder of fingerprint {a.fingerprint[:12]}, and the one here is "
            f"{b.fingerprint[:12]}: name the one whose latents it was trained on"
        )
    a, b = trained.process, now.process
    if a and b and a != b:
        return f"trained on the process {a.kind!r}, and the one here is {b.kind!r}"
    return None


def warn_of_difference(trained: Components, now: Components, where: str) -> None:
    """Warns, by a `ComponentWarning`, where a model is used with other components than it was trained with.

    Args:
        trained: with the model.
        now: at hand.
        where: the model stands.
    """
    if words := difference(trained, now):
        warnings.warn(f"{where} was {words}.", ComponentWarning, stacklevel=3)
