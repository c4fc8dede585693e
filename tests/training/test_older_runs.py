"""A run that was begun before its config had all the fields of today."""

import dataclasses
import json
import shutil
import typing

import numpy as np
import pytest
import rich.console
import tiny_run
from helpers.models import RUNS
from helpers.runs import train

import sora_jax
from sora_jax.commands.train import main, train_one
from sora_jax.components import CodecComponent, Components, TextEncoderComponent, difference
from sora_jax.config_json import from_json, parse, to_json, to_values
from sora_jax.families import registry
from sora_jax.families.dit import ClassConditionalConfig
from sora_jax.families.load import describe, expect
from sora_jax.families.sora import SoraConfig
from sora_jax.generation.pipeline import DEFAULT_MODEL
from sora_jax.models.networks import NETWORKS
from sora_jax.models.sora import ModelConfig
from sora_jax.training.loop import Outcome
from sora_jax.training.run_directory import ComponentChangedError, ConfigChangedError

STEPS = {"num_steps": 2, "save_every": 1}
ENCODER = TextEncoderComponent("words", "f00d", 2)


@dataclasses.dataclass(frozen=True)
class NewerModel(ModelConfig):
    added: tuple[float, ...] = (0.5,)


@dataclasses.dataclass(frozen=True)
class NewerConfig(SoraConfig):
    model: NewerModel = NewerModel()
    also_added: int = 7


def newer(config, **changes):
    """Returns a config as the classes of tomorrow hold it."""
    model = NewerModel(**{f.name: getattr(config.model, f.name) for f in dataclasses.fields(ModelConfig)})
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(SoraConfig)}
    return NewerConfig(**values | {"model": model} | changes)


