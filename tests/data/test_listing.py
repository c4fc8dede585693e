"""Which files a folder holds, links and broken ones among them, and which of them a line of the manifest means."""

import json
import os
import socket
import unicodedata

import pytest
from PIL import Image

from sora_jax.data.builders import clip_dataset, folder, listing
from sora_jax.data.builders.parts import Encoding

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path, "PNG")


def prepare(root, output, *lines, **kwargs):
    """Lists `lines` in the folder's manifest and prepares it."""
    lines = [json.dumps({"file": line, "caption": "c"}) for line in lines]
    (root / "captions.jsonl").write_text("\n".join(lines))
    tasks, skipped = folder.make_tasks(str(root), unseen_share=0)
    return clip_dataset.prepare(
        folder.ClipFolder, tasks, folder.Converter(), Encoding(), str(output), skipped=skipped, **kwargs
    )


def test_links_in_circles_end_and_each_folder_is_listed_once(tmp_path):
    write(tmp_path, "a.png", "one/b.png", "two/c.png", "zz/d.png")
    (tmp_path / "one/x").symlink_to("../two")
    (tmp_path / "two/y").symlink_to("../one")
    (tmp_path / "one/up").symlink_to("..")
    (tmp_path / "aa").symlink_to("zz")  # is met before the folder it links to
    (tmp_path / "self").symlink_to("self")
    found = listing.Folder(str(tmp_path))
    assert found.files == {"a.png", "one/b.png", "two/c.png", "zz/d.png", "self"}
    assert found.find("one/x/y/up/aa/d.png") == "zz/d.png" == found.find("aa/d.png")


def test_a_folder_outside_is_reached_by_a_link(tmp_path):
    write(tmp_path, "elsewhere/deep/a.png", "clips/b.png")
    (tmp_path / "clips/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "clips/again").symlink_to(tmp_path / "elsewhere")
    found = listing.Folder(str(tmp_path / "clips"))
    assert found.files == {"again/deep/a.png", "b.png"}
    assert found.find("link/deep/a.png") == "link/deep/a.png"


def test_a_tree_deeper_than_a_path_may_be_ends(tmp_path):
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(30):  # of 200 letters each; a path has 4,096
        os.mkdir("d" * 200, dir_fd=place)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    write(tmp_path, "a.png")
    found = listing.Folder(str(tmp_path))
    assert found.files == {"a.png"}
    (skipped,) = found.skipped
    assert skipped["reason"].startswith("folder cannot be listed: File name too long")


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("x/a.png", "x/a.png"),
        ("./x/a.png", "x/a.png"),
        ("x//a.png", "x/a.png"),
        ("x/./a.png", "x/a.png"),
        ("x/../x/a.png", "x/a.png"),
        ("nowhere/../x/a.png", "x/a.png"),
        ("x\\a.png", "x/a.png"),
        (".\\x\\..\\x\\\\a.png", "x/a.png"),
        ("{root}/x/a.png", "x/a.png"),
        ("/{root}/x/a.png", "x/a.png"),
        ("{root}/../clips/x/a.png", "x/a.png"),
        ("../clips/x/a.png", "x/a.png"),
        ("{link}/x/a.png", "x/a.png"),
        ("back\\slash.png", "back\\slash.png"),
        (f"{DECOMPOSED}/{DECOMPOSED}.png", f"{COMPOSED}/{DECOMPOSED}.png"),
        (f"{COMPOSED}/{COMPOSED}.png", f"{COMPOSED}/{DECOMPOSED}.png"),
        (f"{DECOMPOSED}\\{COMPOSED}.png", f"{COMPOSED}/{DECOMPOSED}.png"),
        (f"both/{COMPOSED}.png", f"both/{COMPOSED}.png"),
        (f"both/{DECOMPOSED}.png", f"both/{DECOMPOSED}.png"),
        (".hidden/a.png", ".hidden/a.png"),
    ],
)
def test_a_line_finds_its_file(tmp_path, line, file):
    root = tmp_path / "clips"
    write(root, "x/a.png", "back\\slash.png", f"{COMPOSED}/{DECOMPOSED}.png", ".hidden/a.png")
    write(root, f"both/{COMPOSED}.png", f"both/{DECOMPOSED}.png")
    (tmp_path / "link").symlink_to(root)
    assert listing.Folder(str(root)).find(line.format(root=root, link=tmp_path / "link")) == file


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("b.png", "missing: the folder does not hold it"),
        ("A.PNG", "missing: the folder does not hold it; it holds 'x/a.png'"),
        ("X/A.png", "missing: the folder does not hold it; it holds 'x/a.png'"),
        ("x/a.png ", "missing: the folder does not hold it; it holds 'x/a.png'"),
        ("clips/x/a.png", "missing: the folder does not hold it; it holds 'x/a.png'"),
        ("../other.png", "outside of the folder"),
        ("x/../../other.png", "outside of the folder"),
        ("/etc/hosts", "outside of the folder"),
        ("C:\\clips\\a.png", "outside of the folder"),
        ("{root}-2/a.png", "outside of the folder"),
        ("x", "is no file: a folder"),
        (".", "is no file: a folder"),
        ("x\\", "is no file: a folder"),
        ("a\0.png", "missing: the folder does not hold it"),
        ("n" * 5000, "missing: the folder does not hold it"),
        ("\u1e0b\u0323.png", "missing: the folder holds 2 files that differ from it in accents' spelling"),
    ],
)
def test_a_line_without_a_file_says_what_would_do(tmp_path, line, reason):
    root = tmp_path / "clips"
    write(root, "x/a.png", "d\u0323\u0307.png", "d\u0307\u0323.png")
    write(tmp_path, "other.png", "clips-2/a.png")
    with pytest.raises(ValueError) as caught:
        listing.Folder(str(root)).find(line.format(root=root))
    assert reason in str(caught.value)


