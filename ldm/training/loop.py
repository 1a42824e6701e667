"""The loop that all trainings share: micro-batches, accumulation, optimizer steps, EMA, logs, states.

A *stage* (stage_one.py, clip.py, stage_two.py) says what is trained and what its loss is; the loop knows no network.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ldm import config as settings
from ldm.config import LoopConfig
from ldm.errors import UserError
from ldm.files import atomic_write_text
from ldm.training.draws import Draws
from ldm.training.ema import EMA
from ldm.training.optim import build_optimizer, rate_at
from ldm.training.processes import Division, agree, any_process, divide, over_processes
from ldm.training.report import Report
from ldm.training.stage import Player, Stage
from ldm.training.state import load_state, save_state

BAD_STEPS_IN_A_ROW = 10  # non-finite gradients that are skipped before the run gives up


def prepare_output(output: str, resume: str) -> Path:
    """The run's folder; raises UserError if none is named, or if it holds a run that was not asked to go on."""
    if not output:
        raise UserError("no output folder; say output=runs/NAME")
    if resume not in ("", "auto"):
        raise UserError(f"unknown resume '{resume}'; use --resume auto, or leave it out to start anew")
    path = Path(output)
    if not resume and (path / "state").exists():
        raise UserError(f"{path} holds a run already; add --resume auto to go on with it, or choose another output")
    return path


def train(stage: Stage, loop: LoopConfig, accelerator: Accelerator, output: Path, everything: Any) -> None:
    """Run `stage` until `loop.steps` optimizer steps are done, time is up, or a signal asks to stop.

    `everything` is the run's whole configuration; it is kept as `output/config.json`. Going on from a saved state
    happens whenever `output` has one. Raises UserError when gradients stay non-finite; raises KeyboardInterrupt after
    saving on SIGINT.
    """
    division = divide(loop, accelerator.num_processes)
    main = accelerator.is_main_process
    players = stage.players
    for player in players.values():
        player.module.to(accelerator.device)
    # Any: accelerate's wrapper of an optimizer, once prepared
    optimizers: dict[str, Any] = {name: build_optimizer(p.module, p.optimizer) for name, p in players.items()}
    averages = {name: EMA(p.module, loop.ema) for name, p in players.items() if p.averaged and loop.ema}
    scaler = accelerator.scaler  # of fp16's loss, None in other precisions

    step = 0
    found = load_state(output)
    if found is not None:
        step, state = found
        try:
            for name, player in players.items():
                player.module.load_state_dict(state["modules"][name])
                optimizers[name].load_state_dict(state["optimizers"][name])
            for name, average in averages.items():
                average.load_state_dict(state["averages"][name])
            if scaler is not None:
                scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the state in {output / 'state'} is of other networks ({str(error).splitlines()[0]}); go on with the "
                f"settings in {output / 'config.json'}, or choose another output"
            ) from error
        stage.batches.load_state_dict(state["batches"])

    if main:
        atomic_write_text(output / "config.json", _json(everything))
        _print_plan(stage, loop, division, accelerator, step)
    networks: dict[str, nn.Module] = {}
    for name, player in players.items():
        if loop.compile:
            player.module.compile()
        networks[name], optimizers[name] = accelerator.prepare(player.module, optimizers[name])
    if loop.trackers:
        accelerator.init_trackers("ldm", _flat(settings.to_dict(everything)))
    report = Report(output, step, loop.steps) if main else None

    def save() -> None:
        if main:
            save_state(
                output,
                step,
                {
                    "modules": {name: player.module.state_dict() for name, player in players.items()},
                    "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                    "averages": {name: average.state_dict() for name, average in averages.items()},
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "batches": stage.batches.state_dict(),
                },
            )
        accelerator.wait_for_everyone()

    def log(values: Mapping[str, float]) -> None:
        if report is not None:
            report.line(step, values)
        if loop.trackers:
            accelerator.log(dict(values), step=step)

    def look(validate: bool, draw: bool) -> None:
        """Held-out figures and pictures from the averaged weights, by the main process alone."""
        if main:
            with _averaged(players, averages), torch.no_grad():
                if validate and (figures := stage.validate()):
                    log(figures)
                if draw:
                    stage.draw(output, step)
        accelerator.wait_for_everyone()

    sums: dict[str, list[float]] = defaultdict(list)
    counted = bad = skipped = 0
    began = interval = time.monotonic()
    waiting = 0.0
    batches = iter(stage.batches)
    with _signals() as asked, _ending(batches):
        while step < loop.steps:
            before = time.monotonic()
            batch = next(batches)
            waiting += time.monotonic() - before
            torch.manual_seed(loop.seed + step * accelerator.num_processes + accelerator.process_index)  # for dropout
            logs, played = _backward(stage, batch, division, networks, accelerator, loop.seed, step)
            # What accelerate does to clip and to step updates the scale after each optimizer; with two of them, as in
            # a GAN, the second would meet a scale that is not its gradients'.
            norms = {}
            for name in played:
                if scaler is not None:
                    scaler.unscale_(optimizers[name].optimizer)
                clip = players[name].optimizer.clip or math.inf
                norms[name] = float(nn.utils.clip_grad_norm_(networks[name].parameters(), clip))
            if all(map(math.isfinite, norms.values())):
                bad = 0
                for name in played:
                    rate = rate_at(players[name].optimizer, step, loop.steps)
                    for group in optimizers[name].param_groups:
                        group["lr"] = rate
                    if scaler is not None:
                        scaler.step(optimizers[name].optimizer)
                    else:
                        optimizers[name].step()
                    if name in averages:
                        averages[name].update()
            else:
                bad, skipped = bad + 1, skipped + 1
                # The scaler finds its scale by overflowing, and begins at 2 ** 16.
                if bad == BAD_STEPS_IN_A_ROW * (1 if scaler is None else 2):
                    raise UserError(
                        f"gradients were not finite {bad} steps in a row up to step {step} (samples "
                        f"{', '.join(batch.key[:4])}, ...); lower optimizer.rate or use loop.precision=fp32; "
                        f"the last good state is in {output / 'state'}"
                    )
            if scaler is not None:
                scaler.update()
            for name in played:
                optimizers[name].zero_grad()
            step += 1
            counted += 1
            for key, value in {**logs, **{f"gradient/{name}": norm for name, norm in norms.items()}}.items():
                sums[key].append(value)
            if report is not None:
                report.advance()

            if step % loop.log_every == 0 or step == loop.steps:
                spent = time.monotonic() - interval
                values = over_processes({key: sum(each) / len(each) for key, each in sums.items()}, accelerator)
                values["rate"] = rate_at(next(iter(players.values())).optimizer, step - 1, loop.steps)
                values["images"] = step * loop.global_batch
                values["images_per_s"] = counted * loop.global_batch / spent
                values["waiting"] = waiting / spent
                if skipped:
                    values["skipped"] = skipped
                log(values)
                sums.clear()
                counted, waiting, interval = 0, 0.0, time.monotonic()
            if step % loop.validate_every == 0 or (loop.sample_every and step % loop.sample_every == 0):
                look(step % loop.validate_every == 0, bool(loop.sample_every) and step % loop.sample_every == 0)
                interval = time.monotonic()
            stop = agree(asked, accelerator)
            over = bool(loop.max_minutes) and time.monotonic() - began > 60 * loop.max_minutes
            over = any_process(over, accelerator)
            if stop or over or step == loop.steps or step % loop.save_every == 0:
                save()
            if stop:
                if report is not None:
                    report.say(f"stopped at step {step} as asked; --resume auto goes on from there")
                    report.close()
                accelerator.end_training()
                if stop == signal.SIGINT:
                    raise KeyboardInterrupt
                return
            if over:
                break
    look(validate=step % loop.validate_every != 0, draw=True)
    if main:
        with _averaged(players, averages), torch.no_grad():
            stage.export(output, finished=True)
    if report is not None:
        report.say(f"finished at step {step} after {(time.monotonic() - began) / 60:.1f} minutes: {output}")
        report.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def split(batch: Any, size: int) -> Iterator[Any]:
    """Micro-batches of `size` samples of a dataclass of tensors and lists."""
    count = len(batch.key)
    for start in range(0, count, size):
        parts = {f.name: getattr(batch, f.name)[start : start + size] for f in dataclasses.fields(batch)}
        yield dataclasses.replace(batch, **parts)


