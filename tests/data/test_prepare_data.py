"""The command line of prepare_data.py: packages fetched or given, reports, bad input, crashes."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from sora_jax.commands import prepare_data
from sora_jax.data.builders import clip_dataset, fluent_emoji, writer
from sora_jax.data.sources import open_source

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "prepare_data.py"
FIXTURES = ROOT / "tests" / "fixtures" / "fluent_emoji"


@pytest.fixture(scope="module")
def script():
    return prepare_data


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The four npm archives, with the fixtures shared among them, one broken and one nameless file."""
    directory = tmp_path_factory.mktemp("packages")
    files = sorted(FIXTURES.glob("*.webp"))
    for i, package in enumerate(fluent_emoji.PACKAGES):
        members = {f"assets/{p.name}": p.read_bytes() for p in files[i::4]}
        members["package.json"] = json.dumps({"name": package, "version": "1.0.0"}).encode()
        if i == 0:
            members["assets/1f438.webp"] = files[2].read_bytes()[:3000]
            members["assets/ffff1.webp"] = files[0].read_bytes()
        name = f"{package[1:].replace('/', '-')}-1.0.0.tgz"
        with tarfile.open(directory / name, "w:gz") as tar:
            for member, data in members.items():
                info = tarfile.TarInfo(f"package/{member}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return directory


def emoji_command(output, *arguments):
    return ["fluent-emoji", "--output", str(output), "--max-side", "32", "--num-workers", "0", *arguments]


def test_archives_become_a_data_set_and_a_report(script, packages, tmp_path, capsys):
    report_file = tmp_path / "report.json"
    command = emoji_command(tmp_path / "out", "--packages", str(packages), "--json", str(report_file))
    assert script.main(command) == 0
    printed = capsys.readouterr().out
    report = json.loads(report_file.read_text())
    assert printed.rstrip().splitlines()[-1] == f"data.path = {report['path']}"
    assert {e["file"]: e["reason"].split(":")[0] for e in report["skipped"]} == {
        "anim-1/1f438.webp": "cannot be decoded",
        "anim-1/ffff1.webp": "no caption",
    }
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["fluent_emoji"]
    counts = report["splits"].values()
    assert sum(c["num_clips"] for c in counts) == 8 and sum(c["num_stills"] for c in counts) == 4
    source = open_source(report["path"], "train")
    captions = source.metadata.captions
    assert {"sauropod", "hammer", "joker"} <= set(captions)
    assert source.metadata.num_frames[captions.index("sauropod")] == 24
    assert np.maximum(source.metadata.height, source.metadata.width).tolist() == [32] * len(source)
    assert f"{report['num_skipped']} files" in printed and "1f438" in printed


def test_limit_and_no_stills(script, packages, tmp_path):
    report_file = tmp_path / "new" / "report.json"
    arguments = ("--packages", str(packages), "--limit", "3", "--no-stills", "--json", str(report_file))
    assert script.main(emoji_command(tmp_path / "out", *arguments)) == 0
    counts = json.loads(report_file.read_text())["splits"].values()
    assert sum(c["num_clips"] + c["num_stills"] for c in counts) <= 3
    assert sum(c["num_stills"] for c in counts) == 0


def test_a_missing_package_is_named(script, packages, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for archive in sorted(packages.iterdir())[:3]:
        (few / archive.name).symlink_to(archive)
    assert script.main(emoji_command(tmp_path / "out", "--packages", str(few))) == 1
    assert "lacks @lobehub/fluent-emoji-anim-4" in capsys.readouterr().err
    assert script.main(emoji_command(tmp_path / "out", "--packages", str(tmp_path / "absent"))) == 1
    assert "absent is not a directory" in capsys.readouterr().err
    assert not (tmp_path / "out" / "fluent_emoji").exists()


def test_a_broken_archive_is_named(script, packages, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for archive in packages.iterdir():
        (broken / archive.name).write_bytes(archive.read_bytes()[:2000])
    assert script.main(emoji_command(tmp_path / "out", "--packages", str(broken))) == 1
    assert "anim-1-1.0.0.tgz cannot be unpacked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"), [("package/../../x", tarfile.REGTYPE), ("/x", tarfile.REGTYPE), ("x", tarfile.SYMTYPE)]
)
def test_an_archive_that_reaches_out_of_its_directory_is_refused(script, packages, tmp_path, capsys, name, kind):
    evil = tmp_path / "evil"
    shutil.copytree(packages, evil)
    with tarfile.open(next(evil.glob("*anim-1-*")), "w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/hosts"
        tar.addfile(info)
    assert script.main(emoji_command(tmp_path / "out", "--packages", str(evil))) == 1
    assert f"cannot be unpacked: {name!r} is no file inside of it" in capsys.readouterr().err


FAKE_NPM = """#!/bin/sh
# npm pack NAME@VERSION --pack-destination DIR
echo "$2" >> "$NPM_LOG"
case "$2" in *anim-3*) if [ -n "$NPM_FAIL" ]; then echo "npm error 404 not found" >&2; exit 1; fi;; esac
file=$(echo "$2" | sed 's/^@//; s,/,-,; s/@/-/').tgz
cp "$NPM_SOURCE/$file" "$4/$file"
"""


def test_npm_pack_fetches_once_and_says_why_it_failed(script, packages, tmp_path, monkeypatch, capsys):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(FAKE_NPM)
    npm.chmod(0o755)
    log = tmp_path / "log"
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NPM_SOURCE", str(packages))
    monkeypatch.setenv("NPM_LOG", str(log))
    monkeypatch.setenv("NPM_FAIL", "yes")
    command = emoji_command(tmp_path / "out", "--limit", "2")
    assert script.main(command) == 1
    assert "npm error 404" in capsys.readouterr().err
    monkeypatch.delenv("NPM_FAIL")
    log.unlink()
    assert script.main(command) == 0
    assert [line[-11:] for line in log.read_text().split()] == ["nim-3@1.0.0", "nim-4@1.0.0"]
    log.unlink()
    assert script.main(command) == 0 and not log.exists()  # finished: nothing is fetched again
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.main(emoji_command(tmp_path / "other")) == 1
    assert "--packages DIR" in capsys.readouterr().err


@pytest.fixture
def pictures(tmp_path):
    source = tmp_path / "clips"
    source.mkdir()
    lines = []
    for i in range(4):
        Image.new("RGB", (16, 12), (i * 60, 0, 0)).save(source / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "caption": f"red {i}"}))
    (source / "captions.jsonl").write_text("\n".join(lines))
    return source


