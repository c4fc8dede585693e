"""Imports point one way: what each package may import of the others."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
GROUND = {"array_types", "components", "config", "config_json", "files", "migrations", "pixels", "provenance"}
CORE = GROUND | {"diffusion", "patches", "models", "data", "parallel"}
ALLOWED = {
    "array_types": set(),
    "config": set(),
    "components": set(),
    "config_json": {"components", "migrations"},
    "migrations": set(),
    "files": set(),
    "pixels": {"array_types"},
    "provenance": {"array_types"},
    "diffusion": GROUND | {"patches"},
    "patches": GROUND,
    "models": GROUND | {"diffusion", "patches"},
    "data": GROUND | {"patches"},
    "parallel": GROUND | {"models"},
    "training": CORE,
    "families": CORE | {"training"},
    "generation": GROUND | {"diffusion", "patches", "models", "parallel", "training", "families"},
    "evaluation": CORE,
    "convert": GROUND | {"models", "patches"},
    "runs": CORE | {"training", "families", "generation", "evaluation"},
    "configs": CORE | {"training", "families"},
    "commands": CORE | {"training", "families", "generation", "evaluation", "convert", "runs", "configs"},
}


def imported_packages(source: str) -> set[str]:
    """Returns the packages of sora_jax that a module names in an import, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("sora_jax.")}
    return found


def violations(package: str, source: str) -> set[str]:
    return imported_packages(source) - ALLOWED[package] - {package}


@pytest.mark.parametrize("path", sorted((ROOT / "sora_jax").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT / "sora_jax").parts[0].removesuffix(".py")
    if package != "__init__":
        assert not violations(package, path.read_text())


def test_an_arrow_that_runs_back_is_seen():
    assert violations("models", "def f():\n    from sora_jax.training import step") == {"training"}
    assert violations("diffusion", "import sora_jax.models.sora") == {"models"}
    assert violations("data", "from sora_jax import parallel") == {"parallel"}
    assert violations("training", "from sora_jax.models.sora import SoraTransformer") == set()


def test_the_allowed_arrows_make_no_circle():
    assert list(graphlib.TopologicalSorter(ALLOWED).static_order())


def test_no_experiment_is_imported_by_the_package():
    for path in (ROOT / "sora_jax").rglob("*.py"):
        assert "experiments" not in {n.split(".")[0] for n in _modules(path.read_text())}, path


def _modules(source: str) -> list[str]:
    tree = ast.walk(ast.parse(source))
    return [node.module or "" for node in tree if isinstance(node, ast.ImportFrom)]


def test_making_rows_puts_nothing_on_a_device():
    """Workers are many: none of them may take hold of an accelerator."""
    code = (
        "import sys, sora_jax.data.workers as w\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "assert bridge is None or not bridge._backends, bridge._backends\n"
        "assert not any(name.startswith(('flax', 'sora_jax.models')) for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
