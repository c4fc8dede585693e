"""One file's error is its own; one of the system stops the preparation; a record holds what it promises."""

import dataclasses
import errno
import io
import json
import math
import os
import pathlib
import signal

import pytest
from etils import epath
from PIL import Image

from sora_jax.data.builders import folder, parts
from sora_jax.data.builders.parts import CLIP_ID_STRIDE, ClipTask, Encoding, encode_parts
from sora_jax.data.decode import UnreadableClipError
from sora_jax.data.records import ClipRecord, check_record


def picture(width=8, height=6, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, kind)
    return buffer.getvalue()


GOOD = ClipRecord(0, "a", "a cat", 5.0, 6, 8, [picture(), picture()])


def tasks_of(directory, *names):
    for name in names:
        (directory / name).touch()
    return [ClipTask(i, name, str(directory / name), "x", "train") for i, name in enumerate(names)]


def good(task):
    return dataclasses.replace(GOOD, clip_id=task.file_id * CLIP_ID_STRIDE, name=task.name)


def encode(tasks, convert, directory, num_workers=0):
    (part,) = encode_parts(tasks, convert, Encoding(), epath.Path(directory) / "parts", num_workers)["train"]
    return (part.clip_ids // CLIP_ID_STRIDE).tolist(), {entry["file"]: entry["reason"] for entry in part.skipped}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO), "b"), "cannot be read: Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied", "b"), "cannot be read: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "cannot be read: File name too long"),
        (OSError(errno.ESTALE, "Stale file handle"), "cannot be read: Stale file handle"),
        (OSError("broken"), "cannot be read: broken"),
        (MemoryError(), "needs more memory than there is"),
        (UnreadableClipError("is\ntruncated"), "is\\ntruncated"),
    ],
)
def test_an_error_of_one_file_leaves_out_all_of_its_clips(tmp_path, error, reason):
    def convert(task, encoding):
        yield good(task)
        if task.name == "b":
            raise error

    assert encode(tasks_of(tmp_path, "a", "b", "c"), convert, tmp_path) == ([0, 2], {"b": reason})


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_opened_is_named_by_the_error(tmp_path, monkeypatch, error):
    tasks, opened = tasks_of(tmp_path, "a.png", "b.mp4"), open

    def refusing(path, *args, **kwargs):
        if str(path) in [task.path for task in tasks]:
            raise OSError(error, os.strerror(error), path)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)
    reason = f"cannot be read: {os.strerror(error)}"
    assert encode(tasks, folder.Converter(), tmp_path) == ([], {"a.png": reason, "b.mp4": reason})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE])
def test_an_error_of_the_system_stops(tmp_path, code):
    def convert(task, encoding):
        raise OSError(code, os.strerror(code))
        yield

    with pytest.raises(OSError) as caught:
        encode(tasks_of(tmp_path, "a"), convert, tmp_path)
    assert caught.value.errno == code and not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"frames": []}, "holds no frame"),
        ({"frames": [picture(), picture(10, 6)]}, "changes its size: frame 1 is 10x6 pixels, the clip is 8x6"),
        ({"frames": [picture(6, 8)]}, "changes its size: frame 0 is 6x8 pixels, the clip is 8x6"),
        ({"frames": [picture(), b"no picture"]}, "frame 1 is no picture"),
        ({"frames": [picture(), picture()[:10]]}, "frame 1 is no picture"),
        ({"frames": [picture(), picture(kind="PNG")]}, "frame 1 is stored as PNG, not as JPEG"),
        ({"fps": 0.0}, "gives no frame rate: 0.0 frames a second"),
        ({"fps": -1.0}, "gives no frame rate"),
        ({"fps": math.nan}, "gives no frame rate"),
        ({"fps": math.inf}, "gives no frame rate"),
        ({"fps": 1e39}, "gives no frame rate"),  # infinite in float32, in which it is stored
        ({"fps": 1e-46}, "gives no frame rate"),
        ({"caption": "\udc80"}, "cannot be named in UTF-8"),
        ({"clip_id": 2 * CLIP_ID_STRIDE}, "gives more than 100000 clips; longer clips make fewer"),
    ],
)
def test_a_record_that_breaks_its_promise_is_left_out(tmp_path, changes, reason):
    def convert(task, encoding):
        yield dataclasses.replace(good(task), **(changes if task.name == "b" else {}))

    clips, skipped = encode(tasks_of(tmp_path, "a", "b", "c"), convert, tmp_path)
    assert clips == [0, 2] and list(skipped) == ["b"] and skipped["b"].startswith(reason)


