import dataclasses
import json

import pytest

from sora_jax import config as c
from sora_jax.config_json import from_json, to_json
from sora_jax.data.captioned import DataConfig
from sora_jax.families.sora import SampleConfig, SoraConfig
from sora_jax.models.sora import ModelConfig


def test_json_round_trip_keeps_every_value():
    config = SoraConfig(
        data=DataConfig(max_clips=64, num_frames=(2, 9), eval_splits=("a",)), patch=c.PatchConfig(size=(1, 4, 2))
    )
    assert from_json(SoraConfig, to_json(config)) == config


def test_a_key_that_an_older_file_lacks_takes_its_default():
    assert from_json(SoraConfig, edited(data__flip=KeyError, data__mixture=KeyError)) == SoraConfig()


def test_a_key_without_a_default_is_needed():
    text = to_json(c.MixturePart("here")).replace('"path": "here",', "")
    with pytest.raises(ValueError, match="MixturePart: missing key 'path'"):
        from_json(c.MixturePart, text)


def edited(**changes):
    values = json.loads(to_json(SoraConfig()))
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = values
        for parent in parents:
            target = target[parent]
        if value is KeyError:
            del target[last]
        else:
            target[last] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__widht": 3}, r"SoraConfig\.model: unknown key 'widht'; the keys are width, depth"),
        ({"model__width": "64"}, r"SoraConfig\.model\.width: expected int, got '64'"),
        ({"model__width": True}, r"SoraConfig\.model\.width: expected int, got True"),
        ({"model__remat": "some"}, r"remat: expected one of 'none', 'dots', 'full', got 'some'"),
        ({"patch__size": [1, 2]}, r"patch\.size: expected 3 values"),
        ({"version": 99}, r"SoraConfig: this code reads versions up to 2 of the config, got 99"),
        ({"version": True}, r"reads versions up to 2 of the config, got True"),
        ({"kind": "dit"}, r"SoraConfig\.kind: expected 'sora', got 'dit'"),
        ({"kind": 3}, r"SoraConfig: kind: expected a string, got 3"),
        ({"components": {"codec": {}}}, r"SoraConfig: components\.codec: missing key 'kind'"),
        ({"components": {"vae": {}}}, r"components: unknown key 'vae'; the keys are text_encoder, codec, process"),
        ({"patch__size": [1, 0, 2]}, r"PatchConfig\.size must be positive \(t, h, w\), got \(1, 0, 2\)"),
    ],
)
def test_json_is_read_strictly(changes, message):
    with pytest.raises(ValueError, match=message):
        from_json(SoraConfig, edited(**changes))


def test_a_key_that_an_older_file_lacks_has_its_default():
    assert from_json(SoraConfig, edited(data__seed=KeyError)).data.seed == 0


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (c.PatchConfig, {"size": (1, 0, 2)}, r"PatchConfig.size must be positive \(t, h, w\), got \(1, 0, 2\)\."),
        (ModelConfig, {"num_heads": 3}, r"num_heads must be a divisor of width 256, got 3"),
        (ModelConfig, {"num_heads": 64}, r"num_heads must be such that .* >= 6, got 64"),
        (DataConfig, {"num_frames": (5, 2)}, r"num_frames must be \(lowest, highest\) .* got \(5, 2\)"),
        (DataConfig, {"batch_size": 3}, r"batch_size must be a multiple of num_shards \(2\), got 3"),
        (DataConfig, {"max_levels": 0}, r"max_levels must be None or at least 1, got 0"),
        (DataConfig, {"known_first_share": 0.5}, r"max_levels must be given where clips have several levels"),
        (
            DataConfig,
            {"known_first_share": 0.5, "free_frames_share": 0.6, "max_levels": 8},
            r"free_frames_share must be at most 1 - known_first_share = 0\.5, got 0\.6",
        ),
        (DataConfig, {"caption_dropout": 1.5}, r"caption_dropout must be between 0 and 1, got 1\.5"),
        (DataConfig, {"text_length": 8}, r"text_length must be at least max_caption_tokens \(32\), got 8"),
        (c.FlowConfig, {"time_std": 0.0}, r"time_std must be positive"),
        (c.OptimizerConfig, {"ema_decay": 1.0}, r"ema_decay must be at least 0 and below 1, got 1\.0"),
        (c.MeshConfig, {"fsdp": -1}, r"fsdp must be given where data is -1"),
        (SoraConfig, {"num_steps": 0}, r"SoraConfig.num_steps must be at least 1, got 0"),
        (
            SoraConfig,
            {"sample": SampleConfig(height=50)},
            r"sample.height must be a multiple of the 8 pixels .* got 50; 48 or 56 would work",
        ),
        (SoraConfig, {"patch": c.PatchConfig((2, 48, 64))}, r"sample.width .* got 48; 64 would work"),
    ],
)
def test_a_bad_value_names_field_value_and_what_is_allowed(cls, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(cls(), **changes)