def as_version_1(config):
    """Returns a config as it was written when neither the kind nor the components were."""
    return json.dumps({"version": 1, **dataclasses.asdict(config)})


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A finished run of the classes of today, as version 1 wrote it."""
    folder = tmp_path_factory.mktemp("older") / "run"
    config = tiny_run.config(**STEPS)
    assert train(config, folder, tiny_run.opener(config)) is Outcome.FINISHED
    (folder / "config.json").write_text(as_version_1(config))
    return config, folder


@pytest.fixture
def tomorrow(monkeypatch):
    family = registry.FAMILIES["sora"]._replace(config=f"{__name__}:NewerConfig")
    monkeypatch.setitem(registry.FAMILIES, "sora", family)


def test_a_run_from_before_a_field_was_goes_on_bitwise(older, tomorrow, tmp_path):
    config, reference = older
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / "checkpoints" / "2")
    (workdir / "DONE").unlink()
    now = newer(config)
    with pytest.raises(ConfigChangedError, match=r"also_added = 7, now it is 8"):
        train(newer(config, also_added=8), workdir, tiny_run.opener(now))
    components = Components(text_encoder=ENCODER)
    assert train(now, workdir, tiny_run.opener(now), components=components) is Outcome.FINISHED
    tiny_run.assert_same_runs(workdir, reference, config)
    written = parse((workdir / "config.json").read_text())
    assert (written.kind, written.components, written.values["model"]["added"]) == ("sora", components, [0.5])

    # From now on the run knows its encoder.
    other = Components(text_encoder=dataclasses.replace(ENCODER, fingerprint="beef"))
    with pytest.raises(ComponentChangedError, match=r"trained with the text encoder words of fingerprint f00d"):
        train(now, workdir, tiny_run.opener(now), components=other)


def test_what_was_written_before_a_field_was_loads(older, tomorrow):
    for path, config in ((older[1], older[0]), (DEFAULT_MODEL, None)):
        loaded = sora_jax.load(path)
        assert loaded.kind == "sora" and loaded.config.model.added == (0.5,) and loaded.components == Components()
        assert config is None or loaded.config == newer(config)
        assert all(np.isfinite(leaf).all() for leaf in jax_leaves(loaded.params))


def jax_leaves(tree):
    return [leaf for value in tree.values() for leaf in (jax_leaves(value) if isinstance(value, dict) else [value])]


@pytest.mark.parametrize("name", RUNS)
def test_every_family_is_known_by_the_keys_of_version_1(tmp_path, name):
    (tmp_path / "config.json").write_text(as_version_1(RUNS[name]))
    found = describe(tmp_path)
    assert (found.kind, found.config) == (RUNS[name].kind, RUNS[name])
    (tmp_path / "config.json").write_text(to_json(RUNS[name]))
    assert describe(tmp_path).config == RUNS[name]
    if RUNS[name].model.kind in NETWORKS:
        (tmp_path / "config.json").write_text(as_version_1(RUNS[name].model))
        assert describe(tmp_path).config == RUNS[name].model


def test_a_directory_that_holds_another_family_says_what(older, capsys):
    with pytest.raises(ValueError, match=r"holds a Sora, and a classifier .* was to be trained in it: choose"):
        train_one(RUNS["vit"], older[1], None, rich.console.Console())
    with pytest.raises(ValueError, match=r"ClassificationConfig\.kind: expected 'classification', got 'sora'"):
        train(RUNS["vit"], older[1], None)
    before = sorted(older[1].iterdir())
    assert main(["heartbeat", "--workdir", str(older[1]), "--num-steps", "1"]) == 1  # whose seeds are folders in it
    assert "holds a Sora, and a study of discrete diffusion was to be trained in it" in capsys.readouterr().err
    assert sorted(older[1].iterdir()) == before


def test_another_network_of_the_same_family_is_named(tmp_path, older):
    shutil.copytree(older[1], tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(to_json(RUNS["vit"]))
    with pytest.raises(ConfigChangedError, match=r"model.kind = 'vit', now it is 'vivit'"):
        train(RUNS["vivit"], tmp_path / "run", None)


def test_no_directory_is_of_a_kind_that_nobody_knows(tmp_path):
    for text, words in (('{"version": 2, "a": 1}', "no kind"), ('{"version": 2, "kind": "x"}', "an unknown kind, 'x'")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config.json is of {words}; those that are known are sora, dit,"):
            describe(tmp_path)
    with pytest.raises(ValueError, match=r"config.json is a file: name the directory of a run"):
        describe(tmp_path / "config.json")
    for data, words in (
        (b"\x80\x81", r"config\.json is no text"),
        (b'{"version": 2.0}', r"reads versions up to 2 of the config, got 2\.0"),
        (b'{"version": 1, "class_dropout": 0.1, "optimizer": {}, "data": null, "model": []}', r"config\.json: .*data"),
    ):
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(ValueError, match=words):
            describe(tmp_path)
    (tmp_path / "seed_0").mkdir()
    shutil.move(tmp_path / "config.json", tmp_path / "seed_0")
    with pytest.raises(ValueError, match="holds several runs or models, name one of them: seed_0"):
        describe(tmp_path)


def test_what_a_model_was_trained_with_is_told_apart():
    codec = CodecComponent("image", "a1", 0.2)
    trained = Components(ENCODER, codec)
    same = Components(dataclasses.replace(ENCODER, max_tokens=9), dataclasses.replace(codec, fingerprint=None))
    assert difference(trained, same) is None and difference(Components(), trained) is None
    for other, words in (
        (CodecComponent("identity"), "the codec 'image' makes of pixels, and the one here is 'identity'"),
        (CodecComponent("image", "a1", 0.3), "latents times 0.2, and the autoencoder here says 0.3"),
        (CodecComponent("image", "b2", 0.2), "autoencoder of fingerprint a1, and the one here is b2"),
    ):
        assert words in difference(trained, Components(codec=other))


def unions(cls, seen):
    """Returns the unions of dataclasses that the fields of a dataclass may hold, at any depth."""
    found = []
    for hint in (typing.get_type_hints(cls)[field.name] for field in dataclasses.fields(cls)):
        classes = [c for c in (typing.get_args(hint) or (hint,)) if dataclasses.is_dataclass(c)]
        found += [classes] if len(classes) > 1 else []
        for c in set(classes) - seen:
            found += unions(c, seen | {c})
    return found


def test_classes_that_one_field_may_hold_have_kinds_of_their_own():
    found = [union for kind in registry.FAMILIES for union in unions(registry.config_class(kind), set())]
    assert len(found) >= 4
    for classes in found:
        assert len({getattr(c, "kind", None) for c in classes} - {None}) == len(classes), classes


def test_a_wrong_kind_is_told(older):
    with pytest.raises(ValueError, match=r"is a Sora, not a text encoder or a converted U-Net: generate.py --prompt"):
        expect(describe(older[1]), "minilm", "unet")
    assert to_values(RUNS["vit"])["model"]["kind"] == "vit"


def test_latents_that_version_1_read_by_a_config_of_their_own_are_rows_of_one_image():
    older = json.loads(as_version_1(RUNS["dit"]))
    older["data"] = {"split": "train", "eval_splits": [], "batch_size": 8, "path": "/there", "row_length": 6}
    older["data"] |= {"seed": 3, "num_workers": 4}
    data = from_json(ClassConditionalConfig, json.dumps(older)).data
    assert data.sampling.size == (4, 6) and (data.max_segments, data.num_bins, data.num_shards) == (1, 1, 1)
    assert (data.flip, data.path, data.seed, data.batch_size) == (0.5, "/there", 3, 8)
