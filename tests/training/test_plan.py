import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny_recognition
import tiny_run

from sora_jax.config import MeshConfig, OptimizerConfig
from sora_jax.configs import load_config
from sora_jax.data.captioned import DataConfig
from sora_jax.families.sora import SoraConfig
from sora_jax.models.sora import SORA_SIZES, ModelConfig
from sora_jax.parallel import rules
from sora_jax.parallel.attention import DENSE_KEYS, attention_for
from sora_jax.parallel.mesh import make_mesh
from sora_jax.runs import plan

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPT = ROOT / "experiments" / "plan_tpu.py"

PROGRAM = """
  %all-gather.1 = f32[8,4]{1,0} all-gather(%p), channel_id=1, dimensions={0}
  %all-gather.2 = f32[8,4]{1,0:S(1)} all-gather(%q), channel_id=1, dimensions={0}
  %all-gather.3 = f32[8,4]{1,0} all-gather(%r), channel_id=12, dimensions={0}
  %start = (f32[4], f32[4]) all-reduce-start(%a), to_apply=%sum
  %done = f32[4] all-reduce-done(%start)
  %all-reduce.2 = f32[] all-reduce(%b), metadata={op_name="all-gather(x)"}
  %use = f32[8,4]{1,0} add(%all-gather.1, %all-gather.1)
"""


def small_config(**model):
    return SoraConfig(
        model=dataclasses.replace(SORA_SIZES["sora_nano"], **model),
        data=DataConfig(row_length=128, text_length=32, max_segments=4, batch_size=8),
        optimizer=OptimizerConfig(accumulation_steps=2),
        mesh=MeshConfig(data=-1, fsdp=2),
    )


def with_attention(config, name):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=name))


def run_script(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_collectives_are_counted_once_each():
    assert plan.count_collectives(PROGRAM) == {
        "all-gather": 2,
        "all-reduce": 2,
        "reduce-scatter": 0,
        "all-to-all": 0,
        "collective-permute": 0,
    }


@pytest.mark.parametrize("config", [tiny_run.CONFIG, tiny_recognition.NAVIT], ids=["sora", "navit"])
def test_auto_attention_is_that_of_a_tpu_whatever_this_machine_is(config):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    texts = {
        name: plan.lower_step(with_attention(config, name), mesh).as_text() for name in ("auto", "xla", "blockwise")
    }
    assert texts["auto"] == texts["xla"] != texts["blockwise"]


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(plan.MissingCompilerError, match=r"pip install -e '\.\[tpu\]'"):
        plan.plan_step(small_config(), "v5e:2x4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "CONFIG comes first, one of"),
        (("no_such", "--topology", "v5e:2x4"), "no config 'no_such'"),
        (("sora_nano", "--topology", "v5e:2x4", "--json", "/dev/null/x.json"), "--json '/dev/null/x.json' cannot be"),
    ],
)
def test_an_unusable_command_line_is_one_line(arguments, message):
    result = run_script(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"plan_tpu.py: {message}") and result.stderr.count("\n") == 1


