import dataclasses

import jax
import pytest

from sora_jax.config import PackedDataConfig
from sora_jax.training import loop

OF_THE_LOOP = dict(log_every=1, eval_every=1, eval_batches=1, save_every=1, keep=1, sample_every=0)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs with the same config share their compiled functions: most of a tiny run's time is tracing."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("jax_cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    patch = pytest.MonkeyPatch()
    for name in ("make_train_step", "make_eval_step"):
        patch.setattr(loop, name, _remember(getattr(loop, name)))
    yield
    patch.undo()
    jax.config.update("jax_compilation_cache_dir", None)


def _remember(make):
    made = {}

    def remembered(task, *rest):
        # What the loop does between updates, where the data lies and who reads it compiles to the same.
        config = dataclasses.replace(task.config, **OF_THE_LOOP)
        if isinstance(config.data, PackedDataConfig):
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="", num_workers=0))
        if config not in made:
            made[config] = make(task, *rest)
        return made[config]

    return remembered
