"""Emoji as words: a vocabulary of words lacks most of them, while each has a name in English (Unicode CLDR's)."""

from __future__ import annotations

from collections.abc import Callable

import emoji


def spell_out(text: str, known: Callable[[str], bool]) -> str:
    """Returns a text with its emoji as their English names: "two \N{FROG FACE}" as "two frog".

    Skin tones and sequences have names of their own ("thumbs up medium skin tone", "woman astronaut"); of a sequence
    without one, each part is named. A symbol of one character that is `known` is text ("(c)" as one sign, card suits),
    unless a variation selector behind it asks for an emoji. An emoji that is newer than the names stays as it is.

    Args:
        text: any; without emoji it is returned unchanged.
        known: says whether a character is in the vocabulary that the text is read with.
    """
    if text.isascii():
        return text
    spelled = emoji.replace_emoji(text, lambda characters, data: _words(characters, data, known))
    return text if spelled == text else " ".join(spelled.split())


def _words(characters: str, data: dict[str, str], known: Callable[[str], bool]) -> str:
    """Returns the name of an emoji between spaces, or what is known as text."""
    if len(characters) == 1 and known(characters):
        return characters
    return f" {data['en'].strip(':').replace('_', ' ')} "
