"""What the loop does whatever it trains: division, accumulation, averages, logs, resume, signals, bad gradients."""

import importlib.util
import json
import math
import os
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config import LoopConfig
from ldm.errors import UserError
from ldm.training.backward import split
from ldm.training.loop import _print_plan, prepare_output, train
from ldm.training.processes import Division, divide, make_accelerator
from ldm.training.state import load_state

from .toys import LOOP, RowBatches, Rows, ToyStage, log_of, run

SMALL = st.integers(1, 9)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- division


@settings(deadline=None, max_examples=40)
@given(SMALL, SMALL, SMALL)
def test_the_global_batch_is_processes_times_accumulation_times_micro_batch(processes, accumulation, micro):
    loop = LoopConfig(global_batch=processes * accumulation * micro, micro_batch=micro)
    assert divide(loop, processes) == Division(processes, accumulation, micro)
    whole = divide(replace(loop, micro_batch=0), processes)
    assert (whole.accumulation, whole.micro, whole.share) == (1, accumulation * micro, accumulation * micro)


@settings(deadline=None, max_examples=40)
@given(SMALL, SMALL, st.integers(1, 200))
def test_what_does_not_divide_is_refused_with_the_numbers(processes, micro, batch):
    loop = LoopConfig(global_batch=batch, micro_batch=micro)
    if batch % (processes * micro) == 0:
        assert divide(loop, processes).accumulation * processes * micro == batch
    else:
        with pytest.raises(UserError, match=f"loop.global_batch={batch} is not {processes} processes"):
            divide(loop, processes)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"global_batch": 0}])
def test_nothing_to_do_is_refused(wrong):
    with pytest.raises(UserError, match="at least 1"):
        divide(replace(LOOP, **wrong), 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 5))