def test_a_crash_before_the_report_costs_no_encoding(script, pictures, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    command = ["folder", "--source", str(pictures), "--output", str(output), "--unseen-share", "0"]
    command += ["--num-workers", "0"]

    def crash(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(clip_dataset, "describe", crash)
        assert script.main(command) == 1
    assert "disk full" in capsys.readouterr().err
    monkeypatch.setattr("sora_jax.data.builders.folder.Converter.__call__", crash)
    assert script.main(command) == 0
    assert sorted(p.name for p in output.iterdir()) == ["clip_folder"]
    assert len(open_source(str(output), "train")) == 4


def test_a_crash_while_records_are_written_leaves_none(script, pictures, tmp_path, monkeypatch):
    output = tmp_path / "out"
    command = ["folder", "--source", str(pictures), "--output", str(output), "--num-workers", "0"]

    def crash(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_read_record", crash)
        assert script.main(command) == 1
    assert not (output / "clip_folder").exists() and not list(output.rglob("*.incomplete"))
    assert script.main(command) == 0
    assert sorted(p.name for p in (output / "clip_folder").iterdir()) == ["1.0.0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unseen-share", "1.5"], "unseen_share must be at least 0 and below 1, got 1.5"),
        (["--clip-frames", "0"], "clip_frames must be at least 1, got 0"),
        (["--max-side", "0"], "max_side must be at least 1, got 0"),
        (["--num-workers", "-1"], "num_workers must be at least 0, got -1"),
        (["--source", "/absent"], "/absent is not a directory"),
        (["--source", "/absent", "--json", "/dev/null/x.json"], "--json '/dev/null/x.json' cannot be written"),
        (["--source", "/absent", "--output", "/dev/null"], "--output '/dev/null' cannot be written"),
    ],
)
def test_bad_arguments_are_one_clear_line(script, pictures, tmp_path, capsys, arguments, message):
    output = tmp_path / "out"
    assert script.main(["folder", "--source", str(pictures), "--output", str(output), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not output.exists()


def test_a_missing_manifest_says_how_to_write_one(script, tmp_path, capsys):
    assert script.main(["folder", "--source", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert '"caption": "a cat jumps"' in capsys.readouterr().err


def test_the_script_runs_on_its_own(pictures, tmp_path):
    command = [sys.executable, str(SCRIPT), "folder", "--source", str(pictures), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("clip_folder/1.0.0")
    usage = subprocess.run([*command, "--unknown", "1"], capture_output=True, text=True)
    assert usage.returncode == 2 and "--unknown" in usage.stderr
