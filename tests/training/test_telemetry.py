import errno
import json
import os
import types

import numpy as np
import pytest
import rich.console
import tiny_run
from tensorboardX.proto import event_pb2

from sora_jax.families.sora import SoraTask, model_flops
from sora_jax.training.telemetry import Telemetry, interval_figures

COUNTS = {"real_tokens": 48.0, "text_tokens": 10.0, "clips": 4.0, "self_pairs": 600.0, "cross_pairs": 120.0}
STEPS = [
    {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.1, **COUNTS},
    {"loss": 3.0, "grad_norm": 4.0, "learning_rate": 0.2, **COUNTS},
]


def figures(kind, num_devices=2):
    device = types.SimpleNamespace(device_kind=kind)
    return interval_figures(
        STEPS, seconds=4.0, waited=1.0, task=SoraTask(tiny_run.CONFIG), devices=[device] * num_devices
    )


def test_figures_of_an_interval():
    found = figures("cpu")
    assert found["loss"] == 2
    assert found["grad_norm"] == 3
    assert found["learning_rate"] == 0.2
    assert found["step_seconds"] == 2
    assert found["real_tokens_per_second"] == 24
    assert found["real_token_share"] == 0.5  # 48 of 8 rows of 12
    assert found["clips_per_second"] == 2
    assert found["wait_share"] == 0.25
    assert "mfu" not in found


def test_mfu_is_the_share_of_all_chips_peak():
    found = figures("TPU v4", num_devices=2)
    assert found["mfu"] == pytest.approx(2 * model_flops(tiny_run.CONFIG, **COUNTS) / 4.0 / (2 * 275e12))


def test_packing_does_not_flatter_itself():
    """Two clips of half the length need half the attention, whatever the row."""
    config = tiny_run.CONFIG
    rest = {"real_tokens": 8, "text_tokens": 4, "clips": 2, "cross_pairs": 0}
    zero, one, two = (model_flops(config, self_pairs=pairs, **rest) for pairs in (0, 8**2, 2 * 4**2))
    assert one - zero == 2 * (two - zero)
    assert one - zero == 3 * config.model.depth * 4 * config.model.width * 64


def test_lines_of_steps_that_are_made_again_are_dropped(tmp_path):
    console = rich.console.Console(file=open("/dev/null", "w"))
    kept = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 5, "lo')
    telemetry = Telemetry(tmp_path, first_step=2, num_steps=5, console=console)
    telemetry.write(3, figures("cpu"))
    telemetry.image(3, "samples", np.zeros((4, 4, 3), np.uint8))
    telemetry.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[-1]["real_token_share"] == 0.5
    assert any(path.name.startswith("events") for path in (tmp_path / "tensorboard").iterdir())


def test_an_interval_leaves_out_what_is_set_apart():
    from sora_jax.training import telemetry as module

    clock = iter([0.0, 1.0, 4.0, 5.0, 7.0, 10.0])
    patch = pytest.MonkeyPatch()
    patch.setattr(module.time, "perf_counter", lambda: next(clock))
    try:
        watch = module.Stopwatch()  # 0
        with watch.apart():  # 1 ... 4
            pass
        with watch.waiting():  # 5 ... 7
            pass
        assert watch.elapsed() == 10 - 0 - 3
        assert watch.waited == 2
    finally:
        patch.undo()


def test_a_full_disk_ends_it_at_once(tmp_path, monkeypatch):
    """The events of TensorBoard are written by the thread that has them: none waits for a thread that has died."""
    telemetry = Telemetry(tmp_path, 0, 50, rich.console.Console(file=open("/dev/null", "w")))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    closed = []

    class Full:
        def write(self, data):
            raise full

        flush = write

        def close(self):
            closed.append(True)

    monkeypatch.setattr(telemetry._board, "_writer", Full())
    with pytest.raises(OSError, match="No space left"):
        telemetry.write(1, {"loss": 1.0})
    monkeypatch.setattr(Full, "flush", lambda self: self.write(b""))
    with pytest.raises(OSError, match="No space left"):
        telemetry.close()
    assert closed


def test_tensorboard_reads_the_events(tmp_path):
    telemetry = Telemetry(tmp_path, 4, 9, rich.console.Console(file=open("/dev/null", "w")))
    telemetry.write(5, {"loss": 0.25})
    telemetry.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, events, place = file.read_bytes(), [], 0
    while place < len(content):  # TFRecord: length, its checksum, the event, its checksum
        length = int.from_bytes(content[place : place + 8], "little")
        events.append(event_pb2.Event.FromString(content[place + 12 : place + 12 + length]))
        place += 16 + length
    assert place == len(content) and events[0].file_version == "brain.Event:2"
    assert events[1].session_log.status == event_pb2.SessionLog.START and events[1].step == 5
    assert [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in events[2:]] == [
        (5, "loss", 0.25)
    ]