def test_a_record_has_room_for_two_gigabytes(monkeypatch):
    check_record(GOOD)
    monkeypatch.setattr("sora_jax.data.records.MOST_BYTES", len(picture()))
    with pytest.raises(UnreadableClipError, match="too large for a record: its 2 frames take"):
        check_record(GOOD)


def test_a_file_whose_pictures_change_their_size_is_left_out_whole(tmp_path):
    """Each piece of the clip is of one size, the file is not."""

    class Growing(Encoding):
        def encode(self, frame):
            return picture(width=8 if frame.getpixel((0, 0))[0] < 100 else 10)

    frames = [Image.new("RGB", (8, 6), (level, 0, 0)) for level in (0, 40, 160, 240)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    task = ClipTask(0, "a.gif", str(tmp_path / "a.gif"), "x", "train")
    (part,) = encode_parts([task], folder.Converter(2), Growing(), epath.Path(tmp_path) / "parts", 0)["train"]
    assert not len(part) and part.skipped[0]["reason"].startswith("changes its size")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_frames_are_cut_into_pieces(count):
    frames = [bytes([i]) for i in range(count)]
    pieces = list(folder._pieces(iter(frames), 3))
    assert [frame for _, piece in pieces for frame in piece] == frames
    assert [start for start, _ in pieces] == ([None] if count <= 3 else list(range(0, count, 3)))


def test_a_long_video_is_not_held_whole(tmp_path, monkeypatch):
    """Pieces go to disk as they come; of a file that breaks at the end, none is left."""
    monkeypatch.setattr(parts, "_SPOOLED_BYTES", 2000)
    spooled = []

    def convert(task, encoding):
        for piece in range(10):
            yield dataclasses.replace(good(task), clip_id=good(task).clip_id + piece)
            spooled.append(sum(os.fstat(int(fd)).st_size for fd in _open_files_of(tmp_path)))
        if task.name == "b":
            raise UnreadableClipError("is truncated")

    clips, skipped = encode(tasks_of(tmp_path, "a", "b"), convert, tmp_path)
    assert clips == [0] * 10 and skipped == {"b": "is truncated"} and max(spooled) > 8 * len(picture())


def _open_files_of(directory):
    links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}
    return [fd for fd, path in links.items() if path.startswith(str(directory)) and "incomplete" not in path]


def _is_open(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")


def deadly(task, encoding):
    """Reads a file as a broken codec would."""
    if task.name == "exits":
        os._exit(3)
    if task.name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task.name == "once" and not os.path.exists(f"{task.path}-met"):
        pathlib.Path(f"{task.path}-met").touch()
        os._exit(1)
    yield good(task)


@pytest.mark.slow
def test_files_that_end_the_process_are_left_out(tmp_path):
    tasks = tasks_of(tmp_path, "a", "exits", "b", "crashes", "c")
    clips, skipped = encode(tasks, deadly, tmp_path, num_workers=1)
    assert clips == [0, 2, 4]
    assert skipped == {
        "exits": "ends the process that decodes it: exit code 3",
        "crashes": "ends the process that decodes it: SIGSEGV",
    }
    assert not list(tmp_path.rglob("*.reading")) and len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.slow
def test_a_process_that_dies_for_another_reason_stops(tmp_path, monkeypatch):
    """Its file is read by a process of its own without harm; the next start goes on."""
    monkeypatch.setattr(parts, "PART_SIZE", 1)
    tasks = tasks_of(tmp_path, "a", "once")
    with pytest.raises(ChildProcessError, match="fewer num_workers need less"):
        encode_parts(tasks, deadly, Encoding(), epath.Path(tmp_path) / "parts", 2)
    found = encode_parts(tasks, deadly, Encoding(), epath.Path(tmp_path) / "parts", 2)["train"]
    assert [json.loads(json.dumps(part.skipped)) for part in found] == [[], []]