def test_duplicates_are_told_after_names_are_read(tmp_path):
    root = tmp_path / "clips"
    write(root, "x/a.png", f"{DECOMPOSED}.png")
    lines = ["x/a.png", "x\\a.png", str(root / "x/a.png"), f"{COMPOSED}.png", f"{DECOMPOSED}.png"]
    report = prepare(root, tmp_path / "out", *lines)
    assert report["splits"]["train"]["num_stills"] == 2
    assert [entry["file"] for entry in report["skipped"]] == [lines[1], lines[2], lines[4]]
    assert set(report["skip_reasons"]) == {"duplicate"}


def test_what_is_no_file_is_left_out_and_named(tmp_path):
    root = tmp_path / "clips"
    write(root, "a.png", "folder/b.png")
    (root / "dead.png").symlink_to("nowhere.png")
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.mp4")
    os.mkfifo(root / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "socket.mp4"))  # a whole path may be too long for it
    (root / "null.mp4").symlink_to("/dev/null")
    (root / "memory.mp4").symlink_to("/proc/self/mem")
    lines = ["a.png", "dead.png", "loop.png", "pipe.mp4", "pipe.png", "socket.mp4", "null.mp4", "memory.mp4", "folder"]
    report = prepare(root, tmp_path / "out", *lines)
    assert report["splits"]["train"]["num_stills"] == 1
    assert {entry["file"]: entry["reason"] for entry in report["skipped"]} == {
        "dead.png": "cannot be read: a link to 'nowhere.png', which does not exist",
        "loop.png": "cannot be read: Too many levels of symbolic links",
        "pipe.mp4": "is no file: a named pipe",
        "pipe.png": "is no file: a named pipe",
        "socket.mp4": "is no file: a socket",
        "null.mp4": "is no file: a device",
        "memory.mp4": "is empty",
        "folder": "is no file: a folder",
        "folder/b.png": "no caption: captions.jsonl does not list it",
    }


def test_names_that_break_lines_or_are_not_utf8_are_escaped(tmp_path, capsys):
    root = tmp_path / "clips"
    write(root, "a.png", "two\nlines.png")
    (root / os.fsdecode(b"caf\xe9.png")).touch()
    (root / "broken\x1b.png").touch()
    report = prepare(root, tmp_path / "out", "a.png", "two\nlines.png", "broken\x1b.png", "no\u2028where.png")
    assert report["splits"]["train"]["num_stills"] == 2
    assert {entry["file"] for entry in report["skipped"]} == {"caf\\xe9.png", "broken\\x1b.png", "no\\u2028where.png"}
    assert json.loads((tmp_path / "out/clip_folder/1.0.0/report.json").read_text()) == report
    letters = "\U0001f469\u200d\U0001f3a8 \u0e44\u0e17\u0e22.png"
    assert listing.printable(letters) == letters


def test_a_folder_of_bytes_that_are_no_utf8(tmp_path):
    root = tmp_path / os.fsdecode(b"clips\xff")
    write(root, "a.png")
    (root / "b.mp4").write_text("no video")
    (root / "c.png").write_text("no picture")
    report = prepare(root, tmp_path / "out", "a.png", "b.mp4", "c.png")
    assert [entry["file"] for entry in report["skipped"]] == ["b.mp4", "c.png"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    root = tmp_path / "clips"
    write(root, "a.png", "closed/b.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    report = prepare(root, tmp_path / "out", "a.png", "closed/b.png", "closed/c.png")
    assert report["splits"]["train"]["num_stills"] == 2  # a file in it may be read nevertheless
    assert {entry["file"]: entry["reason"] for entry in report["skipped"]} == {
        "closed": "folder cannot be listed: Permission denied",
        "closed/c.png": "missing: the folder 'closed' cannot be listed",
    }


def test_a_file_that_goes_away_is_left_out_and_named(tmp_path, monkeypatch):
    root = tmp_path / "clips"
    write(root, "a.png", "b.png")
    make_tasks = folder.make_tasks

    def and_then(*args, **kwargs):
        found = make_tasks(*args, **kwargs)
        (root / "b.png").unlink()
        return found

    monkeypatch.setattr(folder, "make_tasks", and_then)
    report = prepare(root, tmp_path / "out", "a.png", "b.png")
    assert report["skipped"] == [{"file": "b.png", "reason": "cannot be read: No such file or directory"}]


def test_a_remote_folder_is_refused():
    with pytest.raises(ValueError, match=r"source: gs://bucket/clips is not a directory of this machine"):
        folder.make_tasks("gs://bucket/clips")