@pytest.mark.tpu
class TestWithCompiler:
    @pytest.fixture(autouse=True)
    def _needs_libtpu(self):
        pytest.importorskip("libtpu", reason="needs pip install -e '.[tpu]'")

    @pytest.mark.parametrize("name", ["v99:2x2", "v5e:3x5", "rubbish"])
    def test_an_unknown_topology_is_named_beside_examples(self, name):
        with pytest.raises(ValueError, match=rf"unknown topology '{name}' .*give one like v4:2x2x1, v5e:2x4"):
            plan.topology_devices(name)

    def test_sora_xl_fits_eight_chips(self, capsys):
        config = load_config("sora_xl")
        assert (config.model.width, config.model.depth, config.model.attention) == (1152, 28, "splash")
        result = plan.plan_step(config, "v5e:2x4")
        with capsys.disabled():
            print(f"\nsora_xl on {result.topology}: {result.total_bytes / 1e9:.2f} GB a chip: {result}")
        assert result.num_devices == 8 and result.device_kind == "TPU v5 lite"
        assert result.total_bytes < 16e9
        # Self- and cross-attention, each with a forward kernel, its recomputation and two backward ones.
        assert result.num_pallas_calls >= 6
        assert result.collectives["all-gather"] > 0
        # Parameters, their average and two moments, float32, an eighth on each chip; little else is an argument.
        assert result.aliased_bytes < result.argument_bytes < 1.2 * result.aliased_bytes

    @pytest.mark.parametrize(("topology", "kind", "gib"), [("v4:2x2x1", "TPU v4", 16), ("tpu7x:2x2x1", "TPU7x", 96)])
    def test_half_a_chip_has_half_its_memory(self, topology, kind, gib):
        result = plan.plan_step(small_config(), topology)
        assert (result.num_devices, result.device_kind, result.hbm_bytes) == (8, kind, gib * 2**30)
        assert 0 < result.total_bytes < result.hbm_bytes

    @pytest.mark.parametrize(
        ("name", "batch_size"), [("dit_xl_2", 256), ("navit_stills", 16), ("navit_captions", 16), ("vit_b_16", 64)]
    )
    def test_splash_compiles_for_every_family(self, name, batch_size):
        config = with_attention(load_config(name), "splash")
        model = dataclasses.replace(config.model, depth=1)
        data = dataclasses.replace(config.data, batch_size=batch_size)
        result = plan.plan_step(dataclasses.replace(config, model=model, data=data), "v5e:4x4")
        # A forward kernel and two backward ones.
        assert result.num_devices == 16 and result.num_pallas_calls >= 3

    def test_auto_is_splash_where_rows_are_long(self):
        mesh = make_mesh(MeshConfig(), plan.topology_devices("v5e:2x4"))
        for length, kernels in ((DENSE_KEYS, False), (DENSE_KEYS + 1, True)):
            config = small_config()
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, row_length=length))
            assert ("tpu_custom_call" in plan.lower_step(config, mesh).as_text()) == kernels

    def test_splash_compiles_causal_and_with_its_logsumexp(self):
        mesh = make_mesh(MeshConfig(), plan.topology_devices("v5e:2x4"))
        rows = rules.batch_sharding(mesh)
        q = jax.ShapeDtypeStruct((8, 300, 2, 72), jnp.bfloat16, sharding=rows)
        ids = jax.ShapeDtypeStruct((8, 300), jnp.int32, sharding=rows)

        def loss(q, ids):
            out, total = attention_for("splash", mesh)(q, q, q, ids, ids, causal=True, with_logsumexp=True)
            return out.astype(jnp.float32).sum() + total.sum()

        program = jax.jit(jax.grad(loss)).lower(q, ids).compile().as_text()
        assert program.count('custom_call_target="tpu_custom_call"') == 3

    @pytest.mark.parametrize("head_dim", [32, 72, 96, 128])
    def test_splash_compiles_for_any_head_and_length(self, head_dim):
        model = dataclasses.asdict(ModelConfig(width=2 * head_dim, num_heads=2, depth=1, mlp_dim=64))
        config = small_config(**model | {"attention": "splash"})
        data = dataclasses.replace(config.data, row_length=300, text_length=50)
        mesh = make_mesh(config.mesh, plan.topology_devices("v5e:2x4"))
        program = plan.lower_step(dataclasses.replace(config, data=data), mesh).compile().as_text()
        assert 'custom_call_target="tpu_custom_call"' in program

    def test_a_step_that_is_too_large_says_so(self):
        config = small_config(width=1024, depth=4, num_heads=8, mlp_dim=4096, attention="xla")
        data = dataclasses.replace(config.data, row_length=16384)
        message = r"does not fit TPU v5 lite: it needs [\d.]+G of [\d.]+G\. A smaller data\.batch_size"
        with pytest.raises(plan.OutOfMemoryError, match=message):
            plan.plan_step(dataclasses.replace(config, data=data), "v5e:2x4")

    def test_the_script_writes_what_it_shows(self, tmp_path):
        out = tmp_path / "plan.json"
        small = ("--data.row-length", "128", "--data.batch-size", "8", "--model.attention", "splash")
        result = run_script("sora_nano", "--topology", "v5e:2x4", *small, "--json", str(out))
        assert result.returncode == 0, result.stderr
        figures = json.loads(out.read_text())
        assert figures["mesh"] == {"data": 8, "fsdp": 1} and figures["num_pallas_calls"] > 0
        assert figures["collectives"]["all-reduce"] > 0
        total = sum(figures[f"{part}_bytes"] for part in ("argument", "output", "temporary", "code"))
        assert figures["total_bytes"] == total - figures["aliased_bytes"]
        assert "memory per device" in result.stdout

    def test_the_script_names_an_unknown_topology(self):
        result = run_script("sora_nano", "--topology", "v99:2x2")
        assert result.returncode == 2
        assert result.stderr.count("plan_tpu.py: unknown topology 'v99:2x2'") == 1
