"""What a text encoder does not read of captions, in a line for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MOST_TOLD = 5  # captions that are shown of those that lose something
MOST_CHARACTERS = 12  # unknown characters that are named
SHOWN_LENGTH = 40  # characters of a caption that are shown


def describe_cut(lengths: Mapping[str, int], num_captions: int, max_tokens: int, limit: int, option: str | None) -> str:
    """Says which captions are cut, and what would keep more of them.

    Args:
        lengths: tokens of each caption that is longer than `max_tokens`.
        num_captions: that were read, these among them.
        max_tokens: that are kept.
        limit: most tokens that the encoder reads.
        option: sets `max_tokens`; None where the model was trained with it.
    """
    longest = max(lengths.values())
    more = f"{option} keeps more, up to the encoder's {limit}" if option else "the model reads no more"
    return (
        f"{_count(len(lengths), num_captions)} cut to {max_tokens} tokens (the longest has {longest}): "
        f"{_examples(list(lengths))}; {more}."
    )


def describe_unknown(characters: Mapping[str, Sequence[str]], num_captions: int, encoder: str) -> str:
    """Says what of which captions is unknown to an encoder.

    Args:
        characters: unknown ones of each caption that has any, and words that are too long to be looked up.
        num_captions: that were read, these among them.
        encoder: its name.
    """
    distinct = list(dict.fromkeys(c for some in characters.values() for c in some))
    shown = ", ".join(repr(_short(c)) for c in distinct[:MOST_CHARACTERS])
    shown += ", ..." if len(distinct) > MOST_CHARACTERS else ""
    return (
        f"{_count(len(characters), num_captions)} read with words left out for what the text encoder {encoder} does "
        f"not know, {shown}: {_examples(list(characters))}."
    )


def _count(some: int, num_captions: int) -> str:
    """Returns how many of the captions something is said of, with the verb."""
    if num_captions == 1:
        return "the caption is"
    return f"{some:,} of {num_captions:,} captions {'is' if some == 1 else 'are'}"


def _examples(captions: Sequence[str]) -> str:
    """Returns the first few captions, in quotes, long ones shortened."""
    shown = [repr(_short(caption)) for caption in captions[:MOST_TOLD]]
    return ", ".join(shown) + (", ..." if len(captions) > MOST_TOLD else "")


def _short(text: str) -> str:
    """Returns a text of one line, its end left out where it is long, at a word where that keeps most of it."""
    text = " ".join(text.split()) or text
    if len(text) <= SHOWN_LENGTH:
        return text
    start = text[: SHOWN_LENGTH - 3]
    end = start.rfind(" ")
    return f"{start[:end] if end > SHOWN_LENGTH // 2 else start}..."
