"""What a file is that is not the file of weights it is taken for, in words for the person who named it."""

from __future__ import annotations

_MAGIC = {
    b"\x1f\x8b": "is gzip-compressed: unpack it",
    b"BZh": "is bzip2-compressed: unpack it",
    b"\xfd7zXZ": "is xz-compressed: unpack it",
    b"\x28\xb5\x2f\xfd": "is zstd-compressed: unpack it",
    b"7z\xbc\xaf": "is a 7z archive: unpack it",
    b"Rar!": "is a rar archive: unpack it",
    b"\x89HDF": "is an HDF5 file (of Keras?), which is not read",
    b"GGUF": "is a GGUF file, which is not read",
    b"\x93NUMPY": "is a single NumPy array (.npy), not named tensors",
    b"%PDF": "is a PDF",
    b"\x89PNG": "is a picture",
    b"\xff\xd8\xff": "is a picture",
    b"PK\x03\x04": "is truncated or damaged: it begins as a zip archive, whose end is missing; get it anew",
}
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body")


def what_else(head: bytes) -> str | None:
    """Returns what a file is by its first bytes, such as "is a web page ..."; None where they do not tell.

    Args:
        head: up to 1000 bytes or so, from the beginning.
    """
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file: run git lfs pull"
    for magic, words in _MAGIC.items():
        if head.startswith(magic):
            return words
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it"
    if not head.strip(b"\0"):
        return "begins with zeros alone: it was not copied or downloaded whole"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(_PAGES):
        return "is a web page, not the file: its address answers with a page (a login?); get the file itself"
    characters = head.decode(errors="replace")
    # One character may be cut by the end of `head`.
    if characters.count("\ufffd") > 1 or any(ord(c) < 32 and c not in "\n\t\r" for c in characters):
        return None
    kind = {b"<": "XML", b"{": "JSON", b"[": "JSON"}.get(text[:1], "text")
    return f"is {kind}, not weights: {' '.join(characters.split())[:60]!r}"