def test_micro_batches_are_the_batch_in_order(count, size):
    batch = Rows(torch.arange(count * 4.0).view(count, 4), [str(i) for i in range(count)], list(range(count)))
    parts = list(split(batch, size))
    assert torch.equal(torch.cat([part.x for part in parts]), batch.x)
    assert [key for part in parts for key in part.key] == batch.key
    assert all(len(part.key) == size for part in parts[:-1])


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"log_every": 0}, "loop.log_every must be at least 1"),
        ({"validate_every": 0}, "loop.validate_every must be at least 1"),
        ({"save_every": -1}, "loop.save_every must be at least 1"),
        ({"micro_batch": -2}, "loop.micro_batch must be at least 0"),
        ({"ema": 1.0}, "loop.ema must be"),
        ({"precision": "fp8"}, "loop.precision must be one of auto, fp32, bf16, fp16, not 'fp8'"),
        ({"trackers": ("paper",)}, "loop.trackers must be one of tensorboard, wandb, not 'paper'"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_runs(tmp_path, wrong, words):
    with pytest.raises(UserError, match=words):
        make_accelerator(replace(LOOP, **wrong), tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_half_precision_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match=r"loop.precision=fp16 needs a GPU; use bf16 or fp32"):
        make_accelerator(replace(LOOP, precision="fp16"), tmp_path)


def test_deepspeed_is_refused_and_not_half_used(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(UserError, match="spread them by FSDP"):
        make_accelerator(LOOP, tmp_path)


def test_a_tracker_that_is_not_installed_is_an_error_and_not_silence(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.training.processes.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"names wandb, which is not installed; pip install -e '\.\[track\]'"):
        make_accelerator(replace(LOOP, trackers=("wandb",)), tmp_path)


def test_a_tracker_that_does_not_open_is_a_sentence_before_the_run_begins(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no API key configured")

    find = importlib.util.find_spec  # the tracker is an extra, which need not be there
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "tensorboard" or find(name, *a))
    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    with pytest.raises(UserError, match=r"loop\.trackers=tensorboard cannot be opened \(ValueError: no API key conf"):
        run(ToyStage(), replace(LOOP, trackers=("tensorboard",)), tmp_path)
    assert prepare_output(str(tmp_path), "") is not None


def test_tensorboard_gets_the_log_and_the_settings(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ldm.config import AutoencoderTraining

    loop = replace(LOOP, trackers=("tensorboard",))
    run(ToyStage(loop), loop, tmp_path, AutoencoderTraining(output=str(tmp_path), loop=loop))
    events = EventAccumulator(str(tmp_path / "ldm")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(e["step"], pytest.approx(e["loss"], 1e-5)) for e in log_of(tmp_path) if "loss" in e]
    settings = next((tmp_path / "ldm").glob("*/hparams.yml")).read_text()
    assert "loop.global_batch: 8" in settings


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(ToyStage(), LOOP, tmp_path)
    with pytest.raises(UserError, match="holds a run already; add --resume auto"):
        prepare_output(str(tmp_path), "")
    assert prepare_output(str(tmp_path), "auto") == tmp_path
    assert prepare_output(str(tmp_path / "new"), "auto") == tmp_path / "new"
    with pytest.raises(UserError, match="no output folder"):
        prepare_output("", "")
    with pytest.raises(UserError, match="unknown resume 'yes'"):
        prepare_output(str(tmp_path), "yes")


def test_the_plan_is_printed_before_the_first_step(tmp_path, capsys):
    def at_first(step: int) -> None:
        plans.append(capsys.readouterr().out)

    plans: list[str] = []
    loop = replace(LOOP, micro_batch=4)
    run(ToyStage(loop, at_first), loop, tmp_path)
    for line in (
        "data        rows",
        "toy         rows",
        "batch       8 = 1 processes x 2 accumulation x 4 micro-batch",
        "steps       0 to 6",
        "parameters  net 49",
        "precision   fp32 on cpu, 1 threads",
    ):
        assert line in plans[0].splitlines()


def test_the_plan_names_gpus_that_would_stay_idle(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for processes, device, told in ((1, "cuda", True), (8, "cuda", False), (1, "cpu", False)):
        accelerator: Any = SimpleNamespace(device=torch.device(device))
        _print_plan(ToyStage(LOOP), LOOP, Division(processes, 1, 1), accelerator, 0)
        assert ("devices     1 of 8; accelerate-launch --multi_gpu" in capsys.readouterr().out) == told


# ---------------------------------------------------------------- steps


def test_accumulation_changes_nothing(tmp_path):
    """In float64, where rounding cannot hide a wrong mean, the weights agree to rounding."""
    ends = []
    for micro in (8, 4, 1):
        loop = replace(LOOP, micro_batch=micro)
        stage = ToyStage(loop, dtype=torch.float64)
        run(stage, loop, tmp_path / str(micro))
        ends.append(stage.weights())
    for other in ends[1:]:
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(ends[0], other, strict=True))
    assert [line["loss"] for line in log_of(tmp_path / "8") if "loss" in line] == pytest.approx(
        [line["loss"] for line in log_of(tmp_path / "1") if "loss" in line], rel=1e-5
    )


def test_validation_drawing_and_export_see_averaged_weights_in_evaluation_mode(tmp_path):
    loop = replace(LOOP, validate_every=4, sample_every=2)
    stage = ToyStage(loop, dropout=0.5)
    run(stage, loop, tmp_path)
    assert [(what, step) for what, step, _, _ in stage.seen] == [
        ("draw", 2),
        ("validate", -1),
        ("draw", 4),
        ("draw", 6),
        ("export", -1),
        ("validate", -1),
        ("draw", 6),
    ]
    assert not any(training for _, _, training, _ in stage.seen)
    assert stage.network.training
    found = load_state(tmp_path)
    assert found is not None
    assert torch.equal(stage.seen[-1][3], found[1]["averages"]["net"]["average"]["0.weight"])
    assert not torch.equal(stage.seen[-1][3], stage.network[0].weight)


def test_a_logged_value_is_the_mean_over_the_steps_that_had_it(tmp_path):
    loop = replace(LOOP, log_every=6)
    run(ToyStage(loop), loop, tmp_path)
    (line,) = [line for line in log_of(tmp_path) if "odd" in line]
    assert line["odd"] == (1 + 3 + 5) / 3
    assert line["images"] == 48


def test_a_shard_that_is_lost_is_named_once_and_counted_from_then_on(tmp_path):
    loop = replace(LOOP, log_every=1)
    lost = {2: "s3://bucket/7.tar", 4: "s3://bucket/9.tar"}
    stage = ToyStage(loop, before=lambda step: stage.batches.quarantined.update({lost[step]} if step in lost else ()))
    run(stage, loop, tmp_path)
    lines = log_of(tmp_path)
    events = [(line["step"], line["event"]) for line in lines if "event" in line]
    assert events == [(3, "shard in quarantine: s3://bucket/7.tar"), (5, "shard in quarantine: s3://bucket/9.tar")]
    assert [line.get("quarantined") for line in lines if "loss" in line] == [None, None, 1, 1, 2, 2]


def test_a_sample_that_is_twice_in_a_batch_gets_two_draws(tmp_path):
    class Twice(ToyStage):
        def losses(self, batch, draws, step, networks):
            noise.append(draws.normal("noise", (4,)))
            yield from super().losses(batch, draws, step, networks)

    noise: list[torch.Tensor] = []
    stage = Twice(LOOP)
    rows = Rows(torch.ones(8, 4), ["one"] * 8, list(range(8)))
    stage.batches.__class__ = type("Same", (type(stage.batches),), {"__iter__": lambda self: iter([rows] * 6)})
    run(stage, LOOP, tmp_path)
    assert len(torch.unique(noise[0], dim=0)) == 8


def test_time_is_up(tmp_path, capsys):
    """The run saves and ends at once: what a finished run does may take as long as the queue has left, and more."""
    loop = replace(LOOP, steps=10**6, max_minutes=1e-9)
    stage = ToyStage(loop)
    run(stage, loop, tmp_path)
    assert stage.seen == []
    found = load_state(tmp_path)
    assert found is not None and found[0] == 1
    out = capsys.readouterr().out
    assert "stopped at step 1: the time is up; --resume auto goes on from there" in out and "finished" not in out


def test_the_time_before_the_loop_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.training.loop.BEGAN", time.monotonic() - 3600)
    stage = ToyStage(replace(LOOP, max_minutes=59.0))
    run(stage, replace(LOOP, max_minutes=59.0), tmp_path)
    found = load_state(tmp_path)
    assert found is not None and found[0] == 1


class Stalled(RowBatches):
    """The batch after the first two does not come, until `go`."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.go = threading.Event()

    def __iter__(self):
        for batch in super().__iter__():
            if self.drawn > 2:
                self.go.wait(60)
            yield batch


@pytest.mark.parametrize("why", ["signal", "time"])
def test_a_store_that_hangs_does_not_keep_a_run_from_saving(tmp_path, monkeypatch, capsys, why):
    loop = replace(LOOP, max_minutes=1.0)
    monkeypatch.setattr("ldm.training.loop.BEGAN", time.monotonic())  # that of the tests may be long ago
    stage = ToyStage(loop)
    stage.batches = Stalled(loop.global_batch)

    def stop() -> None:
        if why == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            monkeypatch.setattr("ldm.training.loop.BEGAN", time.monotonic() - 61)

    timer = threading.Timer(1.0, stop)
    timer.start()
    run(stage, loop, tmp_path)
    stage.batches.go.set()
    assert "stopped at step 2" in capsys.readouterr().out
    found = load_state(tmp_path)
    assert found is not None and found[0] == 2
    assert found[1]["batches"]["drawn"] == 2  # though the third is under way
    again, whole = ToyStage(LOOP), ToyStage(LOOP)
    run(again, LOOP, tmp_path)
    run(whole, LOOP, tmp_path / "whole")
    assert same(again.weights(), whole.weights())


def test_what_looking_takes_is_no_part_of_the_speed(tmp_path, monkeypatch):
    """Validation between two lines of the log: neither its time nor the steps before it are lost."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    class Slow(ToyStage):
        def losses(self, *arguments):
            clock.now += 2
            yield from super().losses(*arguments)

        def validate(self):
            clock.now += 1000
            return {}

    clock = Clock()
    monkeypatch.setattr("ldm.training.loop.time", clock)
    loop = replace(LOOP, steps=20, log_every=10, validate_every=9, save_every=100)
    run(Slow(loop), loop, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["images_per_s"] for line in lines if "images_per_s" in line] == [loop.global_batch / 2] * 3
    assert [line["waiting"] for line in lines if "waiting" in line] == [0, 0, 0]


def test_a_nan_does_not_reach_a_snapshot(tmp_path, monkeypatch):
    from ldm.training.members import Members

    update = Members.update

    def spoilt(self, played, step):
        update(self, played, step)
        if step == 3:
            next(iter(self.profiles.values())).average["0.weight"].fill_(math.nan)

    monkeypatch.setattr(Members, "update", spoilt)
    loop = replace(LOOP, save_every=100, ema_widths=(0.1,), ema_snapshot_every=2)
    with pytest.raises(UserError, match="weights of net are not finite after step 4"):
        run(ToyStage(loop), loop, tmp_path)
    assert [path.name for path in (tmp_path / "ema").iterdir()] == ["net-0.1000-00000002.safetensors"]


def test_the_histogram_of_buckets_is_in_the_log_once(tmp_path):
    for steps in (3, 6):
        stage = ToyStage()
        stage.batches.events = ("buckets 16x16: 3",)
        run(stage, replace(LOOP, steps=steps), tmp_path)
    assert [line for line in log_of(tmp_path) if "event" in line] == [{"step": 0, "event": "buckets 16x16: 3"}]


def test_images_are_counted_whatever_the_global_batch_was(tmp_path):
    for steps, size in ((3, 8), (6, 4)):
        loop = replace(LOOP, steps=steps, global_batch=size)
        run(ToyStage(loop), loop, tmp_path)
    assert [line["images"] for line in log_of(tmp_path) if "images" in line] == [8, 24, 36]


def test_no_two_steps_seeds_or_processes_drop_the_same(tmp_path):
    """Nor does the number of processes shift the seeds of others' steps."""
    seeds = []

    class Seen(ToyStage):
        def losses(self, *arguments):
            seeds.append(torch.initial_seed())
            yield from super().losses(*arguments)

    for seed in (0, 1):
        loop = replace(LOOP, seed=seed)
        run(Seen(loop), loop, tmp_path / str(seed))
    assert len(set(seeds)) == 2 * LOOP.steps


# ---------------------------------------------------------------- going on


def test_three_steps_and_three_more_are_six(tmp_path):
    """Weights, optimizer, average and log, bit for bit, with dropout."""
    whole, first, second = (ToyStage(dropout=0.2) for _ in range(3))
    run(whole, LOOP, tmp_path / "whole")
    first.before = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None
    run(first, LOOP, tmp_path / "parts")
    assert not same(whole.weights(), first.weights())
    run(second, LOOP, tmp_path / "parts")
    assert same(whole.weights(), second.weights())
    a, b = load_state(tmp_path / "whole"), load_state(tmp_path / "parts")
    assert a is not None and b is not None and a[0] == b[0] == 6
    assert a[1]["averages"]["net"]["updates"] == b[1]["averages"]["net"]["updates"]
    for name, tensor in a[1]["averages"]["net"]["average"].items():
        assert torch.equal(tensor, b[1]["averages"]["net"]["average"][name])
    assert a[1]["batches"] == b[1]["batches"]
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_a_finished_run_that_goes_on_writes_its_results_again_and_takes_no_step(tmp_path):
    run(ToyStage(), LOOP, tmp_path)
    stage = ToyStage(before=lambda step: pytest.fail("a step was taken"))
    run(stage, LOOP, tmp_path)
    assert [what for what, *_ in stage.seen] == ["export", "validate", "draw"]


def test_more_steps_go_on_from_a_finished_run(tmp_path):
    run(ToyStage(), replace(LOOP, steps=3), tmp_path / "parts")
    longer, whole = ToyStage(), ToyStage()
    run(longer, LOOP, tmp_path / "parts")
    run(whole, LOOP, tmp_path / "whole")
    assert same(longer.weights(), whole.weights())


@pytest.mark.parametrize(
    ("other", "loop", "why"),
    [
        ({"width": 9}, {}, r"size mismatch for 0\.weight: "),
        ({"critic": True}, {}, "it has no critic"),
        ({"deeper": True}, {}, r"Missing key\(s\) in state_dict: .4\.weight., .4\.bias."),
        ({}, {"ema": 0.9}, r"it has no average net, for loop\.ema was another one"),
        ({}, {"ema_widths": (0.1,)}, r"it has no average net 0\.1, for loop\.ema_widths was another one"),
    ],
)
def test_a_state_of_other_networks_is_refused_in_a_sentence_that_names_what_differs(tmp_path, other, loop, why):
    before = replace(LOOP, ema=0.0)
    run(ToyStage(), before, tmp_path)
    with pytest.raises(
        UserError,
        match=rf"was saved by a run with other networks \({why}.*\); go on with the settings in .*config.json",
    ):
        run(ToyStage(**other), replace(before, **loop), tmp_path)


def test_sigterm_saves_and_returns(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    stage = ToyStage(before=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None)
    run(stage, LOOP, tmp_path)
    found = load_state(tmp_path)
    assert found is not None and found[0] == 2
    assert stage.seen == []  # nothing is exported as if it were finished
    assert "stopped at step 2 as asked; --resume auto goes on from there" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigint_saves_and_is_passed_on(tmp_path):
    stage = ToyStage(before=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 1 else None)
    with pytest.raises(KeyboardInterrupt):
        run(stage, LOOP, tmp_path)
    found = load_state(tmp_path)
    assert found is not None and found[0] == 2


# ---------------------------------------------------------------- gradients that are not finite


def test_a_step_with_gradients_that_are_not_finite_is_skipped(tmp_path):
    weights = []

    def spoil(step: int) -> float | None:
        weights.append(stage.weights())
        return math.nan if step == 2 else None

    loop = replace(LOOP, log_every=6)
    stage = ToyStage(loop, spoil)
    run(stage, loop, tmp_path)
    assert same(weights[2], weights[3])
    assert not same(weights[3], weights[4])
    assert [line["skipped"] for line in log_of(tmp_path) if "skipped" in line] == [1]


def test_gradients_that_stay_bad_end_the_run_in_a_sentence(tmp_path):
    loop = replace(LOOP, steps=100)
    stage = ToyStage(loop, lambda step: math.inf if step >= 4 else None)
    with pytest.raises(
        UserError,
        match=r"the loss of net was not finite, 10 steps in a row up to step 13 \(samples row104; .*lower optimi",
    ):
        run(stage, loop, tmp_path)
    found = load_state(tmp_path)
    assert found is not None
    assert all(tensor.isfinite().all() for tensor in found[1]["modules"]["net"].values())


@pytest.mark.parametrize("critic", [False, True])
def test_the_scale_of_a_half_precision_loss_is_found_and_changes_no_weight(tmp_path, critic):
    """fp16's loss scaling on a float32 network: scaling by powers of two is exact, so nothing may change; and a
    scale at which gradients overflow is lowered until they do not."""
    plain = ToyStage(critic=critic, dtype=torch.float64)
    run(plain, LOOP, tmp_path / "plain")
    scaled = ToyStage(critic=critic, dtype=torch.float64)
    _train_scaled(scaled, LOOP, tmp_path / "scaled", 2.0**16)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(plain.weights(), scaled.weights(), strict=True))

    loop = replace(LOOP, steps=20, log_every=20)
    overflowing = ToyStage(loop, critic=critic)
    scale = _train_scaled(overflowing, loop, tmp_path / "overflow", 2.0**127 * 1.9)
    assert scale < 2.0**127
    (line,) = [line for line in log_of(tmp_path / "overflow") if "loss" in line]
    assert 1 <= line["skipped"] < 20
    found = load_state(tmp_path / "overflow")
    assert found is not None and found[1]["scaler"]["scale"] == scale


def _train_scaled(stage: ToyStage, loop: LoopConfig, output, scale: float) -> float:
    accelerator = make_accelerator(loop, output)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    train(stage, loop, accelerator, output, loop)
    return accelerator.scaler.get_scale()
