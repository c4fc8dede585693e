"""The whole line learns: real clips and captions in, a loss that falls on fixed questions, captions that matter."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.config import FlowConfig, OptimizerConfig, PatchConfig
from sora_jax.data.builders import clip_dataset, folder
from sora_jax.data.builders.parts import Encoding
from sora_jax.data.captioned import DataConfig
from sora_jax.data.captions import CaptionTable
from sora_jax.data.content import PixelContent
from sora_jax.data.packing import Shard, row_budgets
from sora_jax.data.pipeline import make_pipeline
from sora_jax.data.sources import open_source
from sora_jax.data.transforms import Sample
from sora_jax.families.sora import SoraConfig, SoraTask, weighted_loss
from sora_jax.models.sora import ModelConfig
from sora_jax.models.text.minilm import load_text_encoder
from sora_jax.parallel.mesh import make_mesh
from sora_jax.patches.rows import fill_row, stack_rows
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.state import init_state, state_shardings
from sora_jax.training.step import make_train_step

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "fluent_emoji"
CAPTIONS = {
    "1f30c.webp": "milky way",
    "1f375.webp": "teacup without handle",
    "1f4a7.webp": "droplet",
    "1f528.webp": "hammer",
    "1f995.webp": "sauropod",
    "1f9e0.webp": "brain",
}
NUM_STEPS = 150
TIMES = (0.3, 0.6, 0.9)


@dataclasses.dataclass
class Trained:
    """A model after training, with what asks it."""

    config: SoraConfig
    shard: Shard
    params: dict
    first_loss: float
    apply: object
    loss: object
    batch: object


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("learning")
    (root / "clips").mkdir()
    for file in CAPTIONS:
        shutil.copy(FIXTURES / file, root / "clips" / file)
    lines = [json.dumps({"file": f, "caption": c, "split": "train"}) for f, c in CAPTIONS.items()]
    (root / "clips" / "captions.jsonl").write_text("\n".join(lines))
    tasks, _ = folder.make_tasks(str(root / "clips"))
    report = clip_dataset.prepare(
        folder.ClipFolder, tasks, folder.Converter(256), Encoding(64, 92), str(root / "data"), 0, [], {}
    )
    config = SoraConfig(
        model=ModelConfig(width=64, depth=2, num_heads=2, mlp_dim=256),
        patch=PatchConfig(size=(2, 8, 8)),
        data=DataConfig(
            path=report["path"], num_frames=(1, 8), fps=(6, 12), long_side=(24, 32), row_length=256, text_length=64,
            max_segments=16, max_caption_tokens=16, num_bins=8, batch_size=1, num_shards=1, num_workers=0,
        ),
        flow=FlowConfig(prediction="x0"),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=10),
        num_steps=NUM_STEPS,
    )  # fmt: skip
    encoder = load_text_encoder()
    source = open_source(config.data.path, "train")
    table = CaptionTable.build(source.metadata.captions, lambda captions: encoder.encode(captions, 16))
    mesh = make_mesh(config.mesh)
    task, tx = SoraTask(config), make_optimizer(config.optimizer, config.num_steps)
    shardings = state_shardings(task, tx, mesh)
    state = init_state(task, tx, shardings)
    step = make_train_step(task, tx, mesh, shardings)

    @jax.jit
    def loss(params, batch):
        shape = batch.patches.shape
        times = jnp.tile(jnp.asarray(TIMES), 100)[: shape[0] * config.data.max_segments].reshape(shape[0], -1)
        total, weight = weighted_loss(
            params, task.model, batch, times, jax.random.normal(jax.random.key(3), shape), config
        )
        return total / weight

    @jax.jit
    def apply(params, batch):
        levels = jnp.full((len(batch.patches), 2 * config.data.max_segments), 0.8)
        noise = jax.random.normal(jax.random.key(4), batch.patches.shape)
        return task.model.apply(
            {"params": params}, noise, batch.positions, batch.segment_ids, levels, batch.level_ids,
            batch.text, batch.text_segment_ids,
        )  # fmt: skip

    shard = Shard(PixelContent(source), table, config.data, config.patch, 0, True)
    samples = [Sample(clip, 0.4, 4, 8.0, 32, 24, False) for clip in range(len(source))]
    batch = stack_rows([shard.fill(samples)])
    first_loss = float(loss(state.params, batch))
    rows = jnp.zeros((1, 1), jnp.int32)
    with make_pipeline(config.data, config.patch, table) as batches:
        for _ in range(NUM_STEPS):
            state, _ = step(state, jax.tree.map(lambda x: x[None], next(batches)), rows)
    return Trained(config, shard, state.params, first_loss, apply, loss, batch)


def with_segments(trained, segments):
    budgets = row_budgets(trained.config.data, trained.config.patch, trained.shard._captions)
    return stack_rows([fill_row(segments, **budgets)])


def test_the_loss_on_fixed_questions_falls_to_half(trained):
    assert float(trained.loss(trained.params, trained.batch)) <= trained.first_loss / 2


def test_a_wrong_caption_costs(trained):
    samples = [Sample(clip, 0.4, 4, 8.0, 32, 24, False) for clip in range(len(CAPTIONS))]
    segments = [trained.shard.segment(sample) for sample in samples]
    swapped = [s._replace(text=other.text) for s, other in zip(segments, segments[1:] + segments[:1], strict=True)]
    right = float(trained.loss(trained.params, with_segments(trained, segments)))
    wrong = float(trained.loss(trained.params, with_segments(trained, swapped)))
    assert wrong > 1.1 * right


def test_another_frame_rate_gives_another_clip(trained):
    slow, fast = (
        with_segments(trained, [trained.shard.segment(Sample(0, 0.4, 8, fps, 32, 24, False))]) for fps in (6.0, 12.0)
    )
    difference = np.abs(np.asarray(trained.apply(trained.params, slow) - trained.apply(trained.params, fast)))
    assert difference.max() > 1e-2
