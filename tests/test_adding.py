"""What docs/adding.md says of a new family: two files and a line of the registry."""

import importlib
import pathlib
import re
import subprocess
import sys

import chex
import pytest

import sora_jax
from sora_jax.commands import convert_checkpoint, train
from sora_jax.families import registry
from sora_jax.generation.pipeline import SoraPipeline

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT / "tests" / "fixtures" / "clip_folder"


def blocks():
    """Returns the code of docs/adding.md by the file that its first line names."""
    text = (ROOT / "docs" / "adding.md").read_text()
    found = re.findall(r"```python\n# ([^\n]*)\n(.*?)```", text, re.S)
    return dict(found)


@pytest.fixture
def family(tmp_path, monkeypatch):
    """The files of the document, where Python finds them beside those of the package."""
    code = blocks()
    for name in ("models", "families"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "bottleneck.py").write_text(code[f"sora_jax/{name}/bottleneck.py"])
        package = importlib.import_module(f"sora_jax.{name}")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    line = code["sora_jax/families/registry.py, in FAMILIES"]
    (kind, added), *others = eval(f"{{{line}}}", {"Family": registry.Family}).items()
    assert not others
    monkeypatch.setitem(registry.FAMILIES, kind, added)
    (tmp_path / "bottleneck_small.py").write_text(code["bottleneck_small.py"])
    return tmp_path


def test_the_files_pass_the_linter(tmp_path):
    for name, code in blocks().items():
        if name.startswith("sora_jax/") and name.endswith(".py"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"# {name}\n{code}")
    config = ["--config", str(ROOT / "pyproject.toml"), "--ignore", "I001"]  # which asks where the package lies
    command = [sys.executable, "-m", "ruff", "check", *config, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_new_family_trains_resumes_loads_and_exports(family):
    config = str(family / "bottleneck_small.py")
    whole, parts, out = (family / name for name in ("whole", "parts", "out"))
    arguments = [config, "--data.path", str(DATA), "--sample-every", "0"]
    assert train.main([*arguments, "--workdir", str(whole)]) == 0
    assert train.main([*arguments, "--workdir", str(parts), "--num-steps", "2"]) == 0
    assert train.main([*arguments, "--workdir", str(parts)]) == 0
    assert convert_checkpoint.main(["export", "--source", str(whole), "--output", str(out)]) == 0
    loaded, exported = sora_jax.load(whole), sora_jax.load(out)
    assert loaded.kind == exported.kind == "bottleneck" and loaded.config.model.width == 4
    chex.assert_trees_all_equal(loaded.params, exported.params)
    assert loaded.components.codec.kind == "identity"
    with pytest.raises(ValueError, match=r"is a bottleneck, not a Sora: train\.py --init-from takes it"):
        SoraPipeline.from_pretrained(out)


def test_kinds_are_told_apart_in_the_registry_alone():
    """No other file asks what class a config or a task is of."""
    names = "config|task|process|data|model|sampling"
    pattern = re.compile(
        rf"\bisinstance\([^()]*\b({names})\b|\btype\([^()]*\b({names})\) *(is|==|!=|in) |match .*\bkind\b"
    )
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted([*(ROOT / "sora_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line) and path.name != "registry.py"
    ]
    others = {
        "isinstance(config, kind)",  # whether a user's file returns a config at all
        "isinstance(config, tuple)",  # of any value that is written as JSON
        "isinstance(data, str)",  # text and bytes
        "type(config.data) is not type(other.data)",  # whether two studies are of one kind of data, whichever it is
    }
    asked = [line for line in lines if not any(other in line for other in others)]
    assert not asked, "\n".join(asked)
    assert len(lines) == len(others)  # none of them is gone
