"""The files of a folder, and which of them a line of a manifest means.

Lines are written by other tools and on other systems than the files: accents may be composed or not, folders be parted
by backslashes, paths be absolute. A name is taken as it stands where there is such a file, and read more widely else.
"""

from __future__ import annotations

import collections
import functools
import ntpath
import os
import pathlib
import unicodedata

MOST_TOLD = 3  # files that are named where none is quite the one that is asked for


def printable(text: str) -> str:
    """Returns a file's name or a message as a line of UTF-8: what breaks lines or is no character is escaped."""
    return "".join(_escaped(c) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # where Python keeps the bytes of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


class Folder:
    """The files of a local folder and of the folders in it, hidden ones (`.name`) apart.

    Links are followed. Each real folder is listed once, under its own name where it lies in this one, so links that
    lead in circles end.

    Args:
        root: the folder.

    Attributes:
        files: names relative to `root`, with slashes; whatever is not a folder.
        skipped: folders that cannot be listed, as `file` and `reason`.
    """

    def __init__(self, root: str):
        self.root = os.path.abspath(root)
        self.files: set[str] = set()
        self.skipped: list[dict[str, str]] = []
        self._closed: set[str] = set()
        seen = {_identity(self.root)}
        own, linked = collections.deque([""]), collections.deque()
        while own or linked:
            name = (own or linked).popleft()
            identity = _identity(self.path(name))
            if name and identity in seen:
                continue
            seen.add(identity)
            self._list(name, own, linked)

    def path(self, name: str) -> str:
        """Returns where the file of this name lies."""
        return os.path.join(self.root, name)

    def _list(self, folder: str, own: collections.deque[str], linked: collections.deque[str]) -> None:
        """Lists one folder, and adds those in it to the ones to be listed."""
        try:
            with os.scandir(self.path(folder)) as entries:
                found = sorted((entry.name, entry.is_symlink(), _is_folder(entry)) for entry in entries)
        except OSError as error:
            self.skipped.append({"file": printable(folder), "reason": f"folder cannot be listed: {error.strerror}"})
            self._closed.add(folder)
            return
        for entry, is_link, is_folder in found:
            name = f"{folder}/{entry}" if folder else entry
            if entry.startswith("."):
                continue
            if is_folder:
                (linked if is_link else own).append(name)
            else:
                self.files.add(name)

    def find(self, name: str) -> str:
        """Returns the file, one of `files` or a hidden one, that a line means by `name`.

        Raises:
            ValueError: there is none; the message says why, and which name would do.
        """
        spellings = dict.fromkeys((name, name.replace("\\", "/")))
        inside = [relative for spelled in spellings if (relative := self._relative(spelled)) is not None]
        for relative in inside:
            if found := self._match(relative):
                return found
        if not inside or ntpath.splitdrive(name)[0]:
            raise ValueError("outside of the folder: move the file into it, or name a link in it")
        for relative in inside:
            if relative == "." or os.path.isdir(self.path(relative)):
                raise ValueError("is no file: a folder")
            if closed := self._closed.intersection(map(str, pathlib.PurePosixPath(relative).parents)):
                raise ValueError(f"missing: the folder {closed.pop()!r} cannot be listed")
        raise ValueError("missing: the folder does not hold it" + self._hint(inside[-1]))

    def _relative(self, name: str) -> str | None:
        """Returns a path as one relative to the folder, without dots; None where it leads out of it."""
        path = os.path.normpath(os.path.join(self.root, name))
        path = f"/{path.lstrip('/')}" if path.startswith("/") else path  # two slashes at the start are kept else
        return _below(path, self.root) or _below(_real(path), os.path.realpath(self.root))

    def _match(self, relative: str) -> str | None:
        """Returns the file that is called so: to the letter, but for how accents are composed, or by way of links."""
        if relative in self.files:
            return relative
        alike = self._by_accents.get(unicodedata.normalize("NFC", relative), [])
        if len(alike) > 1:
            raise ValueError(f"missing: the folder holds {len(alike)} files that differ from it in accents' spelling")
        if alike:
            return alike[0]
        if not os.path.lexists(self.path(relative)) or os.path.isdir(self.path(relative)):
            return None
        listed = os.path.relpath(_real(self.path(relative)), os.path.realpath(self.root))
        return listed if listed in self.files else relative  # links between folders lead to one file by many names

    @functools.cached_property
    def _by_accents(self) -> dict[str, list[str]]:
        """The files by their names with composed accents."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.files):
            found.setdefault(unicodedata.normalize("NFC", name), []).append(name)
        return found

    @functools.cached_property
    def _by_letters(self) -> dict[str, list[str]]:
        """The files by their last names, but for case and spaces around them."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.files):
            found.setdefault(_letters(name), []).append(name)
        return found

    def _hint(self, relative: str) -> str:
        """Returns which files may be meant by a name that there is not, as the end of a message."""
        alike = self._by_letters.get(_letters(relative), [])
        closest = [name for name in alike if name.casefold() == relative.casefold()] or alike
        return f"; it holds {', '.join(map(repr, closest[:MOST_TOLD]))}" if closest else ""


def _below(path: str, root: str) -> str | None:
    """Returns a path relative to a folder, "." for itself; None where it lies elsewhere."""
    if path == root:
        return "."
    start = root.rstrip("/") + "/"
    return path[len(start) :] if path.startswith(start) else None


def _letters(name: str) -> str:
    return unicodedata.normalize("NFC", os.path.basename(name)).casefold().strip()


def _real(path: str) -> str:
    """Returns a path with the links in its folders resolved; what the last name links to is the file's own affair."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _identity(path: str) -> tuple[int, int] | str:
    """Returns what tells a folder from every other one, however it is reached."""
    try:
        found = os.stat(path)
    except OSError:
        return path  # it is named when it cannot be listed
    return found.st_dev, found.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads nowhere