def _backward(
    stage: Stage,
    batch: Any,
    division: Division,
    networks: Mapping[str, nn.Module],
    accelerator: Accelerator,
    seed: int,
    step: int,
) -> tuple[dict[str, float], list[str]]:
    """Accumulate the gradients of one global batch; mean logs over its micro-batches, and who played."""
    logs: dict[str, float] = defaultdict(float)
    played: list[str] = []
    for index, micro in enumerate(split(batch, division.micro)):
        last = index == division.accumulation - 1
        with ExitStack() as stack:
            for network in networks.values():  # gradients are exchanged once, after the last micro-batch
                stack.enter_context(nullcontext() if last else accelerator.no_sync(network))
            # With the epoch, for a sample may be twice in a batch that is larger than the data.
            names = [f"{key} {epoch}" for key, epoch in zip(micro.key, micro.epoch, strict=True)]
            first = accelerator.process_index * division.share + index * division.micro
            draws = Draws(seed, step, names, accelerator.device, first, division.processes * division.share)
            for name, loss, values in stage.losses(micro, draws, step, networks):
                accelerator.backward(loss / division.accumulation)
                if name not in played:
                    played.append(name)
                for key, value in values.items():
                    logs[key] += float(value.detach()) / division.accumulation
    return dict(logs), played


@contextmanager
def _averaged(players: Mapping[str, Player], averages: Mapping[str, EMA]) -> Iterator[None]:
    """Averaged weights in place, evaluation mode on; both undone at the end."""
    with ExitStack() as stack:
        for average in averages.values():
            stack.enter_context(average.applied())
        for player in players.values():
            player.module.eval()
        try:
            yield
        finally:
            for player in players.values():
                player.module.train()


@contextmanager
def _ending(batches: Iterator[Any]) -> Iterator[None]:
    """However the loop ends, its data readers end with it: they heed no signal, and the process would wait for them."""
    try:
        yield
    finally:
        if isinstance(batches, Generator):
            batches.close()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are noted instead of killing the run in the middle of a step."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_plan(stage: Stage, loop: LoopConfig, division: Division, accelerator: Accelerator, step: int) -> None:
    sizes = {name: sum(p.numel() for p in player.module.parameters()) for name, player in stage.players.items()}
    lines = [
        f"data        {stage.batches.describe()}",
        *stage.describe(),
        f"batch       {loop.global_batch} = {division.processes} processes x {division.accumulation} accumulation x "
        f"{division.micro} micro-batch",
        f"steps       {step} to {loop.steps}" + (f", at most {loop.max_minutes:g} minutes" if loop.max_minutes else ""),
        "parameters  " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        f"precision   {loop.precision} on {accelerator.device}, {torch.get_num_threads()} threads",
    ]
    print("\n".join(lines), flush=True)


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """{"a": {"b": 1}, "c": [2]} -> {"a.b": 1, "c": "[2]"}: what trackers take for a run's settings."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _json(everything: Any) -> str:
    import json

    return json.dumps(settings.to_dict(everything), indent=1) + "\n"
